"""Where the YAML files are, beside the package or inside it, and which names there are."""

from pathlib import Path

from sd35bench.errors import ConfigError

GROUPS = ("model", "backend", "prompts", "metric", "profile", "experiment")


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
    """Names of a group's YAML files, those in the user's own folder `extra` included."""
    folders = [config_dir() / group]
    if extra is not None:
        folders.append(extra / group)
    return sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
