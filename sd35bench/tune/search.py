"""Which settings to try: Optuna's part, asked and told by hand.

The objectives are quality (more), latency in seconds (less) and, where a backend costs money, USD
an image (less), on the first prompts that every setting gets. Optuna's TPE proposes; a setting that
is as good as tried (the same images) is told again and not made again. Where TPE has nothing new to
say, a free point of the grid is drawn. A grid with no more points than may be tried is tried whole.
"""

import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from sd35bench.errors import ConfigError
from sd35bench.tune.space import Axis, Point, Space

_STUDY = "settings"
_ASKS = 5
WAVE = 10
"""Settings that are tried together, after each of which Optuna learns; the first are random."""
_POINT, _WORKER = "point", "worker"


@dataclass(frozen=True, slots=True)
class Found:
    """A proposal: its number in the journal and the point that it asks for."""

    number: int
    point: Point


class Search:
    """One search over a space; several processes may share its storage."""

    def __init__(
        self,
        space: Space,
        storage: BaseStorage,
        *,
        objectives: int,
        identity: Callable[[Point], Hashable],
        whole: bool = False,
        seed: int = 0,
        worker: str = "",
    ) -> None:
        """Open the search, or go on with it.

        `objectives` is 2, or 3 with money; `identity` is equal for points of the same images;
        `whole`: the grid is tried whole, in random order.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._space, self._identity = space, identity
        # Nothing is learnt from one wave for the next where all will be tried: one load for all.
        self.wave = space.size if whole else WAVE
        self._asks = 0 if whole else _ASKS
        self._seed, self._worker = seed, worker
        self._distributions = {
            axis.name: _distribution(axis) for axis in space.axes if len(axis.values) > 1
        }
        more, less = StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE
        self._study = optuna.create_study(
            storage=storage,
            study_name=_STUDY,
            directions=[more, less, less][:objectives],
            load_if_exists=True,
        )

    def agree(self, about: Mapping[str, Any]) -> None:
        """Write down what is searched, or hold it against what is there.

        Raises: ConfigError where the study was tuned over something else.
        """
        known = self._study.user_attrs
        for name, value in about.items():
            if name not in known:
                self._study.set_user_attr(name, value)
            elif known[name] != value:
                raise ConfigError(
                    f"this study was tuned with {name}={_short(known[name])}, now it is"
                    f" {_short(value)}: use another study name (trials and images may change)"
                )

    def tried(self) -> list[Point]:
        """Every point that was proposed, each of the same images once, in order of proposal."""
        return list({self._identity(p): p for p in reversed(self._points())}.values())[::-1]

    def running(self) -> list[tuple[Found, str]]:
        """Proposals that nobody has told the outcome of, and the worker that asked for each."""
        return [
            (Found(t.number, self._point(t)), str(t.user_attrs.get(_WORKER, "")))
            for t in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            if t.params or not self._distributions
        ]

    def adopt(self, found: Found) -> None:
        """Take a dead worker's proposal over."""
        trial_id = self._study.get_trials(deepcopy=False)[found.number]._trial_id
        optuna.trial.Trial(self._study, trial_id).set_user_attr(_WORKER, self._worker)

    def ask(self, told: Mapping[Hashable, Sequence[float]]) -> Found | None:
        """Propose a point that was not tried; ``None`` where the grid has no other.

        `told` has the values of what was tried, by identity: a repeated proposal gets them again.
        """
        taken = {self._identity(p) for p in self._points()}
        # One stream per proposal: a search that goes on does not repeat its first draws.
        self._study.sampler = self._sampler(len(self._study.get_trials(deepcopy=False)))
        for attempt in range(self._asks + 1):
            if attempt == self._asks:
                free = self._free(taken)
                if free is None:
                    return None
                self._study.enqueue_trial(self._indices(free))
            trial = self._study.ask(self._distributions)
            trial.set_user_attr(_WORKER, self._worker)
            frozen = self._study.get_trials(deepcopy=False)[trial.number]
            found = Found(trial.number, self._point(frozen))
            same = self._identity(found.point)
            if same not in taken:
                return found
            self.tell(found, told.get(same))
        return None

    def enqueue(self, point: Point) -> None:
        """Have a point proposed next, unless it was tried."""
        if self._identity(point) not in {self._identity(p) for p in self._points()}:
            self._study.enqueue_trial(self._indices(point), skip_if_exists=True)

    def tell(self, found: Found, values: Sequence[float] | None) -> None:
        """Say what a proposal gave; ``None`` where it gave no image that counts."""
        if values is None:
            self._study.tell(found.number, state=TrialState.FAIL, skip_if_finished=True)
        else:
            self._study.tell(found.number, list(values), skip_if_finished=True)

    def _sampler(self, already: int) -> optuna.samplers.BaseSampler:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.samplers.TPESampler(
                seed=(self._seed * 1_000_003 + already) % 2**32, n_startup_trials=WAVE
            )

    def _points(self) -> list[Point]:
        trials = self._study.get_trials(deepcopy=False)
        return [
            self._point(t)
            for t in trials
            if t.state != TrialState.WAITING and (t.params or not self._distributions)
        ]

    def _point(self, trial: FrozenTrial) -> Point:
        return tuple(
            _value(axis, trial.params[axis.name]) if axis.name in trial.params else axis.values[0]
            for axis in self._space.axes
        )

    def _indices(self, point: Point) -> dict[str, Any]:
        return {
            axis.name: axis.values.index(value) if axis.ordered else value
            for axis, value in zip(self._space.axes, point, strict=True)
            if axis.name in self._distributions
        }

    def _free(self, taken: set[Hashable]) -> Point | None:
        """Draw a point that was not tried, the same one for the same seed and history."""
        rng = np.random.default_rng([self._seed, len(taken)])
        for number in rng.permutation(self._space.size).tolist():
            point = self._space.point(number)
            if self._identity(point) not in taken:
                return point
        return None


def _distribution(axis: Axis) -> BaseDistribution:
    """An ordered axis is searched by the number of its value, so that levels are a scale."""
    if axis.ordered:
        return IntDistribution(0, len(axis.values) - 1)
    return CategoricalDistribution(axis.values)


def _value(axis: Axis, parameter: Any) -> Any:
    return axis.values[parameter] if axis.ordered else parameter


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 120 else text[:117] + "..."
