import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from sd35bench import score as score_module
from sd35bench.analysis.summary import show_document
from sd35bench.analysis.table import GUARD
from sd35bench.errors import MetricError
from sd35bench.metrics import selection
from sd35bench.metrics.base import ImageMetric, Value
from sd35bench.metrics.clip_score import ClipScore
from sd35bench.metrics.extractors import NanoEvaluator
from sd35bench.metrics.fid import Fid
from sd35bench.metrics.init_kept import InitKept
from sd35bench.metrics.prompt_accuracy import PromptAccuracy
from sd35bench.score import guard_image, score_study
from sd35bench.study.store import Study
from tests.metrics.doubles import Colours, Redness, pictures, save_random_evaluator
from tests.studies.memory import LOAD, record, session

PROMPT = "a red circle on white"


@pytest.fixture
def study(tmp_path):
    return Study.open(tmp_path, "s", create=True)


def _encode(image: np.ndarray, kind: str = "png") -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, format=kind, quality=90)
    return out.getvalue()


def put(study: Study, images, kind: str = "png", **fields) -> list:
    """Store images with one record each, as a run leaves them."""
    shard = study.shard(f"shard-{len(study.records())}")
    if not study.sessions():
        shard.append_session(session())
    rows = []
    for i, image in enumerate(images):
        digest = study.put_image(_encode(image, kind), {"png": ".png", "jpeg": ".jpg"}[kind])
        height, width = image.shape[:2]
        asked = {"prompt": f"{PROMPT}", "seed": i, "width": width, "height": height, **fields}
        rows.append(record(i, image=digest, **asked))
        shard.append_record(rows[-1])
    shard.close()
    return rows


class Seen(ImageMetric):
    """Keeps what it was shown."""

    name = "seen"

    def __init__(self):
        self.images = []

    def score_images(self, images, records, inits):
        self.images += images
        return [
            Value(float(i.mean()), {"seed": r.trial.request.seed})
            for i, r in zip(images, records, strict=True)
        ]


class Counting(Colours):
    """Counts how often it was asked."""

    name = "counting"

    def __init__(self):
        self.embedded = 0

    def embed(self, images):
        self.embedded += len(images)
        return super().embed(images)


def _values(study, metric):
    return {s.key: s.value for s in study.scores() if s.metric == metric}


def test_score_adds_what_is_missing_once(study):
    rows = put(study, pictures(5))
    extractor = Counting()
    first = score_study(study, [Seen(), Redness(extractor)])
    assert first["scored"] == {"seen": 5, "redness": 5}
    assert first["embedded"] == {"counting": 5}
    assert (first["total"], first["images"], first["study"]) == (15, 5, "s")
    again = Seen()
    second = score_study(study, [again, Redness(extractor)])
    assert (second["total"], second["scored"], again.images) == (0, {}, [])
    assert extractor.embedded == 5
    put(study, pictures(2, seed=9), steps=99)
    third = score_study(study, [Seen(), Redness(extractor)])
    assert third["scored"] == {"seen": 2, "redness": 2}
    assert set(_values(study, "seen")) >= {r.trial.key for r in rows}


def test_score_adding_a_metric_never_embeds_again(study):
    put(study, pictures(4))
    extractor = Counting()
    score_study(study, [Redness(extractor)])
    other = Redness(extractor)
    other.name = "redness_again"
    assert score_study(study, [other])["scored"] == {"redness_again": 4}
    assert extractor.embedded == 4


def test_score_of_other_weights_is_made_again_under_the_same_name(study):
    put(study, pictures(2))
    old, new = Counting(), Counting()
    new.name = "counting-retrained"
    score_study(study, [Redness(old)])
    assert score_study(study, [Redness(new)])["scored"] == {"redness": 2}
    assert score_study(study, [Redness(new)])["total"] == 0
    assert {s.detail["features"] for s in study.scores() if s.metric == "redness"} == {new.name}


