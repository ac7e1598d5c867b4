"""Tiny untrained Sana and PixArt checkpoints in the real folder format, beside `tiny`'s SD3."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
)
from torch import nn
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

from tests.studies.tiny import T5_WIDTH, TOKENS, _t5_encoder, _t5_tokenizer

GEMMA_WIDTH = 16
SANA_SHIFT = 3.0


def write_tiny(family: str, path: Path, seed: int = 0) -> Path:
    """Write the tiny "sana" or "pixart" as a diffusers folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        {"sana": _sana, "pixart": _pixart}[family]().save_pretrained(path)
    return path


def _sana() -> SanaPipeline:
    """An 8-fold autoencoder, Gemma, the flow form of DPM-Solver++ with a shift that is not 1."""
    blocks = ("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock")
    shape: dict[str, Any] = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in {
            "block_types": blocks,
            "block_out_channels": (8, 8, 8, 8),
            "layers_per_block": (1, 1, 1, 1),
            "qkv_multiscales": ((), (), (), (5,)),
        }.items()
    }
    vae = AutoencoderDC(latent_channels=4, attention_head_dim=2, scaling_factor=0.41407, **shape)
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=GEMMA_WIDTH,
        sample_size=32,
    )
    _loud(transformer.caption_projection.linear_2, transformer.proj_out)
    characters = {c: 5 + i for i, c in enumerate("▁\n" + "".join(map(chr, range(33, 127))))}
    special = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<mask>": 4}
    tokenizer = GemmaTokenizer(vocab={**special, **characters}, merges=[])
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=GEMMA_WIDTH,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    return SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=Gemma2Model(config).eval(),
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=DPMSolverMultistepScheduler(
            use_flow_sigmas=True, flow_shift=SANA_SHIFT, prediction_type="flow_prediction"
        ),
    )


def _pixart() -> PixArtAlphaPipeline:
    """A learned sigma (twice the channels out) and the size conditions of the 1024 px model."""
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,  # the size conditions take a third of the width each
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=24,
        sample_size=128,
        patch_size=2,
        caption_channels=T5_WIDTH,
    )
    _loud(transformer.caption_projection.linear_2, transformer.proj_out)
    tokenizer = _t5_tokenizer()
    return PixArtAlphaPipeline(
        tokenizer=tokenizer,
        text_encoder=_t5_encoder(tokenizer),
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 16, 16),
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=4,
        ).eval(),
        transformer=transformer.eval(),
        scheduler=DPMSolverMultistepScheduler(),
    )


def _loud(*layers: Any) -> None:
    """Make text move the output far above rounding."""
    for layer in layers:
        nn.init.normal_(layer.weight, std=0.5)


__all__ = ["SANA_SHIFT", "TOKENS", "write_tiny"]
