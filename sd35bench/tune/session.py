"""The search itself: try settings on the first prompts, then race the survivors on twice as many.

    explore   waves of proposals, each on the first `first` prompts, until `trials` settings or
              seven tenths of the images are used
    race      depth 8, 16, 32 …: those that are out get no more; where the images left do not reach
              for all, the ones that matter most to the answer go on and the others are set aside

The race is a *replay*: at depth d it looks at the first d prompts alone, so the same records give
the same decisions, whoever computes them and however often it was interrupted. What is there
already costs nothing, and workers that share a study come to the same answer.
"""

import time
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from sd35bench.analysis.profiles import Profile
from sd35bench.errors import ConfigError
from sd35bench.tune.race import Evidence, Look, Out, decided, judge, look, pick, promise
from sd35bench.tune.search import Found, Search
from sd35bench.tune.space import Point, Space

__all__ = ["SHARE", "Budget", "Lab", "Outcome", "default_images", "tune"]

SHARE = 0.4
"""Images that are bought where none are stated, as a share of all prompts for every setting."""
_EXPLORED = 0.7
_POLL_S = 1.0
_ABANDONED = 4
"""Settings whose proposals gave no image at all, in a row, before a search gives up."""

Told = Callable[[str], None]
Bury = Callable[[str], AbstractContextManager[bool]]
"""Says whether a worker of the same search, by name, is dead; while inside, no one else is told."""


