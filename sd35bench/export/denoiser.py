"""SD3's denoiser cut in two: a graph whose sizes are all free, and what stays in PyTorch.

Exported whole, the transformer fails at run time on every size that is not square: the crop of
the position table is traced with the sizes of the export. So cutting latents into patches, the
crop and putting patches together again (a reshape and a slice, no arithmetic) stay outside, and
the graph maps patches to patches. Batch, image tokens and text tokens are free axes of one graph.

Cost: per call one copy of the latents each way (16 channels: 256 KiB at 1024 px in fp32) and one
crop per size, kept. The graph reads its weights once: 9 GB in fp32 for SD3.5-Medium.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from sd35bench.core.model import crop_positions, patchify, unpatchify

INPUTS = ("patches", "positions", "timestep", "text", "pooled")
"""The graph's inputs: [B, T, C·p·p], [1, T, D], [B] in float32, [B, L, E] and [B, P]."""
OUTPUT = "velocity"
"""The graph's output: [B, T, p·p·C]."""

Run = Callable[[Mapping[str, torch.Tensor], tuple[int, ...]], torch.Tensor]
"""Runs the graph on its inputs without the blocks whose indices are given."""


class ExportableDenoiser(nn.Module):
    """The part of `SD3Transformer2DModel` that becomes a graph.

    Beside its output it returns what enters and leaves every block, so that blocks can be left
    out of the graph afterwards (`onnx_model.leave_out`): one export serves skip-layer guidance too.
    Source: diffusers, models/transformers/transformer_sd3.py, `SD3Transformer2DModel.forward`.
    """

    def __init__(self, transformer: Any) -> None:
        """Share `transformer`'s weights."""
        super().__init__()
        self.transformer = transformer

    def forward(
        self,
        patches: torch.Tensor,
        positions: torch.Tensor,
        timestep: torch.Tensor,
        text: torch.Tensor,
        pooled: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """Return `OUTPUT`, then image and text tokens at each of `boundaries`."""
        model = self.transformer
        stem = model.pos_embed.proj  # a convolution whose stride is its kernel: a linear layer
        image = nn.functional.linear(patches, stem.weight.flatten(1), stem.bias)
        image = (image + positions).to(image.dtype)
        condition = model.time_text_embed(timestep, pooled)
        text = model.context_embedder(text)
        seen = [image, text]
        for block in model.transformer_blocks:
            text, image = block(hidden_states=image, encoder_hidden_states=text, temb=condition)
            seen += [image] if text is None else [image, text]
        return model.proj_out(model.norm_out(image, condition)), *seen


def boundaries(layers: int) -> list[str]:
    """Names of what enters block 0, 1, … and leaves the last, which returns no text."""
    names = [f"{stream}.{index}" for index in range(layers) for stream in ("image", "text")]
    return [*names, f"image.{layers}"]


class GraphDenoiser:
    """Stands in a diffusers pipeline where the transformer was, and runs a graph instead.

    Keeps the transformer's configuration, dtype and position table, none of its weights.
    """

    attn_processors: Mapping[str, Any] = {}

    def __init__(self, transformer: Any, run: Run) -> None:
        """Take what stays in PyTorch from `transformer`; `run` is the graph."""
        self.config = transformer.config
        self.dtype: torch.dtype = transformer.dtype
        self.device: torch.device = transformer.device
        self._table: torch.Tensor = transformer.pos_embed.pos_embed
        self._run = run
        self._crops: dict[tuple[int, int], torch.Tensor] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor]:
        """Call `forward`, as a module does."""
        return self.forward(*args, **kwargs)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        pooled_projections: torch.Tensor,
        timestep: torch.Tensor,
        joint_attention_kwargs: Mapping[str, Any] | None = None,
        return_dict: bool = False,
        skip_layers: list[int] | None = None,
    ) -> tuple[torch.Tensor]:
        """Predict the velocity of latents [B, C, H, W]; arguments as the transformer's.

        `skip_layers`: blocks that are left out. Raises: ValueError for arguments that a graph
        cannot take.
        """
        if joint_attention_kwargs or return_dict:
            raise ValueError("an exported denoiser takes no joint_attention_kwargs or return_dict")
        size = self.config.patch_size
        rows, columns = (side // size for side in hidden_states.shape[-2:])
        velocity = self._run(
            {
                "patches": patchify(hidden_states, size).contiguous(),
                "positions": self._positions(rows, columns),
                # diffusers' embedding casts too; solvers give int64, and an expanded scalar.
                "timestep": timestep.float().contiguous(),
                "text": encoder_hidden_states.contiguous(),
                "pooled": pooled_projections.contiguous(),
            },
            tuple(sorted(set(skip_layers))) if skip_layers is not None else (),
        )
        return (unpatchify(velocity, size, (rows * size, columns * size)),)

    def _positions(self, rows: int, columns: int) -> torch.Tensor:
        key = (rows, columns)
        if key not in self._crops:
            side = self.config.pos_embed_max_size
            self._crops[key] = crop_positions(self._table[0], side, rows, columns)[None]
        return self._crops[key]
