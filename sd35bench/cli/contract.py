"""`sd35bench contract`: what every backend must do, checked on somebody else's."""

import contextlib
from collections.abc import Iterator
from typing import Any

from sd35bench import plugins
from sd35bench.cli.output import DONE, FAILED, Answer, console
from sd35bench.cli.parser import Command, Given
from sd35bench.errors import ConfigError, SD35BenchError, nearest

STEPS = 4


def contract(given: Given) -> Answer:
    """Check every backend of a package, or one; exit code 1 where one breaks the contract.

    Raises: ConfigError for a name that is neither, and for wrong settings.
    """
    names = _backends(given)
    out = console(given.as_json)
    found = []
    for name in names:
        out.print(f"backend {name}", markup=False)
        checks = []
        for check, wrong in _checked(given, name):
            checks.append({"check": check, "ok": wrong is None, "detail": wrong})
            said = "ok      " if wrong is None else f"BROKEN  {wrong}; "
            out.say(f"  {said}{check}")
        ok = all(each["ok"] for each in checks)
        found.append({"backend": name, "ok": ok, "checks": checks})
    whole = all(each["ok"] for each in found)
    document = {"package": given.words[0], "ok": whole, "backends": found}
    return Answer(document=document, exit_code=DONE if whole else FAILED)


def _backends(given: Given) -> list[str]:
    """Names of a package's backends, or the one backend that was named. Raises: ConfigError."""
    from sd35bench.config import choices

    asked, extra = given.words[0], given.config_dir
    known = choices("backend", extra)
    packages = plugins.packages()
    if asked not in packages:
        if asked in known:
            return [asked]
        there = [*packages, *known]
        raise ConfigError(
            f"contract {asked}: no installed package that adds to sd35bench, and no backend, has"
            f" this name; packages: {', '.join(packages) or 'none'}{nearest(asked, there)}"
        )
    own = [said.partition(" ")[2] for said in packages[asked] if said.startswith("backends ")]
    if not own:
        raise ConfigError(f"contract {asked}: this package adds no backend; only those have one")
    return own


def _checked(given: Given, name: str) -> Iterator[tuple[str, str | None]]:
    """Load a backend as a run would, in this process, and check it."""
    from sd35bench.backends.base import load_backend
    from sd35bench.backends.contract import Subject, run_contract
    from sd35bench.config import check_overrides, compose, freeze
    from sd35bench.config.overrides import written
    from sd35bench.plan import expand
    from sd35bench.remote.providers import is_provider

    settings = [f"backend={name}", f"steps={STEPS}", "cfg=4", *given.settings]
    settings += [] if any(s.startswith("prompts") for s in settings) else ["prompts.limit=1"]
    check_overrides(settings, False, given.config_dir)
    config = compose(written(settings), given.config_dir)
    if is_provider(config.backend.kind):
        raise ConfigError(f"contract {name}: it calls a hosted service; see docs/providers.md")
    sweep = freeze(config).sweep
    try:
        backend = load_backend(sweep.load)
    except SD35BenchError as exc:
        yield "loads", str(exc)
        return
    except Exception as exc:  # somebody else's code
        yield "loads", f"raised {type(exc).__name__}: {exc}"
        return
    with contextlib.closing(backend):
        yield "loads", None
        tasks: Any = config.backend.tasks
        yield from run_contract(Subject(backend, expand(sweep).trials[0].request), list(tasks))


COMMANDS = {
    "contract": Command(
        call=contract,
        words=("PACKAGE",),
        settings="[NAME=VALUE ...]",
        about="""PACKAGE is an installed package that adds backends, or one backend's name. Each is
loaded in this process, on model=nano unless told otherwise, and makes a few dozen small images.
Exit code 1: a check is broken.""",
        examples="""
sd35bench contract my-package
sd35bench contract mine --config-dir conf --plugin-dir code
sd35bench contract mine model=sd35-medium model.path=models/sd35-medium width=512 height=512
""",
    )
}
