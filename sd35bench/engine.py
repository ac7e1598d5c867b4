"""Where trials run: one interface, chosen by the backend's kind and by `engine=`.

An engine refuses up front what it cannot do (`prepare`), makes what is missing of a plan (`run`),
and says what that may cost (`price`) and how many processes it starts (`starts`). Engines with
several workers take the plans of several loads together (`run_together`). Whatever an engine does,
the process that called it alone writes the store (docs/adr/0002): so engines that hand chunks of
whole blocks to other machines need neither locks nor a shared disk.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from sd35bench.plan import Plan
from sd35bench.remote.providers.base import RemoteSettings
from sd35bench.study.store import Study
from sd35bench.trials import Observer, Price, RunSummary
from sd35bench.workers.lane import Crew, run_plans
from sd35bench.workers.limits import Limits
from sd35bench.workers.process import LocalProcesses

if TYPE_CHECKING:
    from sd35bench.workers.cluster import RaySettings


class Engine(Protocol):
    """Makes the images of plans; an immutable value that a job carries."""

    @property
    def price(self) -> Price:
        """What its images cost."""
        ...

    @property
    def starts(self) -> int:
        """Worker processes that one load starts; 0 where nothing is loaded here."""
        ...

    def prepare(self, plan: Plan, *, dry: bool) -> None:
        """Refuse what cannot be done, before anything is loaded or asked for.

        `dry`: nothing will run, so credentials are not needed. Raises: ConfigError.
        """
        ...

    def run(self, plan: Plan, study: Study, observer: Observer | None = None) -> RunSummary:
        """Make what is missing of `plan`; safe to interrupt and to repeat.

        Raises: ConfigError, StudyLocked, DiskFull, StoreError. Failures of trials become records.
        """
        ...


def local_engine(
    limits: Limits, usd_per_image: float = 0.0, workers: int | str = 1
) -> LocalProcesses:
    """Worker processes of this machine, so many at once."""
    price = Price(usd_per_image=usd_per_image)
    return LocalProcesses(limits=limits, price=price, workers=workers)


def ray_engine(
    limits: Limits, usd_per_image: float, workers: int | str, settings: "RaySettings"
) -> Engine:
    """Actors of a Ray cluster."""
    from sd35bench.workers.cluster import RayCluster

    price = Price(usd_per_image=usd_per_image)
    return RayCluster(limits=limits, price=price, workers=workers, settings=settings)


@runtime_checkable
class Shared(Protocol):
    """An engine whose workers take the plans of several loads together."""

    limits: Limits

    def crew(self, plan: Plan) -> Crew:
        """The workers for a plan. Raises: ConfigError."""
        ...


def crew_of(engine: Engine, plan: Plan) -> Crew | None:
    """The several workers that an engine has for a plan; ``None`` where it has one, or none."""
    crew = engine.crew(plan) if isinstance(engine, Shared) else None
    return crew if crew is not None and crew.size > 1 else None


def run_together(
    jobs: Sequence[tuple[Engine, Plan, Observer]], study: Study, crew: Crew
) -> list[RunSummary]:
    """Make what is missing of several loads' plans on one crew; summaries in the same order.

    Raises: ConfigError, StudyLocked, DiskFull, StoreError.
    """
    for _, plan, _ in jobs:
        crew.measure(study, plan.load)
    plans = [
        (plan, engine.limits, observer)
        for engine, plan, observer in jobs
        if isinstance(engine, Shared)
    ]
    return run_plans(plans, study, crew)


def hosted_engine(settings: RemoteSettings) -> Engine:
    """A hosted service."""
    # Imported here: its HTTP client takes 0.1 s, which no local run should wait for.
    from sd35bench.remote.drive import HostedService

    return HostedService(settings=settings)
