"""One damage a kind of file and one reader: a sentence that names it, or healed; no traceback.

All cells, some 1,600, are an experiment of `make reliability` (tests/reliability/damage.py).
"""

import json
from pathlib import Path

import pytest

from sd35bench.cli import main
from sd35bench.loading import checkpoint
from sd35bench.study.store import Study
from tests.golden.studies import make_sets
from tests.reliability.damage import Cells, buy, cells, measured, quiet

CELLS = (
    ("study.json", "empty", "show"),
    ("journal", "another shape", "show"),
    ("scores", "nested 100,000 deep", "score"),
    ("machine", "NaN for a number", "show"),
    ("ledger", "another shape", "verify"),
    ("checked files", "nested 100,000 deep", "clean"),
    ("baseline", "cut", "compare"),
    ("baseline features", "a pickle that raises", "compare"),
    ("image", "flipped bytes", "score"),
    ("init image", "a pipe", "verify"),
    ("features", "flipped bytes", "show"),
    ("reference", "arrays of another shape", "show"),
)
HEALED = {"checked files", "image", "features"}


def make(here: Path) -> None:
    """Two studies of known truth, with every kind of file that needs no worker."""
    make_sets(Path("results"), prompts=64)
    for old, new in (("sets-a", "study"), ("sets-b", "other")):
        Path("results", old).rename(Path("results", new))
    study = Study.open(Path("results"), "study")
    study.put_init(study.read_image_file(str(study.records()[0].image)))
    study.images()
    measured(study)
    buy(study)
    main(["baseline", "make", "study", "base.json"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    import contextlib

    folder = tmp_path_factory.mktemp("whole")
    with contextlib.chdir(folder), quiet():
        make(folder)
    return folder


def look(whole: Path, folder: Path, *chosen: tuple[str, str, str]) -> Cells:
    return cells(chosen, folder, whole)


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell[0])
def test_one_damage_a_kind_ends_in_a_sentence_or_is_healed(whole, tmp_path, cell):
    found = look(whole, tmp_path, cell)
    assert found.tracebacks + found.unnamed + found.waited == []
    assert found.count == 1
    assert found.refused == 0 or cell[0] not in HEALED


MUTANTS = {
    "deep": (
        ("baseline", "nested 100,000 deep", "compare"),
        "sd35bench.gate.baseline.parse_json",
        json.loads,
    ),
    "empty": (
        ("study.json", "empty", "show"),
        "sd35bench.study.store._check_schema",
        lambda marker, _: json.loads(marker.read_text())["schema"],
    ),
    "price": (
        ("ledger", "another shape", "verify"),
        "sd35bench.remote.ledger.Ledger._read_on",
        lambda self, path: [self._apply(json.loads(x)) for x in path.read_bytes().splitlines()],
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_end_in_a_traceback(whole, tmp_path, monkeypatch, name):
    cell, where, mutant = MUTANTS[name]
    monkeypatch.setattr(where, mutant)
    assert look(whole, tmp_path, cell).tracebacks != []


@pytest.mark.parametrize(
    "words",
    [
        "show s --results-dir FILE",
        "run backend=fake results_dir=FILE prompts.limit=1",
        "run backend=fake results_dir=/proc/none prompts.limit=1",
        f"run backend=fake study={'x' * 300} prompts.limit=1",
        f"show {'x' * 300}",
        "run experiment=deep --config-dir theirs",
        "run backend=odd --config-dir theirs",
        "baseline make s FILE/x.json",
        "verify FILE",
        "clean FILE",
    ],
)
def test_a_wrong_place_or_name_is_a_sentence(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("FILE").write_text("x")
    Path("theirs/backend").mkdir(parents=True)
    Path("theirs/experiment").mkdir()
    Path("theirs/backend/odd.yaml").write_text("kind: nosuch\nname: odd\nrequires: []\n")
    Path("theirs/experiment/deep.yaml").write_text("steps: " + "[" * 500 + "]" * 500 + "\n")
    code = main(words.split())
    said = capsys.readouterr().err
    assert code in (2, 4)
    assert "Traceback" not in said
    assert said.strip().splitlines()[-1].startswith("sd35bench: ")


def test_a_damaged_cache_of_digests_is_read_as_none(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = tmp_path / "sd35bench" / "digests.json"
    path.parent.mkdir()
    for text in ("[" * 100_000 + "]" * 100_000, "[]", "{", '{"a": 5, "b": "short"}', ""):
        path.write_text(text)
        assert checkpoint._Cache()._read() == {}
