"""Saving what was trained as a diffusers folder: fp16 safetensors, swapped in as a whole."""

import json
import shutil
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import (
    StableDiffusion3Pipeline,
)

from sd35bench.nano.networks import TextEncoders, build_scheduler


def assemble(
    vae: AutoencoderKL, transformer: SD3Transformer2DModel, text: TextEncoders
) -> StableDiffusion3Pipeline:
    """The pipeline of these networks; they are used, not copied."""
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=build_scheduler(),
        vae=vae,
        text_encoder=text.clip,
        tokenizer=text.tokenizers[0],
        text_encoder_2=text.clip_2,
        tokenizer_2=text.tokenizers[1],
        text_encoder_3=text.t5,
        tokenizer_3=text.tokenizers[2],
    )


def export(pipeline: StableDiffusion3Pipeline, folder: Path) -> int:
    """Save the pipeline in fp16 at `folder`, replacing what is there; returns its size in bytes."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.to(dtype=torch.float16)
    pipeline.save_pretrained(partial, safe_serialization=True)
    pipeline.to(dtype=torch.float32)
    _forget_paths(partial)
    for file in partial.rglob("*.safetensors"):
        file.chmod(0o644)  # safetensors makes them readable by their owner only
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _forget_paths(folder: Path) -> None:
    """Drop the paths of this machine that diffusers leaves in the configurations."""
    for file in folder.rglob("*.json"):
        content = json.loads(file.read_text())
        if isinstance(content, dict) and content.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
