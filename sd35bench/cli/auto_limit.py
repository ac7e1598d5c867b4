"""`run … prompts.limit=auto margin=M`: as many prompts as the study's own pilot says it takes.

The first 16 prompts are the pilot; what a study has of them, or beyond, is not made again. Their
differences plan the number (`recommend.sample_size`) for the seeds that the command asks for, and
the same command goes on to it. Both parts ask for agreement to their own bill.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sd35bench.cli.output import Answer, console
from sd35bench.cli.parser import Given, name_of, number
from sd35bench.cli.study import score_missing
from sd35bench.errors import ConfigError
from sd35bench.recommend.profiles import Profile
from sd35bench.recommend.sample_size import Asked, plan_document
from sd35bench.study.store import Study
from sd35bench.types import Load

PILOT = 16
"""Prompts of a pilot: planned from 8, a fifth of the studies would be twice as large as needed."""
_LIMIT, _AUTO = "prompts.limit", "auto"
_OWN = ("margin", "power")


@dataclass(frozen=True, slots=True)
class Auto:
    """What was asked for, and the other settings of the command line."""

    asked: Asked
    settings: list[str]

    def limited(self, given: Given, prompts: int) -> Given:
        """The same command with a number of prompts."""
        return replace(given, settings=[*self.settings, f"{_LIMIT}={prompts}"])


@dataclass(frozen=True, slots=True)
class Planned:
    """What a command would run: its settings, how many prompts there are, its loads, and where."""

    settings: int
    prompts: int
    loads: Sequence[Load]
    study: str
    results_dir: Any


def read_auto(settings: Sequence[str]) -> Auto | None:
    """Read ``prompts.limit=auto margin=M power=P``; ``None`` where the limit is a number.

    Raises: ConfigError.
    """
    limits = [text for text in settings if name_of(text) == _LIMIT]
    own = {name: text.partition("=")[2] for text in settings if (name := name_of(text)) in _OWN}
    if limits[-1:] != [f"{_LIMIT}={_AUTO}"]:
        for name in own:
            raise ConfigError(f"{name}={own[name]}: give it with {_LIMIT}={_AUTO}")
        return None
    if "margin" not in own:
        raise ConfigError(
            f"{_LIMIT}={_AUTO}: give margin=M too, what may be lost of quality, such as margin=0.05"
        )
    asked = Asked(**{name: number(name, text) for name, text in own.items()}, keep_seeds=True)
    left = [text for text in settings if text not in limits and name_of(text) not in _OWN]
    return Auto(asked, left)


def run_planned(
    given: Given, auto: Auto, make: Callable[[Given], Answer], look: Callable[[Given], Planned]
) -> Answer:
    """Make the pilot, plan from the study, and go on to the planned number.

    `make` runs a command, `look` says what it would run.

    Raises: ConfigError where nothing can be planned, or the set has too few prompts.
    """
    first = auto.limited(given, PILOT)
    planned = look(first)
    _check(planned)
    if given.has("--dry-run") and not _has_pilot(planned):
        said = "the pilot comes first; how many prompts follow is planned from it"
        console(given.as_json).print(f"note: {said}", markup=False)
        return make(first)
    if not given.has("--dry-run"):
        answer = make(first)
        if answer.exit_code != 0:
            return answer
    study = Study.open(planned.results_dir, planned.study)
    score_missing(study)
    prompts, said = _plan(study, auto.asked)
    console(given.as_json).say(f"{_LIMIT}={_AUTO}: {said}")
    last = auto.limited(given, prompts)
    there = look(last).prompts
    if there < prompts:
        raise ConfigError(
            f"{_LIMIT}={_AUTO}: {prompts} prompts are needed and the set has {there}; take a wider"
            " margin or a larger set"
        )
    answer = make(last)
    plan = {"prompts": prompts, "margin": auto.asked.margin, "power": auto.asked.power}
    return replace(answer, document={**answer.document, "planned_prompts": plan})


def _check(planned: Planned) -> None:
    """Refuse what has nothing to tell apart. Raises: ConfigError."""
    if planned.settings < 2:
        raise ConfigError(
            f"{_LIMIT}={_AUTO}: one setting has nothing to be told apart from; sweep two or more"
            " with -m, or give a number"
        )
    if any(load.model.weights == "random" for load in planned.loads):
        raise ConfigError(
            f"{_LIMIT}={_AUTO}: images of random weights have no quality to plan from; give a"
            " number"
        )


def _has_pilot(planned: Planned) -> bool:
    if not (planned.results_dir / planned.study / "study.json").is_file():
        return False
    records = Study.open(planned.results_dir, planned.study).records()
    return len({r.trial.prompt.id for r in records}) >= PILOT


def _plan(study: Study, asked: Asked) -> tuple[int, str]:
    """The number of prompts, and why, in words. Raises: ConfigError."""
    document = plan_document(study, {"auto": Profile(name="auto")}, asked)
    entries = [e for e in document["profiles"]["auto"].values() if e is not None]
    pilot = min(e["pilot"]["prompts"] for e in entries)
    for entry in entries:
        size = entry["set_size"]
        short = size is not None and entry["prompts"] is not None and entry["prompts"] > size
        if short or (entry["prompts"] is None and not entry["decided"]):
            raise ConfigError(f"{_LIMIT}={_AUTO}: {entry['why']}")
    known = [e["prompts"] for e in entries if e["prompts"] is not None]
    if not known:
        return pilot, f"the {pilot} prompts of the pilot decide already"
    prompts = max(*known, pilot)
    return prompts, (
        f"{prompts} prompts decide a margin of {asked.margin:g} with a probability of"
        f" {100 * asked.power:g} % where settings are equal, by a pilot of {pilot}"
    )
