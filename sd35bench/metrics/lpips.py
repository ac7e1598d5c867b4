"""LPIPS: distance of two images in the features of AlexNet, weighted to agree with people.

Features after each of the five ReLUs, at length 1 over channels; squared differences, weighted per
channel, averaged over the picture, added up. torchmetrics has the network and brings the channels'
weights (22 kB, of the authors' version 0.1); AlexNet's own are torchvision's, 244 MB, never
downloaded here. Images come in at their own size; below 32 pixels a side nothing is left at the
last layer.

Source: Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric"
(arXiv 1801.03924); github.com/richzhang/PerceptualSimilarity.
"""

import os
import pickle
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sd35bench.disk import file_digest
from sd35bench.errors import ConfigError, MetricError
from sd35bench.metrics.base import Image, require_uint8_rgb

_WEIGHTS = "alexnet-owt-7be5be79.pth"
LPIPS_REMEDY = (
    f"for it put torchvision's https://download.pytorch.org/models/{_WEIGHTS} (244 MB) into"
    " ~/.cache/torch/hub/checkpoints, or give metric.drift.lpips=FILE"
)
"""How to get it: torch's cache is elsewhere where TORCH_HOME or XDG_CACHE_HOME say so."""
_LEAST_PX = 32


class Lpips:
    """LPIPS on AlexNet with torchvision's ImageNet weights in a file."""

    def __init__(self, weights: Path) -> None:
        """Nothing is read until the first image, or the digest is asked for."""
        self.weights = weights

    @cached_property
    def digest(self) -> str:
        """First 12 hex digits of the weights' SHA-256."""
        return file_digest(self.weights)[:12]

    def __call__(self, image: Image, reference: Image) -> float | None:
        """Distance of two uint8 RGB images of one size, 0 for equal ones; ``None`` below 32 px.

        Raises: MetricError where the weights are not AlexNet's.
        """
        require_uint8_rgb([image, reference])
        if min(image.shape[:2]) < _LEAST_PX:
            return None
        if np.array_equal(image, reference):
            return 0.0
        import torch

        pair = [torch.tensor(x).permute(2, 0, 1)[None].float() / 255 for x in (image, reference)]
        with torch.inference_mode():
            return float(self._network(*pair, normalize=True))

    @cached_property
    def _network(self) -> Any:
        import torch
        from torchmetrics.functional.image.lpips import _LPIPS

        network = _LPIPS(net="alex", pnet_rand=True)  # no download: the backbone comes from here
        try:
            state = torch.load(self.weights, map_location="cpu", weights_only=True)
            own = {k.removeprefix("features."): v for k, v in state.items() if k[0] == "f"}
            for part in (getattr(network.net, f"slice{i}") for i in range(1, 6)):
                for name, layer in part.named_children():
                    found = {key: own[f"{name}.{key}"] for key in layer.state_dict()}
                    layer.load_state_dict(found)
        except (OSError, RuntimeError, AttributeError, KeyError, pickle.UnpicklingError) as exc:
            raise MetricError(
                f"{self.weights} is not torchvision's {_WEIGHTS}, which LPIPS needs: {exc}"
            ) from exc
        return network.eval()


def cached_weights() -> Path:
    """Where torch's cache would have AlexNet's weights; found without importing torch."""
    cache = os.environ.get("XDG_CACHE_HOME", os.path.join("~", ".cache"))
    home = os.environ.get("TORCH_HOME", os.path.join(cache, "torch"))
    return Path(home).expanduser() / "hub" / "checkpoints" / _WEIGHTS


def find_lpips(weights: str | None) -> Lpips | None:
    """LPIPS with the weights in a file; with ``None`` those in torch's cache, if they are there.

    Raises: ConfigError for a file that is not there.
    """
    path = cached_weights() if weights is None else Path(weights)
    if path.is_file():
        return Lpips(path)
    if weights is None:
        return None
    raise ConfigError(
        f"metric.drift.lpips={weights}: there is no such file; put torchvision's {_WEIGHTS}"
        " (download.pytorch.org/models) there"
    )
