"""A study as tables: what `show`, the journal and the scores say, in columns that others read."""

import json
from dataclasses import replace
from pathlib import Path

import pyarrow.csv as csv
import pyarrow.json
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sd35bench import data
from sd35bench.analysis.summary import show_document
from sd35bench.analysis.table import read_table
from sd35bench.cli import main
from sd35bench.errors import ConfigError
from sd35bench.fields import make_trial
from sd35bench.study import view
from sd35bench.study.columns import Records
from sd35bench.study.store import Study
from tests.studies import drawn

LARGEST = 2**64 - 1
METRICS = ["init_kept", "prompt_accuracy"]


def made_image(study: Study) -> str:
    return study.put_image(drawn.draw("blue", 0.5, 77), ".png")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Study:
    """Four settings, a failure in each six trials; a prompt with columns of its own; a huge seed.

    The model has no default metric here, so that scoring is quick.
    """
    root = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawn, "MODEL", replace(drawn.MODEL, name="other"))
        study = drawn.make_study(
            root, "s", steps=(4, 12), cfgs=(4.0,), strengths=(0.5,), fail_every=7
        )
    old = next(r for r in study.records() if r.trial.request.steps == 12 and r.image is not None)
    prompt = replace(old.trial.prompt, tags={"category": ("animals", "pets")})
    request = replace(old.trial.request, seed=LARGEST, prompt='=1+1, "quoted"\nline')
    trial = make_trial(load=old.trial.load, request=request, batch_size=1, prompt=prompt)
    shard = study.shard("shard-2")
    shard.append_record(replace(old, trial=trial, image=made_image(study)))
    shard.close()
    return study


@pytest.fixture(scope="module")
def images(made):
    return data.images_table(made, read_table(made))


def test_a_row_of_settings_is_a_row_of_show(made):
    document = show_document(made)
    rows = data.setting_rows(document)
    assert {len(row) for row in rows} == {len(rows[0])}
    for row, shown in zip(rows, document["settings"], strict=True):
        assert row["latency_s_p50"] == shown["latency_s"]["p50"]
        assert [row["latency_s_low"], row["latency_s_high"]] == shown["latency_s"]["ci95"]
        accuracy = shown["metrics"]["prompt_accuracy"]
        assert row["prompt_accuracy"] == accuracy["value"]
        assert [row["prompt_accuracy_low"], row["prompt_accuracy_high"]] == accuracy["ci95"]
        assert row["denoise_s"] == shown["stage_s"]["denoise_s"]
        assert json.loads(row["environment"]) == shown["environment"]
        assert (row["id"], row["steps"]) == (shown["id"], shown["steps"])
    assert data.settings_table(document).num_rows == len(rows)


def test_a_figure_that_some_settings_have_is_one_column():
    known = {"value": 2.0, "mean_ci95": None, "levels": {"a": 1}}
    rows = data.setting_rows({"settings": [{"speedup": None}, {"speedup": known}]})
    ends = {"speedup_mean_low": None, "speedup_mean_high": None}
    assert rows == [
        {"speedup": None, **ends, "speedup_levels": None},
        {"speedup": 2.0, **ends, "speedup_levels": '{"a": 1}'},
    ]


def test_every_trial_is_a_row_of_images(made, images):
    rows = {row["key"]: row for row in images.to_pylist()}
    records = made.records()
    assert len(rows) == len(records)
    scores = {(s.metric, s.key): s.value for s in made.scores()}
    for record in records:
        row, request = rows[record.trial.key], record.trial.request
        assert (row["steps"], row["cfg"], row["seed"]) == (request.steps, request.cfg, request.seed)
        assert (row["status"], row["error"]) == (record.status.value, record.error)
        known = None if record.timings is None else record.timings.latency_s
        assert row["latency_s"] == (None if known is None else pytest.approx(known))
        assert row["prompt_accuracy"] == scores.get(("prompt_accuracy", record.trial.key))
        assert row["timed"] == row["usable"] == (record.image is not None)
        if record.image is not None:
            assert (made.path / row["file"]).stem == record.image
    assert sum(row["status"] != "ok" for row in rows.values()) > 0


def test_paths_are_of_files_that_are_whole(made, images):
    found = data.with_paths(images, made)
    assert "file" not in found.column_names
    for path, image in zip(found["path"].to_pylist(), found["image"].to_pylist(), strict=True):
        assert (path is None) == (image is None)
        assert path is None or Path(path).is_file()


