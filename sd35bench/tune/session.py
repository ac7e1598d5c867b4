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
from math import isnan

from sd35bench.errors import ConfigError
from sd35bench.recommend.profiles import BEST, Profile
from sd35bench.stats.looks import level_at
from sd35bench.tune.final import Final, decide, settled
from sd35bench.tune.race import OVER_LIMITS, Evidence, Look, Out, judge, look, promise
from sd35bench.tune.search import Found, Search
from sd35bench.tune.space import Point, Space
from sd35bench.tune.study_adapter import StudyLab

SHARE = 0.4
"""Images that are made where none are stated, as a share of all prompts for every setting."""
_EXPLORED = 0.7
_POLL_S = 1.0
_ABANDONED = 4
"""Settings whose proposals gave no image at all, in a row, before a search gives up."""

Report = Callable[[str], None]
ClaimDead = Callable[[str], AbstractContextManager[bool]]
"""Says whether a worker of the same search, by name, is dead; while inside, no other is."""


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
    which the images did not reach, `racing` the indices into `found` of those still in at the end,
    of which `final` has the choice; `winner` is its index. `reference` is the named default that
    the profile holds settings against, which goes on even where it is out itself. `unshown` are
    settings that left the race early, and that on the prompts which they have the winner is not
    shown to be within the margin of.
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
    final: Final | None = None
    reference: Point | None = None
    unshown: tuple[Point, ...] = ()

    @property
    def shown(self) -> bool:
        """Whether the winner is shown to be as good as everything it has to be as good as."""
        return self.final is not None and self.final.shown and not self.unshown


def default_images(space: Space, prompts: int, per_prompt: int, trials: int) -> int:
    """`SHARE` of what the full grid takes, or of `trials` settings where these are fewer."""
    return int(SHARE * min(space.size, trials) * prompts * per_prompt)


def tune(
    lab: StudyLab,
    search: Search,
    claim_dead: ClaimDead,
    budget: Budget,
    profile: Profile,
    report: Report = lambda _text: None,
) -> Outcome:
    """Search and race; repeated, it goes on where it was.

    Raises: ConfigError where nothing can be compared; what the lab raises.
    """
    reference = lab.reference(profile)
    if reference is not None:
        search.enqueue(reference)
    _explore(lab, search, claim_dead, budget, report)
    points = search.tried()
    if not points:
        raise ConfigError("nothing was tried: give more images")
    return _race(lab, points, budget, profile, report)


