"""The example package as `pip install` leaves it: its files and a dist-info, in a folder."""

import shutil
import tomllib
from pathlib import Path

SOURCE = Path(__file__).parent / "example_plugin"


def install_example(site: Path, source: Path = SOURCE) -> Path:
    """Write package and dist-info of `source` into `site` and return it."""
    project = tomllib.loads((source / "pyproject.toml").read_text())["project"]
    packages = [p.parent for p in sorted(source.glob("*/__init__.py"))]
    for package in packages:
        shutil.copytree(package, site / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    write_dist_info(site, project["name"], project.get("entry-points", {}), packages)
    return site


def write_dist_info(
    site: Path, name: str, points: dict[str, dict[str, str]], packages: list[Path] | None = None
) -> None:
    """What pip writes: metadata, entry points, and a record of files."""
    info = site / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [
        f"[{group}]\n" + "".join(f"{key} = {value}\n" for key, value in named.items())
        for group, named in points.items()
    ]
    (info / "entry_points.txt").write_text("\n".join(lines))
    files = "".join(f"{p.name}/__init__.py,,\n" for p in packages or ())
    (info / "RECORD").write_text(f"{files}{info.name}/RECORD,,\n")
