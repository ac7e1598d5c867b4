"""A backend with known truth: the demo study's table as probabilities, prompts as one noise.

Prompts are hard or easy for every setting alike (`_SHARED` of a copula's variance), as they are
for real; each image is right or wrong with exactly the setting's probability.
"""

from collections.abc import Hashable, Sequence

import numpy as np
from scipy import special

from sd35bench.analysis.grouping import PairKey
from sd35bench.analysis.pairs import Candidate, Comparison, compare
from sd35bench.analysis.table import Row
from sd35bench.recommend.profiles import Profile
from sd35bench.tune.race import Evidence
from sd35bench.tune.space import Axis, Point, Space, spread

STEPS = (2, 4, 8, 16, 28)
CFGS = (1.0, 2.0, 4.0, 7.0, 12.0)
# results/tables/demo.md, text-to-image, prompt accuracy and latency s; rows are steps.
ACCURACY = np.array(
    [
        [0.23, 0.17, 0.04, 0.04, 0.02],
        [0.50, 0.67, 0.44, 0.23, 0.00],
        [0.56, 0.77, 0.71, 0.65, 0.46],
        [0.58, 0.81, 0.73, 0.75, 0.65],
        [0.62, 0.81, 0.75, 0.77, 0.75],
    ]
)
LATENCY_S = np.array(
    [
        [0.037, 0.051, 0.048, 0.052, 0.049],
        [0.059, 0.078, 0.083, 0.082, 0.085],
        [0.102, 0.150, 0.144, 0.141, 0.165],
        [0.185, 0.282, 0.296, 0.268, 0.273],
        [0.311, 0.453, 0.455, 0.447, 0.498],
    ]
)
_SHARED = 0.5
_TIMER = 0.03

GRID = Space(
    (
        Axis(name="steps", values=STEPS, ordered=True),
        Axis(name="cfg", values=CFGS, ordered=True),
    )
)
RANGES = Space(
    (
        Axis(name="steps", values=tuple(range(2, 29)), ordered=True),
        Axis(name="cfg", values=spread(1, 12, 0.5), ordered=True),
    )
)


class _Local(Row):
    """A row of this machine, of which no record tells so."""

    @property
    def hosted(self) -> bool:
        return False


class Surface:
    """A lab whose settings have the demo's truth; counts what is bought."""

    objectives = 2
    bounds = (0.0, 1.0)
    images_per_prompt = 1

    default: Point | None = None
    """The setting that a profile with a named reference means."""

    def __init__(self, space: Space, prompts: int, seed: int) -> None:
        self.space, self.prompts = space, prompts
        rng = np.random.default_rng(seed)
        self._easy = rng.standard_normal(prompts)
        self._seed = seed
        self.images = 0
        self._made: dict[Point, set[int]] = {}

    def identity(self, point: Point) -> Hashable:
        return point

    def margin(self, profile: Profile) -> float:
        return profile.margin("prompt_accuracy")

    def reference(self, profile: Profile) -> Point | None:
        return None if profile.reference == "best" else self.default

    def accuracy(self, point: Point) -> float:
        return _between(ACCURACY, self.space, point)

    def latency_s(self, point: Point) -> float:
        return _between(LATENCY_S, self.space, point)

    def work(self, point: Point) -> float:
        """Evaluations an image; an axis that is not searched is without effect."""
        named = self.space.named(point)
        return float(str(named["steps"])) * (2.0 if float(str(named.get("cfg", 1))) > 1 else 1.0)

    def make(self, points: Sequence[Point], prompts: range) -> None:
        for point in points:
            made = self._made.setdefault(point, set())
            self.images += len(set(prompts) - made)
            made |= set(prompts)

    def seen(self, points: Sequence[Point]) -> dict[Point, Evidence]:
        return {p: self._evidence(p) for p in points}

    def compared(self, points: Sequence[Point], prompts: int) -> tuple[list[Point], Comparison]:
        seen = {p: e.first(prompts) for p, e in self.seen(points).items()}
        return list(seen), side_by_side(list(seen.values()))

    def _evidence(self, point: Point) -> Evidence:
        number = [axis.values.index(v) for axis, v in zip(self.space.axes, point, strict=True)]
        rng = np.random.default_rng([self._seed, *number])
        own = rng.standard_normal(self.prompts)
        u = special.ndtr(np.sqrt(_SHARED) * self._easy + np.sqrt(1 - _SHARED) * own)
        quality = (u < self.accuracy(point)).astype(np.float64)
        latency_s = self.latency_s(point) * np.exp(_TIMER * rng.standard_normal(self.prompts))
        missing = [i for i in range(self.prompts) if i not in self._made.get(point, set())]
        quality[missing] = latency_s[missing] = np.nan
        return Evidence(quality=quality, latency_s=latency_s, work=self.work(point))


def side_by_side(seen: Sequence[Evidence]) -> Comparison:
    """Settings as `recommend` would compare them, each image's prompt being its number."""
    found = [
        Candidate(
            row=_Local(setting={"setting": str(i), "cfg": 4.0}, environment_id=None),
            quality=_by_key(evidence.quality),
            latency_s=_by_key(evidence.latency_s),
            work=1.0 if evidence.work is None else evidence.work,
        )
        for i, evidence in enumerate(seen)
    ]
    if len(found) > 1:
        return compare("prompt_accuracy", found)
    keys, values = list(found[0].quality), list(found[0].quality.values())
    return Comparison("prompt_accuracy", found, np.array([values]), keys, np.arange(len(keys)), [])


def _by_key(values: np.ndarray) -> dict[PairKey, float]:
    known = np.flatnonzero(~np.isnan(values)).tolist()
    return {(str(i), "", 0, 64, 64, None): float(values[i]) for i in known}


def _between(table: np.ndarray, space: Space, point: Point) -> float:
    """The table's value, bilinear in the logarithms of steps and cfg."""
    named = space.named(point)
    rows = np.array(
        [np.interp(np.log(float(str(named["cfg"]))), np.log(CFGS), row) for row in table]
    )
    return float(np.interp(np.log(float(str(named["steps"]))), np.log(STEPS), rows))
