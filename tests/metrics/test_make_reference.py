"""`sd35bench reference make`: from a folder and from a study, and what it refuses."""

import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from sd35bench.analysis.grouping import setting_key
from sd35bench.analysis.reference import load_reference
from sd35bench.analysis.summary import show_document
from sd35bench.cli import main
from sd35bench.metrics.extractors import NanoEvaluator
from sd35bench.score import score_study
from sd35bench.study.store import Study
from tests.metrics.doubles import pictures, save_open_clip, save_random_evaluator
from tests.studies.memory import record, session


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_random_evaluator(tmp_path_factory.mktemp("weights") / "evaluator")


@pytest.fixture(autouse=True)
def evaluator(monkeypatch, weights):
    """An untrained evaluator: what is embedded matters here, not what it means."""
    monkeypatch.setattr(NanoEvaluator, "__init__", lambda self: setattr(self, "folder", weights))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    made = tmp_path_factory.mktemp("photos")
    (made / "more").mkdir()
    for i, image in enumerate(pictures(70)):
        name = f"{i:02d}.png" if i < 60 else f"more/{i:02d}.jpg"
        Image.fromarray(image).save(made / name)
    return made


@pytest.fixture
def folder(tmp_path, photos):
    return shutil.copytree(photos, tmp_path / "photos")


def _png(image: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, format="png")
    return out.getvalue()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """70 healthy images of 35 prompts, a black one, and a second setting of 2."""
    root = tmp_path_factory.mktemp("made") / "results"
    study = Study.open(root, "s", create=True)
    shard = study.shard("a")
    shard.append_session(session())
    for i, image in enumerate([*pictures(70), np.zeros((64, 64, 3), np.uint8)]):
        asked = {"prompt": f"a red circle {i // 2}", "seed": i % 2}
        shard.append_record(record(i, image=study.put_image(_png(image), ".png"), **asked))
    for i, image in enumerate(pictures(2, seed=9)):
        shard.append_record(record(i, image=study.put_image(_png(image), ".png"), steps=99))
    shard.close()
    return root


@pytest.fixture
def study(tmp_path, results):
    """A copy of the study, which a test may write into."""
    shutil.copytree(results, tmp_path / "results")
    return Study.open(tmp_path / "results", "s")


def _make(tmp_path, capsys, *words: str) -> tuple[int, dict]:
    words = ("reference", "make", *words, "--results-dir", str(tmp_path / "results"), "--json")
    code = main(list(words))
    return code, json.loads(capsys.readouterr().out)


def test_reference_of_a_folder_says_where_it_came_from(tmp_path, folder, capsys):
    code, said = _make(tmp_path, capsys, "photos", f"images={folder}", "extractor=nano")
    assert code == 0
    made = load_reference(tmp_path / "results" / "references" / "photos.npz")
    expected = NanoEvaluator().embed(pictures(60))
    assert np.allclose(made.features[:60], expected, atol=1e-4)
    assert np.allclose(made.gaussian.mean, made.features.mean(0), atol=1e-4)
    assert (made.gaussian.n, said["n"], said["features"], made.prompts) == (70, 70, 70, None)
    about = made.provenance
    assert about["extractor"] == NanoEvaluator().name
    assert "bicubic" in about["resize"]
    assert about["versions"]["torch"]
    assert (about["found"], about["limit"], about["subset_seed"]) == (70, None, 0)
    assert len(said["digest"]) == len(about["images_digest"]) == 64


def test_reference_is_never_written_over_unasked(tmp_path, folder, capsys):
    words = ("photos", f"images={folder}", "extractor=nano")
    _make(tmp_path, capsys, *words)
    path = tmp_path / "results" / "references" / "photos.npz"
    before = path.read_bytes()
    code, said = _make(tmp_path, capsys, *words, "limit=10")
    assert code == 2
    assert "--force" in said["error"]["message"]
    assert path.read_bytes() == before
    code, said = _make(tmp_path, capsys, *words, "limit=10", "--force")
    assert (code, said["n"], load_reference(path).gaussian.n) == (0, 10, 10)


