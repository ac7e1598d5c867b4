"""The arithmetic of the CPU executor in plain PyTorch, and random weights to try it on.

The idea: what a kernel must equal is written once, in the fewest lines, in any dtype; float64 gives
the value that tolerances are counted from. Cost: that of eager PyTorch.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional as F

Weights = dict[str, torch.Tensor]


def velocity(
    config: Mapping[str, Any],
    weights: Mapping[str, torch.Tensor],
    latents: torch.Tensor,
    context: torch.Tensor,
    modulation: torch.Tensor,
    position: torch.Tensor,
    skip: tuple[int, ...] = (),
) -> torch.Tensor:
    """Return what `sd35_kernels.mmdit.Executor.step` returns, in the dtype of its arguments."""
    p, d, batch = config["patch"], config["width"], latents.shape[0]
    h, w = latents.shape[2] // p, latents.shape[3] // p
    grid = latents.view(batch, config["in_channels"], h, p, w, p)
    patches = grid.permute(0, 2, 4, 1, 3, 5).reshape(batch, h * w, -1)
    x, text = linear(weights, "patch", patches) + position, context
    rows = iter(modulation.split(d, dim=1))
    for i in range(config["layers"]):
        last, dual = i == config["layers"] - 1, i in config["dual"]
        image_rows = [next(rows) for _ in range(9 if dual else 6)]
        text_rows = [next(rows) for _ in range(2 if last else 6)]
        if i not in skip:
            x, text = block(config, weights, i, x, text, image_rows, text_rows)
    out = linear(weights, "final", modulated(x, next(rows), next(rows), config["eps"]))
    out = out.view(batch, h, w, p, p, config["out_channels"]).permute(0, 5, 1, 3, 2, 4)
    return out.reshape(batch, config["out_channels"], h * p, w * p)


def block(
    config: Mapping[str, Any],
    weights: Mapping[str, torch.Tensor],
    i: int,
    x: torch.Tensor,
    text: torch.Tensor,
    image_rows: list[torch.Tensor],
    text_rows: list[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """One MMDiT-X block: `image_rows` and `text_rows` are its modulation vectors [B, D]."""
    eps, name = config["eps"], f"blocks.{i}"
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate, *dual = image_rows
    own = split_heads(config, weights, f"{name}.image", modulated(x, shift, scale, eps))
    other = split_heads(
        config, weights, f"{name}.text", modulated(text, text_rows[0], text_rows[1], eps)
    )
    joint = attend(*(torch.cat(pair, dim=2) for pair in zip(own, other, strict=True)))
    before, tokens = x, x.shape[1]
    x = x + gate[:, None] * linear(weights, f"{name}.image.out", joint[:, :tokens])
    if dual:
        heads = split_heads(
            config, weights, f"{name}.dual", modulated(before, dual[0], dual[1], eps)
        )
        x = x + dual[2][:, None] * linear(weights, f"{name}.dual.out", attend(*heads))
    x = x + mlp_gate[:, None] * mlp(
        weights, f"{name}.image", modulated(x, mlp_shift, mlp_scale, eps)
    )
    if len(text_rows) > 2:
        gate, mlp_shift, mlp_scale, mlp_gate = text_rows[2:]
        text = text + gate[:, None] * linear(weights, f"{name}.text.out", joint[:, tokens:])
        hidden = modulated(text, mlp_shift, mlp_scale, eps)
        text = text + mlp_gate[:, None] * mlp(weights, f"{name}.text", hidden)
    return x, text


def linear(weights: Mapping[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    """Apply the layer `name`."""
    return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def mlp(weights: Mapping[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    """Up, GELU in its tanh form, down."""
    hidden = F.gelu(linear(weights, f"{name}.up", x), approximate="tanh")
    return linear(weights, f"{name}.down", hidden)


def modulated(
    x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float
) -> torch.Tensor:
    """LayerNorm without weights, times `scale` (which holds 1 + scale), plus `shift`."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * scale[:, None] + shift[:, None]


def split_heads(
    config: Mapping[str, Any], weights: Mapping[str, torch.Tensor], name: str, x: torch.Tensor
) -> list[torch.Tensor]:
    """Project to q, k, v [B, heads, tokens, dim], q and k under their RMS norms."""
    qkv = linear(weights, f"{name}.qkv", x).unflatten(-1, (3, config["heads"], -1))
    parts = list(qkv.permute(2, 0, 3, 1, 4))
    if config["qk_norm"]:
        for part, norm in enumerate(("q_norm", "k_norm")):
            gain = weights[f"{name}.{norm}"]
            parts[part] = F.rms_norm(parts[part], gain.shape, gain, config["eps"])
    return parts


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Softmax attention, heads joined again: [B, tokens, D]."""
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def random_weights(config: Mapping[str, Any], seed: int = 0) -> Weights:
    """Weights that keep the scale of their input, so that no layer drowns in another."""
    generator = torch.Generator().manual_seed(seed)
    d, patch = config["width"], config["patch"] ** 2
    weights: Weights = {}

    def add(name: str, n: int, k: int) -> None:
        weights[f"{name}.weight"] = torch.randn(n, k, generator=generator) / k**0.5
        weights[f"{name}.bias"] = 0.1 * torch.randn(n, generator=generator)

    add("patch", d, config["in_channels"] * patch)
    for i in range(config["layers"]):
        for stream in ("image", "text", *(("dual",) if i in config["dual"] else ())):
            name = f"blocks.{i}.{stream}"
            add(f"{name}.qkv", 3 * d, d)
            for norm in ("q_norm", "k_norm") if config["qk_norm"] else ():
                gains = torch.rand(config["head_dim"], generator=generator)
                weights[f"{name}.{norm}"] = 0.5 + gains
            if stream == "text" and i == config["layers"] - 1:
                continue
            add(f"{name}.out", d, d)
            if stream != "dual":
                add(f"{name}.up", 4 * d, d)
                add(f"{name}.down", d, 4 * d)
    add("final", config["out_channels"] * patch, d)
    return weights


def random_inputs(
    config: Mapping[str, Any], batch: int, size: tuple[int, int], text: int, seed: int = 1
) -> dict[str, torch.Tensor]:
    """Inputs of a step for latents of `size` and `text` text tokens."""
    generator = torch.Generator().manual_seed(seed)
    d, patch, layers = config["width"], config["patch"], config["layers"]
    vectors = 12 * layers + 3 * len(config["dual"]) - 4 + 2
    tokens = size[0] // patch * (size[1] // patch)
    shapes = {
        "latents": (batch, config["in_channels"], *size),
        "context": (batch, text, d),
        "modulation": (batch, vectors * d),
        "position": (tokens, d),
    }
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    made["modulation"] = 0.5 + 0.3 * made["modulation"]
    return made
