import io

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from sd35bench.analysis.drift import SHIFTS, drift_document, psnr_db
from sd35bench.analysis.table import read_table
from sd35bench.errors import ConfigError, MetricError
from sd35bench.metrics.base import load_metric
from sd35bench.metrics.drift import Drift, differences, relative_error, ssim
from sd35bench.score import score_study
from sd35bench.study.store import Study
from tests.metrics.doubles import pictures
from tests.metrics.drifted import EAGER, load, nudge, put
from tests.studies.memory import record

# Differences of two images -----------------------------------------------------------------------

A, B = pictures(2, 48, 64)


def _jpeg(image: np.ndarray) -> np.ndarray:
    out = io.BytesIO()
    Image.fromarray(image).save(out, format="jpeg", quality=90)
    return np.asarray(Image.open(out))


def test_identical_images_do_not_differ():
    found = differences(A, A.copy())
    assert found == {
        "max_abs": 0,
        "mean_abs": 0.0,
        "mse": 0.0,
        "psnr_db": None,
        "ssim": 1.0,
        "flip": 0.0,
        **dict.fromkeys(SHIFTS, 0.0),
    }


def test_differences_of_known_images():
    other = A.copy()
    other[0, 0] = (7, 0, 250)
    image = A.copy()
    image[0, 0] = (250, 0, 0)  # wraps around in uint8 arithmetic
    found = differences(image, other)
    samples = A.size
    assert found["max_abs"] == 250
    assert found["mean_abs"] == pytest.approx((243 + 250) / samples)
    assert found["mse"] == pytest.approx((243**2 + 250**2) / samples)
    assert found["psnr_db"] == pytest.approx(10 * np.log10(255**2 * samples / (243**2 + 250**2)))
    assert [found[name] for name in SHIFTS] == pytest.approx(
        [x / (48 * 64) for x in (243, 0, -250)]
    )
    turned = {name: -value if name in SHIFTS else value for name, value in found.items()}
    assert differences(other, image) == pytest.approx(turned)


@pytest.mark.parametrize(
    "mutate",
    [
        lambda x: np.ascontiguousarray(x[..., ::-1]),
        lambda x: np.roll(x, 1, axis=1),
        _jpeg,
        lambda x: x ^ 1,
    ],
    ids=["swapped channels", "shifted by a pixel", "JPEG of the reference", "lowest bit"],
)
def test_every_mutant_shows_in_every_figure(mutate):
    found = differences(mutate(A), A)
    assert found["mean_abs"] > 0.2
    assert found["psnr_db"] < 55
    assert found["ssim"] < 0.9999
    assert found["flip"] > 0.005


def test_psnr_and_ssim_are_those_of_the_literature():
    import torch
    from torchmetrics.functional.image import peak_signal_noise_ratio

    x, y = (torch.tensor(i).double() for i in (A, B))
    found = differences(A, B)
    assert found["psnr_db"] == pytest.approx(
        float(peak_signal_noise_ratio(x, y, data_range=255.0)), rel=1e-6
    )
    assert found["ssim"] == pytest.approx(_wang(A, B), abs=2e-5)
    assert ssim(A[:, ::-1].copy(), B) != pytest.approx(_wang(A, B), abs=1e-3)


