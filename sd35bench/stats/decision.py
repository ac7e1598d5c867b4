"""Which of several settings to name, from paired quality and cost.

The burden of proof lies on the cheaper setting. Settings that another one beats in both quality and
cost, as seen, are never named, and adding one never changes the name. What is left is the *front*:
more cost buys more quality there. Its most expensive setting looks best.

*Fastest* walks the front from expensive to cheap and tests each setting: "worse than some other
setting of the front by the margin or more" (the largest of the p-values: Berger 1982). The order is
fixed by cost, so the walk needs no correction: it stops at the first setting that is not shown, and
one of two settings beyond the margin is named with probability `LEVEL` (fixed-sequence testing:
Maurer, Hothorn and Lehmacher 1995; Westfall and Krishen 2001). With more, the front is found on the
same data, so the best-looking of several is tested first: where three settings all lose exactly the
margin, one of them is named definitively in 5 to 12 % (docs/validity.md, tables planned and looks).
Where nothing cheaper is shown, the best-looking setting (or the named reference) is the answer.

An answer is *definitive* only where it is shown against every other setting, on the front or not,
each by a test of its own, and its expected loss is within the margin. The best-looking one, named
because nothing cheaper is shown, is definitive only if each cheaper setting is shown to be beyond
the margin. Every other answer is provisional. So a slower and worse-looking setting can only make
an answer provisional, and only where it cannot itself be told from the choice (docs/adr/0013).

Error rates of this rule and of the one before it, from 8 prompts on: docs/validity.md
(`python -m tests.validity decisions`).
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import special

from sd35bench.stats.clustered import mean_t
from sd35bench.stats.intervals import Interval

LEVEL = 0.05
"""One-sided level of a test of "worse by the margin or more"."""

SAME_COST = 0.02
"""Costs this close, as a share, are no difference: medians of one setting differ by as much."""

_RESAMPLES = 400
_SEED = 20261130
_NEAR = 1e-12

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Tested:
    """One setting against all others of the front; `rival` is the one that `p` is against.

    `p_adjusted` is the largest p on the walk from the expensive end to this setting; `difference`
    is setting minus rival; `beyond` says that the setting is shown to be worse than the rival of
    its largest loss by more than the margin. `level` is that of the tests.
    """

    rival: int
    difference: Interval
    p: float
    p_adjusted: float
    beyond: bool
    level: float = LEVEL

    @property
    def shown(self) -> bool:
        """Whether the setting is shown to be within the margin."""
        return self.p_adjusted <= self.level


@dataclass(frozen=True, slots=True)
class Decision:
    """The setting to name, and what it rests on; indices are those of the rows of `quality`.

    `best` looks best, `front` runs from expensive to cheap, `walk` are the settings tested in
    order. `expected_loss` is the mean shortfall from the best over resampled prompts, `against` the
    setting that the chosen one is least shown to be as good as, ``None`` where all are shown.
    """

    chosen: int
    best: int
    front: list[int]
    walk: list[int]
    tests: dict[int, Tested]
    definitive: bool
    expected_loss: float
    against: int | None


def decide(
    quality: Floats,
    clusters: NDArray[np.int64],
    cost: Floats,
    margin: float,
    *,
    span: float | None = None,
    fastest: bool = True,
    reference: int | None = None,
    within: list[int] | None = None,
    level: float = LEVEL,
) -> Decision:
    """Name one of S settings from quality [S, n] of the same n pairs and cost [S].

    Args:
        quality: more is better.
        clusters: [n], the prompt of each pair, from 0.
        cost: less is better.
        margin: what may be lost, in the units of quality, at least 0.
        span: the largest loss that one pair can show, where that is known (1 for shares).
        fastest: name the cheapest setting that is shown to be within the margin; else the best.
        reference: hold settings against this one instead of against each other.
        within: settings that may be named, at least one; all by default.
        level: one-sided, of each test; see `stats.looks` where one looks again.
    """
    allowed = list(range(len(quality))) if within is None else within
    sums, counts = prompt_sums(quality, clusters)
    means = quality.mean(axis=1)
    front = front_by_cost(means, cost, allowed)
    best = front[0]
    against = _Against(sums, counts, quality, clusters, margin, span, level)
    fallback = best if reference is None or reference not in front else reference
    walk = _walk(front, cost, reference, best)
    rivals = front if reference is None else [reference]
    tests = _walked(against, walk, rivals)
    chosen = best
    if fastest:
        chosen = next((i for i in reversed(walk) if tests[i].shown), fallback)
    rest = [j for j in rivals if j != best]
    if best not in tests and rest:
        tests[best] = against.test(best, rest, 0.0)
    others = [j for j in (allowed if reference is None else [reference]) if j != chosen]
    if chosen not in tests and others:  # it beats all others in what was seen
        tests[chosen] = against.test(chosen, others, 0.0)
    loss = expected_loss(sums, counts, chosen, [chosen, *others])
    unshown = max(others, key=lambda j: against.p(chosen, j), default=None)
    if unshown is not None and against.p(chosen, unshown) <= level:
        unshown = None
    shown = unshown is None
    if fastest and chosen not in walk:
        shown = shown and all(tests[i].beyond for i in walk)
    return Decision(
        chosen=chosen,
        best=best,
        front=front,
        walk=walk,
        tests=tests,
        definitive=shown and len(counts) > 1 and (margin <= 0.0 or loss <= margin),
        expected_loss=loss,
        against=unshown,
    )


def front_by_cost(means: Floats, cost: Floats, allowed: list[int]) -> list[int]:
    """Settings that no other beats in quality at no more cost, from expensive to cheap.

    Of settings with the same quality the cheapest stays, of exact ties the first.
    """

    def beats(j: int, i: int) -> bool:
        if abs(means[j] - means[i]) <= _NEAR:
            return (cost[j], j) < (cost[i], i)
        return means[j] > means[i] and cost[j] <= cost[i] * (1.0 + SAME_COST)

    left = [i for i in allowed if not any(beats(j, i) for j in allowed if j != i)]
    return sorted(left, key=lambda i: (-cost[i], -means[i]))


def expected_loss(sums: Floats, counts: Floats, chosen: int, among: list[int]) -> float:
    """Mean shortfall of `chosen` from the best of `among` over resampled prompts; 0 with one."""
    if len(counts) < 2 or len(among) < 2:
        return 0.0
    weights = _weights(len(counts))
    drawn = (weights @ sums) / np.maximum(weights @ counts, _NEAR)[:, None]
    return float(np.mean(drawn[:, among].max(axis=1) - drawn[:, chosen]))


def _walk(front: list[int], cost: Floats, reference: int | None, best: int) -> list[int]:
    """Settings to test, from expensive to cheap: those that cost less than what they replace."""
    if reference is None:
        return [i for i in front if i != best]
    if reference in front:
        return [i for i in front if cost[i] < cost[reference]]
    return list(front)


@dataclass(frozen=True, slots=True)
class _Against:
    """Tests of one setting against others on the same pairs."""

    sums: Floats
    counts: Floats
    quality: Floats
    clusters: NDArray[np.int64]
    margin: float
    span: float | None
    level: float

    def test(self, i: int, others: list[int], p_before: float) -> Tested:
        """Test one setting; `p_before` is the largest p of those before it on the walk."""
        found = [self.p(i, j) for j in others]
        means = self.sums.sum(axis=0) / self.counts.sum()
        at = max(range(len(others)), key=lambda a: (found[a], means[others[a]]))
        rival = others[at]
        worst = max(others, key=lambda j: means[j])
        beyond = shown_beyond(self._paired(i, worst), self.counts, self.margin, self.level)
        bounds = None if self.span is None else (-self.span, self.span)
        paired = self.quality[i] - self.quality[rival]
        difference = mean_t(paired, self.clusters, bounds=bounds)
        p = max(found[at], p_before)
        return Tested(rival, difference, found[at], p, beyond, self.level)

    def p(self, i: int, j: int) -> float:
        """Return the p-value of "`i` is worse than `j` by the margin or more"."""
        return p_loss(self._paired(i, j), self.counts, self.margin, self.span)

    def _paired(self, i: int, j: int) -> Floats:
        return self.sums[:, i] - self.sums[:, j]


def p_loss(sums: Floats, counts: Floats, margin: float, span: float | None) -> float:
    """One-sided p-value of "the mean is minus the margin or less"; 1 where it cannot be told.

    `sums` [k] and `counts` [k] are prompts' sums of paired differences and their pairs. Student's t
    over prompts. Differences without any spread show nothing by it; where no prompt shows a loss
    and one can be `span` at most, a mean loss of the margin would need losing prompts with a
    probability of margin / span, of which k prompts showed none.
    """
    k = len(counts)
    if k < 2:
        return 1.0
    value = float(sums.sum() / counts.sum())
    residuals = (sums - value * counts) / counts.mean()
    error = float(np.sqrt(np.square(residuals).sum() / (k - 1) / k))
    by_t = 1.0
    if error > _NEAR:
        by_t = float(special.stdtr(k - 1, -(value + margin) / error))
    if span is None or margin <= 0.0 or float(sums.min()) < -_NEAR:
        return by_t
    return min(by_t, max(0.0, 1.0 - margin / span) ** k)


def shown_beyond(sums: Floats, counts: Floats, margin: float, level: float = LEVEL) -> bool:
    """Whether prompts' sums of differences [k] show a loss of more than the margin."""
    return p_loss(-sums, counts, -margin, None) <= level


def _walked(against: _Against, walk: list[int], rivals: list[int]) -> dict[int, Tested]:
    tests: dict[int, Tested] = {}
    largest = 0.0
    for i in walk:
        others = [j for j in rivals if j != i]
        if others:
            tests[i] = against.test(i, others, largest)
            largest = tests[i].p_adjusted
    return tests


def prompt_sums(quality: Floats, clusters: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Sums [k, S] of quality [S, n] over each of k prompts, and their pairs [k]."""
    labels = np.unique(clusters, return_inverse=True)[1]
    counts = np.bincount(labels).astype(np.float64)
    weighed = [np.bincount(labels, weights=row).astype(np.float64) for row in quality]
    sums = np.stack(weighed, axis=1)
    return sums, counts


@lru_cache(maxsize=32)
def _weights(k: int) -> Floats:
    """How often each of k prompts is drawn in each resample [R, k]."""
    rng = np.random.default_rng(_SEED)
    return rng.multinomial(k, np.full(k, 1.0 / k), size=_RESAMPLES).astype(np.float64)
