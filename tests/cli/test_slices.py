"""A study on some of its prompts, by the columns that its user's file has."""

import dataclasses
import json

import pytest

from sd35bench.cli import answer, main
from sd35bench.config import freeze
from sd35bench.config.compose import compose
from sd35bench.config.overrides import written
from sd35bench.errors import ConfigError
from sd35bench.study import view
from sd35bench.study.columns import Records
from sd35bench.study.store import Study
from tests.studies import drawn
from tests.studies.drawn import make_study


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Prompts with a side of two, and marks of which a prompt may have several."""
    root = tmp_path_factory.mktemp("results")
    make = drawn._record

    def tagged(study, load, request, number, failed):
        record = make(study, load, request, number, failed)
        tags = {"side": (request.prompt.split()[-1],), "marks": ("any", f"m{number % 3}")}
        ref = dataclasses.replace(record.trial.prompt, tags=tags)
        return dataclasses.replace(record, trial=dataclasses.replace(record.trial, prompt=ref))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawn, "MODEL", dataclasses.replace(drawn.MODEL, name="other"))
        patch.setattr(drawn, "_record", tagged)
        make_study(root, "mine", steps=(4, 12), cfgs=(4.0,), strengths=())
        patch.setattr(drawn, "_record", make)
        make_study(root, "plain", steps=(4,), cfgs=(4.0,), strengths=())
    return root


def ask(results, verb, *flags):
    return answer(verb, ["mine", f"--results-dir={results}", *flags]).document


def counts(document):
    return [row["n"] for row in document["settings"]]


def test_slices_are_the_studies_of_their_prompts(results):
    whole = ask(results, "show")
    found = ask(results, "show", "--slice", "side")
    parts = found["parts"]
    assert (found["slice"], [p["where"] for p in parts]) == (
        "side",
        [{"side": "left"}, {"side": "right"}],
    )
    sums = [sum(n) for n in zip(*map(counts, parts), strict=True)]
    assert sums == counts(whole)
    assert all(n > 0 for part in parts for n in counts(part))
    alone = ask(results, "show", "--where", "side=left")
    assert alone == parts[0]
    (inside,) = ask(results, "show", "--where=side=left", "--slice=marks")["parts"][:1]
    assert (inside["where"], counts(inside)) == ({"side": "left", "marks": "any"}, counts(alone))
    study = Study.open(results, "mine")
    kept = study.part({"side": "left"})
    assert {r.trial.prompt.tags["side"] for r in kept.records()} == {("left",)}
    assert len(list(kept.all_records())) == len(list(study.all_records()))  # contention needs all


def test_csv_names_the_slice_of_each_row(results, capsys):
    flags = [f"--results-dir={results}", "--slice=side", "--csv", "--columns", "side,n"]
    assert main(["show", "mine", *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "side,n"
    assert {line.partition(",")[0] for line in lines[1:]} == {"left", "right"}


def test_a_large_journals_view_has_the_same_slices(results, monkeypatch):
    plain = [r.trial.key for r in Study.open(results, "mine").part({"side": "left"}).records()]
    monkeypatch.setattr(view, "LEAST_BYTES", 0)
    records = Study.open(results, "mine").part({"side": "left", "marks": "any"}).records()
    assert isinstance(records, Records)
    assert [r.trial.key for r in records] == plain


def test_recommend_and_report_of_a_part_leave_the_whole_ones_alone(results):
    found = ask(results, "recommend", "--where", "side=right", "--profile", "final")
    assert found["where"] == {"side": "right"}
    assert found["profiles"]["final"]["text-to-image"]["evidence"]
    folder = results / "mine"
    assert not (folder / "recommended.yaml").exists()
    written_ = ask(results, "report", "--where", "side=right")
    assert written_["parts"][0]["path"] == str(folder / "report-side-right.html")
    assert "on the right" in (folder / "report-side-right.html").read_text()
    assert "on the left" not in (folder / "report-side-right.html").read_text()
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--where", "side"], "expected NAME=VALUE"),
        (["--where", "site=left"], "no such column; there are marks, side; did you mean side"),
        (["--where", "side=lef"], "no prompt has it; there are left, right"),
        (["--slice", "colour"], "--slice=colour: no such column"),
    ],
)
def test_what_no_prompt_has_is_the_users_error(results, flags, said):
    with pytest.raises(ConfigError, match=said):
        ask(results, "show", *flags)


def test_prompts_without_columns_say_so(results):
    with pytest.raises(ConfigError, match="without columns of their own"):
        answer("show", ["plain", f"--results-dir={results}", "--slice", "side"])
    with pytest.raises(ConfigError, match="--looks is of all prompts"):
        ask(results, "recommend", "--looks", "100", "--where", "side=left")


def test_columns_of_a_file_are_kept_and_those_of_a_run_are_said_to_be_ignored(tmp_path):
    rows = [
        {"prompt": "a cat", "category": "animals", "tags": ["fur", "pet"], "seed": 7, "Steps": 4},
        {"prompt": "a car", "category": "things", "tags": [], "weight": 1.5, "box": {"x": 1}},
    ]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    sweep = freeze(compose(written(["backend=fake", f"prompts.path={path}"]))).sweep
    assert [item.ref.tags for item in sweep.prompts] == [
        {"category": ("animals",), "tags": ("fur", "pet")},
        {"category": ("things",), "weight": ("1.5",)},
    ]
    assert (
        "prompts: seed, Steps in mine.jsonl are ignored: fields of a run, such as seed=VALUE"
        in (sweep.notes)
    )
