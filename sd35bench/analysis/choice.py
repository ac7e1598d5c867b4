"""One profile's choice among compared candidates, and why the others were not chosen.

Within the profile's latency limit, *best* is the highest mean quality. A candidate is *as good*
if the lower end of the 95 % interval of its paired difference from the best lies above minus the
margin; the best is always as good as itself. The fastest of those is chosen; where their latencies
cannot be told apart (2 % or the interval of the paired ratio), the better one. If no candidate is
distinguishably worse than the best, the data do not decide and the fastest is chosen, which is
said. The best is the best of several noisy means, so differences from it are a little too
unfavourable to the others: that errs on the side of quality.
"""

from dataclasses import dataclass, replace
from math import exp

from sd35bench.analysis.intervals import Interval
from sd35bench.analysis.pairs import Comparison
from sd35bench.analysis.profiles import Profile
from sd35bench.analysis.summary import latency_summary

__all__ = ["Choice", "Speeds", "choose", "speeds"]

_SAME_SPEED = 0.02


@dataclass(frozen=True, slots=True)
class Speeds:
    """Seconds (p50) per candidate, or denoiser evaluations where not all were timed.

    `basis` says which: "latency_s" or "evaluations".
    """

    basis: str
    values: list[float]


@dataclass(frozen=True, slots=True)
class Choice:
    """Indices into the comparison, and what was found out on the way.

    `verdicts` has a reason per candidate, `differences` the paired difference from `best` for
    those within the limit.
    """

    chosen: int
    best: int
    limit: float | None
    margin: float
    distinguishable: bool
    differences: dict[int, Interval]
    verdicts: dict[int, str]
    reason: str


def speeds(comparison: Comparison) -> Speeds:
    """How fast each candidate is."""
    p50 = [latency_summary(c.row.timed)["p50"] for c in comparison.candidates]
    if all(value is not None for value in p50):
        return Speeds("latency_s", p50)
    return Speeds("evaluations", [c.work for c in comparison.candidates])


def choose(comparison: Comparison, speed: Speeds, profile: Profile) -> Choice | str:
    """Choose for a profile; a text says why nothing can be chosen."""
    limit = _limit(speed, profile)
    if isinstance(limit, str):
        return limit
    feasible = [i for i, v in enumerate(speed.values) if limit is None or v <= limit]
    if not feasible:
        return f"no setting is within {_amount(speed, limit)}; the fastest takes" + (
            f" {_amount(speed, min(speed.values))}"
        )
    means = comparison.quality.mean(axis=1)
    best = max(feasible, key=lambda i: (means[i], -speed.values[i]))
    differences = {i: comparison.difference(i, best) for i in feasible}
    margin = profile.margin(comparison.metric)
    worse = [i for i in feasible if i != best and _high(differences[i]) < 0.0]
    as_good = [i for i in feasible if i == best or _low(differences[i]) > -margin]
    decided = bool(worse) or len(feasible) == 1
    chosen = _fastest(comparison, speed, as_good if decided else feasible)
    draft = Choice(chosen, best, limit, margin, decided, differences, {}, "")
    verdicts = {
        i: _verdict(draft, speed, i, as_good) for i in range(len(speed.values)) if i != chosen
    }
    n = comparison.quality.shape[1]
    return replace(draft, verdicts=verdicts, reason=_reason(draft, len(feasible), n))


def _limit(speed: Speeds, profile: Profile) -> float | str | None:
    """The profile's limit in the units of `speed`; the stricter one if there are two."""
    limits = []
    if profile.latency_limit_frac is not None:
        limits.append(profile.latency_limit_frac * max(speed.values))
    if profile.latency_limit_s is not None:
        if speed.basis != "latency_s":
            return (
                f"the profile limits latency to {profile.latency_limit_s:g} s and not every"
                " setting was timed; run with batch_size=1 or timed_limit=N"
            )
        limits.append(profile.latency_limit_s)
    return min(limits) if limits else None


def _fastest(comparison: Comparison, speed: Speeds, allowed: list[int]) -> int:
    """The fastest of those allowed; of those no slower, the best."""
    first = min(allowed, key=lambda i: speed.values[i])
    tied = [i for i in allowed if i == first or _same_speed(comparison, speed, i, first)]
    means = comparison.quality.mean(axis=1)
    return max(tied, key=lambda i: (means[i], -speed.values[i]))


def _same_speed(comparison: Comparison, speed: Speeds, i: int, first: int) -> bool:
    if speed.values[i] <= speed.values[first] * (1.0 + _SAME_SPEED):
        return True
    if speed.basis != "latency_s":
        return False
    ratio = comparison.log_speed_ratio(i, first)
    if ratio is None or ratio.low is None:
        return False
    return ratio.low <= 0.0 or exp(ratio.value) <= 1.0 + _SAME_SPEED


def _verdict(choice: Choice, speed: Speeds, i: int, as_good: list[int]) -> str:
    if i not in choice.differences:
        return f"too slow: {_amount(speed, speed.values[i])}, limit {_amount(speed, choice.limit)}"
    difference = choice.differences[i]
    if choice.distinguishable and i not in as_good:
        if _high(difference) < -choice.margin:
            return "worse than the best by more than the margin"
        if _high(difference) < 0.0:
            return "worse than the best; not shown to be within the margin"
        return "not shown to be within the margin of the best"
    if speed.values[i] > speed.values[choice.chosen] * (1.0 + _SAME_SPEED):
        if i == choice.best:
            return "the best mean quality, but slower"
        return "as good within the margin, but slower" if i in as_good else "slower"
    return "as fast, with lower mean quality"


def _reason(choice: Choice, feasible: int, n: int) -> str:
    if not choice.distinguishable:
        return (
            f"not distinguishable with n={n} pairs: none of the {feasible} settings is shown to be"
            " worse than the best; chosen because fastest"
        )
    if feasible == 1:
        return "the only setting within the limit"
    if choice.chosen == choice.best:
        return "the best quality; no faster setting is shown to be within the margin"
    return (
        f"the fastest whose quality is shown to be within {choice.margin:g} of the best"
        f" (95 % interval, n={n} pairs)"
    )


def _amount(speed: Speeds, value: float | None) -> str:
    if value is None:
        return "no limit"
    return f"{value:.3g} s" if speed.basis == "latency_s" else f"{value:.3g} evaluations"


def _low(interval: Interval) -> float:
    return float("-inf") if interval.low is None else interval.low


def _high(interval: Interval) -> float:
    return float("inf") if interval.high is None else interval.high
