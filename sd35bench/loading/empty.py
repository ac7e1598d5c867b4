"""Modules without weights: built on the meta device, where they take neither memory nor time.

What is in no checkpoint is computed here: buffers, and the dtype of what stays in fp32.
"""

from typing import Any

import diffusers
import torch
import transformers
from diffusers.models.embeddings import PatchEmbed, get_1d_sincos_pos_embed_from_grid
from torch import nn

from sd35bench.errors import BackendError


def build_empty(config: dict[str, Any]) -> nn.Module:
    """Build the module that a part's configuration describes, in evaluation mode.

    `config`: its JSON, with the class in diffusers or transformers under `_class_name`.
    """
    name = config["_class_name"]
    values = {key: value for key, value in config.items() if not key.startswith("_")}
    with torch.device("meta"):
        if hasattr(diffusers, name):
            return getattr(diffusers, name).from_config(values).eval()
        model_class = getattr(transformers, name)
        return model_class(model_class.config_class.from_dict(values)).eval()


def dtype_of(model: nn.Module, path: str, dtype: torch.dtype) -> torch.dtype:
    """Return fp32 for what transformers keeps so under fp16: T5's output projections."""
    kept = getattr(model, "_keep_in_fp32_modules", None)
    if dtype is torch.float16 and kept and set(kept) & set(path.split(".")):
        return torch.float32
    return dtype


def restore_buffers(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Compute the true values of every buffer that is still on the meta device.

    Raises: BackendError for one that nobody has thought of.
    """
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:
                persistent = name not in module._non_persistent_buffers_set
                values = _true_buffer(module, name, buffer, dtype).to(device)
                module.register_buffer(name, values, persistent=persistent)


def _true_buffer(
    module: nn.Module, name: str, buffer: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    if name == "position_ids":
        return torch.arange(buffer.shape[-1]).expand(buffer.shape).clone()
    if name == "pos_embed" and isinstance(module, PatchEmbed):
        return _position_table(module, buffer.shape[-1], dtype)
    raise BackendError(f"{type(module).__name__} has a buffer {name!r} that is in no checkpoint")


def _position_table(module: PatchEmbed, width: int, dtype: torch.dtype) -> torch.Tensor:
    """The sine-cosine table [1, side**2, width], first by column, then by row.

    It is made of two small tables: diffusers' own function takes 4 GB for SD3.5-Medium's 226
    million values. Source: diffusers `get_2d_sincos_pos_embed`.
    """
    side = module.pos_embed_max_size
    assert side is not None
    positions = torch.arange(side, dtype=torch.float32) / (side / module.base_size)
    exact = get_1d_sincos_pos_embed_from_grid(width // 2, positions / module.interpolation_scale)
    line = exact.float().to(dtype)
    table = torch.empty(side, side, width, dtype=dtype)
    table[..., : width // 2] = line[None]
    table[..., width // 2 :] = line[:, None]
    return table.view(1, side * side, width)
