"""The fused passes in plain PyTorch, in the dtype of their arguments: what kernels must equal.

Cost: that of eager PyTorch, a pass over memory for every operation.
"""

import torch
from torch.nn import functional as F


def modulated_norm(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float
) -> torch.Tensor:
    """LayerNorm of `x` [B, N, D] without weights, times `scale` [B, D], plus `shift` [B, D]."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * scale[:, None] + shift[:, None]


def gated_norm(
    x: torch.Tensor,
    update: torch.Tensor,
    gate: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``x + gate * update`` and its modulated norm; `update`: [B, N, D], the rest [B, D]."""
    total = x + gate[:, None] * update
    return total, modulated_norm(total, scale, shift, eps)


def joint_heads(
    image: torch.Tensor,
    text: torch.Tensor | None,
    gains: tuple[torch.Tensor, ...],
    heads: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cut both streams' qkv into heads, norm queries and keys, and put image before text.

    `image`: [B, N, 3 D], rows q, k, v; `text`: [B, T, 3 D], or none for the second attention.
    `gains`: image's of q and k, then text's, each one head wide. Returns q, k, v, each
    [B, heads, N + T, D / heads].
    """
    parts: list[list[torch.Tensor]] = [[], [], []]
    for number, stream in enumerate((image, text)):
        if stream is None:
            continue
        cut = stream.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        for part in range(3):
            value = cut[part]
            if part < 2:
                gain = gains[2 * number + part]
                value = F.rms_norm(value, gain.shape, gain, eps)
            parts[part].append(value)
    q, k, v = (torch.cat(each, dim=2) for each in parts)
    return q, k, v