def test_a_large_study_gives_the_same_table(made, images, monkeypatch):
    monkeypatch.setattr(view, "LEAST_BYTES", 0)
    study = Study.open(made.path.parent, made.name)
    assert isinstance(study.records(), Records)
    assert data.images_table(study, read_table(study)).equals(images)


def test_what_is_no_unicode_is_replaced():
    assert data._texts(["\ud800a", None]).to_pylist() == ["?a", None]


def test_pairs_are_of_one_prompt_seed_and_size(images):
    rows = {row["key"]: row for row in images.to_pylist()}
    pairs = data.pairs_table(images, METRICS).to_pylist()
    assert pairs
    for pair in pairs:
        one, other = rows[pair["key"]], rows[pair["reference_key"]]
        same = ("prompt", "negative_prompt", "seed", "width", "height", "init_image", "batch_size")
        assert [one[name] for name in same] == [other[name] for name in same]
        assert (one["steps"], other["steps"]) == (4, 12)
        assert pair["reference_prompt_accuracy"] == other["prompt_accuracy"]
    asked = rows[pairs[0]["key"]]["setting_id"]
    turned = data.pairs_table(images, METRICS, asked).to_pylist()
    assert {pair["reference_setting_id"] for pair in turned} == {asked}
    assert {pair["setting_id"] for pair in turned} == {pairs[0]["reference_setting_id"]}
    with pytest.raises(ConfigError, match="no setting with images"):
        data.pairs_table(images, METRICS, "nosuch")


def test_files_keep_seeds_exact(made, images, tmp_path):
    import duckdb

    tables = {"images": images}
    (plain,), (parquet,) = data.write_csv(tmp_path, tables), data.write_parquet(tmp_path, tables)
    assert LARGEST in pq.read_table(parquet)["seed"].to_pylist()
    query = f"select count(*) from '{plain}' where seed = 18446744073709551615"
    assert duckdb.sql(query).fetchall() == [(1,)]
    options = csv.ParseOptions(newlines_in_values=True)
    assert csv.read_csv(plain, parse_options=options).num_rows == images.num_rows


def test_a_dataset_folder_is_whole_and_its_seeds_are_exact(made, images, tmp_path):
    folder = tmp_path / "new" / "set"
    count = data.write_dataset(folder, made, images)
    found = pyarrow.json.read_json(folder / "metadata.jsonl")
    ok = [r for r in made.records() if r.image is not None]
    assert found.num_rows == count == len(ok) == len(list((folder / "images").iterdir()))
    assert not {"image", "label"} & set(found.column_names)  # `datasets` has its own
    # Readers make 1.8446744073709552e19 of a number: texts, as one is above 2^63 - 1.
    assert set(map(int, found["seed"].to_pylist())) == {r.trial.request.seed for r in ok}
    with Image.open(folder / found["file_name"][0].as_py()) as image:
        assert image.size == (64, 64)
    with pytest.raises(ConfigError, match="not empty"):
        data.write_dataset(folder, made, images)
    assert [path.name for path in folder.parent.iterdir()] == ["set"]


def test_mutant_that_writes_a_huge_seed_as_a_number_loses_it(tmp_path):
    path = tmp_path / "metadata.jsonl"
    path.write_text(json.dumps({"seed": LARGEST}))
    assert int(pyarrow.json.read_json(path)["seed"][0].as_py()) != LARGEST


def test_an_interrupted_dataset_leaves_nothing(made, images, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(data.shutil, "copyfile", interrupt)
    with pytest.raises(KeyboardInterrupt):
        data.write_dataset(tmp_path / "set", made, images)
    assert list(tmp_path.iterdir()) == []


def test_the_verb_writes_what_is_asked_for(made, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sd35bench.cli.data.score_missing", lambda _: {})  # imports torch
    root = f"--results-dir={made.path.parent}"
    assert main(["data", "s", root, "--csv", "t", "--parquet", "t", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    names = {f"{n}.{s}" for n in ("settings", "images", "pairs") for s in ("csv", "parquet")}
    assert {p.name for p in (tmp_path / "t").iterdir()} == names
    assert len(document["written"]) == 6
    assert document["images"] == len(made.records())
    assert main(["data", "s", root, "--dataset", "d", "--where", "category=pets", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 1
    rows = [json.loads(line) for line in (tmp_path / "d/metadata.jsonl").open()]
    assert [row["tag_category"] for row in rows] == ["animals, pets"]
    assert main(["data", "s", root]) == 2
    assert "--csv" in capsys.readouterr().err
