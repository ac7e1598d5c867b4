"""The table of docs/scale.md is made of what was kept, the latest of each command and size."""

import json
import sys

import pytest

from tests import scale


def measured(command: str, records: int, wall_s: float, cpu_s: float) -> dict:
    return {
        "commit": "abc1234", "at": "2026-11-30 18:00", "records": records, "command": command,
        "wall_s": wall_s, "cpu_s": cpu_s, "peak_mb": 1000.0, "page_mb": None, "canary": 50.0,
        "load": 1.0,
    }  # fmt: skip


def test_the_page_gets_the_latest_of_each_command_by_size(tmp_path, monkeypatch, capsys):
    kept = [measured("show", 1_000_000, 9.0, 4.0), measured("show", 1_000_000, 6.0, 4.5)]
    kept += [measured("recommend", 1_000_000, 40.0, 31.0), measured("show", 1_000, 9.0, 9.0)]
    (tmp_path / scale.KEPT).write_text("".join(json.dumps(each) + "\n" for each in kept))
    page = tmp_path / "scale.md"
    page.write_text(f"before\n{scale.MARKS[0]}old\n{scale.MARKS[1]}\nafter\n")
    given = ["--records", "--folder", str(tmp_path), "--page", str(page)]
    monkeypatch.setattr(sys, "argv", ["scale", *given])
    assert scale.main() == 0
    rows = [line.split(" | ") for line in page.read_text().splitlines() if "| 1," in line]
    assert [(row[0], row[1], row[2], row[7].strip(" |")) for row in rows] == [
        ("| 1,000", "show", "9.0", ""),
        ("| 1,000,000", "show", "6.0", "5 s: kept by CPU seconds"),
        ("| 1,000,000", "recommend", "40.0", "30 s: missed"),
    ]
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text


@pytest.mark.parametrize("only", [["show"], []])
def test_only_some_commands_are_measured_where_some_are_asked_for(tmp_path, monkeypatch, only):
    (tmp_path / "n200").mkdir()
    (tmp_path / "n200" / "study.json").touch()
    monkeypatch.setattr(scale, "PAGES", {})
    monkeypatch.setattr(scale, "append_one", lambda path: None)
    monkeypatch.setattr(scale, "canary", lambda: 1.0)
    monkeypatch.setattr(scale, "measure", lambda command, folder: {"wall_s": 1.0})
    found = [each["command"] for each in scale.measure_all(tmp_path, [200], only)]
    assert found == (only or list(scale.commands(tmp_path)))
