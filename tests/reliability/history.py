"""What went wrong when these experiments were first run, and what became of it. No figures here."""

__all__ = ["FOUND"]

FOUND = (
    "A run of the load was broken by two requests that got no answer: the server hung up on idle"
    " connections after uvicorn's default, which is as long as httpx keeps them, and two requests"
    " left in that very moment. The server now keeps idle connections longer than clients do"
    " (`KEEP_ALIVE_S`).",
    "The first run of the limits was broken: the bound below (limits that are not reached show"
    " nothing) stopped it. Its clients gave up on predictions that took as long as their"
    " `remote.timeout_s`, and a prediction that was given up keeps its place in flight until it"
    " must have ended, so nothing more was created. That is as designed (the service may still be"
    " at work on it); the experiment now waits longer than a prediction takes. Whoever sets"
    " `remote.timeout_s` below the service's latency will see the same.",
    "An intent that was never sent keeps its place in flight as well, as the client cannot know."
    " Studies are kept small enough here that this never stops one.",
    "Two faults of the harness were found by planting faults: an image that was gone ended the"
    " count instead of being counted, and Schemathesis' groups of failures passed the net that was"
    " to catch them. Both are tests now.",
    "A first run of the load for one minute found the resident set still growing, by as much in"
    " the second half as in the first. With the file of predictions alone it grows until SQLite's"
    " page cache is full and then not at all; what Python itself holds (tracemalloc) grew by a"
    " small part of the rest. The load now lasts three minutes, and what grows in the second half"
    " is bounded by itself.",
    "The misbehaving services found that a prediction that never ends, or that the service does not"
    " know any more, was no purchase to what stops purchases: five in a row were bought. What may"
    " have been made now counts like what was.",
    "They also found that a download may take a minute whatever `remote.timeout_s` says, and that a"
    " wait for the rate limit had no end. Both are bounded now.",
    "Damaged files: a `results_dir=` that is a file ended in a traceback of Hydra's, which makes"
    " its folders before it calls us; a journal that was cut left 3 images, of which a metric"
    " looked for 3 neighbours each, in one of numpy's. Both are sentences now.",
    "A first run of the killed verbs was broken by the harness: the process beside was told to end"
    " by SIGTERM, which a verb takes for Ctrl-C and ends with exit code 3, as it should.",
    "A later run was refused by `tune`, as the code under test was edited while it ran: a study of"
    " two environments is not searched. It was run again.",
    "Runs are not all of one day: the table above says which are older, and on which commit. The"
    " older ones were taken over from the page of their day, as they stood there; on the machine of"
    " the newer ones, shared with other work, the OpenAPI document's did not end in seven minutes.",
    "In the other experiments client and server passed each bound in the first run at full size;"
    " what they look for was found before, by the tests of the parts (`tests/remote`,"
    " `tests/server`).",
)
