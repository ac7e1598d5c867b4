"""Generated replies, damaged in their JSON or their bytes: a typed error in time, or read."""

from collections.abc import Sequence
from pathlib import Path

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.reliability.experiment import Experiment, Figure
from tests.remote.test_faults import ASKED, MALFORMED, Loop, meet

__all__ = ["MALFORMED_REPLIES"]

REPLIES = 5000
DISTINCT = "distinct replies"
SPARE = 1.6
"""Hypothesis draws some replies twice: it is asked for more than are needed."""


def run(scale: float, folder: Path) -> tuple[Sequence[Figure], Sequence[str]]:
    """Let the client meet them all."""
    wanted = round(REPLIES * scale)
    loop = Loop()

    # Nothing is shrunk: that would meet one reply a thousand times, and count it.
    @settings(MALFORMED, max_examples=round(wanted * SPARE), phases=[Phase.generate])
    @given(asked=ASKED, data=st.data())
    def all_of_them(asked, data):
        meet(loop, asked, data)

    seen = []
    try:
        all_of_them()
    except Exception as exc:  # the finding itself, whatever it is
        seen.append(f"{type(exc).__name__}: {exc}")
    finally:
        loop.close()
    return _figures(loop, wanted, len(seen)), seen


def _figures(loop: Loop, wanted: int, failed: int) -> list[Figure]:
    distinct = len(loop.replies)
    outcomes = [
        Figure(name=f"came to: {outcome}", value=count)
        for outcome, count in sorted(loop.came_to.items())
    ]
    return [
        Figure(name="replies met", value=sum(loop.came_to.values())),
        Figure(name=DISTINCT, value=distinct, least=wanted),
        Figure(
            name="untyped exceptions, late ends, contracts broken",
            value=failed,
            most=0,
            out_of=DISTINCT,
        ),
        Figure(name="deadline (s)", value=loop.DEADLINE_S),
        # Five deadlines: the machine may be busy with other experiments.
        Figure(name="slowest (s)", value=round(loop.slowest_s, 3), most=5 * loop.DEADLINE_S),
        *outcomes,
    ]


MALFORMED_REPLIES = Experiment(
    name="malformed-replies",
    title="Malformed replies",
    did=(
        "Hypothesis takes valid replies of each route (create, poll, list, presign, image) of both"
        " providers and replaces, removes, wraps or inflates a value of the JSON, or cuts, flips,"
        " inserts, repeats or drops bytes of head and body; one in fifty is followed by silence. A"
        " server sends them from a socket; the client's transport, readers and downloads meet them."
    ),
    fails_if=(
        "anything but a RemoteError (or one of its kinds) comes out, an answer that was read breaks"
        " the reader's contract, it takes longer than the deadline allows, or a request that had"
        " reached the server is said not to have been sent."
    ),
    shows_not=(
        "That each reply was understood as its sender meant it: a flipped bit inside a string is"
        " a valid reply."
    ),
    run=run,
)
