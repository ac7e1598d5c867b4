"""Set metrics beyond FID on real nano images: names, references, values, mutants that fail."""

import io

import numpy as np
import pytest
from PIL import Image

from sd35bench.analysis.facts import METRICS
from sd35bench.analysis.reference import Reference, save_reference
from sd35bench.analysis.set_metrics import STATISTICS, compute
from sd35bench.errors import ConfigError, MetricError
from sd35bench.metrics.base import SetMetric, load_metric
from sd35bench.metrics.extractors import NanoEvaluator
from sd35bench.metrics.reference import ReferencedMetric, keep_reference, reduce_images
from sd35bench.metrics.selection import select_metrics
from sd35bench.nano.prompts import prompt_set, true_render
from sd35bench.stats.frechet import fit
from sd35bench.stats.kernel import Sample
from tests.metrics.doubles import pictures, save_open_clip
from tests.studies.memory import MemoryStudy, record

PARAMETERS = {"kid": {"normalise": True}, "cmmd": {}, "precision": {"k": 3}, "recall": {"k": 3}}
FAMILIES = ("kid", "cmmd", "precision", "recall", "fid_infinity")


@pytest.fixture(scope="module")
def nano():
    return NanoEvaluator()


@pytest.fixture(scope="module")
def renders():
    """True renders of 96 prompts: twice, by unlike seeds, as images and as their reference."""
    items = prompt_set("tune", "t2i", limit=96)
    return [[true_render(item, seed) for item in items] for seed in (0, 1)]


@pytest.fixture(scope="module")
def features(nano, renders):
    """Features of true renders, of their reference, and of what damage makes of the renders."""
    images, reference = renders
    large = [_enlarged(x) for x in images]
    shown = {
        "images": images,
        "reference": reference,
        "swapped channels": [x[:, :, ::-1].copy() for x in images],
        "compressed": [_jpeg(x) for x in images],
        "noise": pictures(len(images)),
        "large": large,
        "large, resized without antialiasing": [x[::2, ::2].copy() for x in large],
    }
    return {name: nano.embed(each) for name, each in shown.items()}


def _reference(features: np.ndarray, prompts: np.ndarray | None = None) -> Reference:
    return Reference(
        name="r", gaussian=fit(features), source="a test", features=features, prompts=prompts
    )


def _value(statistic: str, features: np.ndarray, reference: np.ndarray) -> float:
    """Of images of as many prompts, against renders of the same ones in the same order."""
    prompts = np.arange(len(features))
    images, target = Sample(features, prompts), _reference(reference, prompts)
    found, _ = compute(statistic, images, target, PARAMETERS[statistic])
    return found.value


def _jpeg(image: np.ndarray, quality: int = 5) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


