"""What a YAML file of somebody else may not carry: anything that Hydra would run.

Hydra makes objects of whatever a `hydra` section names under `_target_` (callbacks, launchers), at
every start and with --dry-run too, and OmegaConf's resolvers read the environment. A configuration
folder is data here: files are looked at before Hydra reads them.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import yaml

from sd35bench.errors import ConfigError

RESOLVERS = ("oc.select",)
"""Resolvers that a file may use: they read other fields, and nothing else."""

_WHY = "a configuration folder sets fields and runs nothing; leave it out"
_HYDRA = re.compile(r"(?:^|[\s/@.:])hydra(?:$|[\s/@.:])")
_INSTANTIATED = ("_target_", "_partial_", "_args_", "_recursive_", "_convert_")
_PACKAGE = re.compile(r"#\s*@package\s+(\S+)")
_RESOLVER = re.compile(r"\$\{\s*([^{}:$]*?)\s*:|\$\{[^{}:]*(\$\{)")


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
