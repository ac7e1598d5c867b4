"""What others add: a class of an installed package, or of the one folder that `--plugin-dir` names.

An installed package names its classes in entry points, a group for each kind of thing (`GROUPS`):

    [project.entry-points."sd35bench.backends"]
    mine = "my_package.backend:MyBackend"

A YAML under `--config-dir` may name one by its place, `kind: my_package.backend:MyBackend`. Code
comes from where somebody put it on purpose and from nowhere else: not from the working folder, not
from the standard library, not from a folder that a YAML names. Nothing is imported before it is
asked for, and a class is used only if it derives from the base class of its kind. A package's own
YAML files are read from its folder `configs/`, as if it was given by `--config-dir`.

Cost: reading entry points of 200 distributions takes about 30 ms, once in a process.
"""

import importlib
import importlib.machinery
import importlib.util
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from sd35bench.errors import ConfigError, nearest

GROUPS = ("backends", "metrics", "prompts", "providers", "samplers", "sinks")
CONFIGS = "configs"
"""The folder of a plug-in package that holds YAML files of its own."""
_PLACE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")

T = TypeVar("T")
_folders: list[Path] = []
_named: dict[tuple[str, str], str] = {}


def use_folder(text: str | None) -> None:
    """Take plug-ins from this folder too, in this process and in workers that it starts.

    Raises: ConfigError where it is no folder, and for the working folder.
    """
    _named.clear()
    wanted = None if text is None else Path(text).resolve()
    if wanted == folder():
        return
    _forget()
    if wanted is None:
        return
    if not wanted.is_dir():
        raise ConfigError(f"--plugin-dir={text}: there is no such folder")
    if wanted == Path.cwd().resolve():
        raise ConfigError(
            f"--plugin-dir={text}: is the working folder, whose files are never run; put plug-ins"
            " in a folder of their own"
        )
    _folders.append(wanted)
    sys.path.append(str(wanted))


def folder() -> Path | None:
    """The folder of `--plugin-dir`, if there is one."""
    return _folders[0] if _folders else None


def given() -> list[str]:
    """What a process that works for this one is to be told: the folder, if there is one."""
    return [str(path) for path in _folders]


_flags: list[str] = []


def keep_flags(config_dir: str | None, plugin_dir: str | None) -> None:
    """Let commands that are printed name these folders too, until the next command runs."""
    named = {"--config-dir": config_dir, "--plugin-dir": plugin_dir}
    _flags[:] = [f"{name}={shlex.quote(text)}" for name, text in named.items() if text is not None]


def command(words: str) -> str:
    """A command to print: what it has to say of the user's own files and code is added here."""
    return " ".join(["sd35bench", words, *_flags])


def _forget() -> None:
    """Let go of the folder of an earlier command, and of the modules that came from it."""
    for old in _folders:
        for name, module in list(sys.modules.items()):
            file = getattr(module, "__file__", None)
            if file is not None and Path(file).is_relative_to(old):
                del sys.modules[name]
        if str(old) in sys.path:
            sys.path.remove(str(old))
    _folders.clear()


def name_place(group: str, name: str, place: str) -> None:
    """Let a name stand for a place, until the next command: a YAML's own name for its `kind`.

    Raises: ConfigError for what is no place, and for a name that an entry point has.
    """
    if not is_place(place):
        raise ConfigError(f"{_field(group)}.kind={place}: must be package.module:Class")
    if name in entry_points(group):
        raise ConfigError(f"{_field(group)} {name}: an installed package has this name")
    _named[group, name] = place


# What installed packages name --------------------------------------------------------------------


def entry_points(group: str) -> dict[str, Callable[[], Any]]:
    """Name → what imports it, of the entry points `sd35bench.<group>`; nothing is imported here.

    A call raises ConfigError, naming package and entry point, where the import fails or where two
    packages use one name.
    """
    found: dict[str, list[metadata.EntryPoint]] = {}
    for point in _points():
        if point.group == f"sd35bench.{group}":
            found.setdefault(point.name, []).append(point)
    return {name: _Loader(group, points) for name, points in sorted(found.items())}


