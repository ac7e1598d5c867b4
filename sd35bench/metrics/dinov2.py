"""DINOv2 features: what FD-DINOv2 and its kin are computed on. Weights are never downloaded.

As in dgm-eval: Pillow's bicubic with antialiasing to 224 x 224 px, whatever the image's shape was;
ImageNet's mean and deviation; the class token after the last layer norm. The published models were
trained at 518 px, so their 37 x 37 position embeddings come down to 16 x 16, and the authors' code
does that with a scale of 16.1 / 37, not 16 / 37, which moves every feature a little. transformers
leaves the 0.1 out; here it is put back, once, when the weights are loaded.

Source: Oquab et al. 2023 (arXiv 2304.07193), facebookresearch/dinov2/models/vision_transformer.py;
Stein et al. 2023 (arXiv 2306.04675), layer6ai-labs/dgm-eval/dgm_eval/models/dinov2.py, whose
default is the large model.
"""

import json
import math
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sd35bench.disk import file_digest
from sd35bench.errors import MetricError
from sd35bench.metrics.base import Extractor, Image, require_uint8_rgb

FAMILY = "dinov2"
_DEFAULT = "facebook/dinov2-large"
_LOCAL = "local-dir:"
_FILES = ("config.json", "model.safetensors")
_SIDE_PX = 224
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)
_OFFSET = 0.1


def dinov2_model(label: str, model: str | None) -> str:
    """Say which weights a metric's name and option mean: a Hub id, or ``local-dir:PATH``.

    `label` is ``dinov2`` (the large model) or ``dinov2-base`` and the like.
    """
    if model is not None:
        return model
    return _DEFAULT if label == FAMILY else f"facebook/{label}"


class Dinov2(Extractor):
    """Class tokens [n, d] of a DINOv2 model; d is 384, 768, 1024 or 1536 of the published ones.

    `model` is a Hub id whose files are in the local cache, or ``local-dir:PATH`` of a folder with
    config.json and model.safetensors.
    """

    resize = (
        f"Pillow's bicubic with antialiasing to {_SIDE_PX} x {_SIDE_PX} px, then ImageNet's mean"
        " and deviation"
    )

    def __init__(self, model: str = _DEFAULT) -> None:
        self.model = model
        base = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(model.removeprefix(_LOCAL)).name)
        self.label = base if FAMILY in base else f"{FAMILY}-{base}"

    @cached_property
    def folder(self) -> Path:
        """Where configuration and weights are. Raises: MetricError with how to get them."""
        if self.model.startswith(_LOCAL):
            folder = Path(self.model.removeprefix(_LOCAL))
            missing = [name for name in _FILES if not (folder / name).is_file()]
            if missing:
                raise MetricError(
                    f"{folder} holds no DINOv2 weights: no {' and no '.join(missing)}"
                )
            return folder
        import huggingface_hub
        from huggingface_hub.errors import HFValidationError

        try:
            found = [huggingface_hub.try_to_load_from_cache(self.model, name) for name in _FILES]
        except HFValidationError as exc:
            raise MetricError(
                f"{self.model!r} is neither a Hub id such as {_DEFAULT} nor {_LOCAL}PATH"
            ) from exc
        if not all(isinstance(path, str) for path in found):
            raise MetricError(
                f"the weights of {self.model} are not on this machine; `hf download {self.model}"
                f" {' '.join(_FILES)}` where there is network, or give model={_LOCAL}FOLDER with"
                " these two files"
            )
        return Path(str(found[0])).parent

    @cached_property
    def name(self) -> str:  # type: ignore[override]
        """Label with the weights' digest."""
        return f"{self.label}-{file_digest(self.folder / _FILES[1])[:12]}"

    @cached_property
    def _config(self) -> dict[str, Any]:
        path = self.folder / _FILES[0]
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as exc:
            raise MetricError(f"{path} cannot be read as a model's configuration: {exc}") from exc
        kind = found.get("model_type")
        if kind != FAMILY:
            raise MetricError(f"{path} is of a {kind!r} model; this extractor needs {FAMILY!r}")
        return found

    @property
    def min_images(self) -> int:  # type: ignore[override]
        """Twice the dimensions, and at least 1024: below, the covariance is mostly noise."""
        return max(1024, 2 * int(self._config["hidden_size"]))

    @cached_property
    def _network(self) -> Any:
        _ = self._config  # refuses what is no DINOv2 before transformers fills it with noise
        import torch
        from transformers import Dinov2Model
        from transformers.utils import logging

        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()  # it would break ours
        try:
            loaded: Any = Dinov2Model.from_pretrained(self.folder, output_loading_info=True)
        except (RuntimeError, OSError, ValueError, KeyError) as exc:
            raise MetricError(f"transformers cannot load {self.folder}: {exc}") from exc
        finally:
            if shown:
                logging.enable_progress_bar()
        model, report = loaded
        absent = sorted(report["missing_keys"])
        if absent:
            raise MetricError(
                f"{self.folder} lacks {len(absent)} of the model's tensors, {absent[0]} among them;"
                f" download {_FILES[1]} again"
            )
        embeddings = model.embeddings
        grid = _SIDE_PX // model.config.patch_size
        table = embeddings.position_embeddings.detach()
        embeddings.position_embeddings = torch.nn.Parameter(_positions(table, grid))
        return model.eval()

    def embed(self, images: Sequence[Image]) -> NDArray[np.float32]:
        """Class tokens [n, d] of uint8 RGB images, not normalised."""
        batch = network_input(images)
        import torch

        with torch.inference_mode():
            return self._network(torch.from_numpy(batch)).pooler_output.float().numpy()


def network_input(images: Sequence[Image]) -> NDArray[np.float32]:
    """Bring uint8 RGB images to what the network takes: [n, 3, 224, 224], without torch.

    Raises: MetricError for images that are not uint8 RGB.
    """
    require_uint8_rgb(images)
    from PIL import Image as Pillow

    size = (_SIDE_PX, _SIDE_PX)
    small = [Pillow.fromarray(x).resize(size, Pillow.Resampling.BICUBIC) for x in images]
    pixels = np.stack([np.asarray(x, np.float32) for x in small]) / 255
    return ((pixels - _MEAN) / _STD).transpose(0, 3, 1, 2).astype(np.float32)


def _positions(table: Any, grid: int) -> Any:
    """Position embeddings [1, 1 + N, d] brought to a grid of `grid` x `grid`, as the authors do."""
    import torch

    own, patches = table[:, :1], table[:, 1:]
    side = math.isqrt(patches.shape[1])
    if side == grid:
        return table
    square = patches.reshape(1, side, side, -1).permute(0, 3, 1, 2).float()
    scale = (grid + _OFFSET) / side
    found = torch.nn.functional.interpolate(square, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([own, found.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)