def _explore(
    lab: StudyLab, search: Search, claim_dead: ClaimDead, budget: Budget, report: Report
) -> None:
    price = budget.first * lab.images_per_prompt
    # Two settings at least, or there is nothing to compare.
    most = max(2, min(budget.trials, int(_EXPLORED * budget.images) // price))
    first = range(budget.first)
    while True:
        wave = _take_over_dead(search, claim_dead)
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
        report(f"trying {len(wave)} settings on {len(first)} prompts ({len(tried)} tried before)")
        points = [w.point for w in wave]
        lab.make(points, first)
        values = _values(lab, points, budget.first)
        for found in wave:
            search.tell(found, values.get(lab.identity(found.point)))
        _refuse_hopeless(lab, search, budget)


def _take_over_dead(search: Search, claim_dead: ClaimDead) -> list[Found]:
    """Take over what dead workers asked for."""
    taken = []
    for found, name in search.running():
        with claim_dead(name) as dead:
            if dead:
                search.adopt(found)
                taken.append(found)
    return taken


def _values(lab: StudyLab, points: Sequence[Point], prompts: int) -> dict[Hashable, list[float]]:
    """Objectives by identity, of the settings that have any: on the first prompts alone."""
    found = {}
    for point, evidence in lab.seen(points).items():
        start = evidence.first(prompts)
        values = [start.mean, start.p50_s, start.usd][: lab.objectives]
        if all(value == value for value in values):
            found[lab.identity(point)] = values
    return found


def _refuse_hopeless(lab: StudyLab, search: Search, budget: Budget) -> None:
    """End a search whose every setting so far failed, before it pays for more.

    Raises: ConfigError.
    """
    tried = search.tried()
    if len(tried) >= _ABANDONED and not _values(lab, tried, budget.first):
        raise ConfigError(
            f"none of the first {len(tried)} settings gave an image that can be judged and timed;"
            " see what failed with `sd35bench show`, and try one setting with `sd35bench run`"
        )


def _race(
    lab: StudyLab, points: list[Point], budget: Budget, profile: Profile, report: Report
) -> Outcome:
    """Double the depth until the answer is decided, or prompts or images are used up."""
    race = _Race(lab, points, budget, profile)
    while race.look() is None:
        alive, deeper = race.next()
        report(f"racing {len(alive)} settings to {deeper} prompts ({race.images} images so far)")
        lab.make(alive, range(race.depth, deeper))
        race.deepened(alive, deeper)
    return race.outcome()


class _Race:
    """Where a race stands."""

    def __init__(
        self, lab: StudyLab, points: list[Point], budget: Budget, profile: Profile
    ) -> None:
        self._lab, self._points, self._budget, self._profile = lab, points, budget, profile
        self._margin = lab.margin(profile)
        self._reference = _same(lab, points, lab.reference(profile))
        self._reached = dict.fromkeys(points, budget.first)
        self._out: dict[Point, Out] = {}
        self._aside: dict[Point, str] = {}
        self._history: list[dict[str, int]] = []
        self._stopped: str | None = None
        self._final: Final | str = ""
        self.depth = budget.first
        self.images = len(points) * budget.first * lab.images_per_prompt

    def look(self) -> str | None:
        """Judge on what was made so far; says why the race is over, if it is."""
        seen = self._lab.seen(self._points)
        self._seen = {p: seen[p].first(self._reached[p]) for p in self._points}
        self._found = look(self._seen, self._lab.bounds)
        verdicts = judge(self._found, self._profile, self._margin, self._reference)
        for point, verdict in verdicts.items():
            self._out.setdefault(point, verdict)
        self._racing = [i for i, p in enumerate(self._points) if self._races(p)]
        self._history.append(
            {"prompts": self.depth, "settings": len(self._racing), "images": self.images}
        )
        self._final = self._decide()
        self._stopped = self._stop()
        return self._stopped

    def next(self) -> tuple[list[Point], int]:
        """Who goes on, and to how many prompts; the rest is set aside."""
        alive = [self._points[i] for i in self._racing]
        rulers = self._rulers()
        keep = self._affordable() - len(rulers)
        if keep < len(alive):
            ruler = None if self._reference is None else self._seen[self._reference]
            chances = promise(
                {p: self._seen[p] for p in alive},
                self._margin,
                objective=self._profile.objective,
                reference=ruler,
            )
            alive.sort(key=lambda p: (p != self._reference, -chances[p]))
            why = f"the images did not reach for it beyond {self.depth} prompts"
            self._aside |= dict.fromkeys(alive[keep:], why)
        return alive[:keep] + rulers, min(2 * self.depth, self._lab.prompts)

    def deepened(self, alive: Sequence[Point], depth: int) -> None:
        """Take in that these settings have so many prompts now."""
        self.images += len(alive) * (depth - self.depth) * self._lab.images_per_prompt
        self._reached |= dict.fromkeys(alive, depth)
        self.depth = depth

    def outcome(self) -> Outcome:
        """What the race came to; after `look` said that it is over."""
        assert self._stopped is not None
        final = None if isinstance(self._final, str) else self._final
        if final is not None:
            for i, why in final.choice.limits.broken.items():
                self._out.setdefault(final.points[i], Out(kind=_kind(why), why=why))
        return Outcome(
            seen=self._seen,
            depth=self._reached,
            out=self._out,
            aside=self._aside,
            found=self._found,
            racing=[i for i, p in enumerate(self._points) if self._races(p)],
            winner=None if final is None else self._points.index(final.chosen),
            stopped=self._stopped,
            images=self.images,
            history=self._history,
            final=final,
            reference=self._reference,
            unshown=() if final is None else self._unshown(self._points.index(final.chosen)),
        )

    def _unshown(self, winner: int) -> tuple[Point, ...]:
        """Those not left that might still be better than the winner by more than the margin.

        A race may drop the best one by bad luck on few prompts, so without these it would be said
        too often that something is as good as the best (docs/adr/0011).
        """
        if self._reference is not None:
            return ()
        gone = [i for i, p in enumerate(self._points) if not self._races(p)]
        rivals = [i for i in gone if self._kind_of(i) not in (*OVER_LIMITS, "failed")]
        low = self._found.low[winner]
        return tuple(self._points[i] for i in rivals if not low[i] > -self._margin)

    def _kind_of(self, i: int) -> str | None:
        out = self._out.get(self._points[i])
        return None if out is None else out.kind

    def _races(self, point: Point) -> bool:
        return point not in self._out and point not in self._aside

    def _rulers(self) -> list[Point]:
        """The named default where it is out itself: others are still held against it."""
        ruler = self._reference
        return [ruler] if ruler is not None and ruler in self._out and not self._lost() else []

    def _lost(self) -> bool:
        """Whether the profile's named default gave nothing that others could be held against."""
        if self._profile.reference == BEST:
            return False
        seen = None if self._reference is None else self._seen[self._reference]
        return seen is None or isnan(seen.mean) or isnan(seen.p50_s)

    def _decide(self) -> Final | str:
        """What `recommend` would say of those left."""
        if not self._racing:
            return "no setting meets the profile"
        if self._lost():
            return f"{self._profile.reference}'s setting gave no image to hold others against"
        asked = [self._points[i] for i in self._racing] + self._rulers()
        points, comparison = self._lab.compared(asked, self.depth)
        level = level_at(self.depth, self._lab.prompts)
        return decide(points, comparison, self._profile, reference=self._reference, level=level)

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
        return max(self._fewest, int(left / doublings) // self._price)

    @property
    def _fewest(self) -> int:
        """Two settings, and the named default where it does not race."""
        return 2 + len(self._rulers())

    def _stop(self) -> str | None:
        final = self._final
        if not self._racing:
            return "no setting meets the profile"
        if len(self._racing) == 1 or self._lost():
            return final if isinstance(final, str) else "one setting is left"
        if isinstance(final, Final) and settled(final, self._profile):
            return "decided: shown to be as good, and none that could replace it is left"
        if self.depth >= self._lab.prompts:
            return final if isinstance(final, str) else "all prompts are used"
        price = self._fewest * self._price
        if self._budget.images - self.images < price:
            return f"the images are used up: to go on would take {price} at least"
        return None


def _same(lab: StudyLab, points: Sequence[Point], wanted: Point | None) -> Point | None:
    """The point that was tried and asks for the same images as the wanted one."""
    if wanted is None:
        return None
    name = lab.identity(wanted)
    return next((p for p in points if lab.identity(p) == name), None)


def _kind(why: str) -> str:
    """The first of the limits that `recommend` found broken."""
    return next((kind for kind in OVER_LIMITS if why.startswith(kind)), "failed")