def _enlarged(image: np.ndarray) -> np.ndarray:
    """Twice the size with a fine grid over it, which antialiasing takes away."""
    large = image.repeat(2, 0).repeat(2, 1).astype(np.int16)
    large[::2, ::2] += 60
    large[1::2, 1::2] -= 60
    return np.clip(large, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("statistic", PARAMETERS)
def test_true_renders_are_near_and_every_mutant_is_far(statistic, features):
    target = features["reference"]
    better = -1.0 if statistic in ("precision", "recall") else 1.0
    right = better * _value(statistic, features["images"], target)
    for mutant in ("swapped channels", "compressed", "noise"):
        wrong = better * _value(statistic, features[mutant], target)
        assert wrong > right + 0.05 * abs(right), mutant
    # The reference's own damage is seen as much as the images'.
    assert better * _value(statistic, target, features["compressed"]) > right


@pytest.mark.parametrize("statistic", ["kid", "cmmd"])
def test_resizing_mutant_without_antialiasing_is_far(statistic, features):
    target = features["reference"]
    right = _value(statistic, features["large"], target)
    wrong = _value(statistic, features["large, resized without antialiasing"], target)
    assert wrong > 3 * abs(right)


@pytest.mark.slow
def test_extrapolated_distance_sees_swapped_channels_and_compression(nano, renders):
    prompts = np.tile(np.arange(96), 2)
    items = prompt_set("tune", "t2i", limit=96)
    target = nano.embed([true_render(item, seed) for seed in (2, 3) for item in items])
    images = renders[0] + renders[1]

    def value(shown):
        found, _ = compute(
            "frechet_infinity", Sample(nano.embed(shown), prompts), _reference(target, prompts), {}
        )
        return found.value

    right = value(images)
    assert value([x[:, :, ::-1].copy() for x in images]) > abs(right) + 10
    assert value([_jpeg(x) for x in images]) > abs(right) + 10


def test_kid_of_clip_features_is_the_kernel_of_their_cosine(features):
    x, y = (features[name].astype(float) for name in ("images", "reference"))
    cosines = [
        (a / np.linalg.norm(a, axis=1)[:, None]) @ (b / np.linalg.norm(b, axis=1)[:, None]).T
        for a, b in ((x, x), (y, y), (x, y))
    ]
    off = ~np.eye(len(x), dtype=bool)
    means = [((c + 1) ** 3)[off].mean() for c in cosines]
    expected = means[0] + means[1] - 2 * means[2]
    assert _value("kid", x, y) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_floats_never_reach_an_extractor(family):
    metric = load_metric(f"{family}_nano")
    with pytest.raises(MetricError, match="uint8"):
        metric.extractor.embed([np.zeros((64, 64, 3), np.float32)])


def test_cmmd_does_not_see_the_length_of_features_and_is_1000_times_the_distance(features):
    from sd35bench.stats.kernel import gaussian_kernel, kernel_distance

    x, y = (features[name] for name in ("images", "reference"))
    longer = x * np.linspace(0.5, 2.0, len(x))[:, None]
    plain = _value("cmmd", x, y)
    assert _value("cmmd", longer, y) == pytest.approx(plain, abs=1e-4)
    unit = [f.astype(float) / np.linalg.norm(f.astype(float), axis=1)[:, None] for f in (x, y)]
    prompts = np.arange(len(x))
    sides = Sample(unit[0], prompts), Sample(unit[1], prompts)
    assert plain == pytest.approx(1000 * kernel_distance(*sides, gaussian_kernel(10.0)).value)


def test_cmmd_plus_each_images_pair_with_itself_is_what_the_authors_code_gives(features):
    """google-research/cmmd/distance.py, with 1 / n of the diagonal in its means."""
    x, y = (features[name].astype(float) for name in ("images", "reference"))
    x, y = (f / np.linalg.norm(f, axis=1)[:, None] for f in (x, y))

    def k(a, b):
        return np.exp(-((a[:, None] - b[None]) ** 2).sum(-1) / 200)

    theirs = 1000 * (k(x, x).mean() + k(y, y).mean() - 2 * k(x, y).mean())
    n = len(x)
    off = [(k(z, z).sum() - n) / (n * (n - 1)) for z in (x, y)]
    more = 1000 * sum(1 - mean for mean in off) / n
    found, _ = compute("cmmd", Sample(x, np.arange(n)), _reference(y), {})
    assert found.value == pytest.approx(theirs - more, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "full", "least"),
    [
        ("kid", {}, "kid_inception", 64),
        ("kid_nano", {}, "kid_nano", 64),
        ("kid", {"extractor": "nano", "min_images": 200}, "kid_nano", 200),
        ("cmmd", {}, "cmmd_ViT-L-14-336_openai", 64),
        ("cmmd", {"model": "nano"}, "cmmd_nano", 64),
        ("precision", {}, "precision_inception", 64),
        ("recall_nano", {}, "recall_nano", 64),
        ("recall_ViT-B-32_openai", {}, "recall_ViT-B-32_openai", 64),
        ("fid_infinity", {}, "fid_infinity_inception", 4096),
        ("fid_infinity_nano", {}, "fid_infinity_nano", 384),
    ],
)
def test_set_metric_names_its_extractor_and_minimum(name, options, full, least):
    metric = load_metric(name, **options)
    assert isinstance(metric, SetMetric)
    assert (metric.name, metric.min_images) == (full, least)
    assert metric.statistic in STATISTICS


def test_set_metric_on_an_open_clip_folder(tmp_path):
    model = save_open_clip(tmp_path / "tiny")
    assert load_metric("cmmd", model=model).name == "cmmd_tiny"
    metric = load_metric("kid", extractor="clip", model=model)
    assert metric.name == "kid_tiny"
    assert metric.extractor.embed(pictures(2)).shape == (2, 16)
    assert "Resize" in metric.extractor.resize


@pytest.mark.parametrize(
    ("name", "options", "what"),
    [
        ("kid_nano", {"reference": "/nowhere"}, r"metric\.kid\.reference='/nowhere'"),
        ("cmmd_nano", {"reference": "/nowhere"}, r"metric\.cmmd\.reference"),
        ("kid_nano", {"min_images": 1}, r"metric\.kid\.min_images=1"),
        ("kid_nano", {"subset_size": 1}, r"metric\.kid\.subset_size=1"),
        ("kid_nano", {"subset_size": 9, "subsets": 0}, r"metric\.kid\.subsets=0"),
        ("recall_nano", {"k": 0}, r"metric\.recall\.k=0"),
        ("precision_nano", {"k": 40}, r"metric\.precision\.k=40"),
    ],
)
def test_wrong_option_is_refused_by_name(name, options, what):
    with pytest.raises(ConfigError, match=what):
        load_metric(name, **options)


