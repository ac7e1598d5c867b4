"""One profile's choice among compared candidates, and why the others were not chosen.

`stats.decision` names the setting: the cheapest one that is shown to be within the margin, else the
best-looking one (or the named default that the profile holds others against), which is then said to
be provisional. Here a profile's limits are applied first, and the decision is put into words.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sd35bench import words
from sd35bench.analysis.pairs import Comparison
from sd35bench.recommend.pareto import Limits, Speeds, amount, check_limits, contradiction
from sd35bench.recommend.profiles import Profile
from sd35bench.stats.decision import LEVEL, SAME_COST, Decision, Tested, decide
from sd35bench.stats.intervals import Interval
from sd35bench.stats.verdicts import images_between


@dataclass(slots=True, kw_only=True)
class Choice:
    """Indices into the comparison, and what was found out on the way.

    `reference` is what "as good" is held against: the best, or a named default, which may be
    outside of the limits. `rival` is the best of the others within the limits: what the choice has
    to stand against on other prompts. `differences` are paired differences from the reference of
    the candidates within the limits, `tests` those of the candidates that were tested. `definitive`
    says whether the answer is shown; else it is provisional. `expected_loss` is the mean shortfall
    from the best within the limits, `unshown` the setting within the limits that the choice is not
    shown to be as good as, with the difference from it. `more` says which question more images
    would decide, and how many; empty where none is open. `caveats` say that a limit is only just
    kept, and that another latency than p50 contradicts the choice.
    """

    chosen: int
    best: int
    reference: int
    rival: int | None
    limits: Limits
    margin: float
    distinguishable: bool
    definitive: bool
    expected_loss: float
    unshown: tuple[int, Interval] | None
    differences: dict[int, Interval]
    tests: dict[int, Tested]
    front: list[int]
    verdicts: dict[int, str] = field(default_factory=dict)
    reason: str = ""
    caveats: list[str] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)
    level: float = LEVEL

    def as_good(self, i: int) -> bool:
        """Whether a candidate within the limits is shown to be as good within the margin."""
        return i == self.reference or (i in self.tests and self.tests[i].shown)


def choose(
    comparison: Comparison,
    speed: Speeds,
    profile: Profile,
    named: int | None = None,
    level: float = LEVEL,
) -> Choice | str:
    """Choose for a profile; a text says why nothing can be chosen.

    `named` is the candidate that is the profile's reference, where that is a named default; `level`
    is that of this look (`stats.looks`).
    """
    limits = check_limits(comparison, speed, profile)
    if isinstance(limits, str):
        return limits
    feasible = [i for i in range(len(speed.values)) if i not in limits.broken]
    if not feasible:
        return _nothing_feasible(speed, limits)
    margin = profile.margin(comparison.metric)
    found = decide(
        comparison.quality,
        comparison.clusters,
        np.array(speed.values),
        margin,
        span=comparison.largest_loss,
        fastest=profile.objective == "fastest",
        reference=named,
        within=feasible,
        level=level,
    )
    choice = _choice(comparison, found, limits, margin, named, feasible)
    choice.level = level
    choice.more = _open_question(choice, found)
    choice.caveats = _caveats(choice, comparison, speed, profile)
    choice.reason = _reason(choice, comparison, speed, profile)
    choice.verdicts = {
        i: limits.broken[i] if i in limits.broken else _verdict(choice, speed, i)
        for i in range(len(speed.values))
        if i != choice.chosen
    }
    return choice


def _choice(
    comparison: Comparison,
    found: Decision,
    limits: Limits,
    margin: float,
    named: int | None,
    feasible: list[int],
) -> Choice:
    means = comparison.quality.mean(axis=1)
    reference = found.best if named is None else named
    from_best = comparison.differences_from(found.best)
    differences = comparison.differences_from(reference)
    others = [i for i in feasible if i != found.chosen]
    return Choice(
        chosen=found.chosen,
        best=found.best,
        reference=reference,
        rival=max(others, key=lambda i: means[i], default=None),
        limits=limits,
        margin=margin,
        distinguishable=len(feasible) == 1 or any(_high(from_best[i]) < 0.0 for i in feasible),
        definitive=found.definitive,
        expected_loss=found.expected_loss,
        unshown=None
        if found.against is None
        else (found.against, comparison.differences(found.chosen)[found.against]),
        differences={i: differences[i] for i in feasible},
        tests=found.tests,
        front=found.front,
    )


def _open_question(choice: Choice, found: Decision) -> dict[str, Any]:
    """What is open first: whether the choice is as good as it has to be, or the next cheaper one.

    Empty where the choice is shown and every cheaper setting is shown to be beyond the margin.
    """
    if choice.unshown is not None:
        difference = choice.unshown[1]
        return _needed(choice.chosen, choice.unshown[0], difference, choice)
    start = found.walk.index(choice.chosen) + 1 if choice.chosen in found.walk else 0
    for i in found.walk[start:]:
        test = found.tests[i]
        if not test.shown and not test.beyond:
            return _needed(i, test.rival, test.difference, choice)
    return {}


def _needed(i: int, rival: int, difference: Interval, choice: Choice) -> dict[str, Any]:
    last = LEVEL if choice.level == LEVEL else LEVEL / 2  # of planned looks, that of the last
    numbers = images_between(difference, choice.margin, last)
    return {
        "candidate": i,
        "against": rival,
        **({"prompts": None, "images": None} if numbers is None else numbers),
    }


def _verdict(choice: Choice, speed: Speeds, i: int) -> str:
    what = "the best" if choice.reference == choice.best else "the named default"
    test = choice.tests.get(i)
    if i not in choice.front:
        return "slower or as slow, with no better quality than another"
    if speed.values[i] > speed.values[choice.chosen]:
        if i == choice.best:
            return "the best mean quality, but slower"
        return "as good within the margin, but slower" if choice.as_good(i) else "slower"
    if test is not None and test.beyond:
        return f"faster; worse than {what} by more than the margin"
    return f"faster; not shown to be within the margin of {what}"


def _reason(choice: Choice, comparison: Comparison, speed: Speeds, profile: Profile) -> str:
    what = "the best" if choice.reference == choice.best else profile.reference
    if len(choice.differences) == 1:
        text = "the only setting within the limits"
    else:
        text = _named_because(choice, comparison, speed, profile, what)
        text += _provisional(choice, what)
    return "; ".join([text, *choice.caveats])


def _caveats(choice: Choice, comparison: Comparison, speed: Speeds, profile: Profile) -> list[str]:
    """What the reason and the headline have to say of the latency, if anything."""
    chosen = choice.chosen
    found = [choice.limits.close[chosen]] if chosen in choice.limits.close else []
    if speed.basis == "latency_s" and profile.objective == "fastest":
        slowest = speed.values[chosen] * (1.0 + SAME_COST)
        slower = [i for i in choice.differences if speed.values[i] > slowest]
        text = contradiction(comparison, chosen, slower)
        found += [] if text is None else [text]
    return found


def _named_because(
    choice: Choice, comparison: Comparison, speed: Speeds, profile: Profile, what: str
) -> str:
    """Why this setting, whether shown or not."""
    n = comparison.quality.shape[1]
    within = " within the limits" if choice.limits.broken else ""
    if profile.objective == "best-quality":
        return f"the best mean quality{within} (n={n} pairs)"
    if choice.chosen in (choice.best, choice.reference):
        name = (
            f"{profile.reference}'s setting"
            if choice.chosen != choice.best
            else "the best mean quality"
        )
        return (
            f"{name}{within}; no faster setting is shown to be within {choice.margin:g} of it"
            f" (n={n} pairs)"
        )
    text = (
        f"the fastest whose quality is shown to be within {choice.margin:g} of {what}"
        f" (one-sided {words.digits(100 * choice.level, 2)} %, tested from slow to fast, n={n}"
        " pairs)"
    )
    ratio = comparison.log_speed_ratio(choice.chosen, choice.reference)
    if speed.basis == "latency_s" and (ratio is None or ratio.high is None or ratio.high >= 0.0):
        text += "; that it is faster is not shown by the timed images"
    return text


def _provisional(choice: Choice, what: str) -> str:
    """What keeps the answer from being definitive, or nothing."""
    if choice.definitive:
        return ""
    if choice.unshown is not None:
        return "; provisional: another setting may be better by more than the margin"
    if choice.margin > 0.0 and choice.expected_loss > choice.margin:
        return (
            "; provisional: the expected loss against the best is"
            f" {words.digits(choice.expected_loss, 2)}, the margin {choice.margin:g}"
        )
    return f"; provisional: a faster setting may be within {choice.margin:g} of {what}"


def _nothing_feasible(speed: Speeds, limits: Limits) -> str:
    fast = limits.latency is not None and min(speed.values) > limits.latency
    if fast and all(t.startswith("too slow") and ";" not in t for t in limits.broken.values()):
        return (
            f"no setting is within {amount(speed, limits.latency)}; the fastest takes"
            f" {amount(speed, min(speed.values))}"
        )
    fastest = min(limits.broken, key=lambda i: speed.values[i])
    return f"no setting is within the limits; the fastest is {limits.broken[fastest]}"


def _high(interval: Interval) -> float:
    return float("inf") if interval.high is None else interval.high
