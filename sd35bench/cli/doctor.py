"""`sd35bench doctor`: what works on this machine, what does not, and what to do about it.

Every line was tried, not guessed: versions are read, each backend's own `probe` is asked, weights
are hashed. A backend or a model that is new needs no change here.
"""

import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sd35bench import plugins, words
from sd35bench.cli.output import Answer, console
from sd35bench.cli.parser import Command, Given
from sd35bench.errors import ConfigError, SD35BenchError

if TYPE_CHECKING:
    from sd35bench.backends.base import Probe

PACKAGES = (
    "sd35bench",
    "torch",
    "diffusers",
    "transformers",
    "open-clip-torch",
    "torchmetrics",
    "hydra-core",
)
METRICS = ("inception", "clip", "dinov2", "lpips")
MOST_GPUS = 16
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
LONG_REMEDY = 160
WIDEST_NAME = 30
STATES = {True: "[green]ok[/green]", False: "[red]broken[/red]", None: ""}


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that was tried.

    `ok`: ``None`` with a remedy is something optional that is absent, without one a mere fact.
    """

    group: str
    name: str
    ok: bool | None
    detail: str
    remedy: str | None = None

    @property
    def state(self) -> str:
        """The word for it in the table, in rich's markup."""
        absent = self.ok is None and self.remedy is not None
        return "[yellow]absent[/yellow]" if absent else STATES[self.ok]


def doctor(given: Given) -> Answer:
    """Try everything and print a table. Exit code 0 whatever is found.

    Raises: ConfigError for an argument that names nothing.
    """
    wanted = given.words[0] if given.words else ""
    extra = given.config_dir
    _refuse_unknown(wanted, extra)
    tried = [*_machine(), *_packages(), *_devices(), *_plugins(wanted)]
    tried += [*_backends(wanted, extra), *_models(wanted, extra), *_metrics(wanted)]
    checks = [c for c in (*tried, _browser()) if wanted in c.name]
    if not given.as_json:
        _print(console(), checks, in_full=bool(wanted))
    failed = [c.name for c in checks if c.ok is False]
    document = {"ok": not failed, "failed": failed, "checks": [asdict(c) for c in checks]}
    return Answer(document=document)


def _refuse_unknown(wanted: str, extra: Path | None) -> None:
    """Refuse a name that no check can have, before torch is loaded. Raises: ConfigError."""
    from sd35bench.config import choices

    devices = ("cpu", "cuda", *(f"cuda:{index}" for index in range(MOST_GPUS)))
    named = [f"{group} {name}" for group in ("backend", "model") for name in choices(group, extra)]
    named += [f"plug-in {package}" for package in plugins.packages()]
    named += [f"metric {name}" for name in METRICS]
    names = ("machine", "disk", *PACKAGES, *devices, "chromium", *named)
    if not any(wanted in name for name in names):
        raise ConfigError(f"doctor {wanted}: nothing is named so; see sd35bench doctor")


def _machine() -> Iterator[Check]:
    cores = len(os.sched_getaffinity(0))
    free_gb = shutil.disk_usage(Path.cwd()).free / 1e9
    detail = f"Python {platform.python_version()}, {platform.machine()}, {cores} cores"
    yield Check(group="machine", name="machine", ok=None, detail=detail)
    yield Check(
        group="machine",
        name="disk",
        ok=free_gb > 1,
        detail=f"{words.number(free_gb, 0)} GB free here",
        remedy=None if free_gb > 1 else "free some space, or give results_dir=FOLDER elsewhere",
    )


def _packages() -> Iterator[Check]:
    for name in PACKAGES:
        try:
            yield Check(group="packages", name=name, ok=True, detail=version(name))
        except PackageNotFoundError:
            remedy = "make setup" if name == "sd35bench" else f"pip install {name}"
            yield Check(
                group="packages", name=name, ok=False, detail="not installed", remedy=remedy
            )


def _devices() -> Iterator[Check]:
    try:
        import torch

        from sd35bench.backends.probes import cpu_features
    except ImportError as exc:
        remedy = "pip install torch"
        yield Check(group="devices", name="cpu", ok=False, detail=str(exc), remedy=remedy)
        return
    features = cpu_features()
    detail = ", ".join(features) if features else "no vector extensions that torch knows"
    yield Check(group="devices", name="cpu", ok=None, detail=detail)
    if not torch.cuda.is_available():
        detail = "no CUDA device; device=auto is the CPU"
        yield Check(group="devices", name="cuda", ok=None, detail=detail)
        return
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        detail = f"{found.name}, {words.size_in(found.total_memory, 'GiB', 0)}"
        yield Check(group="devices", name=f"cuda:{index}", ok=True, detail=detail)


