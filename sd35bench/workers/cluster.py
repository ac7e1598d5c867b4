"""Many machines through Ray: the same chunks on actors, each of which keeps one worker process.

An actor is a worker's host and nothing more: on its node it starts the very process that a local
run starts (`process.py`), so deadlines, the memory limit, leases and the canary are
those of a local worker. The driver asks it batch by batch and alone writes; init images go out and
image files come back as bytes, so that nodes share no disk. A batch costs one call, 1 to 3 ms.

An actor that dies with its node, or is killed, takes an answer with it that may have been made: the
batch is asked for again, of a new actor, and trials are told apart by their keys, so each is kept
once. A worker process that dies on a healthy node is a failure of the trial, as everywhere.
"""

import contextlib
import importlib
import importlib.util
import os
import platform
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from sd35bench import plugins
from sd35bench.errors import ConfigError, MetricError, StoreError, WorkerDied, WorkerLost, nearest
from sd35bench.loading.checkpoint import whole_digest
from sd35bench.machine.measure import asked_device
from sd35bench.plan import Plan
from sd35bench.study.store import Study
from sd35bench.trials import Observer, Price, RunSummary
from sd35bench.types import Load, ModelSpec
from sd35bench.workers.features import FeatureProcess, Spread
from sd35bench.workers.lane import Worker
from sd35bench.workers.leases import claim_cores
from sd35bench.workers.limits import Limits
from sd35bench.workers.process import WorkerProcess, run_plan
from sd35bench.workers.seats import AUTO, Seat, occupies
from sd35bench.workers.worker import Answer, BatchJob, Failed, Ready, Settled

