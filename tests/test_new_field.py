"""A field added to `Request` and to `fields.py` alone is known everywhere, and pools nothing.

The field is real: a copy of the two files with `eta` in them is laid over the package, and a
process of its own runs the command line on the fake backend. The same is done with two mutants of
the table: one that leaves the field out of settings, as every list did that did not know it, and
one that puts it into the key at its neutral value, which would make every older study anew.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import sd35bench
from sd35bench.cli import main

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
SCRIPT = """
import contextlib, io, json, sys
from sd35bench.cli import main

def said(*arguments):
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        code = main([*arguments, "--json"])
    return json.loads(text.getvalue() or "null"), code

asked, where = json.loads(sys.argv[1]), ["--results-dir", "results"]
old, _ = said("run", *asked, "eta=0", "study=old")
made, _ = said("run", *asked, "eta=0,0.5,1", "study=new", "-m")
shown, _ = said("show", "new", *where)
known = {"skipped": old["skipped"], "rows": [[s["eta"], s["n"]] for s in shown["settings"]]}
if sys.argv[2] == "briefly":
    sys.exit(print(json.dumps(known)))
said("run", *asked, "study=unasked")
compared, _ = said("compare", "old", "unasked", "--policy", "drift", *where)
advice, _ = said("recommend", "new", *where)
best = advice["profiles"]["final"]["text-to-image"] if "profiles" in advice else None
comparisons = compared.get("comparisons", [])
print(json.dumps(known | {
    "titles": [c["title"] for c in comparisons],
    "differs": [c["differs"] for c in comparisons],
    "refused": said("run", *asked, "eta=2")[1],
    "said": best and best["evidence"]["headline"],
    "command": best and best["command"],
    "eta": best and best["setting"]["eta"],
}))
"""


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

    `briefly`: only what `run` and `show` say, which is half of the 18 s.
    """
    assert main(["run", *ASKED, "study=old", f"results_dir={tmp_path / 'results'}"]) == 0
    paths = [_with_eta(tmp_path / "code", mutants), *os.environ.get("PYTHONPATH", "").split(":")]
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(ASKED), "briefly" if briefly else "in full"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ":".join(map(str, paths))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout)


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
