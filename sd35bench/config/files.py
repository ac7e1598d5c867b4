"""Where the YAML files are, beside the package or inside it, and which names there are.

A YAML file of somebody else may not carry what Hydra would run. Hydra makes objects of whatever a
`hydra` section names under `_target_` (callbacks, launchers), at every start and with --dry-run
too, and OmegaConf's resolvers read the environment. A configuration folder is data here: files are
looked at before Hydra reads them.
"""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import yaml

from sd35bench import plugins
from sd35bench.disk import file_stamp
from sd35bench.errors import ConfigError

GROUPS = ("model", "backend", "prompts", "metric", "profile", "experiment")
RESOLVERS = ("oc.select",)
"""Resolvers that a file may use: they read other fields, and nothing else."""

_WHY = "a configuration folder sets fields and runs nothing; leave it out"
_HYDRA = re.compile(r"(?:^|[\s/@.:])hydra(?:$|[\s/@.:])")
_INSTANTIATED = ("_target_", "_partial_", "_args_", "_recursive_", "_convert_")
_PACKAGE = re.compile(r"#\s*@package\s+(\S+)")
_RESOLVER = re.compile(r"\$\{\s*([^{}:$]*?)\s*:|\$\{[^{}:]*(\$\{)")


@cache
def config_dir() -> Path:
    """Absolute path of the folder that holds run.yaml.

    Raises: ConfigError if the installation lacks it.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package.parent / "configs", package / "configs"):
        if (folder / "run.yaml").is_file():
            return folder
    raise ConfigError(f"configs/run.yaml is neither beside nor in {package}; reinstall sd35bench")


def choices(group: str, extra: Path | None = None) -> list[str]:
    """Names of a group's YAML files, of plug-in packages and the user's own `extra` too.

    A plug-in's entry point without a YAML is a name as well.
    """
    names = {path.stem for folder in folders(extra) for path in (folder / group).glob("*.yaml")}
    return sorted(names | set(unwritten(group)))


def folders(extra: Path | None = None) -> list[Path]:
    """Folders of YAML files: ours, those of plug-in packages, and the user's own."""
    return [config_dir(), *plugins.package_configs(), *([] if extra is None else [extra])]


def group_file(group: str, name: str, extra: Path | None = None) -> Path | None:
    """A choice's YAML file, the first of all folders; ``None`` where it has none."""
    found = (folder / group / f"{name}.yaml" for folder in folders(extra))
    return next((path for path in found if path.is_file()), None)


def file_state(path: Path) -> tuple[str, int, int, int, int]:
    """A file's path, and what changes when it does. Raises: OSError."""
    return str(path), *file_stamp(path.stat())


def own_file(group: str, name: str, extra: Path | None) -> str:
    """The path of a user's own choice, or the name as it is where the folder has none."""
    path = None if extra is None else extra / group / f"{name}.yaml"
    return f"{path}" if path is not None and path.is_file() else name


PLUGIN_GROUPS = {"backend": ("backends", "providers"), "prompts": ("prompts",)}
"""Whose entry points are choices of a group by themselves."""


def unwritten(group: str) -> Iterator[str]:
    """Entry points that no package brings a YAML for."""
    for kind in PLUGIN_GROUPS.get(group, ()):
        for name in plugins.entry_points(kind):
            if group_file(group, name) is None:
                yield name


def check_group_file(path: Path, folder: Path) -> None:
    """Refuse a `hydra` section, a `_target_`, or a resolver that is not in `RESOLVERS`.

    Raises: ConfigError, naming file and line; for a file that is no YAML, too.
    """
    if "hydra" in path.relative_to(folder).parts[:-1]:
        raise ConfigError(f"{path}:1: a folder `hydra` is not read; move its files out")
    try:
        text = path.read_text("utf-8")
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path}: cannot be read: {exc}") from exc
    except (yaml.YAMLError, RecursionError) as exc:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(exc).split())}") from exc
    for number, line in enumerate(text.splitlines(), start=1):
        found = _PACKAGE.search(line)
        if found is not None and "hydra" in found[1]:
            raise ConfigError(f"{path}:{number}: @package {found[1]}: {_WHY}")
    for node, role in _scalars(tree, "", set()):
        wrong = _wrong(str(node.value), role)
        if wrong is not None:
            raise ConfigError(f"{path}:{node.start_mark.line + 1}: {wrong}")


def _scalars(
    node: yaml.Node | None, role: str, seen: set[int]
) -> Iterator[tuple[yaml.ScalarNode, str]]:
    """Every scalar once, with its role: "key", "defaults" (of that list), or "" for a value."""
    if node is None or id(node) in seen:  # an alias may lead back to its own anchor
        return
    seen.add(id(node))
    if isinstance(node, yaml.ScalarNode):
        yield node, role
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _scalars(value, role, seen)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            is_defaults = role == "defaults" or getattr(key, "value", None) == "defaults"
            yield from _scalars(key, "defaults" if role == "defaults" else "key", seen)
            yield from _scalars(value, "defaults" if is_defaults else "", seen)


def _wrong(text: str, role: str) -> str | None:
    """Why a scalar is refused; ``None`` where it is not."""
    if role and _HYDRA.search(text):
        return f"{text[:60]}: {_WHY}"
    if role == "key" and text in _INSTANTIATED:
        return f"{text}: {_WHY}"
    for found in _RESOLVER.finditer(text):
        if found[2] is not None or found[1] not in RESOLVERS:
            name = "of a computed name" if found[2] is not None else repr(found[1])
            return f"{text[:60]}: the resolver {name} is not taken; taken: {', '.join(RESOLVERS)}"
    return None