def _plugins(wanted: str) -> Iterator[Check]:
    """What installed packages add; each is imported, and held against the base class of its kind.

    A name of the package's own is the package's own: a plug-in of that name is never used.
    """
    for package, added in plugins.packages().items():
        if wanted not in f"plug-in {package}":
            continue
        try:
            for said in added:
                _check_plugin(*said.split(" ", 1))
        except ConfigError as exc:
            yield Check(
                group="plug-ins",
                name=f"plug-in {package}",
                ok=False,
                detail=str(exc),
                remedy=f"update {package}, or pip uninstall {package}",
            )
        else:
            detail = ", ".join(added)
            yield Check(group="plug-ins", name=f"plug-in {package}", ok=True, detail=detail)


def _check_plugin(group: str, name: str) -> None:
    """Import one plug-in. Raises: ConfigError."""
    from sd35bench.analysis.facts import METRICS as OWN_METRICS
    from sd35bench.backends.base import KINDS, Backend
    from sd35bench.evaluations import EVALUATIONS_PER_STEP, Sampler
    from sd35bench.metrics.base import Metric
    from sd35bench.prompts import READERS, PromptSet
    from sd35bench.remote.providers import PROVIDERS
    from sd35bench.remote.providers.base import Provider

    own: dict[str, tuple[Any, type]] = {
        "backends": (KINDS, Backend),
        "metrics": (OWN_METRICS, Metric),
        "prompts": (READERS, PromptSet),
        "providers": (PROVIDERS, Provider),
        "samplers": (EVALUATIONS_PER_STEP, Sampler),
    }
    known, base = own.get(group, ((), object))
    if name in known:
        raise ConfigError(f"{group} {name}: this name is sd35bench's own; choose another")
    plugins.load_class(group, name, base)


def _backends(wanted: str, extra: Path | None) -> Iterator[Check]:
    """Ask the variants' classes, with the variants' options, whether they could run here."""
    from omegaconf import OmegaConf

    from sd35bench.backends.base import Probe, backend_class
    from sd35bench.config import choices, compose
    from sd35bench.remote.providers import is_provider

    for name in (n for n in choices("backend", extra) if wanted in f"backend {n}"):
        conf: Any = OmegaConf.to_container(compose([f"backend={name}"], extra).backend)
        try:
            found = (
                _service(conf["kind"])
                if is_provider(conf["kind"])
                else backend_class(conf["kind"]).probe(conf["options"])
            )
        except ConfigError as exc:
            remedy = f"fix configs/backend/{name}.yaml, or what its kind names"
            found = Probe(ok=False, detail=str(exc), remedy=remedy)
        except Exception as exc:  # whatever a library does when it is half installed
            detail = f"{type(exc).__name__}: {exc}"
            found = Probe(ok=False, detail=detail, remedy="make setup (or pip install -e .)")
        yield Check(
            group="backends",
            name=f"backend {name}",
            ok=found.ok,
            detail=found.detail,
            remedy=found.remedy,
        )


def _service(name: str) -> "Probe":
    """Say where a hosted service is and whether its key is set; nothing is sent to it."""
    from sd35bench.backends.base import Probe
    from sd35bench.remote.key import read_key
    from sd35bench.remote.providers import provider_class

    provider = provider_class(name)
    where = f"{provider.base_url}, or remote.base_url"
    if not os.environ.get(provider.key_variable, "").strip():
        remedy = f"put its key into {provider.key_variable}, or give remote.key_file=FILE"
        return Probe(ok=None, detail=f"{where}; no key in the environment", remedy=remedy)
    try:
        read_key(provider.key_variable, None)
    except ConfigError as exc:
        remedy = f"correct or unset {provider.key_variable}"
        return Probe(ok=False, detail=f"{where}; {exc}", remedy=remedy)
    detail = f"{where}; the key is in {provider.key_variable}, not tried: doctor calls nobody"
    return Probe(ok=True, detail=detail)


def _models(wanted: str, extra: Path | None) -> Iterator[Check]:
    from sd35bench.architectures import architecture_names
    from sd35bench.config import choices, compose

    shapes = architecture_names()
    for name in (n for n in choices("model", extra) if wanted in f"model {n}"):
        ok, detail, remedy = _weights(compose([f"model={name}"], extra).model)
        if name in shapes and ok is not True:
            detail += "; model.weights=random needs none"
        yield Check(group="models", name=f"model {name}", ok=ok, detail=detail, remedy=remedy)


def _weights(model: Any) -> tuple[bool | None, str, str | None]:
    """Look for a model's weights: state, what was found, what to do."""
    from sd35bench.loading.checkpoint import find_checkpoint, weights_digest

    if model.hosted_only is not None:
        return None, f"hosted only: {model.hosted_only}", None
    try:
        folder = find_checkpoint(model.name, model.path, model.hub_id, gated=model.gated)
        digest = weights_digest(folder)
    except SD35BenchError as exc:
        # Only the package's own weights are something to expect here.
        remedy = str(exc).removeprefix(f"model={model.name}: ")
        return (False if model.hub_id is None else None), "no weights here", remedy
    return True, f"{_short(folder)}, digest {digest[:12]}", None


