"""What every test shares: which ones are too long for `make check`."""

import functools
import gc
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml

import sd35bench.export.artifact as artifact
from sd35bench import plugins
from sd35bench.cli import main
from sd35bench.machine import measure
from tests import preforked
from tests.studies import in_process

HERE = Path(__file__).parent
MODEL = (
    "backends",
    "core",
    "export",
    "loading",
    "nano",
    "test_kill.py",
    "test_faults.py",
    "test_notebook.py",
    "test_cli.py",
    "test_cli_verbs.py",
    "test_compare.py",
    "test_validity_runs.py",
    "test_tune_cli.py",
    "test_demo.py",
)
LONGEST = ("golden", "test_notebook.py")
RULES = (HERE / "rules.js").read_text(encoding="utf-8")
CHROMIUM_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def pytest_configure() -> None:
    """Keep each parallel worker, and the processes it starts, to one core.

    Two threads that share their cores with another test wait for each other at every barrier: the
    notebook's 30 s became 300 s. No canary is read, but where a test asks for it: what the suite
    itself disturbs would be timed again, and left out of latencies. No lease either, or tests that
    run side by side would wait for each other.
    """
    # Python looks for garbage at every 700 new objects, a tenth of what small objects cost.
    gc.set_threshold(20_000, 20, 20)
    os.environ.setdefault("SD35BENCH_CANARY", "off")
    os.environ.setdefault("SD35BENCH_LEASES", "off")
    _read_yaml_in_c()
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is not None and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})


def pytest_unconfigure() -> None:
    """Spare pytest's last look for garbage, 2 s over torch: the process ends."""
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_sessionstart() -> Iterator[None]:
    """Have pytest-xdist start its workers here as forks."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return (yield)
    with preforked.forks_of_workers():
        return (yield)


def _read_yaml_in_c() -> None:
    """Let OmegaConf parse with libyaml: the same rules, and a composition takes 30 % less.

    Some 600 compositions are made here, each of 20 files. What is no YAML has other words then.
    """
    from omegaconf import _utils

    plain = yaml.SafeLoader
    yaml.SafeLoader = getattr(yaml, "CSafeLoader", plain)
    loader = _utils.get_yaml_loader()
    yaml.SafeLoader = plain
    _utils.get_yaml_loader = lambda: loader


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what runs the embedded model, or many processes: minutes together, so not in check.

    The longest tests, of 20 to 40 s, go first, so that no worker is left with one at the end.
    """
    for item in items:
        if item.path.relative_to(HERE).parts[0] in MODEL:
            item.add_marker(pytest.mark.model)
    items.sort(key=lambda item: item.path.relative_to(HERE).parts[0] not in LONGEST)


@pytest.fixture(scope="module", autouse=True)
def settled_heap() -> None:
    """Take what lives already out of the collector's sight, before a module starts.

    Closing a backend collects garbage. Over the million objects of torch, diffusers and compiled
    graphs that takes 2 s, hundreds of times; what a test itself made is still looked at.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def no_earlier_flags() -> Iterator[None]:
    """Forget the folders that the last command of a module was given.

    What prints commands names them until the next one runs; a report that a test makes is not one.
    """
    yield
    plugins.keep_flags(None, None)


@pytest.fixture(scope="session", autouse=True)
def own_artifacts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep exported models in a folder of this session, which its parallel workers share."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "artifacts"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(artifact, "artifact_root", lambda: root)
        yield


@pytest.fixture(scope="session", autouse=True)
def known_machine() -> Iterator[None]:
    """Ask git, the packages' metadata and the trusted certificates once in a session.

    Otherwise they take 0.2 s of each run, and 0.07 s of each HTTP client.
    """
    with pytest.MonkeyPatch.context() as patch:
        for module, name in (
            (measure, "_commit"),
            (measure, "_version"),
            (httpx2._transports.default, "create_ssl_context"),
        ):
            patch.setattr(module, name, functools.cache(getattr(module, name)))
        yield


@pytest.fixture(scope="session", autouse=True)
def no_power_cuts() -> Iterator[None]:
    """Let fsync return at once: what a killed process wrote is there without it.

    It is a tenth of a study's CPU time, and most of its waiting. Tests of it put theirs on top.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture
def fakes_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have runs of the fake backend compute in this process, for a test of something else."""
    in_process.fakes_here(monkeypatch)


@pytest.fixture(scope="module")
def all_fakes_here() -> Iterator[None]:
    """Do so for a whole module and its fixtures."""
    with pytest.MonkeyPatch.context() as patch:
        in_process.fakes_here(patch)
        yield


@pytest.fixture
def forked_python() -> Iterator[None]:
    """Have `subprocess` fork Python commands, in a test of what becomes of them."""
    with preforked.forks_of_python():
        yield


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium; a module's own, as its event loop would be in the way of other tests."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium on PATH: apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_FLAGS)
        yield launched
        launched.close()


class Tabs:
    """Pages for one test after another: a new one costs Chromium 0.6 s of CPU, of 1.5 s in all."""

    def __init__(self, browser: Any) -> None:
        self._browser, self._context = browser, browser.new_context()
        self._free: list[Any] = []
        self._taken: list[tuple[Any, dict[str, Callable]]] = []

    def take(
        self, hears: dict[str, Callable], width: int = 1280, height: int = 800, **options: Any
    ) -> Any:
        """An empty page that tells what it `hears`; one with options is nobody else's."""
        if options:
            page = self._browser.new_page(**options)
        else:
            page = self._free.pop() if self._free else self._context.new_page()
        page.set_viewport_size({"width": width, "height": height})
        for event, hear in hears.items():
            page.on(event, hear)
        self._taken.append((page, hears))
        return page

    def give_back(self) -> None:
        """End what the test's pages do, and have them empty for the next test."""
        for page, hears in self._taken:
            if page.context is not self._context:
                page.close()
                continue
            page.goto("about:blank")
            for event, hear in hears.items():
                page.remove_listener(event, hear)
            page.emulate_media(media="null", color_scheme="null")
            self._free.append(page)
        self._taken.clear()


@pytest.fixture(scope="module")
def tabs(browser: Any) -> Tabs:
    """Pages of this module, for its fixtures to take and to give back."""
    return Tabs(browser)


@pytest.fixture(scope="session")
def faults() -> Callable[[Any], list[str]]:
    """What of an open page breaks a rule of accessibility or its width, in all four looks."""

    def look(page: Any) -> list[str]:
        found = []
        for width, scheme in itertools.product((1280, 400), ("light", "dark")):
            page.set_viewport_size({"width": width, "height": 800})
            page.emulate_media(color_scheme=scheme)
            over = page.evaluate("document.documentElement.scrollWidth - innerWidth")
            broken = page.evaluate(RULES) + [f"too-wide: {over} px"] * (over > 0)
            found += [f"{width} {scheme}: {fault}" for fault in broken]
        return found

    return look


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cores in sight, as in the shell: `pytest_configure` leaves a parallel worker one.

    More threads than cores in sight are refused.
    """
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})


@pytest.fixture
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in an empty folder, so that what is left behind shows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / ".hub"))
    monkeypatch.setenv("PYTHONPATH", str(HERE.parent))


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, Any]]:
    """Call the command with --json; gives exit code and document."""

    def answer(*arguments: str) -> tuple[int, Any]:
        capsys.readouterr()
        code = main([*arguments, "--json"])
        out = capsys.readouterr().out
        assert out.count("\n") == 1, "exactly one line, one document"
        return code, json.loads(out)

    return answer