def test_metrics_on_one_extractor_share_one_reference():
    rows = [record(i, prompt=p) for i, p in enumerate(["a red circle on white"])]
    keys = {load_metric(f"{f}_nano").reference_key(rows) for f in (*FAMILIES, "fid")}
    assert len(keys) == 1


def test_parameters_are_in_the_scores_and_fids_have_none():
    assert load_metric("fid_nano").statistic is None
    assert load_metric("recall_nano", k=5).parameters == {"k": 5}
    assert load_metric("kid_nano").parameters == {"normalise": True}
    assert load_metric("kid_inception").parameters == {"normalise": False}
    subsets = load_metric("kid_inception", subset_size=50).parameters
    assert subsets == {"normalise": False, "subset_size": 50, "subsets": 100, "subset_seed": 0}


def _statistics(path, **more):
    np.savez(path, mean=np.zeros(48), cov=np.eye(48), n=5000, **more)
    return str(path)


@pytest.mark.parametrize("family", ["kid", "cmmd", "precision", "recall"])
def test_reference_of_statistics_alone_is_refused_where_features_are_needed(family, tmp_path):
    path = _statistics(tmp_path / "old.npz")
    with pytest.raises(MetricError, match="sd35bench reference make"):
        load_metric(f"{family}_nano", reference=path).make_reference([record(0)])
    assert load_metric("fid_nano", reference=path).make_reference([record(0)]).n == 5000


def test_reference_of_another_extractor_is_refused(tmp_path):
    reference = _reference(np.random.default_rng(0).normal(size=(80, 48)).astype(np.float32))
    made = Reference(
        name="r",
        gaussian=reference.gaussian,
        source="x",
        features=reference.features,
        provenance={"extractor": "inception-123"},
    )
    save_reference(tmp_path / "r.npz", made)
    with pytest.raises(MetricError, match="holds features of inception-123"):
        load_metric("kid_nano", reference=str(tmp_path / "r.npz")).make_reference([record(0)])


def test_reference_kept_by_one_metric_serves_another_or_says_what_it_lacks(tmp_path):
    for i, image in enumerate(pictures(80)):
        Image.fromarray(image).save(tmp_path / f"{i:03d}.png")
    study = MemoryStudy(tmp_path / "study")
    rows = [record(0)]
    kid = load_metric("kid_nano", reference=str(tmp_path))
    recall = load_metric("recall_nano", reference=str(tmp_path))
    keep_reference(study, kid, "shared", rows)
    recall.extractor = None  # nothing is embedded again
    keep_reference(study, recall, "shared", rows)
    fid = load_metric("fid_nano", reference=str(tmp_path))
    with pytest.raises(MetricError, match="has 80 images, it needs 192"):
        keep_reference(study, fid, "shared", rows)


def test_reference_that_an_earlier_version_kept_gets_its_features(tmp_path):
    study = MemoryStudy(tmp_path)
    path = tmp_path / "references" / "old.npz"
    path.parent.mkdir()
    _statistics(path, source="true renders", min_images=192)
    rows = [record(0, prompt="a red circle on white")]
    metric = load_metric("kid_nano")
    keep_reference(study, load_metric("fid_nano"), "old", rows)
    before = path.read_bytes()
    keep_reference(study, metric, "old", rows)
    assert path.read_bytes() != before
    from sd35bench.analysis.reference import read_reference

    kept = read_reference(study, "old")
    assert kept.features.shape == (384, 48)
    assert set(kept.prompts) == {"a red circle on white"}


def test_subset_of_features_is_seeded_and_statistics_are_of_all(nano):
    images = pictures(40)
    whole = reduce_images(nano, images, "x", ["p"] * 40)
    part = reduce_images(nano, images, "x", ["p"] * 40, keep=10)
    again = reduce_images(nano, images, "x", keep=10)
    other = reduce_images(nano, images, "x", keep=10, seed=1)
    assert (part.n, len(part.features), len(part.prompts)) == (40, 10, 10)
    assert np.array_equal(part.mean, whole.mean)
    assert np.array_equal(part.features, again.features)
    assert not np.array_equal(part.features, other.features)
    with pytest.raises(MetricError, match="at least 2"):
        reduce_images(nano, images[:1], "x")


@pytest.mark.parametrize("family", FAMILIES)
def test_bare_family_means_nanos_evaluator_on_a_study_of_nano(family):
    (metric,) = select_metrics([family], [record(0)], {}).metrics
    assert metric.name == f"{family}_nano"


def test_every_set_metric_family_is_tested_here():
    known = {f for f in METRICS if f not in ("clip_score", "sharpness", "contrast", "drift")}
    known -= {"init_kept", "judge", "prompt_accuracy", "fid"}
    assert known == set(FAMILIES)
    assert all(isinstance(load_metric(f"{f}_nano"), ReferencedMetric) for f in FAMILIES)