class _Loader:
    """Imports what an entry point names."""

    def __init__(self, group: str, points: Sequence[metadata.EntryPoint]) -> None:
        self._group, self._points = group, points

    def __call__(self) -> Any:
        point = self._points[0]
        places = sorted({f"{p.value} of {_package(p)}" for p in self._points})
        where = f"plug-in {point.name!r} of sd35bench.{self._group}"
        if len(places) > 1:
            raise ConfigError(f"{where}: two packages use this name: {' and '.join(places)}")
        _refuse_shadowed(point.value)
        return _imported(point.value, f"{where} ({places[0]})")


def packages() -> dict[str, list[str]]:
    """Installed package → what it adds, as group and name ("backends mine")."""
    found: dict[str, list[str]] = {}
    for point in _points():
        said = f"{point.group.removeprefix('sd35bench.')} {point.name}"
        found.setdefault(_package(point), []).append(said)
    return {package: sorted(added) for package, added in sorted(found.items())}


def package_configs() -> list[Path]:
    """Folders of YAML files that plug-in packages bring; no package is imported for them."""
    found: dict[Path, None] = {}
    for top in dict.fromkeys(
        point.value.partition(":")[0].partition(".")[0] for point in _points()
    ):
        spec = _spec(top)
        for place in () if spec is None else spec.submodule_search_locations or ():
            if (Path(place) / CONFIGS).is_dir():
                found[Path(place) / CONFIGS] = None
    return list(found)


@cache
def _points_on(path: tuple[str, ...]) -> tuple[metadata.EntryPoint, ...]:
    wanted = {f"sd35bench.{group}" for group in GROUPS}
    found: dict[str, tuple[metadata.EntryPoint, ...]] = {}
    for each in metadata.distributions(path=list(path)):
        points = tuple(p for p in each.entry_points if p.group in wanted)
        if points:
            found.setdefault(each.metadata["Name"], points)  # as Python: the first on the path
    return tuple(point for points in found.values() for point in points)


def _points() -> tuple[metadata.EntryPoint, ...]:
    return _points_on(tuple(_path()))


def _package(point: metadata.EntryPoint) -> str:
    return "?" if point.dist is None else f"{point.dist.metadata['Name']}"


# What a name means -------------------------------------------------------------------------------


def _field(group: str) -> str:
    """The field of a configuration that names a class of this group."""
    return group if group == "prompts" else group.removesuffix("s")


def is_place(kind: str) -> bool:
    """Whether a kind is a place, `package.module:Class`, and not a name."""
    return _PLACE.fullmatch(kind) is not None


def added_names(group: str) -> list[str]:
    """Names that entry points and this command's YAML files add to a group."""
    return sorted({*entry_points(group), *(name for g, name in _named if g == group)})


def load_class(group: str, kind: str, base: type[T], known: Sequence[str] = ()) -> type[T]:
    """Import the class that a kind names. `known` are the package's own names, for the refusal.

    Raises: ConfigError for an unknown kind, for code that is not from an installed package or the
    folder of `--plugin-dir`, for what cannot be imported, and for another class than a `base`.
    """
    kind = _named.get((group, kind), kind)
    where = f"{_field(group)}.kind={kind}"
    added = entry_points(group)
    if is_place(kind):
        _refuse_foreign(kind, where)
        found = _imported(kind, where)
    elif kind in added:
        found = added[kind]()
    else:
        names = sorted({*known, *added_names(group)})
        raise ConfigError(f"{where} is unknown; known: {', '.join(names)}{nearest(kind, names)}")
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ConfigError(
            f"{where}: {getattr(found, '__name__', found)} does not derive from"
            f" {base.__module__}.{base.__qualname__}"
        )
    return found


def load_own(group: str, name: str, base: type[T], places: Mapping[str, str]) -> type[T]:
    """Import the class of a name of ours, `places` has module:class of each, or of a plug-in.

    Raises: ConfigError as `load_class`, ImportError where a module of ours cannot be imported.
    """
    if name not in places:
        return load_class(group, name, base, list(places))
    module, _, found = places[name].partition(":")
    return getattr(importlib.import_module(module), found)