def _wang(a: np.ndarray, b: np.ndarray) -> float:
    """SSIM as in Wang et al. 2004, equation 13, in double precision, borders mirrored."""
    line = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2

    def blur(x):
        return np.stack([ndimage.correlate(x[..., c], window, mode="mirror") for c in range(3)], -1)

    x, y = a.astype(float), b.astype(float)
    mx, my = blur(x), blur(y)
    vx, vy, vxy = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    top = (2 * mx * my + c1) * (2 * vxy + c2)
    return float((top / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean())


def test_ssim_of_tiny_images_is_unknown():
    assert ssim(A[:10], B[:10]) is None
    assert differences(A[:10], B[:10])["flip"] > 0


@pytest.mark.parametrize(
    ("image", "reference"),
    [(A / 255.0, A), (A.astype(np.float32), A), (A, A[:24]), (A, A.transpose(2, 0, 1))],
    ids=["floats to 1", "floats to 255", "unlike sizes", "channels first"],
)
def test_differences_refuse(image, reference):
    with pytest.raises(MetricError, match="images"):
        differences(image, reference)


def test_relative_error_of_latents():
    b = np.array([[[3.0, 4.0]]], np.float32)
    assert relative_error(b, b) == 0.0
    assert relative_error(b * np.float32(1.5), b) == pytest.approx(0.5)
    assert relative_error(b, 2 * b) == pytest.approx(0.5)  # held against the reference's length
    assert relative_error(b, np.zeros_like(b)) is None
    assert relative_error(np.full_like(b, np.nan), b) is None
    assert relative_error(b, b[..., :1]) is None


# Which reference ---------------------------------------------------------------------------------


def _paired(*rows, reference: str = "eager") -> list[tuple[int, list[int]]]:
    """Each paired record's place, and the places of its references, best first."""
    place = {r.trial.key: i for i, r in enumerate(rows)}
    found = Drift(reference).pairing(list(rows))
    return [(place[k], [place[r.trial.key] for r in refs]) for k, refs in found.items()]


def test_pair_is_the_same_request_on_the_same_model():
    rows = [
        record(0, load=EAGER),
        record(0, load=load()),
        record(0, load=load(), seed=1),
        record(0, load=load(), steps=9),
        record(0, load=load(), negative_prompt="grey"),
        record(0, load=load(model="nano-two")),
    ]
    assert _paired(*rows) == [(1, [0])]


def test_like_batch_size_comes_first_then_like_threads():
    rows = [
        record(0, load=EAGER),
        record(0, load=EAGER, batch_size=8),
        record(0, load=load("eager", threads=1), batch_size=8),
        record(0, load=load(), batch_size=8),
        record(0, load=load(threads=1), batch_size=8),
        record(0, load=load()),
    ]
    found = dict(_paired(*rows))
    assert found[3] == [1, 2, 0]
    assert found[4] == [2, 1, 0]
    assert found[5][0] == 0


def test_reference_against_itself_is_noise_and_its_standard_is_held_against_nothing():
    rows = [
        record(0, load=EAGER),
        record(0, load=EAGER, batch_size=8),
        record(0, load=load("eager", threads=1)),
        record(0, load=load("eager", threads=1), batch_size=8),
        record(0, load=load()),
    ]
    found = dict(_paired(*rows))
    assert 0 not in found
    assert found[1] == [0]
    assert found[2] == [0]
    assert found[3] == [1, 0]  # another thread count alone, where that can be had


def test_reference_is_the_one_at_fp32_with_the_commonest_thread_count():
    rows = [
        record(0, load=load("eager", threads=4)),
        record(0, load=load("eager", dtype="bf16")),
        record(1, load=load("eager", dtype="bf16")),
        record(0, load=EAGER),
        record(0, load=load("int8")),
    ]
    assert dict(_paired(*rows)) == {0: [3], 1: [3, 0], 4: [3, 0]}


def test_reference_by_name_and_none_of_it():
    rows = [record(0, load=EAGER), record(0, load=load("onnx"))]
    assert _paired(*rows, reference="onnx") == [(0, [1])]
    assert _paired(*rows, reference="openvino") == []


def test_drift_has_its_reference_in_its_name():
    assert load_metric("drift").name == load_metric("drift", reference="eager").name == "drift"
    assert load_metric("drift", reference="onnx").name == load_metric("drift_onnx").name
    with pytest.raises(ConfigError, match="pixels_per_degree"):
        load_metric("drift", pixels_per_degree=0.0)


# On a study --------------------------------------------------------------------------------------


@pytest.fixture
def study(tmp_path):
    return Study.open(tmp_path, "s", create=True)


def _drift(study, metric="drift"):
    return {s.key: s for s in study.scores() if s.metric == metric}


def test_study_is_scored_once_against_the_reference(study, monkeypatch):
    images = pictures(8)
    latents = [(i[:1, :4, :4] / 255.0, i[:1, 4:8, :4] / 99.0) for i in images]
    halves = [(a.astype(np.float32) * 1.5, b.astype(np.float32)) for a, b in latents]
    eager = put(study, images, EAGER, latents)
    others = [
        put(study, [nudge(i, 1 + n) for i in images], load(f"b{n}"), halves) for n in range(3)
    ]
    reads = []
    read = Study.read_image
    monkeypatch.setattr(Study, "read_image", lambda self, d: reads.append(d) or read(self, d))
    counts = score_study(study, ["drift"])
    assert counts["scored"] == {"drift": 24}
    assert len(reads) == len(set(reads)) == 32  # nothing is decoded twice
    found = _drift(study)
    for n, rows in enumerate(others):
        for row, reference in zip(rows, eager, strict=True):
            score = found[row.trial.key]
            assert score.value == score.detail["mean_abs"] == 1 + n
            assert score.detail["reference_image"] == reference.image
            assert score.detail["reference_key"] == reference.trial.key
            assert score.detail["latent_rel_first"] == pytest.approx(0.5)
            assert score.detail["latent_rel_last"] == pytest.approx(0.0, abs=1e-6)
            assert 0 < score.detail["flip"] < 0.5
            assert 0.5 < score.detail["ssim"] < 1
    reads.clear()
    assert score_study(study, ["drift"])["total"] == 0
    assert reads == []


def test_score_is_made_again_when_the_reference_changed(study):
    images = pictures(3)
    put(study, images, EAGER)
    (first, *_) = put(study, [nudge(i) for i in images], load())
    score_study(study, ["drift"])
    put(study, [nudge(images[0], 5)], EAGER)  # the same trial, run again with another result
    assert score_study(study, ["drift"])["scored"] == {"drift": 1}
    assert _drift(study)[first.trial.key].value == 3
    assert score_study(study, ["drift"])["total"] == 0


def test_score_is_made_again_for_a_better_reference_and_another_viewer(study):
    images = pictures(2)
    put(study, images, EAGER)
    put(study, [nudge(i) for i in images], load(), batch_size=2)
    score_study(study, ["drift"])
    put(study, images, EAGER, batch_size=2)
    assert score_study(study, ["drift"])["scored"] == {"drift": 4}  # two of them are the floor
    options = {"drift": {"pixels_per_degree": 20.0}}
    assert score_study(study, ["drift"], options=options)["scored"] == {"drift": 4}


@pytest.mark.parametrize("how", ["black", "gone"])
def test_reference_that_must_not_be_scored_is_passed_over(study, how):
    images = pictures(2)
    wrong = np.zeros_like(images[0]) if how == "black" else images[0] // 3
    alone = put(study, [wrong, images[1]], EAGER)
    put(study, images, EAGER, batch_size=2)
    rows = put(study, [nudge(i) for i in images], load())
    if how == "gone":
        study.image_path(alone[0].image).unlink()
    score_study(study, ["drift"])
    used = [_drift(study)[r.trial.key].detail["reference_key"] for r in rows]
    assert used[0] != alone[0].trial.key
    assert used[1] == alone[1].trial.key
    assert score_study(study, ["drift"])["total"] == 0


def test_no_healthy_reference_means_no_score(study):
    images = pictures(2)
    put(study, [np.zeros_like(images[0]), images[1]], EAGER)
    put(study, images, load())
    assert score_study(study, ["drift"])["scored"] == {"drift": 1}
    assert score_study(study, ["drift"])["total"] == 0


def test_record_that_became_the_standard_loses_its_score(study):
    images = pictures(2)
    put(study, images, EAGER)
    one = put(study, [nudge(i) for i in images], load("eager", threads=1))
    score_study(study, ["drift"])
    assert all(_drift(study)[r.trial.key].value == 2 for r in one)
    for n in range(3):
        put(study, images, load(f"b{n}", threads=1))
    score_study(study, ["drift"])
    assert all(_drift(study)[r.trial.key].value is None for r in one)
    document = drift_document(study, read_table(study))
    assert [e["what"] for e in document["noise_floor"]] == ["2 threads instead of 1"]
    assert score_study(study, ["drift"])["total"] == 0


def test_another_reference_leaves_the_first_ones_scores_alone(study):
    images = pictures(2)
    put(study, images, EAGER)
    put(study, [nudge(i) for i in images], load("onnx"))
    score_study(study, ["drift"])
    options = {"drift": {"reference": "onnx"}}
    assert score_study(study, ["drift"], options=options)["scored"] == {"drift_onnx": 2}
    assert len(_drift(study)) == len(_drift(study, "drift_onnx")) == 2
    document = drift_document(study, read_table(study))
    assert (document["metric"], [r["backend"] for r in document["rows"]]) == ("drift", ["onnx"])
    assert "drift_onnx" in " ".join(document["warnings"])


def test_psnr_of_one_level_everywhere():
    assert psnr_db(1.0) == pytest.approx(48.1308, abs=1e-4)
    assert psnr_db(0.0) is None
