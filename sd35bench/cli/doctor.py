"""`sd35bench doctor`: what works on this machine, what does not, and what to do about it.

Every line was tried, not guessed: versions are read, backends imported, weights hashed.
"""

import importlib
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.table import Table

from sd35bench.cli.output import Answer, console
from sd35bench.errors import ConfigError, SD35BenchError

__all__ = ["Check", "doctor"]

PACKAGES = (
    "sd35bench",
    "torch",
    "diffusers",
    "transformers",
    "open-clip-torch",
    "torchmetrics",
    "hydra-core",
)
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
HELP = """sd35bench doctor: what works on this machine, what does not, and what to install

Usage: sd35bench doctor [--json]

Examples:
  sd35bench doctor
  sd35bench doctor --json | jq '.checks[] | select(.ok == false)'
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that was tried; `ok` is None for what is only said."""

    name: str
    ok: bool | None
    detail: str
    remedy: str | None = None


def doctor(arguments: list[str], as_json: bool) -> Answer:
    """Try everything and print a table. Exit code 0 whatever is found."""
    out = console(as_json)
    if arguments in (["-h"], ["--help"]):
        out.print(HELP, markup=False)
        return Answer()
    if arguments:
        raise ConfigError(f"doctor takes no argument {arguments[0]!r}; see doctor --help")
    checks = [*_machine(), *_packages(), *_devices(), *_backends(), *_models(), _browser()]
    if not as_json:
        out.print(_table(checks))
        for check in checks:
            if check.remedy is not None:
                out.print(f"{check.name}: {check.remedy}", markup=False, soft_wrap=True)
    failed = [c.name for c in checks if c.ok is False]
    document = {"ok": not failed, "failed": failed, "checks": [asdict(c) for c in checks]}
    return Answer(document=document)


def _machine() -> Iterator[Check]:
    cores = len(os.sched_getaffinity(0))
    free_gb = shutil.disk_usage(Path.cwd()).free / 1e9
    detail = f"Python {platform.python_version()}, {platform.machine()}, {cores} cores"
    yield Check(name="machine", ok=None, detail=detail)
    yield Check(
        name="disk",
        ok=free_gb > 1,
        detail=f"{free_gb:.0f} GB free here",
        remedy=None if free_gb > 1 else "free some space, or give results_dir=FOLDER elsewhere",
    )


def _packages() -> Iterator[Check]:
    for name in PACKAGES:
        try:
            yield Check(name=name, ok=True, detail=version(name))
        except PackageNotFoundError:
            remedy = "make setup" if name == "sd35bench" else f"pip install {name}"
            yield Check(name=name, ok=False, detail="not installed", remedy=remedy)


def _devices() -> Iterator[Check]:
    try:
        import torch
    except ImportError as exc:
        yield Check(name="torch", ok=False, detail=str(exc), remedy="pip install torch")
        return
    if not torch.cuda.is_available():
        yield Check(name="cuda", ok=None, detail="no CUDA device; the CPU is used")
        return
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        detail = f"{found.name}, {found.total_memory / 2**30:.0f} GiB"
        yield Check(name=f"cuda:{index}", ok=True, detail=detail)


def _backends() -> Iterator[Check]:
    """Import each backend's module, as loading it would."""
    from omegaconf import OmegaConf

    from sd35bench.backends.base import KINDS
    from sd35bench.config import choices, compose

    for name in choices("backend"):
        kind = str(OmegaConf.select(compose([f"backend={name}"]), "backend.kind"))
        title = f"backend {name}"
        if kind not in KINDS:
            detail = f"kind {kind!r} is not registered"
            yield Check(name=title, ok=False, detail=detail, remedy="fix its YAML")
            continue
        module, _, attribute = KINDS[kind].partition(":")
        try:
            getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as exc:
            yield Check(name=title, ok=False, detail=str(exc), remedy="make setup")
        else:
            yield Check(name=title, ok=True, detail=f"{module} can be imported")


def _models() -> Iterator[Check]:
    from sd35bench.checkpoint import find_checkpoint, weights_digest
    from sd35bench.config import choices, compose

    for name in choices("model"):
        model = compose([f"model={name}"]).model
        try:
            folder = find_checkpoint(name, model.path, model.hub_id)
            digest = weights_digest(folder)
        except SD35BenchError as exc:
            # Only the package's own weights are something to expect here.
            ok = False if model.hub_id is None else None
            yield Check(name=f"model {name}", ok=ok, detail="no weights", remedy=str(exc))
        else:
            detail = f"{folder}, digest {digest[:12]}"
            yield Check(name=f"model {name}", ok=True, detail=detail)


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
            name="chromium",
            ok=None,
            detail="not found; only the report's browser tests need it",
            remedy="playwright install --with-deps chromium",
        )
    return Check(name="chromium", ok=True, detail=found)


def _table(checks: list[Check]) -> Table:
    words = {True: "[green]ok[/green]", False: "[red]missing[/red]", None: "-"}
    table = Table(box=None, pad_edge=False)
    for title in ("what", "state", "found"):
        table.add_column(title, overflow="fold")
    for check in checks:
        table.add_row(check.name, words[check.ok], check.detail)
    return table
