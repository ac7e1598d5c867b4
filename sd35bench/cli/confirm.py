"""Runs the commands that a confirmation prints: held-out images of a few settings."""

import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sd35bench.errors import ConfigError, StudyLocked

__all__ = ["run_confirming"]

_POLL_S = 0.5


def run_confirming(
    runs: Sequence[dict[str, Any]], extra: Path | None = None, patient: bool = False
) -> int:
    """Run the very commands that are printed, one after the other; the first bad code ends it.

    `extra` is a folder of the user's own YAML files; `patient`: wait where another process makes
    the same images, in place of refusing.

    Raises: ConfigError where a hosted service would be asked, which costs money; StudyLocked.
    """
    from sd35bench.cli.run import run

    hosted = next((r for r in runs if r["hosted"]), None)
    if hosted is not None:
        raise ConfigError(
            f"--run does not spend money on a hosted service; run it yourself: {hosted['command']}"
        )
    own = [] if extra is None else [f"--config-dir={extra}"]
    left = [shlex.split(each["command"])[2:] + own for each in runs]
    while left:
        try:
            answer = run(left[0], True)
        except StudyLocked:
            if not patient:
                raise
            time.sleep(_POLL_S)
            continue
        if answer.exit_code != 0:
            return answer.exit_code
        left.pop(0)
    return 0
