"""Where the YAML files are, beside the package or inside it, and which names there are."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

from sd35bench import plugins
from sd35bench.errors import ConfigError

GROUPS = ("model", "backend", "prompts", "metric", "profile", "experiment")


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


def file_state(path: Path) -> tuple[str, int, int, int]:
    """A file's path, size in bytes, time of change in ns and inode. Raises: OSError."""
    found = path.stat()
    return str(path), found.st_size, found.st_mtime_ns, found.st_ino


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
