"""Where trials run: one interface, chosen by the backend's kind.

An engine is asked three things: to refuse up front what it cannot do (`prepare`), to make what is
missing of a plan (`run`), and what that may cost (`price`). Local worker processes and hosted
services are the engines of today. Whatever an engine does, the process that called it alone writes
the store (docs/adr/0002): it hands records to `sd35bench.trials.Run`. So an engine
that hands chunks of whole blocks to other machines needs neither locks nor a shared disk.
"""

from typing import Protocol

from sd35bench.limits import Limits
from sd35bench.plan import Plan
from sd35bench.process import LocalProcesses
from sd35bench.remote.settings import RemoteSettings
from sd35bench.store import Study
from sd35bench.trials import Observer, Price, RunSummary


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


def local_engine(limits: Limits, usd_per_image: float = 0.0) -> Engine:
    """Worker processes of this machine."""
    return LocalProcesses(limits=limits, price=Price(usd_per_image=usd_per_image))


def hosted_engine(settings: RemoteSettings) -> Engine:
    """A hosted service."""
    # Imported here: its HTTP client takes 0.1 s, which no local run should wait for.
    from sd35bench.remote.drive import HostedService

    return HostedService(settings=settings)
