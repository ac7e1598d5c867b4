import numpy as np
import pytest
from PIL import Image

from sd35bench.errors import ConfigError, MetricError
from sd35bench.metrics.base import load_metric
from sd35bench.metrics.extractors import Inception, NanoEvaluator
from sd35bench.metrics.fid import Fid
from sd35bench.metrics.reference import true_renders
from sd35bench.nano.prompts import prompt_set, true_render
from sd35bench.stats.frechet import Gaussian, fit, frechet_distance
from tests.metrics.doubles import pictures, save_open_clip, save_random_evaluator
from tests.studies.memory import record

PROMPTS = ["a red circle on white", "two blue squares on a black background"]


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    return NanoEvaluator(save_random_evaluator(tmp_path_factory.mktemp("weights") / "evaluator"))


def _records(prompts=PROMPTS, **fields):
    return [record(i, prompt=p, **fields) for i, p in enumerate(prompts)]


@pytest.fixture(scope="module")
def made(nano):
    """The reference of true renders of `PROMPTS`."""
    return Fid(nano, "nano").make_reference(_records())


def _fid(nano, images, reference_images) -> float:
    return frechet_distance(fit(nano.embed(images)), fit(nano.embed(reference_images)))


def test_reference_from_true_renders_has_twice_the_minimum_and_is_repeatable(nano, made):
    assert made.n >= 2 * nano.min_images
    again = Fid(nano, "nano").make_reference(_records())
    assert np.array_equal(made.mean, again.mean)
    assert "true renders" in made.source


def test_reference_key_follows_prompts_and_size_not_their_order(nano):
    metric = Fid(nano, "nano")
    key = metric.reference_key(_records())
    assert key == metric.reference_key(_records(PROMPTS[::-1]) + _records(seed=3))
    assert key != metric.reference_key(_records(PROMPTS[:1]))
    assert key != metric.reference_key(_records(width=72))


def test_reference_of_true_renders_is_near_other_true_renders_and_far_from_noise(nano, made):
    reference = Gaussian(made.mean, made.cov, made.n)
    fresh = [x for p in PROMPTS for x in list(true_renders(p, (64, 64), 400))[300:]]
    near = frechet_distance(fit(nano.embed(fresh)), reference)
    far = frechet_distance(fit(nano.embed(pictures(200))), reference)
    assert near < 0.05 * far


def test_true_renders_of_two_prompts_do_not_share_their_layouts():
    """The prompts differ in colour only: at one place their renders would be one shape."""
    red, blue = (
        [np.abs(x.astype(int) - 255).sum(2) > 40 for x in true_renders(p, (64, 64), 8)]
        for p in ("a large red circle on white", "a large blue circle on white")
    )
    same = [np.mean(a == b) for a in red for b in blue]
    assert max(same) < 0.999
    assert not np.array_equal(red[0], red[1])


def test_prompt_without_a_true_render_is_refused_by_name(nano):
    with pytest.raises(MetricError, match="a cat in a hat"):
        Fid(nano, "nano").make_reference(_records(["a cat in a hat"]))


def test_reference_folder_is_read_and_keyed_by_content(nano, tmp_path):
    for i, image in enumerate(pictures(200)):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    metric = load_metric("fid_nano", reference=str(tmp_path))
    metric.extractor = nano
    made = metric.make_reference(_records())
    expected = fit(nano.embed(pictures(200)))
    assert made.n == 200
    # Features of a batch depend on its neighbours in the last float32 digits only.
    assert np.allclose(sorted(made.mean), sorted(expected.mean), atol=1e-5)
    key = metric.reference_key(_records())
    Image.fromarray(pictures(1, seed=9)[0]).save(tmp_path / "0.png")
    assert metric.reference_key(_records()) != key


def _npz(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


def test_reference_statistics_are_loaded_and_keyed_by_digest(nano, tmp_path):
    path = _npz(tmp_path / "r.npz", mean=np.zeros(48), cov=np.eye(48), n=5000)
    metric = Fid(nano, "nano", path)
    made = metric.make_reference(_records())
    assert (made.n, made.source) == (5000, path)
    key = metric.reference_key(_records())
    _npz(tmp_path / "r.npz", mean=np.ones(48), cov=np.eye(48), n=5000)
    assert metric.reference_key(_records()) != key


@pytest.mark.parametrize(
    ("arrays", "what"),
    [
        ({"mean": np.zeros(48), "cov": np.eye(48)}, "lacks n"),
        ({"mean": np.zeros(48), "cov": np.eye(47), "n": 5000}, "do not fit"),
        ({"mean": np.zeros(48), "cov": np.eye(48), "n": 10}, "has 10 images"),
    ],
    ids=["no-count", "shapes", "too-few"],
)
def test_bad_reference_statistics_are_refused(nano, tmp_path, arrays, what):
    with pytest.raises(MetricError, match=what):
        Fid(nano, "nano", _npz(tmp_path / "r.npz", **arrays)).make_reference(_records())


def test_reference_that_is_not_there_is_the_users_error():
    with pytest.raises(ConfigError, match=r"metric\.fid\.reference"):
        load_metric("fid_nano", reference="/nowhere")


def test_reference_folder_without_images_is_refused(nano, tmp_path):
    with pytest.raises(MetricError, match="no images"):
        Fid(nano, "nano", str(tmp_path)).make_reference(_records())


def test_swapped_channels_mutant_is_seen(nano):
    images, reference = pictures(120, seed=1), pictures(120, seed=2)
    right = _fid(nano, images, reference)
    wrong = _fid(nano, [x[:, :, ::-1].copy() for x in images], reference)
    assert wrong > 3 * right


def test_compressed_reference_mutant_is_seen(tmp_path):
    nano = NanoEvaluator()
    # The trained evaluator on its own world: an untrained one, or noise, hides the damage.
    images = [true_render(item, 0) for item in prompt_set("tune", "t2i", limit=120)]
    squeezed = []
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i}.jpg", quality=5)
        squeezed.append(np.asarray(Image.open(tmp_path / f"{i}.jpg")))
    assert _fid(nano, images, images) < 1e-3 < 10 < _fid(nano, squeezed, images)


def test_inception_without_weights_is_an_error_with_a_remedy(tmp_path):
    with pytest.raises(MetricError, match=r"put torch-\s?fidelity"):
        _ = load_metric("fid_inception", weights=str(tmp_path / "none.pth")).extractor.name


def test_inception_with_weights_but_without_its_package_says_what_to_install(tmp_path):
    pytest.importorskip("torchmetrics")
    try:
        import torch_fidelity  # noqa: F401
    except ImportError:
        (tmp_path / "w.pth").write_bytes(b"x")
        with pytest.raises(MetricError, match="pip install torch-fidelity"):
            Inception(str(tmp_path / "w.pth")).embed(pictures(1))
    else:
        pytest.skip("torch-fidelity is installed here")


@pytest.mark.parametrize(
    ("name", "options", "full", "least"),
    [
        ("fid", {}, "fid_inception", 2048),
        ("fid_inception", {}, "fid_inception", 2048),
        ("fid", {"extractor": "inception"}, "fid_inception", 2048),
    ],
)
def test_fid_names_its_extractor_and_minimum(name, options, full, least):
    metric = load_metric(name, **options)
    assert (metric.name, metric.min_images) == (full, least)


def test_fid_on_an_open_clip_folder(tmp_path):
    metric = load_metric("fid", extractor="clip", model=save_open_clip(tmp_path / "tiny"))
    assert metric.name == "fid_tiny"
    assert metric.min_images == 1024
    assert metric.extractor.embed(pictures(2)).shape == (2, 16)