def _imported(place: str, where: str) -> Any:
    """Import an object. Raises: ConfigError, whatever its module raises."""
    module, _, name = place.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except Exception as exc:  # somebody else's code
        raise ConfigError(f"{where}: cannot be imported: {type(exc).__name__}: {exc}") from exc
    return found


def _refuse_foreign(place: str, where: str) -> None:
    """Refuse code that nobody installed and that is not in the plug-in folder."""
    top = place.partition(":")[0].partition(".")[0]
    _refuse_shadowed(place)
    spec = _spec(top)
    own = folder()
    if spec is None:
        there = "" if own is None else f", and not in {own}"
        raise ConfigError(
            f"{where}: no installed package has a module {top!r}{there}; install it, or name the"
            " folder that holds it with --plugin-dir"
        )
    files = [
        Path(p).resolve() for p in (spec.origin, *(spec.submodule_search_locations or ())) if p
    ]
    if own is not None and any(own in file.parents for file in files):
        return
    if own is not None and any((own / name).exists() for name in (top, f"{top}.py")):
        raise ConfigError(f"{where}: {spec.origin} comes before the one in {own}; rename yours")
    if not _is_installed(top, files):
        raise ConfigError(
            f"{where}: module {top!r} ({spec.origin}) belongs to no installed package; install it,"
            " or name its folder with --plugin-dir"
        )


def _is_installed(top: str, files: Sequence[Path]) -> bool:
    """Whether a distribution has a module of this name, or its source is installed as editable."""
    for each in metadata.distributions(path=_path()):
        if top in (each.read_text("top_level.txt") or "").split():
            return True
        record = "\n" + (each.read_text("RECORD") or "")
        if f"\n{top}/" in record or f"\n{top}.py," in record:
            return True
        if any(p.value.partition(":")[0].partition(".")[0] == top for p in each.entry_points):
            return True
        source = _source(each)
        if source is not None and any(source in file.parents for file in files):
            return True
    return False


def _source(each: metadata.Distribution) -> Path | None:
    """The source folder of an editable installation. Source: PEP 610."""
    text = each.read_text("direct_url.json")
    found = {} if text is None else json.loads(text)
    if not found.get("dir_info", {}).get("editable"):
        return None
    return Path(unquote(urlsplit(found["url"]).path)).resolve()


# The working folder is not a place of code -------------------------------------------------------


def _path() -> list[str]:
    """Where Python looks, without the working folder that `python -m` puts first."""
    return sys.path[1:] if _first_is_implied() else list(sys.path)


def _first_is_implied() -> bool:
    first = sys.path[0] if sys.path else "-"
    return first == "" or Path(first).resolve() == Path.cwd().resolve()


def _spec(top: str) -> importlib.machinery.ModuleSpec | None:
    """Where a module is outside the implied working folder; nothing is imported."""
    found = importlib.machinery.PathFinder.find_spec(top, _path())
    return next(filter(None, _other_specs(top)), None) if found is None else found


def _other_specs(top: str) -> Iterator[importlib.machinery.ModuleSpec | None]:
    """What other finders than those of folders say: editable installations have their own."""
    for finder in sys.meta_path:
        if finder is not importlib.machinery.PathFinder:
            yield finder.find_spec(top, None)


def _refuse_shadowed(place: str) -> None:
    """Refuse a module that Python would take from the working folder in place of the installed.

    Raises: ConfigError.
    """
    top = place.partition(":")[0].partition(".")[0]
    if not _first_is_implied():
        return
    here = importlib.machinery.PathFinder.find_spec(top, sys.path[:1])
    there = _spec(top)
    if here is not None and (there is None or here.origin != there.origin):
        raise ConfigError(
            f"{place}: module {top!r} would come from the working folder ({here.origin}), whose"
            " files are never run; start this elsewhere, or install it"
        )
