"""A Hydra sweeper that loads each backend once, however many points a sweep has.

Hydra's own sweeper makes one job per point. Here comma lists on request fields become the
`axes` of a job, and only what decides a load (model, backend, threads and their options) makes
jobs of its own. So `-m backend=eager,compile steps=4,16 cfg=1,4` is two jobs of four settings,
each with one worker process, and any Hydra launcher can take the jobs elsewhere.

Every job is composed and validated before the first one starts.
"""

import importlib
import importlib.util
import itertools
import os
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.core.utils import JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from pydantic import create_model

from sd35bench.config.compose import CONFIG_NAME, explained, hydra_session, search_path
from sd35bench.config.files import choices, group_file
from sd35bench.config.models import AXES, AXES_CONF, SWEEPER_MODULE, Conf, read
from sd35bench.config.overrides import LOAD_AXES, OWN_INPUTS, parse, sweep_values
from sd35bench.errors import ConfigError, JobsLost, StoreError, nearest
from sd35bench.fields import SIZE
from sd35bench.remote.inputs import IMAGE

NOISE_BATCH = 8
_OURS = ("sd35bench", "builtins", "hydra", "omegaconf")
"""Whose exceptions are errors; a launcher's own say that a job of it ended without an answer."""

REQUEST_AXES = tuple(name for name in AXES if name not in LOAD_AXES)
_LISTED = ("optional_backends", "models_with_images", "companions", "nano_companions")
_NAMES: Any = dict.fromkeys(_LISTED, (list[str], ...))
_SWEEP: Any = create_model("SweepConf", __base__=Conf, axes=(AXES_CONF, ...), **_NAMES)
"""What a sweep reads before its jobs are composed: axes, and lists of names."""

Task = Callable[[DictConfig], Any]
_extra: ContextVar[Path | None] = ContextVar("extra", default=None)
"""The user's own folder of YAML files, while Hydra sweeps and makes the sweeper."""


def sweep(
    task: Task, overrides: Sequence[str], extra: Path | None = None, root: str = CONFIG_NAME
) -> list[Any]:
    """Run Hydra's multirun with our sweeper; returns what the jobs returned, in order.

    `extra` is a folder with YAML files of the user's own, `root` the primary file's name.

    Raises: ConfigError for what Hydra refuses; the task's own exceptions pass.
    """
    token = _extra.set(extra)
    try:
        with hydra_session(extra) as hydra, explained():
            _register()
            return hydra.multirun(
                config_name=root,
                task_function=task,
                overrides=[*overrides, *search_path(extra)],
                with_log_configuration=False,
            )
    finally:
        _extra.reset(token)


def _register() -> None:
    """Let Hydra take our sweeper for a plugin.

    It looks plugins up by a full name that must be under `hydra_plugins.`. A mapped package of
    that name is not found in an editable installation, so this module gets an alias in it. The
    class keeps its own name: launchers pickle it, and the far side knows only that one.
    """
    package, _, name = SWEEPER_MODULE.partition(".")
    try:
        parent = importlib.import_module(package)
    except ImportError:  # no Hydra plugin is installed
        parent = types.ModuleType(package)
        parent.__path__ = []
        sys.modules[package] = parent
    this = sys.modules[__name__]
    sys.modules[SWEEPER_MODULE] = this
    setattr(parent, name, this)
    plugins = Plugins.instance()
    plugins.register(GroupingSweeper)
    plugins.class_name_to_class[f"{SWEEPER_MODULE}.GroupingSweeper"] = GroupingSweeper


