"""MMDiT-X, SD3's denoiser, as plain PyTorch on fused weights: one call is one denoising step.

What does not depend on the latents is computed before the loop, by `condition`: the context
embedding, the cropped table of positions, and every step's adaLN modulations in one product. The
adaLN layers are 34 % of SD3.5-Medium's parameters (762 of 2,243 million); a loop that computes them
reads 3 GB of float32 for one row in each step, this one reads them once an image.

A step at 1024 px with 333 text tokens is 11.25 TFLOP for one image (7.02 in linear layers, 4.23 in
attention), twice that with guidance; float32 weights are 5.9 GB without adaLN.

An *executor* runs the step. This module has the reference; all take and give the same tensors.

Names of the fused weights, all ``[out, in]``, D wide:

| name | rows |
| --- | --- |
| `patch.weight`, `.bias` | D; columns channel, y, x |
| `blocks.{i}.image.qkv.*`, `blocks.{i}.text.qkv.*`, `blocks.{i}.dual.qkv.*` | q, k, v |
| `blocks.{i}.*.q_norm`, `.k_norm` | gains of the RMS norms, one head wide |
| `blocks.{i}.*.out.*`; `blocks.{i}.image|text.up.*`, `.down.*` | attention's output; the MLP |
| `final.weight`, `.bias` | y, x, channel |
| `modulation.*` | D-wide runs in the order of `modulation_names` |
| `context.*`, `time.0.*`, `time.2.*`, `pooled.0.*`, `pooled.2.*` | the embedders |
| `position` | `[side * side, D]`, the table that is cropped |

The last block's text has no `out`, `up` or `down`: nobody reads it.
Source: Esser et al. 2024 (arXiv 2403.03206), figure 2; Stability-AI/sd3.5, `mmditx.py`.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch.nn import functional as F

Weights = dict[str, torch.Tensor]

TIME_WIDTH = 256
"""Width of the sinusoidal embedding of a timestep."""
IMAGE = ("shift", "scale", "gate", "mlp_shift", "mlp_scale", "mlp_gate")
DUAL = ("dual_shift", "dual_scale", "dual_gate")
LAST_TEXT = FINAL = ("shift", "scale")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The shape of an MMDiT-X; `dual` are the layers with a second, image-only attention."""

    layers: int
    heads: int
    head_dim: int
    dual: tuple[int, ...]
    patch: int
    in_channels: int
    out_channels: int
    context_width: int
    pooled_width: int
    position_side: int
    qk_norm: bool
    eps: float = 1e-6

    @property
    def width(self) -> int:
        """D, the width of both streams."""
        return self.heads * self.head_dim

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values, `width` included."""
        return {**asdict(self), "width": self.width}


def modulation_names(config: Config) -> list[str]:
    """Return the D-wide runs of a row of modulations, in order."""
    names: list[str] = []
    for i in range(config.layers):
        image = IMAGE + DUAL if i in config.dual else IMAGE
        text = LAST_TEXT if i == config.layers - 1 else IMAGE
        names += [f"blocks.{i}.image.{name}" for name in image]
        names += [f"blocks.{i}.text.{name}" for name in text]
    return names + [f"final.{name}" for name in FINAL]


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What a whole image's steps share, made once by `condition`.

    `context`: [B, T, D], embedded. `table`: [E, B, M], a row of modulations for each evaluation
    and sample, scales with their 1 added. `position`: [N, D].
    """

    context: torch.Tensor
    table: torch.Tensor
    position: torch.Tensor

    def rows(self, rows: slice) -> "Conditions":
        """Return the conditions of some of the batch."""
        return Conditions(
            context=self.context[rows].contiguous(),
            table=self.table[:, rows].contiguous(),
            position=self.position,
        )


class Executor(Protocol):
    """Runs one denoising step; `facts` says how, as JSON scalars."""

    facts: dict[str, Any]

    def step(
        self,
        latents: torch.Tensor,
        context: torch.Tensor,
        modulation: torch.Tensor,
        position: torch.Tensor,
        skip: tuple[int, ...] = (),
    ) -> torch.Tensor:
        """Return the velocity [B, C, H, W] of `latents` [B, C, H, W].

        `context`: [B, T, D]; `modulation`: [B, M]; `position`: [N, D]; layers in `skip` are left
        out.
        """
        ...


