import json
from pathlib import Path

import numpy as np
import pytest

from sd35bench.errors import MetricError
from sd35bench.metrics.base import load_metric
from sd35bench.metrics.clip_score import ClipScore
from sd35bench.metrics.extractors import NanoEvaluator, OpenClip
from tests.metrics.doubles import TINY_CLIP, pictures, save_open_clip, save_random_evaluator
from tests.studies.memory import record

LONG = " ".join(["a very long prompt about many things"] * 5)


@pytest.fixture(scope="module")
def open_clip_name(tmp_path_factory):
    return save_open_clip(tmp_path_factory.mktemp("weights") / "tiny")


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    return NanoEvaluator(save_random_evaluator(tmp_path_factory.mktemp("weights") / "evaluator"))


def _score(metric: ClipScore, images, prompts) -> list[float]:
    features = metric.extractor.embed(images)
    rows = [record(i, prompt=p) for i, p in enumerate(prompts)]
    return [v.value for v in metric.score_features(features, rows)]


def test_backbone_is_in_the_name(open_clip_name):
    assert load_metric("clip_score", model=open_clip_name).name == "clip_score_tiny"
    assert load_metric("clip_score_nano").name == "clip_score_nano"
    assert load_metric("clip_score").name == "clip_score_ViT-L-14_openai"
    assert load_metric("clip_score_ViT-B-32_laion2b_s34b_b79k").name.endswith("laion2b_s34b_b79k")


def test_score_is_100_times_the_cosine_that_open_clip_gives(open_clip_name):
    import open_clip
    import torch
    from PIL import Image

    images, prompts = pictures(3, 48, 40), ["a red circle", "two blue squares", ""]
    ours = _score(load_metric("clip_score", model=open_clip_name), images, prompts)
    model, _, preprocess = open_clip.create_model_and_transforms(open_clip_name)
    model.eval()
    with torch.no_grad():
        i = model.encode_image(torch.stack([preprocess(Image.fromarray(x)) for x in images]))
        t = model.encode_text(open_clip.get_tokenizer(open_clip_name)(prompts))
    expected = 100 * torch.cosine_similarity(i, t)
    assert ours == pytest.approx(expected.tolist(), abs=1e-4)


@pytest.mark.parametrize("which", ["open_clip", "nano"])
def test_long_prompt_keeps_its_end_token_and_is_recorded(which, open_clip_name, nano):
    metric = ClipScore(nano) if which == "nano" else load_metric("clip_score", model=open_clip_name)
    rows = [record(0, prompt=LONG), record(1, prompt="a red circle")]
    features = metric.extractor.embed(pictures(2))
    long, short = metric.score_features(features, rows)
    assert long.detail["truncated"] > 0
    assert short.detail == {}


def test_tokenizer_mutant_that_drops_the_end_token_changes_the_score(open_clip_name, monkeypatch):
    metric = load_metric("clip_score", model=open_clip_name)
    kept = _score(metric, pictures(1), [LONG])
    import open_clip

    tokenizer = open_clip.get_tokenizer(open_clip_name)
    ids = tokenizer([LONG])
    assert int(ids[0, -1]) == tokenizer.eot_token_id

    class Naive:
        encode = staticmethod(tokenizer.encode)

        def __call__(self, texts):
            ids = tokenizer(texts)
            ids[:, -1] = tokenizer.encode("things")[0]
            return ids

    mutant = load_metric("clip_score", model=open_clip_name)
    loaded = mutant.extractor._loaded
    mutant.extractor.__dict__["_loaded"] = (*loaded[:2], Naive())
    assert abs(_score(mutant, pictures(1), [LONG])[0] - kept[0]) > 1e-3


@pytest.mark.parametrize("which", ["open_clip", "nano"])
def test_swapped_channels_are_another_score(which, open_clip_name, nano):
    metric = ClipScore(nano) if which == "nano" else load_metric("clip_score", model=open_clip_name)
    images = pictures(2)
    swapped = [image[:, :, ::-1].copy() for image in images]
    right, wrong = (_score(metric, each, ["a red circle"] * 2) for each in (images, swapped))
    assert np.abs(np.subtract(right, wrong)).min() > 1e-3


@pytest.mark.parametrize("which", ["open_clip", "nano"])
def test_floats_are_refused(which, open_clip_name, nano):
    extractor = nano if which == "nano" else OpenClip(open_clip_name)
    with pytest.raises(MetricError, match="uint8"):
        extractor.embed([image / 255 for image in pictures(1)])


@pytest.mark.parametrize("which", ["open_clip", "nano"])
def test_resize_is_antialiased(which, open_clip_name, nano):
    extractor = nano if which == "nano" else OpenClip(open_clip_name)
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255  # finer than the network's pixels: antialiased it is plain grey
    grey = np.full((256, 256, 3), 128, np.uint8)
    black_or_white = stripes[::8, ::8]  # the mutant: every eighth pixel
    near, far = (extractor.embed([x])[0] for x in (stripes, black_or_white))
    expected = extractor.embed([grey])[0]
    assert np.linalg.norm(near - expected) < 0.05 * np.linalg.norm(far - expected)


def test_missing_weights_are_an_error_with_a_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    metric = load_metric("clip_score_ViT-B-32_laion2b_s34b_b79k")
    with pytest.raises(MetricError, match=r"not on this machine.*laion/CLIP-ViT-B-32"):
        metric.extractor.embed(pictures(1))


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"model": "local-dir:/nowhere"}, "/nowhere holds no open_clip weights"),
        ({"model": "ViT-B-32", "pretrained": "/nowhere.pt"}, "not on this machine"),
    ],
    ids=["folder", "checkpoint"],
)
def test_missing_local_weights_are_named(options, what):
    metric = load_metric("clip_score", **options)
    with pytest.raises(MetricError, match=what):
        metric.extractor.embed(pictures(1))


def test_unknown_backbone_is_refused():
    with pytest.raises(MetricError, match="ViT-B-33"):
        load_metric("clip_score_ViT-B-33_nope")


def test_missing_evaluator_is_an_error_with_a_remedy(tmp_path):
    with pytest.raises(MetricError, match="reinstall"):
        _ = NanoEvaluator(tmp_path).name


def test_extractor_names_tell_weights_apart(tmp_path, nano):
    other = NanoEvaluator(save_random_evaluator(tmp_path / "other", seed=1))
    assert nano.name != other.name
    assert nano.name == NanoEvaluator(nano.folder).name


def test_evaluator_digest_is_the_one_it_gives_itself(nano):
    from sd35bench.nano.evaluator import load_evaluator

    assert nano.name == f"nano-{load_evaluator(nano.folder).digest[:12]}"
    assert nano.min_images == 4 * nano.embed(pictures(1)).shape[1]


def test_checkpoint_file_gives_the_same_features_as_its_folder(tmp_path, open_clip_name):
    import open_clip

    folder = Path(open_clip_name.removeprefix("local-dir:"))
    (tmp_path / "tiny-test.json").write_text(json.dumps(TINY_CLIP))
    open_clip.add_model_config(tmp_path / "tiny-test.json")
    weights = folder / "open_clip_model.safetensors"
    by_file = load_metric("clip_score", model="tiny-test", pretrained=str(weights))
    assert by_file.name == "clip_score_tiny-test_open_clip_model"
    assert by_file.extractor.name.endswith(OpenClip(open_clip_name).name[-12:])
    assert by_file.extractor.embed(pictures(2)).shape == (2, 16)