class GroupingSweeper(Sweeper):
    """Launches one job per load; see the module."""

    def __init__(self) -> None:
        """Hydra calls `setup` next."""
        self.hydra_context: HydraContext | None = None
        self.config: DictConfig | None = None
        self.launcher: Launcher | None = None

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Take what Hydra composed and make the launcher that it names."""
        self.hydra_context, self.config = hydra_context, config
        self._task = task_function
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> list[Any]:
        """Validate all jobs, launch them, and return what they returned, in order.

        A task function with an attribute `prepare` gets the composed configurations first; if it
        returns True, nothing is launched. Raises: JobsLost where the launcher lost a job.
        """
        assert self.hydra_context is not None
        assert self.config is not None
        assert self.launcher is not None
        read(_SWEEP, OmegaConf.masked_copy(self.config, list(_SWEEP.model_fields)))
        jobs = job_overrides(arguments, self.config)
        jobs += noise_overrides(jobs, _noise_floor(arguments, self.config))
        jobs += companion_overrides(arguments, self.config)
        loader = self.hydra_context.config_loader
        configs = [_own(loader.load_sweep_config(self.config, list(job))) for job in jobs]
        prepare = getattr(self._task, "prepare", None)
        if prepare is not None and prepare(configs):
            return []
        try:
            with folders_made():  # Hydra makes its own before it calls the task
                returned = self.launcher.launch(jobs, initial_job_idx=0)
        except Exception as exc:
            if type(exc).__module__.partition(".")[0] in _OURS:
                raise
            said = (str(exc).strip().splitlines() or [""])[0]
            raise JobsLost(f"{type(exc).__name__}: {said}") from exc
        return [_value(job) for job in returned]


@contextmanager
def folders_made() -> Iterator[None]:
    """Say of a folder that cannot be made how to name another. Raises: StoreError."""
    try:
        yield
    except OSError as exc:
        raise StoreError(
            f"cannot write {exc.filename}: {exc.strerror}; give another results_dir="
        ) from exc


def job_overrides(arguments: Sequence[str], config: DictConfig) -> list[list[str]]:
    """Turn a command line into one list of overrides per load.

    `config` is the composed experiment, whose axes the command line overrides: a single value on
    the command line replaces an axis of the experiment.
    """
    parsed = [parse(text) for text in arguments]
    given = {override.get_key_element().lstrip("+") for override in parsed}
    shared: list[str] = []
    loads: list[list[str]] = []
    for override in parsed:
        name = override.get_key_element().lstrip("+")
        if name in LOAD_AXES:
            loads.append(list(dict.fromkeys(f"{name}={text}" for text in _texts(override))))
        elif name.startswith(OWN_INPUTS):
            values = ",".join(_texts(override)) if override.is_sweep_override() else ""
            shared += [] if values else [str(override.input_line)]
            shared.append(f"++axes.{name}=[{values}]")
        elif name in REQUEST_AXES and override.is_sweep_override():
            shared.append(f"axes.{name}=[{','.join(_texts(override))}]")
        else:
            shared.append(str(override.input_line))
            if name in REQUEST_AXES:
                shared.append(f"axes.{name}=[]")
    sides = given & {*SIZE}
    if sides and "aspect_ratio" not in given:
        shared += ["aspect_ratio=null", "axes.aspect_ratio=[]"]
    if "aspect_ratio" in given and not sides:
        shared += ["width=null", "height=null", "axes.width=[]", "axes.height=[]"]
    for name in LOAD_AXES:
        if name not in given:
            values = list(config.axes[name])
            if name == "backend":
                values += [b for b in config.optional_backends if _installed(b)]
            if name == "model" and any(each.startswith(IMAGE) for each in given):
                values += list(config.models_with_images)
            if values:
                loads.append([f"{name}={value}" for value in values])
    return [[*load, *shared] for load in itertools.product(*loads)]


def companion_overrides(arguments: Sequence[str], config: DictConfig) -> list[list[str]]:
    """Jobs of the experiments that an experiment names as its companions.

    One grid cannot hold every question of a study; companions are more grids, in the same study,
    under the same command line. `nano_companions` need what only nano's prompts have.
    """
    names = list(config.companions)
    if config.prompts.kind == "nano":
        names += config.nano_companions
    found = []
    for name in names:
        own = [f"experiment={name}" if _names_experiment(a) else a for a in arguments]
        found += job_overrides(own, config)
    return found


def _names_experiment(argument: str) -> bool:
    return parse(argument).get_key_element() == "experiment"


def _installed(backend: str) -> bool:
    """Whether the packages that a backend's own YAML requires are there; nothing is imported."""
    path = group_file("backend", backend, _extra.get())
    conf: Any = {} if path is None else OmegaConf.load(path)
    return all(
        importlib.util.find_spec(package) is not None for package in conf.get("requires", ())
    )


def noise_overrides(jobs: Sequence[Sequence[str]], backend: str | None) -> list[list[str]]:
    """Jobs that run `backend` once more with another thread count, and in batches.

    How far these move its images is the noise floor: what another backend moves less than that
    is not a difference between the two.
    """
    if backend is None:
        return []
    others: dict[tuple[str, ...], list[str]] = {}
    for job in jobs:
        shared = [text for text in job if not text.startswith(("backend=", "threads="))]
        others.setdefault(tuple(shared), shared)
    variants = (
        [f"backend={backend}", "threads=1"],
        [f"backend={backend}", f"batch_size={NOISE_BATCH}", "axes.batch_size=[]", "timed_limit=0"],
    )
    if len(os.sched_getaffinity(0)) == 1:
        variants = variants[1:]  # one core has one thread count
    variants = tuple([*head, "starts=1"] for head in variants)  # one process shows the drift
    found = []
    for shared, head in itertools.product(others.values(), variants):
        own = {text.partition("=")[0] for text in head}
        found.append([*head, *(text for text in shared if text.partition("=")[0] not in own)])
    return found


def _noise_floor(arguments: Sequence[str], config: DictConfig) -> str | None:
    """The field's value: the command line's, else the experiment's."""
    given = [o.value() for o in map(parse, arguments) if o.get_key_element() == "noise_floor"]
    value: Any = given[-1] if given else config.noise_floor
    known = choices("backend", _extra.get())
    if value is not None and value not in known:
        raise ConfigError(
            f"noise_floor={value}: must be one of {', '.join(known)}{nearest(value, known)}"
        )
    return value


def _own(config: DictConfig) -> DictConfig:
    """Take Hydra's node out of a job's configuration: so the task function gets it."""
    with read_write(config), open_dict(config):
        del config["hydra"]
    return config


def _texts(override: Override) -> list[str]:
    """The values as text that Hydra parses back to the same values."""
    if override.is_sweep_override():
        sweep_values(override)  # refuses what has no single values
        return [str(text) for text in override.sweep_string_iterator()]
    return [override.get_value_element_as_str()]


def _value(job: Any) -> Any:
    if job.status is JobStatus.FAILED:
        raise job._return_value  # the property would print to stderr first
    return job.return_value