class Lab(Protocol):
    """Makes images of settings on prompts, and says what they gave."""

    @property
    def prompts(self) -> int:
        """How many prompts there are."""
        ...

    @property
    def images_per_prompt(self) -> int:
        """Images of one setting and prompt: the seeds."""
        ...

    @property
    def objectives(self) -> int:
        """3 where a backend costs money, else 2: quality and latency."""
        ...

    @property
    def bounds(self) -> tuple[float, float] | None:
        """What quality can be at least and at most."""
        ...

    def identity(self, point: Point) -> Hashable:
        """Equal for points that ask for the same images."""
        ...

    def buy(self, points: Sequence[Point], prompts: range) -> None:
        """Make and score what is missing of these settings on these prompts."""
        ...

    def seen(self, points: Sequence[Point]) -> dict[Point, Evidence]:
        """What is known of these settings, on all prompts."""
        ...

    def margin(self, profile: Profile) -> float:
        """The profile's margin in units of quality."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How much may be tried: settings, images, and the prompts that every setting gets first."""

    trials: int
    images: int
    first: int


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What a search came to.

    `depth` is the prompts that each setting got, `out` why a setting stopped, `aside` those for
    which the images did not reach, `racing` the indices into `found` of those still in at the end.
    """

    seen: dict[Point, Evidence]
    depth: dict[Point, int]
    out: dict[Point, Out]
    aside: dict[Point, str]
    found: Look
    racing: list[int]
    winner: int | None
    stopped: str
    images: int
    history: list[dict[str, int]]


def default_images(space: Space, prompts: int, per_prompt: int, trials: int) -> int:
    """`SHARE` of what the full grid takes, or of `trials` settings where these are fewer."""
    return int(SHARE * min(space.size, trials) * prompts * per_prompt)


def tune(
    lab: Lab,
    search: Search,
    bury: Bury,
    budget: Budget,
    profile: Profile,
    told: Told = lambda _text: None,
) -> Outcome:
    """Search and race; repeated, it goes on where it was.

    Raises: ConfigError where nothing can be compared; what the lab raises.
    """
    _explore(lab, search, bury, budget, told)
    points = search.tried()
    if not points:
        raise ConfigError("nothing was tried: give more images")
    return _race(lab, points, budget, profile, told)


def _explore(lab: Lab, search: Search, bury: Bury, budget: Budget, told: Told) -> None:
    price = budget.first * lab.images_per_prompt
    # Two settings at least, or there is nothing to compare.
    most = max(2, min(budget.trials, int(_EXPLORED * budget.images) // price))
    first = range(budget.first)
    while True:
        wave = _orphans(search, bury)
        tried = search.tried()
        values = _values(lab, tried, budget.first)
        room = most - len(tried)
        while len(wave) < search.wave and room > 0:
            found = search.ask(values)
            if found is None:
                break
            wave.append(found)
            room -= 1
        if not wave:
            if not search.running():
                return
            time.sleep(_POLL_S)  # another worker still makes what the race needs
            continue
        told(f"trying {len(wave)} settings on {len(first)} prompts ({len(tried)} tried before)")
        points = [w.point for w in wave]
        lab.buy(points, first)
        values = _values(lab, points, budget.first)
        for found in wave:
            search.tell(found, values.get(lab.identity(found.point)))
        _refuse_hopeless(lab, search, budget)


def _orphans(search: Search, bury: Bury) -> list[Found]:
    """Take over what dead workers asked for."""
    taken = []
    for found, name in search.running():
        with bury(name) as dead:
            if dead:
                search.adopt(found)
                taken.append(found)
    return taken


def _values(lab: Lab, points: Sequence[Point], prompts: int) -> dict[Hashable, list[float]]:
    """Objectives by identity, of the settings that have any: on the first prompts alone."""
    found = {}
    for point, evidence in lab.seen(points).items():
        start = evidence.first(prompts)
        values = [start.mean, start.p50_s, start.usd][: lab.objectives]
        if all(value == value for value in values):
            found[lab.identity(point)] = values
    return found


def _refuse_hopeless(lab: Lab, search: Search, budget: Budget) -> None:
    """End a search whose every setting so far failed, before it pays for more.

    Raises: ConfigError.
    """
    tried = search.tried()
    if len(tried) >= _ABANDONED and not _values(lab, tried, budget.first):
        raise ConfigError(
            f"none of the first {len(tried)} settings gave an image that can be judged and timed;"
            " see what failed with `sd35bench show`, and try one setting with `sd35bench run`"
        )


def _race(lab: Lab, points: list[Point], budget: Budget, profile: Profile, told: Told) -> Outcome:
    """Double the depth until the answer is decided, or prompts or images are used up."""
    race = _Race(lab, points, budget, profile)
    while race.look() is None:
        alive, deeper = race.next()
        told(f"racing {len(alive)} settings to {deeper} prompts ({race.images} images so far)")
        lab.buy(alive, range(race.depth, deeper))
        race.bought(alive, deeper)
    return race.outcome()


class _Race:
    """Where a race stands."""

    def __init__(self, lab: Lab, points: list[Point], budget: Budget, profile: Profile) -> None:
        self._lab, self._points, self._budget, self._profile = lab, points, budget, profile
        self._margin = lab.margin(profile)
        self._reached = dict.fromkeys(points, budget.first)
        self._out: dict[Point, Out] = {}
        self._aside: dict[Point, str] = {}
        self._history: list[dict[str, int]] = []
        self._stopped: str | None = None
        self.depth = budget.first
        self.images = len(points) * budget.first * lab.images_per_prompt

    def look(self) -> str | None:
        """Judge on what was bought so far; says why the race is over, if it is."""
        seen = self._lab.seen(self._points)
        self._seen = {p: seen[p].first(self._reached[p]) for p in self._points}
        self._found = look(self._seen, self._lab.bounds)
        for point, verdict in judge(self._found, self._profile, self._margin).items():
            self._out.setdefault(point, verdict)
        left = [p not in self._out and p not in self._aside for p in self._points]
        self._racing = [i for i, races in enumerate(left) if races]
        self._history.append(
            {"prompts": self.depth, "settings": len(self._racing), "images": self.images}
        )
        self._stopped = self._stop()
        return self._stopped

    def next(self) -> tuple[list[Point], int]:
        """Who goes on, and to how many prompts; the rest is set aside."""
        alive = [self._points[i] for i in self._racing]
        keep = self._affordable()
        if keep < len(alive):
            chances = promise({p: self._seen[p] for p in alive}, self._margin)
            alive.sort(key=lambda p: -chances[p])
            why = f"the images did not reach for it beyond {self.depth} prompts"
            self._aside |= dict.fromkeys(alive[keep:], why)
        return alive[:keep], min(2 * self.depth, self._lab.prompts)

    def bought(self, alive: Sequence[Point], depth: int) -> None:
        """Take in that these settings have so many prompts now."""
        self.images += len(alive) * (depth - self.depth) * self._lab.images_per_prompt
        self._reached |= dict.fromkeys(alive, depth)
        self.depth = depth

    def outcome(self) -> Outcome:
        """What the race came to; after `look` said that it is over."""
        assert self._stopped is not None
        winner = pick(self._found, self._racing, self._margin) if self._racing else None
        return Outcome(
            seen=self._seen,
            depth=self._reached,
            out=self._out,
            aside=self._aside,
            found=self._found,
            racing=self._racing,
            winner=winner,
            stopped=self._stopped,
            images=self.images,
            history=self._history,
        )

    @property
    def _price(self) -> int:
        """Images that take one setting through the next doubling."""
        deeper = min(2 * self.depth, self._lab.prompts)
        return (deeper - self.depth) * self._lab.images_per_prompt

    def _affordable(self) -> int:
        """Settings that may go on: each doubling to come has an equal share of what is left."""
        doublings = 1
        while self.depth * 2**doublings < self._lab.prompts:
            doublings += 1
        left = self._budget.images - self.images
        return max(2, int(left / doublings) // self._price)

    def _stop(self) -> str | None:
        if not self._racing:
            return "no setting meets the profile"
        if len(self._racing) == 1:
            return "one setting is left"
        if decided(self._found, self._racing, self._margin):
            return "decided: within the margin of every other, and none that is faster is left"
        if self.depth >= self._lab.prompts:
            return "all prompts are used"
        if self._budget.images - self.images < 2 * self._price:
            return f"the images are used up: two settings more would take {2 * self._price}"
        return None
