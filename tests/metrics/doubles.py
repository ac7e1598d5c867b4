"""Small real networks with random weights, an extractor without a network, and a metric of it."""

import json
from pathlib import Path

import numpy as np

from sd35bench.metrics.base import Extractor, FeatureMetric, Value

TINY_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def save_random_evaluator(folder: Path, seed: int = 0) -> Path:
    """An evaluator of nano's own architecture, untrained, in its own file format."""
    import torch

    from sd35bench.nano.evaluator import build_model, save_evaluator

    torch.manual_seed(seed)
    save_evaluator(build_model(), folder)
    return folder


def save_open_clip(folder: Path, seed: int = 0) -> str:
    """A tiny open_clip model with the usual tokenizer; returns its ``local-dir:`` name."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    model = open_clip.CLIP(**TINY_CLIP)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    config = {
        "model_cfg": TINY_CLIP,
        "preprocess_cfg": {
            "mean": [0.5, 0.4, 0.3],
            "std": [0.3, 0.3, 0.3],
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return f"local-dir:{folder}"


def pictures(count: int, height: int = 64, width: int = 64, seed: int = 0) -> list[np.ndarray]:
    """Smooth random uint8 RGB images [height, width, 3], unlike in their channels."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / 16
    found = []
    for _ in range(count):
        a, b, c = rng.uniform(0.3, 1.5, (3, 3))
        waves = [np.sin(a[i] * x + b[i] * y + 6 * c[i]) for i in range(3)]
        scale = np.array([120, 70, 30])
        found.append((np.stack(waves, -1) * scale + scale + 10).astype(np.uint8))
    return found


class Colours(Extractor):
    """Mean colours as features."""

    name = "colours"
    min_images = 8

    def embed(self, images):
        return np.array([i.reshape(-1, 3).mean(0) for i in images], np.float32)


class Redness(FeatureMetric):
    """The first feature."""

    name = "redness"

    def __init__(self, extractor):
        self.extractor = extractor

    def score_features(self, features, records):
        return [Value(float(f[0])) for f in features]
