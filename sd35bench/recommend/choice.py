"""One profile's choice among compared candidates, and why the others were not chosen.

Within the profile's limits, *best* is the highest mean quality. A candidate is *as good* if it is
shown (Holm over the candidates) to be within the margin of every other one, or of the named
default that the profile holds it against. The objective "fastest" takes the fastest of those, and
the reference itself is always allowed; where latencies cannot be told apart (2 % or the interval
of the paired ratio), the better one. The objective "best-quality" takes the best.

If no candidate is distinguishably worse than the best, the data do not decide: the fastest is
chosen, which is said, with the number of images that would decide. That one looks at uncorrected
intervals: any sign of a difference keeps the speed from deciding alone.
"""

from dataclasses import dataclass, field
from math import exp
from typing import Any

from sd35bench.analysis.pairs import Comparison
from sd35bench.recommend.pareto import SAME_COST, Limits, Speeds, amount, check_limits
from sd35bench.recommend.profiles import Profile
from sd35bench.stats.intervals import Interval
from sd35bench.stats.verdicts import TAIL, Tested, against_all, images_between


@dataclass(slots=True, kw_only=True)
class Choice:
    """Indices into the comparison, and what was found out on the way.

    `reference` is what "as good" is held against: the best, or a named default, which may be
    outside of the limits. `rival` is the best of the others within the limits: what the choice has
    to stand against on other prompts. `differences` are paired differences from the reference,
    `tests` those of non-inferiority, both of the candidates within the limits. `more` says which
    question more images would decide, and how many; empty where none is open.
    """

    chosen: int
    best: int
    reference: int
    rival: int | None
    limits: Limits
    margin: float
    distinguishable: bool
    differences: dict[int, Interval]
    tests: dict[int, Tested]
    verdicts: dict[int, str] = field(default_factory=dict)
    reason: str = ""
    more: dict[str, Any] = field(default_factory=dict)

    def as_good(self, i: int) -> bool:
        """Whether a candidate within the limits is shown to be as good within the margin."""
        return i == self.reference or (i in self.tests and self.tests[i].shown)


def choose(
    comparison: Comparison,
    speed: Speeds,
    profile: Profile,
    named: int | None = None,
    *,
    worse_elsewhere: bool = False,
) -> Choice | str:
    """Choose for a profile; a text says why nothing can be chosen.

    `named` is the candidate that is the profile's reference, where that is a named default.
    `worse_elsewhere`: settings that are not compared here any more were found to be worse, so that
    the data do tell settings apart, though perhaps not these.
    """
    limits = check_limits(comparison, speed, profile)
    if isinstance(limits, str):
        return limits
    feasible = [i for i in range(len(speed.values)) if i not in limits.broken]
    if not feasible:
        return _nothing_feasible(speed, limits)
    margin = profile.margin(comparison.metric)
    means = comparison.quality.mean(axis=1)
    best = max(feasible, key=lambda i: (means[i], -speed.values[i]))
    from_best = {i: comparison.differences(i) for i in feasible}
    worse = [i for i in feasible if i != best and _high(from_best[i][best]) < 0.0]
    decided = bool(worse) or worse_elsewhere or len(feasible) == 1
    reference = best if named is None else named
    rivals = feasible if named is None else [named]
    pairwise = {i: {j: from_best[i][j] for j in rivals if j != i} for i in feasible}
    choice = Choice(
        chosen=best,
        best=best,
        reference=reference,
        rival=None,
        limits=limits,
        margin=margin,
        distinguishable=decided,
        differences={i: from_best[i][reference] for i in feasible},
        tests=against_all(feasible, pairwise, margin),
    )
    allowed = _allowed(choice, profile, feasible)
    choice.chosen = _fastest(comparison, speed, allowed)
    others = [i for i in feasible if i != choice.chosen]
    choice.rival = max(others, key=lambda i: means[i], default=None)
    choice.more = _open_question(choice, speed, from_best)
    choice.reason = _reason(choice, comparison, profile)
    choice.verdicts = {
        i: limits.broken[i] if i in limits.broken else _verdict(choice, speed, i)
        for i in range(len(speed.values))
        if i != choice.chosen
    }
    return choice


def _allowed(choice: Choice, profile: Profile, feasible: list[int]) -> list[int]:
    """The candidates that the objective leaves to speed."""
    held_against_best = choice.reference == choice.best
    if not choice.distinguishable and (held_against_best or choice.reference in feasible):
        return feasible
    if profile.objective == "best-quality":
        return [choice.best]
    shown = [i for i in feasible if choice.as_good(i)]
    return shown if shown else [choice.best]