def test_subset_of_a_folder_is_seeded_and_in_the_digest(tmp_path, folder, capsys):
    words = (f"images={folder}", "extractor=nano", "limit=20", "keep=15")
    found = [
        _make(tmp_path, capsys, name, *words, f"seed={seed}")[1]
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    digests = [f["provenance"]["images_digest"] for f in found]
    assert digests[0] == digests[1] != digests[2]
    assert {(f["n"], f["features"]) for f in found} == {(20, 15)}
    assert "20 of 70" in found[0]["source"]


def test_reference_with_an_open_clip_model(tmp_path, folder, capsys):
    model = save_open_clip(tmp_path / "tiny")
    words = ("c", f"images={folder}", "extractor=clip", f"model={model}", "limit=5")
    code, said = _make(tmp_path, capsys, *words)
    assert (code, said["label"]) == (0, "tiny")
    assert "Resize" in said["provenance"]["resize"]


def test_reference_of_a_studys_setting_uses_its_features_and_leaves_out_black(
    tmp_path, study, capsys
):
    score_study(study, ["clip_score_nano"])  # embeds them
    kept = study.features(NanoEvaluator().name)
    setting = setting_key(study.records()[0].trial)
    code, said = _make(tmp_path, capsys, "base", "study=s", f"setting={setting}")
    assert (code, said["n"]) == (0, 70)
    made = load_reference(tmp_path / "results" / "references" / "base.npz")
    assert len(set(made.prompts)) == 35
    rows = {tuple(row) for row in made.features}
    assert rows == {tuple(kept[str(r.image)]) for r in study.records()[:70]}
    assert made.provenance["setting"]["steps"] == 8


def test_reference_of_a_study_is_what_kid_then_pairs_prompts_with(tmp_path, study, capsys):
    setting = setting_key(study.records()[0].trial)
    _make(tmp_path, capsys, "base", "study=s", f"setting={setting}")
    path = str(tmp_path / "results" / "references" / "base.npz")
    score_study(study, ["kid_nano"], options={"kid": {"reference": path}})
    rows = {s["steps"]: s["metrics"]["kid_nano"] for s in show_document(study)["settings"]}
    assert rows[8]["value"] == pytest.approx(0.0, abs=1e-9)  # against itself, prompt by prompt
    assert rows[8]["reference_source"].startswith("70 of 70 images of study s")
    assert (rows[99]["value"], rows[99]["needs"]) == (None, 64)


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["study=s"], "a reference is one setting's images"),
        (["study=s", "setting=zzz"], "setting=zzz and 0 fit"),
        (["study=none"], "study=none"),
        (["images=nowhere", "extractor=nano"], "there is no such folder"),
        (["images=nowhere", "study=s"], "either images=DIR or study=NAME"),
        ([], "either images=DIR or study=NAME"),
        (["study=s", "limit=1"], "limit=1 must be at least 2"),
        (["study=s", "keep=x"], "keep=x: must be a whole number"),
        (["study=s", "extractor=vgg"], "extractor=vgg: must be one of"),
        (["study=s", "extractor=clip"], "belong together"),
        (["images=x", "setting=1"], "needs study=NAME"),
        (["studi=s"], "did you mean study"),
        (["--forse", "study=s"], "unknown flag --forse; did you mean --force"),
        (["another", "study=s"], "expected `sd35bench reference make NAME"),
    ],
)
def test_wrong_input_is_exit_code_2_with_the_remedy(tmp_path, study, capsys, words, what):
    code, said = _make(tmp_path, capsys, "r", *words)
    assert code == 2
    assert what in said["error"]["message"]
    assert not (tmp_path / "results" / "references").exists()


@pytest.mark.parametrize("name", ["../r", "a/b", ".r", ""])
def test_name_that_is_no_name_is_refused(tmp_path, study, capsys, name):
    code, said = _make(tmp_path, capsys, name, "study=s")
    assert (code, "is no name" in said["error"]["message"]) == (2, True)


def test_file_that_is_no_image_is_named(tmp_path, folder, capsys):
    (folder / "05.png").write_bytes(b"not a picture")
    code, said = _make(tmp_path, capsys, "photos", f"images={folder}", "extractor=nano")
    assert code == 2
    assert "05.png cannot be read as an image" in said["error"]["message"]


def test_inception_without_weights_is_refused_before_any_image_is_read(tmp_path, folder, capsys):
    words = ("p", f"images={folder}", f"weights={tmp_path / 'none.pth'}")
    code, said = _make(tmp_path, capsys, *words)
    assert code == 2
    assert "Inception's weights" in said["error"]["message"]


def test_help_has_examples(capsys):
    assert main(["reference", "--help"]) == 0
    assert "sd35bench reference make coco" in capsys.readouterr().out


def test_score_takes_a_reference_after_the_metrics_name(tmp_path, study, capsys):
    setting = setting_key(study.records()[0].trial)
    _make(tmp_path, capsys, "base", "study=s", f"setting={setting}")
    path = tmp_path / "results" / "references" / "base.npz"
    words = ["score", "s", "--metric", "kid", f"metric.kid.reference={path}"]
    assert main([*words, "--results-dir", str(tmp_path / "results")]) == 0
    assert "kid_nano: 72 new scores" in capsys.readouterr().out
