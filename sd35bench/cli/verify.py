"""`sd35bench verify`: whether every file that a study's results stand on is there and whole."""

import os
from typing import Any

from sd35bench.cli.output import Answer, console
from sd35bench.cli.parser import RESULTS_DIR, Command, Given
from sd35bench.errors import ConfigError

DAMAGED = 1


def verify(given: Given) -> Answer:
    """Check a study's files; exit code 1 where something is damaged or missing.

    Raises: ConfigError where there is no such study.
    """
    from sd35bench.verify import document, verify_study

    path = given.results_dir / given.words[0]
    if not os.path.isdir(path):
        raise ConfigError(f"study {given.words[0]!r} is not in {given.results_dir}")
    found = document(path.name, verify_study(path), path)
    _print(console(given.as_json), found)
    return Answer(document=found, exit_code=0 if found["whole"] else DAMAGED)


def _print(out: Any, found: dict[str, Any]) -> None:
    for problem in found["problems"]:
        text = f"{problem['what']} → {problem['remedy']}"
        out.print(text, markup=False, soft_wrap=True, highlight=False)
    checked = ", ".join(f"{count} {kind}" for kind, count in found["checked"].items())
    verdict = "whole" if found["whole"] else f"{len(found['problems'])} problems"
    out.print(f"study {found['study']}: {verdict}; looked at: {checked}", markup=False)


COMMANDS = {
    "verify": Command(
        call=verify,
        words=("STUDY",),
        about="""Reads every file that a result stands on, once, and writes nothing: the journal,
images by their digests, features, references, scores, and what was paid for. Exit code 0 where all
is whole, 1 where something is not.""",
        examples="""
sd35bench verify demo           each damaged or missing file, and what puts it right
sd35bench verify demo --json | jq -r '.problems[].file'
""",
        flags=(RESULTS_DIR,),
    )
}