def test_score_embeds_one_file_of_two_trials_once(study):
    put(study, pictures(3))
    put(study, pictures(3), batch_size=8)
    extractor = Counting()
    counts = score_study(study, [Redness(extractor)])
    assert (extractor.embedded, counts["scored"]) == (3, {"redness": 6})


@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_score_shows_metrics_what_was_written_as_uint8(study, kind):
    image = pictures(1, 40, 48)[0]
    (row,) = put(study, [image], kind)
    seen = Seen()
    score_study(study, [seen])
    written = np.asarray(Image.open(study.image_path(row.image)).convert("RGB"))
    assert seen.images[0].dtype == np.uint8
    assert np.array_equal(seen.images[0], written)
    assert np.array_equal(seen.images[0], image) is (kind == "png")


def test_score_batches_by_size_and_keeps_values_with_their_records(study, monkeypatch):
    monkeypatch.setattr(score_module, "_BATCH", 3)
    rows = put(study, pictures(4)) + put(study, pictures(5, 48, 72, seed=4))
    calls = []
    score_study(study, [Seen()], lambda done, total: calls.append((done, total)))
    values = _values(study, "seen")
    for row in rows:
        assert values[row.trial.key] == pytest.approx(study.read_image(row.image).mean())
    assert calls == [(3, 9), (4, 9), (7, 9), (9, 9)]


BAD = {
    "black": np.zeros((64, 64, 3), np.uint8),
    "nearly black": np.full((64, 64, 3), 5, np.uint8),
    "constant": np.full((64, 64, 3), (10, 200, 30), np.uint8),
}


@pytest.mark.parametrize("kind", ["png", "jpeg"])
@pytest.mark.parametrize("name", BAD)
def test_guards_come_before_any_metric(study, name, kind):
    (good,) = put(study, pictures(1))
    (bad,) = put(study, [BAD[name]], kind, steps=9)
    seen = Seen()
    counts = score_study(study, [seen])
    assert len(seen.images) == 1
    assert _values(study, "seen").keys() == {good.trial.key}
    assert sum(counts["excluded"].values()) == 1
    assert _values(study, GUARD) == {good.trial.key: 1.0, bad.trial.key: 0.0}
    assert score_study(study, [Seen()])["excluded"] == counts["excluded"]
    assert any("left out" in w for w in show_document(study)["warnings"])


def test_guard_refuses_a_wrong_size_and_passes_a_picture():
    picture = pictures(1, 48, 64)[0]
    assert guard_image(picture, record(0, width=64, height=48)) is None
    assert guard_image(picture, record(0, width=48, height=64)) == ("wrong size 64x48, asked 48x64")


def test_missing_file_is_counted_and_scored_when_it_is_back(study):
    rows = put(study, pictures(2))
    path = study.image_path(rows[0].image)
    data = path.read_bytes()
    path.unlink()
    counts = score_study(study, [Seen()])
    assert counts["excluded"] == {"image file missing": 1}
    assert counts["scored"] == {"seen": 1}
    path.write_bytes(data)
    assert score_study(study, [Seen()])["scored"] == {"seen": 1}


def test_killed_scoring_keeps_what_was_flushed(study, monkeypatch):
    monkeypatch.setattr(score_module, "_BATCH", 2)
    monkeypatch.setattr(score_module, "_FLUSH", 3)
    put(study, pictures(8))

    class Killed(Seen):
        def score_images(self, images, records, inits):
            if len(self.images) >= 4:
                raise KeyboardInterrupt
            return super().score_images(images, records, inits)

    with pytest.raises(KeyboardInterrupt):
        score_study(study, [Killed()])
    kept = len(_values(study, "seen"))
    assert 0 < kept < 8
    assert score_study(study, [Seen()])["scored"] == {"seen": 8 - kept}


