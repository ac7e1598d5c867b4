import hashlib
import json
import math
import shutil

import numpy as np
import pytest
from PIL import Image

from sd35bench.errors import MetricError
from sd35bench.metrics.base import load_metric
from sd35bench.metrics.dinov2 import Dinov2, network_input
from tests.metrics.doubles import pictures

WIDTH, GRID, SIDE = 32, 16, 37


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny DINOv2 as transformers writes it, trained (so to speak) at 518 px."""
    return _save(tmp_path_factory.mktemp("weights") / "tiny")


def _save(path, seed=0, model_type="dinov2"):
    import torch
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(seed)
    config = Dinov2Config(
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        mlp_ratio=2,
        image_size=14 * SIDE,
        patch_size=14,
    )
    model = Dinov2Model(config)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            # Fresh weights are so small that images would hardly move the class token.
            large = "position" in name or "projection" in name or "weight" in name
            tensor.add_(torch.randn_like(tensor) * (0.3 if large else 0.0))
    model.save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
    return path


def _cubic(x):
    """Keys' kernel with a = -0.75, which torch's bicubic has."""
    x = np.abs(x)
    near = 1.25 * x**3 - 2.25 * x**2 + 1
    far = -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def _rows(scale):
    """[16, 37]: what each new row takes from the old ones, the border's repeated."""
    weights = np.zeros((GRID, SIDE))
    for i in range(GRID):
        at = (i + 0.5) / scale - 0.5
        for j in range(math.floor(at) - 1, math.floor(at) + 3):
            weights[i, min(max(j, 0), SIDE - 1)] += _cubic(at - j)
    return weights