class Embedder:
    """Turns text embeddings and timesteps into `Conditions`, with weights that only it needs."""

    def __init__(self, config: Config, weights: Weights, dtype: torch.dtype) -> None:
        """Take its weights out of `weights`; `dtype` is what the steps compute in."""
        self._config, self._dtype = config, dtype
        prefixes = ("modulation.", "context.", "time.", "pooled.", "position")
        names = [name for name in weights if name.startswith(prefixes)]
        self._weights = {name: weights.pop(name) for name in names}
        width = config.width
        names = modulation_names(config)
        ones = torch.tensor([name.endswith("scale") for name in names], dtype=torch.float32)
        self._ones = ones.repeat_interleave(width).to(self._weights["modulation.bias"].device)
        self._positions: dict[tuple[int, int], torch.Tensor] = {}

    @property
    def weights(self) -> Weights:
        """The weights held here; `Embedder` takes them again."""
        return self._weights

    @torch.inference_mode()
    def condition(
        self,
        embeds: torch.Tensor,
        pooled: torch.Tensor,
        timesteps: torch.Tensor,
        size: tuple[int, int],
    ) -> Conditions:
        """Compute what all evaluations of a batch share.

        `embeds`: [B, T, context width]; `pooled`: [B, pooled width]; `timesteps`: [E], 0 to 1000;
        `size`: height and width of the latents.
        """
        time = self._mlp("time", sinusoids(timesteps, TIME_WIDTH).to(pooled.dtype))
        text = self._mlp("pooled", pooled)
        rows = F.silu(time[:, None] + text[None])
        table = self._linear("modulation", rows) + self._ones
        context = self._linear("context", embeds)
        return Conditions(
            context=context.to(self._dtype),
            table=table.to(self._dtype),
            position=self._position(size),
        )

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self._weights[f"{name}.weight"], self._weights[f"{name}.bias"])

    def _mlp(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return self._linear(f"{name}.2", F.silu(self._linear(f"{name}.0", x)))

    def _position(self, size: tuple[int, int]) -> torch.Tensor:
        """Crop the middle of the table, once for each size."""
        if size not in self._positions:
            rows, columns = (each // self._config.patch for each in size)
            table, side = self._weights["position"], self._config.position_side
            self._positions[size] = crop_positions(table, side, rows, columns).to(self._dtype)
        return self._positions[size]


class TorchExecutor:
    """The reference: `velocity` in PyTorch, or through torch.compile."""

    def __init__(self, config: Config, weights: Weights, *, compiled: Any = None) -> None:
        """`compiled` wraps the step's function, as torch.compile does."""

        def run(
            latents: torch.Tensor,
            context: torch.Tensor,
            modulation: torch.Tensor,
            position: torch.Tensor,
            skip: tuple[int, ...],
        ) -> torch.Tensor:
            return velocity(config, weights, latents, context, modulation, position, skip)

        self._run = run if compiled is None else compiled(run)
        self.facts: dict[str, Any] = {
            "executor": "torch" if compiled is None else "torch.compile",
            "tier": "exact",
            "weight_bytes": sum(tensor.nbytes for tensor in weights.values()),
        }

    @torch.inference_mode()
    def step(
        self,
        latents: torch.Tensor,
        context: torch.Tensor,
        modulation: torch.Tensor,
        position: torch.Tensor,
        skip: tuple[int, ...] = (),
    ) -> torch.Tensor:
        """Return the velocity of `latents`; see `Executor`."""
        return self._run(latents, context, modulation, position, skip)


def velocity(
    config: Config,
    weights: Mapping[str, torch.Tensor],
    latents: torch.Tensor,
    context: torch.Tensor,
    modulation: torch.Tensor,
    position: torch.Tensor,
    skip: tuple[int, ...] = (),
) -> torch.Tensor:
    """Return the velocity [B, C, H, W] of `latents`; the arguments are `Executor.step`'s."""
    size = latents.shape[-2:]
    runs = modulation.view(len(latents), -1, 1, config.width).unbind(1)
    vectors = dict(zip(modulation_names(config), runs, strict=True))
    x = F.linear(
        patchify(latents.to(position.dtype), config.patch),
        weights["patch.weight"],
        weights["patch.bias"],
    )
    x, text = x + position, context
    for i in range(config.layers):
        if i not in skip:
            x, text = _block(config, weights, i, vectors, x, text)
    x = _modulated(config, x, vectors, "final.")
    x = F.linear(x, weights["final.weight"], weights["final.bias"])
    return unpatchify(x, config.patch, size).to(latents.dtype)


def patchify(latents: torch.Tensor, patch: int) -> torch.Tensor:
    """Cut [B, C, H, W] into [B, N, C * patch * patch], the patch convolution's order."""
    b, c, h, w = latents.shape
    cut = latents.reshape(b, c, h // patch, patch, w // patch, patch)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(b, (h // patch) * (w // patch), -1)


def unpatchify(x: torch.Tensor, patch: int, size: tuple[int, ...]) -> torch.Tensor:
    """Put [B, N, patch * patch * C] together to [B, C, H, W]; `size` is H and W."""
    h, w = size
    cut = x.reshape(len(x), h // patch, w // patch, patch, patch, -1)
    return cut.permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, h, w)


def crop_positions(table: torch.Tensor, side: int, rows: int, columns: int) -> torch.Tensor:
    """Cut the middle of a table of positions [side * side, D]: [rows * columns, D].

    Source: diffusers, models/embeddings.py, `PatchEmbed.cropped_pos_embed`.
    """
    top, left = (side - rows) // 2, (side - columns) // 2
    crop = table.view(side, side, -1)[top : top + rows, left : left + columns]
    return crop.reshape(rows * columns, -1)


def sinusoids(timesteps: torch.Tensor, width: int) -> torch.Tensor:
    """Embed timesteps [E] as [E, width]: cosines, then sines, of periods up to 10,000 * 2 pi."""
    half = width // 2
    steps = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    angles = timesteps.float()[:, None] * torch.exp(-math.log(10_000) * steps / half)[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


Vectors = dict[str, torch.Tensor]


def _block(
    config: Config,
    weights: Mapping[str, torch.Tensor],
    i: int,
    vectors: Vectors,
    x: torch.Tensor,
    text: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One joint block: both streams attend together, each has its own weights."""
    image_name, text_name, dual_name = (f"blocks.{i}.{s}." for s in ("image", "text", "dual"))
    tokens = x.shape[1]
    qkv = [
        _heads(config, weights, image_name, _modulated(config, x, vectors, image_name)),
        _heads(config, weights, text_name, _modulated(config, text, vectors, text_name)),
    ]
    joint = _attend(*(torch.cat(pair, dim=2) for pair in zip(*qkv, strict=True)))
    attended = _out(weights, image_name, joint[:, :tokens])
    y = torch.addcmul(x, vectors[f"{image_name}gate"], attended)
    if i in config.dual:
        second = _modulated(config, x, vectors, image_name, "dual_")
        alone = _attend(*_heads(config, weights, dual_name, second))
        y = torch.addcmul(y, vectors[f"{image_name}dual_gate"], _out(weights, dual_name, alone))
    if i < config.layers - 1:
        attended = _out(weights, text_name, joint[:, tokens:])
        text = torch.addcmul(text, vectors[f"{text_name}gate"], attended)
        text = _mlp(config, weights, text_name, vectors, text)
    return _mlp(config, weights, image_name, vectors, y), text


def _modulated(
    config: Config, x: torch.Tensor, vectors: Vectors, name: str, which: str = ""
) -> torch.Tensor:
    normed = F.layer_norm(x, (config.width,), eps=config.eps)
    return torch.addcmul(vectors[f"{name}{which}shift"], normed, vectors[f"{name}{which}scale"])


def _heads(
    config: Config, weights: Mapping[str, torch.Tensor], name: str, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Project to queries, keys and values, each [B, heads, N, head_dim]."""
    qkv = F.linear(x, weights[f"{name}qkv.weight"], weights[f"{name}qkv.bias"])
    cut = qkv.view(x.shape[0], x.shape[1], 3, config.heads, config.head_dim)
    q, k, v = cut.permute(2, 0, 3, 1, 4).unbind(0)
    if config.qk_norm:
        q = F.rms_norm(q, (config.head_dim,), weights[f"{name}q_norm"], config.eps)
        k = F.rms_norm(k, (config.head_dim,), weights[f"{name}k_norm"], config.eps)
    return q, k, v


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _out(weights: Mapping[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, weights[f"{name}out.weight"], weights[f"{name}out.bias"])


def _mlp(
    config: Config,
    weights: Mapping[str, torch.Tensor],
    name: str,
    vectors: Vectors,
    x: torch.Tensor,
) -> torch.Tensor:
    h = _modulated(config, x, vectors, name, "mlp_")
    h = F.gelu(
        F.linear(h, weights[f"{name}up.weight"], weights[f"{name}up.bias"]), approximate="tanh"
    )
    down = F.linear(h, weights[f"{name}down.weight"], weights[f"{name}down.bias"])
    return torch.addcmul(x, vectors[f"{name}mlp_gate"], down)