def _metrics(wanted: str) -> Iterator[Check]:
    """Look for the weights of what judges images; nano's own come with the package."""
    from sd35bench.errors import MetricError
    from sd35bench.metrics.clip_score import DEFAULT_LABEL
    from sd35bench.metrics.dinov2 import FAMILY, Dinov2
    from sd35bench.metrics.extractors import Inception, clip_extractor
    from sd35bench.metrics.lpips import LPIPS_REMEDY, find_lpips

    def lpips() -> str:
        found = find_lpips(None)
        if found is None:
            raise MetricError(LPIPS_REMEDY)
        return f"alexnet-{found.digest}"

    named: dict[str, tuple[str, Callable[[], str]]] = {
        "inception": ("FID and KID of the literature", lambda: Inception().name),
        "clip": ("CLIP-score", lambda: clip_extractor(DEFAULT_LABEL, None, None).name),
        FAMILY: ("FID and KID on DINOv2 features", lambda: Dinov2().name),
        "lpips": ("LPIPS in drift", lpips),
    }
    for name in (n for n in METRICS if wanted in f"metric {n}"):
        use, find = named[name]
        try:
            ok, detail, remedy = True, f"{use}: {find()}", None
        except MetricError as exc:
            ok, detail, remedy = None, f"{use}: no weights here", str(exc)
        yield Check(group="metrics", name=f"metric {name}", ok=ok, detail=detail, remedy=remedy)


def _browser() -> Check:
    """The report needs none; its tests do."""
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        try:
            from playwright.sync_api import sync_playwright

            with sync_playwright() as tools:
                path = Path(tools.chromium.executable_path)
            found = str(path) if path.exists() else None
        except Exception:  # playwright's own errors have no common base before it has started
            found = None
    if found is None:
        return Check(
            group="tests",
            name="chromium",
            ok=None,
            detail="not found; only the report's browser tests need it",
            remedy="playwright install --with-deps chromium",
        )
    return Check(group="tests", name="chromium", ok=True, detail=found)


def _print(out: Console, checks: Sequence[Check], in_full: bool) -> None:
    """One table by groups, then what to do, each remedy once, then the count."""
    out.print(_table(checks))
    remedies: dict[str, list[str]] = {}
    for check in checks:
        if check.remedy is not None:
            short = check.remedy if in_full or len(check.remedy) <= LONG_REMEDY else None
            names = remedies.setdefault(short or f"steps: {plugins.command('doctor NAME')}", [])
            names.append(_own_name(check))
    if remedies:
        out.print("\n[bold]What to do[/bold]")
    for remedy, names in remedies.items():
        numbered = re.sub(r" \((\d)\) ", r"\n    \1. ", remedy)  # a step a line, to be copied
        out.print(f"  [bold]{escape(', '.join(names))}[/bold]: {escape(numbered)}", soft_wrap=True)
    out.print(f"\n{_count(checks)}")


def _table(checks: Sequence[Check]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    widest = max(len(_own_name(c)) for c in checks) + 2
    table.add_column(overflow="fold", min_width=min(widest, WIDEST_NAME))
    table.add_column(no_wrap=True, min_width=6)
    table.add_column(overflow="fold")
    for group, members in groupby(checks, key=lambda check: check.group):
        table.add_row(f"[bold]{group}[/bold]")
        for check in members:
            table.add_row(f"  {escape(_own_name(check))}", check.state, escape(check.detail))
    return table


def _own_name(check: Check) -> str:
    """The name without the group that stands above it."""
    return check.name.removeprefix(f"{check.group.removesuffix('s')} ")


def _count(checks: Sequence[Check]) -> str:
    backends = [c for c in checks if c.group == "backends"]
    working = sum(c.ok is True for c in backends)
    broken = [_own_name(c) for c in checks if c.ok is False]
    said = f"{working} of {len(backends)} backends run here. " if backends else ""
    if broken:
        return f"{said}[red]Broken: {escape(', '.join(broken))}.[/red]"
    return f"{said}Nothing that should be here is broken."


def _short(folder: Path) -> str:
    home = str(Path.home())
    text = str(folder)
    return f"~{text.removeprefix(home)}" if text.startswith(f"{home}/") else text


COMMANDS = {
    "doctor": Command(
        call=doctor,
        words=("[NAME]",),
        about="""NAME keeps only the lines whose name contains it, and gives their remedies in
full. States: ok; broken (should work and does not); absent (optional, and not on this machine).
Nothing is loaded, downloaded or changed. The exit code is 0 whatever is found; --json has it under
"ok".""",
        examples="""
sd35bench doctor
sd35bench doctor compile
sd35bench doctor sd35-medium
sd35bench doctor --json | jq '.checks[] | select(.ok == false)'
""",
    )
}