def _paper(folder, images, scale=(GRID + 0.1) / SIDE):
    """dgm-eval's transforms, and a model of 224 px with positions interpolated by hand."""
    import torch
    from torchvision import transforms
    from transformers import Dinov2Config, Dinov2Model

    trained = Dinov2Model.from_pretrained(folder)
    state = trained.state_dict()
    table = state["embeddings.position_embeddings"].numpy()
    square = table[0, 1:].reshape(SIDE, SIDE, WIDTH)
    small = np.einsum("ia,jb,abd->ijd", _rows(scale), _rows(scale), square)
    joined = np.concatenate([table[0, :1], small.reshape(-1, WIDTH)])[None]
    state["embeddings.position_embeddings"] = torch.tensor(joined, dtype=torch.float32)
    config = Dinov2Config.from_dict(trained.config.to_dict() | {"image_size": 224})
    model = Dinov2Model(config).eval()
    model.load_state_dict(state)
    prepare = transforms.Compose(
        [
            transforms.Resize((224, 224), transforms.InterpolationMode.BICUBIC),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    with torch.no_grad():
        batch = torch.stack([prepare(Image.fromarray(x)) for x in images])
        return model(batch).last_hidden_state[:, 0].numpy()


@pytest.mark.slow
def test_features_are_dgm_evals_and_the_authors_positions(folder):
    images = pictures(2, 300, 180)  # higher than wide: squeezed, not cropped
    ours = Dinov2(f"local-dir:{folder}").embed(images)
    expected = _paper(folder, images)
    assert ours.shape == (2, WIDTH)
    assert ours == pytest.approx(expected, abs=1e-4)
    plain = _paper(folder, images, GRID / SIDE)  # the mutant: transformers' own positions
    assert np.abs(plain - expected).max() > 1e-2


@pytest.mark.slow
def test_swapped_channels_are_other_features(folder):
    extractor, images = Dinov2(f"local-dir:{folder}"), pictures(2)
    swapped = [image[:, :, ::-1].copy() for image in images]
    right, wrong = extractor.embed(images), extractor.embed(swapped)
    assert np.linalg.norm(right - wrong, axis=1).min() > 0.1 * np.linalg.norm(right[0] - right[1])


@pytest.mark.slow
def test_resize_is_antialiased_to_the_features(folder):
    near, far, expected = Dinov2(f"local-dir:{folder}").embed(_stripes())
    assert np.linalg.norm(near - expected) < 0.1 * np.linalg.norm(far - expected)


def _stripes():
    """Lines finer than the network's pixels, every fourth pixel of them (the mutant), and grey."""
    stripes = np.zeros((896, 896, 3), np.uint8)
    stripes[:, ::2] = 255
    return stripes, stripes[::4, ::4], np.full((896, 896, 3), 128, np.uint8)


def test_lines_finer_than_the_networks_pixels_become_grey():
    near, far, grey = network_input(_stripes())
    assert np.abs(near - grey)[:, 4:-4, 4:-4].max() < 0.1
    assert np.abs(far - grey).max() > 1.5


def test_channels_have_imagenets_mean_and_deviation_in_the_order_of_rgb():
    orange = np.full((10, 20, 3), (255, 102, 0), np.uint8)
    found = network_input([orange])
    assert found.shape == (1, 3, 224, 224)
    assert found.dtype == np.float32
    by_hand = [(1.0 - 0.485) / 0.229, (0.4 - 0.456) / 0.224, (0.0 - 0.406) / 0.225]
    assert found[0, :, 100, 100] == pytest.approx(by_hand, abs=1e-5)
    assert np.ptp(found, axis=(2, 3)).max() < 1e-6


def test_wide_image_is_squeezed_and_not_cropped():
    image = np.zeros((100, 300, 3), np.uint8)
    image[:, :60] = 255  # a fifth: cropped to the middle nothing of it would be left
    white = network_input([image])[0, 0, 112] > 1.0
    assert white[:44].all()
    assert not white[46:].any()


def test_floats_are_refused_before_weights_are_looked_for():
    with pytest.raises(MetricError, match="uint8"):
        Dinov2().embed([image / 255 for image in pictures(1)])


@pytest.mark.parametrize("family", ["fid", "fid_infinity", "kid", "precision", "recall"])
def test_every_family_takes_dinov2_by_option_and_by_name(family, tmp_path):
    folder = _files(tmp_path / "tiny")
    metric = load_metric(family, extractor="dinov2", model=f"local-dir:{folder}")
    assert metric.name == f"{family}_dinov2-tiny"
    assert metric.extractor.name.startswith("dinov2-tiny-")
    assert metric.extractor.min_images == 1024
    assert metric.parameters.get("normalise", False) is False
    named = load_metric(f"{family}_dinov2-base")
    assert (named.name, named.extractor.model) == (f"{family}_dinov2-base", "facebook/dinov2-base")
    large = load_metric(f"{family}_dinov2")
    assert (large.name, large.extractor.model) == (
        f"{family}_dinov2-large",
        "facebook/dinov2-large",
    )


def _files(path, weights=b"weights", width=WIDTH):
    """The two files of a DINOv2 folder; the weights are none."""
    path.mkdir(parents=True)
    config = {"model_type": "dinov2", "hidden_size": width}
    (path / "config.json").write_text(json.dumps(config))
    (path / "model.safetensors").write_bytes(weights)
    return path


def test_name_tells_weights_apart_and_dimensions_say_how_many_images(tmp_path):
    folders = [_files(tmp_path / "a" / "tiny"), _files(tmp_path / "b" / "tiny", b"other", 1024)]
    small, large = (Dinov2(f"local-dir:{path}") for path in folders)
    assert (small.label, large.label) == ("dinov2-tiny", "dinov2-tiny")
    assert small.name != large.name
    assert (small.min_images, large.min_images) == (1024, 2048)


def test_hub_id_is_found_in_the_local_cache_and_else_refused(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    extractor = load_metric("fid_dinov2-small").extractor
    with pytest.raises(MetricError, match=r"not on this machine; `hf download facebook/dinov2-sm"):
        _ = extractor.name
    own = tmp_path / "models--facebook--dinov2-small"
    (own / "refs").mkdir(parents=True)
    (own / "refs" / "main").write_text("abc")
    _files(own / "snapshots" / "abc")
    digest = hashlib.sha256(b"weights").hexdigest()[:12]
    assert extractor.name == f"dinov2-small-{digest}"


def _lacking(folder, tmp_path):
    from safetensors.numpy import load_file, save_file

    path = shutil.copytree(folder, tmp_path / "lacking")
    state = load_file(path / "model.safetensors")
    del state["layernorm.weight"]
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.mark.slow
def test_tensors_that_are_not_there_are_not_filled_with_noise(folder, tmp_path):
    path = _lacking(folder, tmp_path)
    with pytest.raises(MetricError, match=r"lacks 1 of the model's tensors, layernorm\.weight"):
        Dinov2(f"local-dir:{path}").embed(pictures(1))


@pytest.mark.parametrize(
    ("files", "what"),
    [
        ({}, "holds no DINOv2 weights: no config.json and no model.safetensors"),
        ({"config.json": "{"}, "no model.safetensors"),
        ({"config.json": "{", "model.safetensors": ""}, "cannot be read as a model's config"),
        (
            {"config.json": '{"model_type": "vit"}', "model.safetensors": ""},
            "of a 'vit' model; this extractor needs 'dinov2'",
        ),
    ],
    ids=["empty", "no weights", "no json", "another model"],
)
def test_folder_that_is_no_dinov2_is_refused(tmp_path, files, what):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(MetricError, match=what):
        _ = Dinov2(f"local-dir:{tmp_path}").min_images


def test_model_that_is_no_hub_id_is_refused():
    with pytest.raises(MetricError, match=r"neither a Hub id such as facebook/dinov2-large"):
        _ = Dinov2("a b/c").name


@pytest.mark.slow
def test_reference_is_made_on_dinov2_features(folder, tmp_path):
    from sd35bench.cli import answer

    (tmp_path / "photos").mkdir()
    for i, image in enumerate(pictures(3)):
        Image.fromarray(image).save(tmp_path / "photos" / f"{i}.png")
    options = ("extractor=dinov2", f"model=local-dir:{folder}", f"--results-dir={tmp_path}")
    words = ["make", "r", f"images={tmp_path / 'photos'}", *options]
    made = answer("reference", words).document
    assert made["label"] == "dinov2-tiny"
    assert made["provenance"]["extractor"] == Dinov2(f"local-dir:{folder}").name
    assert "224 x 224" in made["provenance"]["resize"]