ANSWER_S = 8.0
"""How long an address may take to answer as Ray; Ray itself would try for 47 s."""
PLACE_S = 600.0
"""How long an actor may wait for a node: a cluster that grows takes minutes."""
CHECK_S = 3600.0
"""How long a node may take to hash a model that it has not hashed before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RaySettings:
    """Where the cluster is (``None``: one of this machine's own), and further options.

    `init` are those of `ray.init`, `actor` those of an actor (`num_gpus`, `resources` …).
    """

    address: str | None = None
    init: Mapping[str, Any] = field(default_factory=dict)
    actor: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class RayCluster:
    """The engine of `engine=ray`: `workers` actors, or "auto", as many as the cluster holds."""

    limits: Limits = field(default_factory=Limits)
    price: Price = field(default_factory=Price)
    workers: int | str = AUTO
    settings: RaySettings = field(default_factory=RaySettings)

    @property
    def starts(self) -> int:
        """Worker processes that share a plan."""
        return self.limits.starts

    def prepare(self, plan: Plan, *, dry: bool) -> None:
        """Connect, and refuse what the cluster does not hold; a dry run connects to nothing.

        Raises: ConfigError for an address where no Ray answers, options that Ray does not have,
        more workers than fit, and nodes without the model or with another one.
        """
        _require_ray()
        _check_options(self.settings)
        if not dry:
            _connect(self.settings)
            self.crew(plan)
            _check_nodes(plan.load)

    def crew(self, plan: Plan) -> "RayCrew":
        """The actors for a plan. Raises: ConfigError."""
        _connect(self.settings)
        needs = _needs(plan.load)
        most = _room(needs)
        said = ", ".join(f"{name}={value:g}" for name, value in needs.items())
        if self.workers != AUTO and int(self.workers) > most:
            raise ConfigError(
                f"workers={self.workers}: backend={plan.load.backend.name} needs {said} an actor,"
                f" and this cluster holds {most}; give at most workers={most}"
            )
        if most == 0:
            raise ConfigError(
                f"engine=ray: no node of the cluster has {said} for"
                f" backend={plan.load.backend.name}"
            )
        return RayCrew(int(most if self.workers == AUTO else self.workers), needs, self.settings)

    def run(self, plan: Plan, study: Study, observer: Observer | None = None) -> RunSummary:
        """Make what is missing on the cluster. Raises: as `run_plan`."""
        return run_plan(plan, study, observer, self.limits, self.crew(plan))


@dataclass(frozen=True, slots=True)
class RayCrew:
    """Actors of a cluster, each with the resources that a load needs."""

    size: int
    needs: Mapping[str, float]
    settings: RaySettings

    def measure(self, study: Study, load: Load) -> None:
        """Nothing: this machine's limits say nothing of the nodes'."""

    def hire(self, lane: int, load: Load, limits: Limits) -> Worker:
        """Start an actor where there is room for it, and its worker process."""
        options = {**_actor_defaults(self.needs), **self.settings.actor}
        each = -(-self.size // len(_nodes()))  # actors are spread over the nodes
        return RayWorker(load, limits, options, beside=each - 1)

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Be connected while there is something to do."""
        _connect(self.settings)
        try:
            yield
        finally:
            _ray().shutdown()


class RayWorker:
    """The driver's end of one actor; see `sd35bench.workers.lane.Worker`."""

    def __init__(self, load: Load, limits: Limits, options: Mapping[str, Any], beside: int) -> None:
        """Ask for an actor and wait until a node has started it. Raises: WorkerLost."""
        ray = _ray()
        kind, on_cores = ray.remote(NodeWorker), not options.get("num_gpus")
        told = (load, limits, on_cores, beside, *plugins.given())
        self._actor = kind.options(**options).remote(*told)
        self.node = self._get(self._actor.place.remote(), PLACE_S)

    def load(self) -> Ready | Failed:
        """Load the backend on the node."""
        return self._ask("load")

    def settle(self) -> Settled | Failed:
        """Say that the warm-up is over."""
        return self._ask("settle")

    def run(self, job: BatchJob, deadline_s: float) -> Answer:
        """Run one batch; its init images travel as bytes."""
        inits = tuple(Path(i).read_bytes() if isinstance(i, str) else i for i in job.inits)
        return self._ask("run", replace(job, inits=inits), deadline_s)

    def close(self) -> None:
        """Ask the worker process to end."""
        self._ask("close")

    def stop(self) -> None:
        """End the actor; the thread that waits for it finds it dead."""
        with contextlib.suppress(Exception):  # Ray may be gone before it
            _ray().kill(self._actor)

    def kill(self) -> None:
        """End the actor now, and its process with it; safe to call twice."""
        self.stop()

    def _ask(self, name: str, *arguments: Any) -> Any:
        # No time limit of its own: the node keeps the deadlines, and Ray notices a dead node.
        answer = self._get(self._actor.ask.remote(name, *arguments), None)
        if isinstance(answer, WorkerDied):
            raise answer
        return answer

    def _get(self, promised: Any, timeout_s: float | None) -> Any:
        try:
            return _answer(promised, timeout_s)
        except TimeoutError as exc:
            self.stop()
            raise WorkerLost(f"no node had room for an actor in {PLACE_S:g} s") from exc


class NodeWorker:
    """What an actor is: on its node, the host of one worker process."""

    def __init__(
        self, load: Load, limits: Limits, on_cores: bool, beside: int, plugin_dir: str | None = None
    ) -> None:
        """Take free cores where the backend runs on cores, and start the process.

        `plugin_dir` must be at the same path on the node.
        """
        plugins.use_folder(plugin_dir)
        self._load, self._claim = load, contextlib.ExitStack()
        seat = Seat()
        if on_cores and occupies(load):
            cores = self._claim.enter_context(claim_cores(load.threads))
            seat = Seat(cores=cores, beside=beside)
        self._worker = WorkerProcess(load, limits, seat)
        self._is_loaded = False

    def place(self) -> str:
        """The node's name."""
        return platform.node()

    def ask(self, name: str, *arguments: Any) -> Any:
        """Call the worker process; what it died of is an answer, which keeps its type."""
        if name == "load":
            wrong = model_problem(self._load.model)
            if wrong is not None:
                return WorkerDied(f"node {platform.node()}: {wrong}")
        elif not self._is_loaded:
            return WorkerLost("the actor was started anew, without its load")
        try:
            answer = getattr(self._worker, name)(*arguments)
        except WorkerDied as exc:
            return exc
        self._is_loaded = True
        return answer


class RayFeatures:
    """The driver's end of an actor that embeds images; see `sd35bench.workers.features.Host`."""

    def __init__(self, threads: int, options: Mapping[str, Any]) -> None:
        """Ask for an actor; a node starts it while the first batch is on its way."""
        self._actor = (
            _ray().remote(NodeFeatures).options(**options).remote(threads, *plugins.given())
        )

    def embed(self, key: bytes, name: str, images: Sequence[Any]) -> np.ndarray:
        """Rows [n, d] of one batch. Raises: WorkerDied, MetricError."""
        answer = _answer(self._actor.embed.remote(key, name, images), None)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def kill(self) -> None:
        """End the actor now, and its process with it; safe to call twice."""
        with contextlib.suppress(Exception):  # Ray may be gone before it
            _ray().kill(self._actor)


class NodeFeatures:
    """What such an actor is: on its node, the host of one process that embeds."""

    def __init__(self, threads: int, plugin_dir: str | None = None) -> None:
        """Take free cores and start the process; `plugin_dir` must be there on the node too."""
        plugins.use_folder(plugin_dir)
        self._claim = contextlib.ExitStack()
        self._process = FeatureProcess(threads, self._claim.enter_context(claim_cores(threads)))

    def embed(self, key: bytes, name: str, images: Sequence[Any]) -> Any:
        """Rows of one batch; what stands in their way is an answer, which keeps its type."""
        try:
            return self._process.embed(key, name, images)
        except (WorkerDied, MetricError) as exc:
            return exc


@contextlib.contextmanager
def ray_spread(workers: int | str, threads: int | None, settings: RaySettings) -> Iterator[Spread]:
    """Actors that embed images, each on `threads` cores of its own; connected meanwhile.

    Raises: ConfigError as `RayCluster.prepare`.
    """
    _require_ray()
    _check_options(settings)
    _connect(settings)
    each = len(os.sched_getaffinity(0)) if threads is None else threads
    needs = {"num_cpus": float(each)}
    most = _room(needs)
    count = most if workers == AUTO else int(workers)
    try:
        if not 0 < count <= most:
            raise ConfigError(
                f"workers={workers}: scoring needs num_cpus={each} an actor, and this cluster holds"
                f" {most}; give fewer workers or threads"
            )
        options = {**_actor_defaults(needs), **settings.actor}
        with contextlib.closing(Spread(lambda _: RayFeatures(each, options), count)) as spread:
            yield spread
    finally:
        _ray().shutdown()


def model_problem(model: ModelSpec) -> str | None:
    """Say why a model is not on this machine as it is on the driver's; ``None`` where it is."""
    if not model.path or model.weights == "random":
        return None
    path = Path(model.path)
    components = None if model.components is None else Path(model.components)
    wanted = [("path", path), *((c.kind, Path(c.path)) for c in model.changes)]
    for name, part in [*wanted, *([] if components is None else [("components", components)])]:
        if not part.exists():
            return f"model.{name}={part} is not there; put the same at the same path"
    changes = [(change.kind, change.path, change.weight) for change in model.changes]
    try:
        found = whole_digest(path, components, changes, model.variant)
    except (ConfigError, StoreError, OSError) as exc:
        return f"model.path={path} cannot be read: {exc}"
    if found != model.weights_digest:
        return (
            f"model.path={path} holds other weights (digest {found[:12]}, here"
            f" {model.weights_digest[:12]}); copy the same folder there"
        )
    return None


# The cluster ----------------------------------------------------------------------------------


def _ray() -> Any:
    return importlib.import_module("ray")


def _answer(promised: Any, timeout_s: float | None) -> Any:
    """What an actor answers. Raises: WorkerLost where it is gone, TimeoutError."""
    ray = _ray()
    try:
        return ray.get(promised, timeout=timeout_s)
    except ray.exceptions.GetTimeoutError as exc:
        raise TimeoutError from exc
    except (ray.exceptions.RayActorError, ray.exceptions.RaySystemError) as exc:
        raise WorkerLost(f"the actor's process or its node ended: {_first_line(exc)}") from exc


def _require_ray() -> None:
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("engine=ray: ray is not installed; pip install 'ray>=2.50,<3'")


def _check_options(settings: RaySettings) -> None:
    """Refuse options that `ray.init` or actors do not have. Raises: ConfigError."""
    import inspect

    known = {
        "init": set(inspect.signature(_ray().init).parameters) - {"address", "kwargs"},
        "actor": set(importlib.import_module("ray._common.ray_option_utils").actor_options),
    }
    for group, names in known.items():
        for name in getattr(settings, group):
            if name not in names and not name.startswith("_"):
                raise ConfigError(
                    f"ray.{group}.{name}: Ray has no such option{nearest(name, sorted(names))}"
                )


def _connect(settings: RaySettings) -> None:
    """Join the cluster, or start one on this machine; nothing if that was done.

    Raises: ConfigError where no Ray answers.
    """
    ray = _ray()
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = settings.address
    if address is not None:
        address = _found_address(address)
    given = {"include_dashboard": False} if address is None else {}
    options = {**given, "logging_level": "ERROR", "log_to_driver": True, **settings.init}
    try:
        ray.init(address="local" if address is None else address, **options)
    except (ConnectionError, ValueError, TypeError, RuntimeError) as exc:
        raise ConfigError(f"ray.address={settings.address}: {_first_line(exc)}") from exc


def _found_address(address: str) -> str:
    """HOST:PORT of a cluster that answers. Raises: ConfigError within `ANSWER_S` and a little."""
    if address.startswith("ray://"):
        raise ConfigError(
            f"ray.address={address}: Ray Client is not taken; start this command on a node of the"
            " cluster with ray.address=auto, or give HOST:PORT of its head"
        )
    where = address
    if address == "auto":
        services = importlib.import_module("ray._private.services")
        where = os.environ.get("RAY_ADDRESS") or services.find_bootstrap_address(None)
        if not where:
            raise ConfigError("ray.address=auto: no Ray runs on this machine; start one: ray start")
    host, colon, port = where.rpartition(":")
    if not colon or not port.isdigit():
        raise ConfigError(f"ray.address={address}: must be auto or HOST:PORT")
    try:
        socket.create_connection((host, int(port)), timeout=ANSWER_S / 2).close()
    except OSError as exc:
        raise ConfigError(f"ray.address={address}: nothing answers there ({exc})") from exc
    if not _in_time(lambda: importlib.import_module("ray._raylet").GcsClient(address=where)):
        raise ConfigError(f"ray.address={address}: what answers there is no Ray head")
    return where


def _in_time(call: Callable[[], Any]) -> bool:
    """Whether a call that cannot be given a time limit returns in `ANSWER_S`, without an error."""
    done = threading.Event()

    def run() -> None:
        with contextlib.suppress(Exception):
            call()
            done.set()

    threading.Thread(target=run, daemon=True).start()
    return done.wait(ANSWER_S)


def _first_line(exc: BaseException) -> str:
    return (str(exc).strip().splitlines() or [type(exc).__name__])[0]


def _nodes() -> list[Mapping[str, Any]]:
    return [node for node in _ray().nodes() if node["Alive"]]


def _needs(load: Load) -> dict[str, float]:
    """What an actor reserves: a GPU, or `threads` cores; nothing where nothing is occupied."""
    if not occupies(load):
        return {"num_cpus": 0.0}
    has_gpu = any(node["Resources"].get("GPU") for node in _nodes())
    if asked_device(load, has_gpu) == "cuda":
        return {"num_gpus": 1.0}
    return {"num_cpus": float(load.threads)}


def _room(needs: Mapping[str, float]) -> int:
    """How many actors the nodes hold together."""
    ((name, amount),) = needs.items()
    resource = {"num_gpus": "GPU", "num_cpus": "CPU"}[name]
    each = [node["Resources"].get(resource, 0.0) for node in _nodes()]
    return 1024 if amount == 0 else sum(int(found // amount) for found in each)


def _actor_defaults(needs: Mapping[str, float]) -> dict[str, Any]:
    """An actor's options but for the user's; `max_restarts` 0, as a lane asks for a new actor."""
    return {"num_cpus": 0, **needs, "max_restarts": 0, "scheduling_strategy": "SPREAD"}


def _check_nodes(load: Load) -> None:
    """Refuse a node that would run the load without its model. Raises: ConfigError."""
    if not load.model.path or load.model.weights == "random":
        return
    ray = _ray()
    strategies = importlib.import_module("ray.util.scheduling_strategies")
    needs = _needs(load)
    asked = {}
    for node in _nodes():
        if needs.get("num_gpus") and not node["Resources"].get("GPU"):
            continue
        there = strategies.NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        task = ray.remote(model_problem).options(num_cpus=0, scheduling_strategy=there)
        asked[node["NodeManagerHostname"], node["NodeManagerAddress"]] = task.remote(load.model)
    for (name, address), promised in asked.items():
        wrong = ray.get(promised, timeout=CHECK_S)
        if wrong is not None:
            raise ConfigError(f"node {name} ({address}): {wrong}")
