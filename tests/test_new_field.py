"""A field added to `Request` and to `fields.py` alone is known everywhere, and pools nothing.

The field is real: a copy of the two files with `eta` in them is laid over the package, and a fork
of this process imports it and runs the command line on the fake backend. The same is done with two
mutants of the table: one that leaves the field out of settings, as every list did that did not know
it, and one that puts it into the key at its neutral value, which would make every older study anew.
"""

import contextlib
import importlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

import sd35bench
from sd35bench.cli import main
from tests.forked import forget, in_fork

pytestmark = pytest.mark.usefixtures("fakes_here")

PACKAGE = Path(sd35bench.__file__).resolve().parent
IN_TYPES = "    eta: float = 0.0\n"
IN_FIELDS = """    Field(
        name="eta",
        takes=Annotated[float, Interval(ge=0, le=1)],
        means="noise added at each step",
        default="0.5",
        unasked=0.5,
        neutral=0.0,
    ),
"""
MUTANTS = {
    "elif value != field.neutral:": "elif False:",
    "if getattr(request, field.name) == field.neutral:": "if False:",
}
ASKED = ["backend=fake", "steps=4", "cfg=4", "prompts.limit=2"]


def _said(*arguments: str) -> tuple[Any, int]:
    cli = importlib.import_module("sd35bench.cli")
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        code = cli.main([*arguments, "--json"])
    return json.loads(text.getvalue() or "null"), code


def _known(folder: Path, briefly: bool) -> dict[str, Any]:
    """In a fork: what the commands say whose package lies in the folder `code`."""
    forget("sd35bench", "tests")
    os.chdir(folder)
    sys.path.insert(0, str(folder / "code"))
    importlib.invalidate_caches()
    here = importlib.import_module("tests.studies.in_process").HereWorker
    importlib.import_module("sd35bench.workers.process").WorkerProcess = here
    asked, where = ASKED, ["--results-dir", "results"]
    old, _ = _said("run", *asked, "eta=0", "study=old")
    _said("run", *asked, "eta=0,0.5,1", "study=new", "-m")
    shown, _ = _said("show", "new", *where)
    known = {"skipped": old["skipped"], "rows": [[s["eta"], s["n"]] for s in shown["settings"]]}
    if briefly:
        return known
    _said("run", *asked, "study=unasked")
    compared, _ = _said("compare", "old", "unasked", "--policy", "drift", *where)
    advice, _ = _said("recommend", "new", *where)
    best = advice["profiles"]["final"]["text-to-image"] if "profiles" in advice else None
    comparisons = compared.get("comparisons", [])
    return known | {
        "titles": [c["title"] for c in comparisons],
        "differs": [c["differs"] for c in comparisons],
        "refused": _said("run", *asked, "eta=2")[1],
        "said": best and best["evidence"]["headline"],
        "command": best and best["command"],
        "eta": best and best["setting"]["eta"],
    }


def _with_eta(folder: Path, mutants: dict[str, str]) -> Path:
    """The package with `eta` in its two files, and links to all others."""
    package = folder / "sd35bench"
    package.mkdir(parents=True)
    for entry in PACKAGE.iterdir():
        if entry.name not in ("types.py", "fields.py", "__pycache__"):
            (package / entry.name).symlink_to(entry)
    types = (PACKAGE / "types.py").read_text()
    last = "    output_quality: int = 90\n"
    assert types.count(last) == 1
    (package / "types.py").write_text(types.replace(last, last + IN_TYPES))
    table = (PACKAGE / "fields.py").read_text()
    end = '        label="quality",\n    ),\n'
    for before, after in {end: end + IN_FIELDS, **mutants}.items():
        assert table.count(before) == 1, before
        table = table.replace(before, after)
    (package / "fields.py").write_text(table)
    return folder


def _trial(tmp_path: Path, mutants: dict[str, str], briefly: bool = True) -> dict:
    """What a contributor sees: an old study, three values of the new field, their comparison.

    `briefly`: only what `run` and `show` say.
    """
    assert main(["run", *ASKED, "study=old", f"results_dir={tmp_path / 'results'}"]) == 0
    _with_eta(tmp_path / "code", mutants)
    return in_fork(_known, tmp_path, briefly)


@pytest.mark.parametrize(
    "briefly", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["briefly", "in full"]
)
def test_a_new_field_takes_two_files_and_fifteen_lines(tmp_path, briefly):
    assert len((IN_TYPES + IN_FIELDS).splitlines()) <= 15
    found = _trial(tmp_path, {}, briefly)
    assert found["skipped"] == 2, "the old study's trials keep their keys"
    assert sorted(found["rows"]) == [[0.0, 2], [0.5, 2], [1.0, 2]]
    if briefly:
        return
    assert found["differs"] == [{"eta": [0.0, 0.5]}]
    assert found["titles"] == ["fake, 4 steps, cfg 4, eta 0.5 against fake, 4 steps, cfg 4"]
    assert found["refused"] == 2
    eta = found["eta"]
    assert ("eta" in found["said"]) is (eta != 0)
    assert (f"eta={eta:g}" in found["command"]) is (eta != 0.5)


@pytest.mark.slow
def test_mutants_pool_the_new_field_and_make_old_studies_anew(tmp_path):
    found = _trial(tmp_path, MUTANTS)
    assert found["skipped"] == 0
    assert len(found["rows"]) == 1
