"""Golden files on disk, and how outputs differ from them."""

import difflib
from collections.abc import Mapping
from pathlib import Path

EXPECTED = Path(__file__).parent / "expected"
LINES = 40
"""Lines of each difference that are shown."""


def write(made: Mapping[str, str], folder: Path) -> None:
    """Write the texts into a folder, and remove what is no longer made."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.name not in made:
            path.unlink()
    for name, text in made.items():
        (folder / name).write_text(text, encoding="utf-8")


def differences(made: Mapping[str, str]) -> str:
    """Unified differences from the golden files, file by file; empty where there is none."""
    expected = {path.name: path.read_text(encoding="utf-8") for path in EXPECTED.iterdir()}
    parts = []
    for name in sorted(expected.keys() | made.keys()):
        old, new = expected.get(name), made.get(name)
        if old == new:
            continue
        if old is None or new is None:
            parts.append(f"{name}: {'new' if old is None else 'no longer made'}")
            continue
        lines = list(
            difflib.unified_diff(
                old.splitlines(), new.splitlines(), f"expected/{name}", "now", lineterm="", n=2
            )
        )
        more = [f"... {len(lines) - LINES} more lines"] if len(lines) > LINES else []
        parts.append("\n".join([*lines[:LINES], *more]))
    return "\n\n".join(parts)