def _fid(tmp_path) -> Fid:
    metric = Fid(NanoEvaluator(save_random_evaluator(tmp_path / "evaluator")), "nano")
    metric.extractor.__dict__["min_images"] = 60  # fewer images make a quicker test
    return metric


def test_fid_below_its_minimum_has_no_reference_and_says_what_it_needs(study, tmp_path):
    put(study, pictures(5))
    assert score_study(study, [_fid(tmp_path)])["scored"] == {"fid_nano": 5}
    assert not (study.path / "references").exists()
    entry = show_document(study)["settings"][0]["metrics"]["fid_nano"]
    assert (entry["value"], entry["needs"], entry["n"]) == (None, 60, 5)


def test_fid_reference_is_made_once_and_again_when_prompts_are_added(study, tmp_path):
    put(study, pictures(60))
    metric = _fid(tmp_path)
    score_study(study, [metric])
    assert score_study(study, [_fid(tmp_path)])["total"] == 0
    first = sorted(study.path.glob("references/*.npz"))
    assert len(first) == 1
    entry = show_document(study)["settings"][0]["metrics"]["fid_nano"]
    assert entry["value"] > 0
    assert entry["reference"] == first[0].stem
    assert entry["reference_n"] >= 120
    put(study, pictures(2, seed=5), prompt="two blue squares on black")
    assert score_study(study, [_fid(tmp_path)])["scored"] == {"fid_nano": 62}
    assert len(list(study.path.glob("references/*.npz"))) == 2
    assert show_document(study)["settings"][0]["metrics"]["fid_nano"]["n"] == 62


def test_held_out_prompts_do_not_move_the_reference_of_the_others(study, tmp_path):
    put(study, pictures(60))
    score_study(study, [_fid(tmp_path)])
    before = show_document(study)["settings"][0]["metrics"]["fid_nano"]
    put(study, pictures(2, seed=5), prompt="two blue squares on black", split="heldout")
    assert score_study(study, [_fid(tmp_path)])["scored"] == {"fid_nano": 2}
    assert show_document(study)["settings"][0]["metrics"]["fid_nano"] == before


def test_edits_get_init_kept_and_text_to_image_does_not(study):
    from sd35bench.metrics.reference import true_renders

    init = next(true_renders("a large red circle on white", (64, 64), 1))
    digest = study.put_init(_encode(init))
    fields = {"prompt": "a large blue circle on white"}
    (edit,) = put(study, [init], init_image=digest, prompt_strength=0.1, **fields)
    (plain,) = put(study, [next(true_renders(fields["prompt"], (64, 64), 1))], **fields)
    counts = score_study(study, [PromptAccuracy(), InitKept()])
    assert counts["scored"] == {"prompt_accuracy": 2, "init_kept": 1}
    assert _values(study, "init_kept") == {edit.trial.key: pytest.approx(1.0)}
    accuracy = _values(study, "prompt_accuracy")
    assert (accuracy[edit.trial.key], accuracy[plain.trial.key]) == (0.0, 1.0)
    rows = {s["task"]: s["metrics"] for s in show_document(study)["settings"]}
    assert rows["text-to-image"]["init_kept"]["value"] is None
    assert rows["image-to-image"]["init_kept"]["value"] == pytest.approx(1.0)


def test_default_that_cannot_be_had_is_noted_and_the_rest_is_scored(study, monkeypatch, tmp_path):
    monkeypatch.setattr(NanoEvaluator, "__init__", lambda self: setattr(self, "folder", tmp_path))
    put(study, pictures(2))
    counts = score_study(study)
    assert counts["scored"] == {"prompt_accuracy": 2}
    assert counts["refused"].keys() == {"clip_score_nano", "fid_nano"}
    with pytest.raises(MetricError, match="evaluator"):
        score_study(study, ["clip_score"])


