"""The number of prompts that a study's looks are planned for, kept in its folder.

It is fixed before the first look, since moving it afterwards would be optional stopping.
"""

import json
from dataclasses import dataclass
from typing import Any

from sd35bench.disk import write_atomic
from sd35bench.errors import ConfigError, StoreError
from sd35bench.stats.decision import LEVEL
from sd35bench.stats.looks import level_at

FILE = "looks.json"


@dataclass(frozen=True, slots=True)
class Look:
    """One look at a study: at how many prompts, of how many planned ones, and at which level."""

    prompts: int
    planned: int | None
    level: float = LEVEL

    def document(self) -> dict[str, Any]:
        """What `evidence` says of it: nothing where no looks were planned."""
        if self.planned is None:
            return {}
        return {"look": {"prompts": self.prompts, "planned": self.planned, "level": self.level}}


def read_look(study: Any, prompts: int) -> Look:
    """Look at so many prompts of a study. Raises: StoreError."""
    planned = read_planned(study)
    return Look(prompts, planned, level_at(prompts, planned))


def read_planned(study: Any) -> int | None:
    """The planned number; ``None`` where one look was all that was planned. Raises: StoreError."""
    path = study.path / FILE
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text("utf-8"))["prompts"]
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise StoreError(f"{path}: damaged: {exc}; write it again with the number planned") from exc
    if not isinstance(found, int) or found < 1:
        raise StoreError(f"{path}: prompts={found!r}: must be a whole number from 1")
    return found


def plan_looks(study: Any, prompts: int) -> None:
    """Fix the number before the first look. Raises: ConfigError where another number is fixed."""
    if prompts < 2:
        raise ConfigError(f"--looks={prompts}: must be at least 2 prompts")
    known = read_planned(study)
    if known is not None and known != prompts:
        raise ConfigError(
            f"--looks={prompts}: the looks at study {study.name!r} are planned for {known} prompts;"
            " another number is another study"
        )
    write_atomic(study.path / FILE, json.dumps({"prompts": prompts}).encode())