def _fastest(comparison: Comparison, speed: Speeds, allowed: list[int]) -> int:
    """The fastest of those allowed; of those no slower, the best."""
    first = min(allowed, key=lambda i: speed.values[i])
    tied = [i for i in allowed if i == first or _same_speed(comparison, speed, i, first)]
    means = comparison.quality.mean(axis=1)
    return max(tied, key=lambda i: (means[i], -speed.values[i]))


def _same_speed(comparison: Comparison, speed: Speeds, i: int, first: int) -> bool:
    if speed.values[i] <= speed.values[first] * (1.0 + SAME_COST):
        return True
    if speed.basis != "latency_s":
        return False
    ratio = comparison.log_speed_ratio(i, first)
    if ratio is None or ratio.low is None:
        return False
    return ratio.low <= 0.0 or exp(ratio.value) <= 1.0 + SAME_COST


def _open_question(
    choice: Choice, speed: Speeds, pairwise: dict[int, list[Interval]]
) -> dict[str, Any]:
    """The question that fewest more images would decide, of those that matter to the choice.

    Either a faster candidate is neither shown to be within the margin nor to be beyond it, or the
    chosen one itself is not shown to be. Holm's next step asks for its share of the level.
    """
    left = sum(not t.shown for t in choice.tests.values())
    tail = TAIL / max(1, left)
    asked: list[tuple[int, int, Interval]] = []
    for i, test in choice.tests.items():
        faster = speed.values[i] < speed.values[choice.chosen]
        if test.shown or not (faster or i == choice.chosen):
            continue
        if _high(pairwise[i][choice.reference]) > -choice.margin:
            asked.append((i, test.rival, test.difference))
    found = []
    for i, rival, difference in asked:
        needed = images_between(difference, choice.margin, tail)
        if needed is not None:
            found.append({"candidate": i, "against": rival, **needed})
    if found:
        return min(found, key=lambda f: f["prompts"])
    if asked:
        return {"candidate": asked[0][0], "against": asked[0][1], "prompts": None, "images": None}
    return {}


def _verdict(choice: Choice, speed: Speeds, i: int) -> str:
    difference = choice.differences[i]
    what = "the best" if choice.reference == choice.best else "the named default"
    if choice.distinguishable and not choice.as_good(i):
        if _high(difference) < -choice.margin:
            return f"worse than {what} by more than the margin"
        if _high(difference) < 0.0:
            return f"worse than {what}; not shown to be within the margin"
        if i != choice.best:
            return f"not shown to be within the margin of {what}"
    if speed.values[i] > speed.values[choice.chosen] * (1.0 + SAME_COST):
        if i == choice.best:
            return "the best mean quality, but slower"
        return "as good within the margin, but slower" if choice.as_good(i) else "slower"
    if speed.values[i] < speed.values[choice.chosen] * (1.0 - SAME_COST):
        return "faster, with lower mean quality"
    return "as fast, with lower mean quality"


def _reason(choice: Choice, comparison: Comparison, profile: Profile) -> str:
    n, feasible = comparison.quality.shape[1], len(choice.differences)
    if not choice.distinguishable:
        return (
            f"not distinguishable with n={n} pairs: none of the {feasible} settings is shown to be"
            " worse than the best; chosen because fastest"
        )
    if feasible == 1:
        return "the only setting within the limits"
    what = "the best" if choice.reference == choice.best else profile.reference
    if profile.objective == "best-quality":
        alike = sum(_high(d) >= 0.0 for d in choice.differences.values()) - 1
        told = f"; {alike} others cannot be told apart from it with n={n} pairs" if alike else ""
        return f"the best quality within the limits{told}"
    if choice.chosen == choice.reference:
        within = " within the limits" if choice.limits.broken and what == "the best" else ""
        return f"{_first(what)} quality{within}; no faster setting is shown to be within the margin"
    if not choice.as_good(choice.chosen):
        return f"the best within the limits; none is shown to be within the margin of {what}"
    return (
        f"the fastest whose quality is shown to be within {choice.margin:g} of {what}"
        f" (Holm over {len(choice.tests)} candidates, one-sided 2.5 %, n={n} pairs)"
    )


def _first(what: str) -> str:
    return "the best" if what == "the best" else f"{what}'s"


def _nothing_feasible(speed: Speeds, limits: Limits) -> str:
    if all(text.startswith("too slow") and ";" not in text for text in limits.broken.values()):
        return (
            f"no setting is within {amount(speed, limits.latency)}; the fastest takes"
            f" {amount(speed, min(speed.values))}"
        )
    fastest = min(limits.broken, key=lambda i: speed.values[i])
    return f"no setting is within the limits; the fastest is {limits.broken[fastest]}"


def _high(interval: Interval) -> float:
    return float("inf") if interval.high is None else interval.high