def test_default_whose_reference_cannot_be_made_is_refused_and_the_rest_is_scored(
    study, monkeypatch
):
    """A prompt of the user's has no true render; raising there (the mutant) aborts `recommend`."""
    metrics = {"seen": Seen(), "fid_nano": Fid(Counting(), "nano")}
    monkeypatch.setattr(selection, "default_metrics", lambda model, task: tuple(metrics))
    monkeypatch.setattr(selection, "load_metric", lambda name, **options: metrics[name])
    put(study, pictures(8), prompt="a cat in a hat")
    for new in (8, 0):
        counts = score_study(study)
        assert counts["scored"] == ({"seen": new} if new else {})
        assert "'a cat in a hat' has no true render" in counts["refused"]["fid_nano"]
    with pytest.raises(MetricError, match="no true render"):
        score_study(study, [metrics["fid_nano"]])


def test_metric_that_gives_no_number_leaves_a_reason(study):
    class Broken(Seen):
        def score_images(self, images, records, inits):
            return [Value(float("nan")) for _ in images]

    put(study, pictures(1))
    score_study(study, [Broken()])
    (score,) = [s for s in study.scores() if s.metric == "seen"]
    assert (score.value, score.detail) == (None, {"reason": "the metric gave nan"})


def test_metric_that_applies_to_nothing_says_what_to_do(study):
    real = replace(LOAD, model=replace(LOAD.model, name="sd35-medium"))
    put(study, pictures(2), load=real)
    counts = score_study(study, ["fid", "prompt_accuracy"])
    assert "metric.fid.reference" in counts["refused"]["fid_inception"]
    assert "prompt_accuracy" in counts["refused"]
    assert counts["scored"] == {}


def test_family_name_means_nanos_evaluator_on_a_study_of_nano(study, monkeypatch, tmp_path):
    folder = save_random_evaluator(tmp_path / "evaluator")
    monkeypatch.setattr(NanoEvaluator, "__init__", lambda self: setattr(self, "folder", folder))
    put(study, pictures(3))
    counts = score_study(study, ["clip_score", "fid"])
    assert counts["scored"] == {"clip_score_nano": 3, "fid_nano": 3}
    assert len(counts["embedded"]) == 1  # one extractor served both
    assert sum(counts["embedded"].values()) == 3


def test_options_reach_the_metric(study, tmp_path, monkeypatch):
    folder = save_random_evaluator(tmp_path / "evaluator")
    monkeypatch.setattr(NanoEvaluator, "__init__", lambda self: setattr(self, "folder", folder))
    put(study, pictures(2))
    np.savez(tmp_path / "r.npz", mean=np.zeros(48), cov=np.eye(48), n=5000)
    options = {"fid": {"reference": str(tmp_path / "r.npz")}}
    made = {}

    def spy(name, **given):
        made[name] = given
        return (
            ClipScore(NanoEvaluator())
            if name.startswith("clip")
            else Fid(NanoEvaluator(), "nano", given["reference"])
        )

    monkeypatch.setattr(selection, "load_metric", spy)
    score_study(study, ["fid"], options=options)
    assert made == {"fid_nano": options["fid"]}


def test_scored_study_is_shown_without_torch(study, tmp_path, monkeypatch):
    import subprocess
    import sys

    put(study, pictures(2))
    folder = save_random_evaluator(tmp_path / "evaluator")
    code = (
        "import sys\nfrom pathlib import Path\nfrom sd35bench.metrics.extractors import *\n"
        f"NanoEvaluator.__init__ = lambda self: setattr(self, 'folder', Path({str(folder)!r}))\n"
        "from sd35bench.score import score_study\nfrom sd35bench.study.store import Study\n"
        f"study = Study.open(Path({str(tmp_path)!r}), 's')\n"
        "print(score_study(study)['total'], 'torch' in sys.modules)"
    )
    with monkeypatch.context() as patch:
        patch.setattr(NanoEvaluator, "__init__", lambda self: setattr(self, "folder", folder))
        assert score_study(study)["total"] > 0
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "False"]
