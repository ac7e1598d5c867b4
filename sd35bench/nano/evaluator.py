"""nano's evaluator: a small CLIP in open_clip's architecture, trained on true renders only.

It stands in for the real CLIP and, by its image features, for Inception where no weights can be
downloaded. Its tokenizer is its own: one id per word of the captions, since open_clip's default
one produces ids up to 49407.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from open_clip.model import CLIP
from PIL import Image
from safetensors.torch import load_file, save_file

from sd35bench.nano.captions import words

EVALUATOR = Path(__file__).parent / "evaluator"
IMAGE_PX = 64
TEXT_TOKENS = 16
CONFIG_FILE, WEIGHTS_FILE = "open_clip_config.json", "open_clip_model.safetensors"

_SPECIAL = ("<pad>", "<unknown>")
_VOCABULARY = {word: number for number, word in enumerate((*_SPECIAL, *words()))}
# open_clip pools the text at its largest id, so the end token comes last.
_START, _END = len(_VOCABULARY), len(_VOCABULARY) + 1

MODEL_CONFIG: dict[str, Any] = {
    "embed_dim": 48,
    "vision_cfg": {"image_size": IMAGE_PX, "layers": [1, 1, 1, 1], "width": 10, "head_width": 32},
    "text_cfg": {
        "context_length": TEXT_TOKENS,
        "vocab_size": _END + 1,
        "width": 64,
        "heads": 2,
        "layers": 2,
    },
}
_MEAN, _STD = 0.5, 0.35


class Evaluator:
    """Features of images and texts in one space of 48 dimensions, not normalised."""

    def __init__(self, model: CLIP, digest: str) -> None:
        self.model = model.eval()
        self.digest = digest
        """SHA-256 of configuration and weights, for a metric's name."""

    def image_features(
        self, images: Sequence[NDArray[np.uint8]], batch: int = 64
    ) -> NDArray[np.float32]:
        """Features [n, 48] of uint8 [H, W, 3] images of any size and aspect ratio.

        Raises: TypeError for an image that is not uint8, ValueError for one that is not [H, W, 3].
        """
        pixels = [to_square(image) for image in images]
        return self._in_batches(self.model.encode_image, [normalise(p) for p in pixels], batch)

    def text_features(self, prompts: Sequence[str]) -> NDArray[np.float32]:
        """Features [n, 48] of prompts; words outside the captions' vocabulary count as unknown."""
        return self._in_batches(self.model.encode_text, list(tokenize(prompts)), 256)

    @torch.no_grad()
    def _in_batches(self, encode: Any, rows: list[torch.Tensor], batch: int) -> NDArray[np.float32]:
        if not rows:
            return np.zeros((0, MODEL_CONFIG["embed_dim"]), np.float32)
        parts = [encode(torch.stack(rows[i : i + batch])) for i in range(0, len(rows), batch)]
        return torch.cat(parts).float().numpy()


def build_model() -> CLIP:
    """The untrained network."""
    return CLIP(**MODEL_CONFIG)


def load_evaluator(folder: Path = EVALUATOR) -> Evaluator:
    """The evaluator saved in a folder, on the CPU in float32. Raises: FileNotFoundError."""
    digest = hashlib.sha256()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        digest.update((folder / name).read_bytes())
    config = json.loads((folder / CONFIG_FILE).read_text())
    model = CLIP(**config["model_cfg"])
    weights = load_file(folder / WEIGHTS_FILE)
    model.load_state_dict(weights)  # copies fp16 into the float32 network
    return Evaluator(model, digest.hexdigest())


def save_evaluator(model: CLIP, folder: Path = EVALUATOR) -> None:
    """Save in fp16 as open_clip's `local-dir:` expects it."""
    folder.mkdir(parents=True, exist_ok=True)
    preprocess = {"mean": [_MEAN] * 3, "std": [_STD] * 3, "resize_mode": "longest"}
    config = {"model_cfg": MODEL_CONFIG, "preprocess_cfg": preprocess}
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
    weights = {
        name: weight.half() if weight.is_floating_point() else weight
        for name, weight in model.state_dict().items()
    }
    save_file(weights, folder / WEIGHTS_FILE)
    (folder / WEIGHTS_FILE).chmod(0o644)


def tokenize(prompts: Sequence[str]) -> torch.Tensor:
    """Token ids [n, 16] int64: start, one id a word, end; cut so that the end remains."""
    ids = torch.zeros(len(prompts), TEXT_TOKENS, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        known = [_VOCABULARY.get(word, _VOCABULARY["<unknown>"]) for word in prompt.lower().split()]
        line = [_START, *known[: TEXT_TOKENS - 2], _END]
        ids[row, : len(line)] = torch.tensor(line)
    return ids


def to_square(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The image padded to a square by its own edges, then resized with antialiasing.

    Raises: TypeError for one that is not uint8, ValueError for one that is not [H, W, 3].
    """
    if image.dtype != np.uint8:
        raise TypeError(f"image has dtype {image.dtype}; the evaluator reads uint8 in [0, 255]")
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image has shape {image.shape}; expected [H, W, 3]")
    height, width = image.shape[:2]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    sides = ((top, side - height - top), (left, side - width - left), (0, 0))
    square = np.pad(image, sides, mode="edge")
    if side == IMAGE_PX:
        return square
    resized = Image.fromarray(square).resize((IMAGE_PX, IMAGE_PX), Image.Resampling.BICUBIC)
    return np.asarray(resized)


def normalise(square: NDArray[np.uint8]) -> torch.Tensor:
    """uint8 [64, 64, 3] -> float32 [3, 64, 64], as the network was trained."""
    return (torch.from_numpy(square.copy()).permute(2, 0, 1).float() / 255 - _MEAN) / _STD
