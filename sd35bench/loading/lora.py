"""LoRA files merged into a loaded model's weights: W + weight * scale * up @ down, in float32.

Merged, a LoRA costs nothing in any step, and every backend runs the same weights: what compiles,
quantises, fuses or exports them does so afterwards. Against layers that add the product at each
call the result differs by rounding alone. The scale is alpha / rank, or 1 where no alpha is kept.

Layer names are read in diffusers' and PEFT's layout (``transformer.X.lora_A.weight``), in kohya's
(``lora_unet_X.lora_down.weight``), and with the original's own names for SD3's layers in both;
there q, k and v are one layer. A name that no layer has is refused: half a LoRA is another model.

Source: Hu et al. 2021 (arXiv 2106.09685), section 4.1; kohya-ss/sd-scripts, `networks/lora_sd3.py`.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sd35bench.core.weights import config_of_diffusers, original_layers
from sd35bench.errors import BackendError
from sd35bench.loading.folders import LOAD_ERRORS, modules
from sd35bench.loading.formats import metadata_of, read_tensors
from sd35bench.types import Change

_FACTOR = re.compile(
    r"(?P<layer>.+?)\.(?:lora_|lora\.|lora_linear_layer\.)(?P<side>A|B|down|up)(?:\.default)?\.weight"
)
_ALPHA = re.compile(r"(?P<layer>.+)\.alpha")
OTHER_KINDS = {"dora_scale": "DoRA", "magnitude": "DoRA", "hada_": "LoHa", "lokr_": "LoKr"}
OTHER_KINDS |= {"oft_": "OFT", "lora_mid": "LoCon", "lora_embedding": "an embedding's LoRA"}
ADAPTER_KEY = "lora_adapter_metadata"
"""Where diffusers keeps PEFT's settings in the header. Source: diffusers 0.42, `lora_base.py`."""
DOTTED = ("", "diffusion_model.", "model.diffusion_model.", "base_model.model.", "unet.")
KOHYA = {
    "transformer": ("lora_unet", "lora_transformer"),
    "text_encoder": ("lora_te1",),
    "text_encoder_2": ("lora_te2",),
    "text_encoder_3": ("lora_te3",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Layers of a part that share one LoRA layer's rows; `swapped`: its halves are."""

    part: str
    layers: tuple[Any, ...]
    swapped: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """One layer's product: `up` [out, r] times `down` [r, in], times `scale`."""

    up: torch.Tensor
    down: torch.Tensor
    scale: float

    def product(self) -> torch.Tensor:
        """The product [out, in] in float32; kernels of convolutions are flattened."""
        up, down = self.up.flatten(1).float(), self.down.flatten(1).float()
        return (up @ down) * self.scale


def merge_lora(pipe: Any, change: Change) -> dict[str, Any]:
    """Add a LoRA to the weights of the pipeline's layers; returns what was merged.

    Raises: BackendError for a file that is no LoRA, or one for another model.
    """
    path = Path(change.path)
    try:
        layers = _read(path)
        targets = dict(_targets(pipe))
        unknown = sorted(layers.keys() - targets.keys())
        if unknown:
            raise ValueError(
                f"{len(unknown)} of its {len(layers)} layers are not in the model, first"
                f" {unknown[0]}"
            )
        for name, factors in layers.items():
            _add(targets[name], factors.product() * change.weight, name)
    except LOAD_ERRORS as exc:
        raise BackendError(
            f"model.lora={path} cannot be merged: {exc}; give a LoRA that was trained on this model"
        ) from exc
    return {
        "file": path.name,
        "digest": change.digest[:12],
        "weight": change.weight,
        "layers": len(layers),
        "parts": sorted({targets[name].part for name in layers}),
    }


@torch.no_grad()
def _add(target: Target, delta: torch.Tensor, name: str) -> None:
    """Add the product's rows to the layers that they belong to, in float32."""
    weights = [layer.weight for layer in target.layers]
    rows = [len(weight) for weight in weights]
    if delta.shape != (sum(rows), weights[0][0].numel()):
        raise ValueError(f"{name} is {list(delta.shape)}, the model's layer is not")
    if target.swapped:
        delta = torch.cat(delta.chunk(2)[::-1])
    for weight, piece in zip(weights, delta.split(rows), strict=True):
        summed = weight.float() + piece.to(weight.device).reshape(weight.shape)
        weight.copy_(summed.to(weight.dtype))


def _targets(pipe: Any) -> Iterator[tuple[str, Target]]:
    """Every spelling of every layer's name that a LoRA file may have."""
    parts: list[tuple[str, Any]] = modules(pipe)
    for part, model in parts:
        found = {
            name: Target(part=part, layers=(module,))
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d)
        }
        if type(model).__name__ == "SD3Transformer2DModel":
            config = config_of_diffusers(dict(model.config))
            found |= {
                original: Target(
                    part=part, layers=tuple(found[n].layers[0] for n in names), swapped=swapped
                )
                for original, names, swapped in original_layers(config)
                if all(name in found for name in names)
            }
        for name, target in found.items():
            flat = name.replace(".", "_")
            yield f"{part}.{name}", target
            for prefix in DOTTED if part == "transformer" else ():
                yield f"{prefix}{name}", target
            for prefix in KOHYA.get(part, ()):
                yield f"{prefix}_{flat}", target


def _read(path: Path) -> dict[str, Factors]:
    """Read a file's pairs of factors by layer.

    Raises: ValueError for another kind of adapter, and for a factor without its other.
    """
    sides: dict[str, dict[str, torch.Tensor]] = {}
    alphas: dict[str, float] = {}
    for name, value in read_tensors(path).items():
        if (found := _FACTOR.fullmatch(name)) is not None:
            side = "down" if found["side"] in ("A", "down") else "up"
            sides.setdefault(found["layer"], {})[side] = value
        elif (found := _ALPHA.fullmatch(name)) is not None:
            alphas[found["layer"]] = float(value)
        else:
            kind = next((k for word, k in OTHER_KINDS.items() if word in name), None)
            said = (
                "is no factor of a LoRA" if kind is None else f"is of {kind}, not of a plain LoRA"
            )
            raise ValueError(f"{name} {said}")
    scales = _Scales(path)
    for layer, pair in sides.items():
        if pair.keys() != {"down", "up"}:
            raise ValueError(f"{layer} has only one of its two factors")
    return {
        layer: Factors(**pair, scale=scales.of(layer, len(pair["down"]), alphas.get(layer)))
        for layer, pair in sides.items()
    }


class _Scales:
    """A product's factor: from alpha beside it, else from the settings that PEFT kept."""

    def __init__(self, path: Path) -> None:
        text = metadata_of(path).get(ADAPTER_KEY)
        beside = path.with_name("adapter_config.json")
        if text is None and path.stem == "adapter_model" and beside.is_file():
            text = beside.read_text()
        self._settings: Mapping[str, Any] = {} if text is None else json.loads(text)

    def of(self, layer: str, rank: int, alpha: float | None) -> float:
        """The scale of a layer of that rank."""
        settings = self._of_part(layer)
        if settings.get("use_dora"):
            raise ValueError("it is of DoRA, not of a plain LoRA")
        if alpha is None:
            patterns = settings.get("alpha_pattern") or {}
            hits = (v for k, v in patterns.items() if re.fullmatch(rf"(.*\.)?({k})", layer))
            alpha = next(hits, settings.get("lora_alpha"))
        if alpha is None:
            return 1.0
        return float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)

    def _of_part(self, layer: str) -> Mapping[str, Any]:
        """The part's own settings: under its name in a header, plain in PEFT's file."""
        head = f"{layer.partition('.')[0]}."
        own = {k.removeprefix(head): v for k, v in self._settings.items() if k.startswith(head)}
        return own if own else self._settings
