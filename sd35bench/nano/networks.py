"""The embedded model's networks: the very classes of SD3.5, at toy size, and their tokenizers.

Nothing here is trained; `train` fills the weights in and `export` saves them as a diffusers folder:
fp16 safetensors, swapped in as a whole. The two CLIP widths add up to less than T5's, as
`encode_prompt` needs.
"""

import json
import shutil
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import (
    StableDiffusion3Pipeline,
)
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,  # pyright: ignore[reportAttributeAccessIssue]
)

from sd35bench.nano.captions import words

TEXT_TOKENS = 16
"""Length of every tokenizer's output; also nano's `max_sequence_length`."""
CLIP_WIDTHS = (64, 96)
T5_WIDTH = 192
SCHEDULER_SHIFT = 3.0


@dataclass(frozen=True)
class TransformerSize:
    """The size of the MMDiT-X; the default has about 8 M parameters."""

    layers: int = 6
    heads: int = 6
    head_dim: int = 32
    dual_attention_layers: tuple[int, ...] = (0, 1)


NANO = TransformerSize()


def build_transformer(size: TransformerSize = NANO) -> SD3Transformer2DModel:
    """An untrained MMDiT-X on 16-channel latents, patch 1, adaLN-zero initialised.

    Its default size is 8 x 8 latents (64 x 64 px); position embeddings reach 16 x 16.
    """
    width = size.heads * size.head_dim
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=16,
        out_channels=16,
        num_layers=size.layers,
        attention_head_dim=size.head_dim,
        num_attention_heads=size.heads,
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=width,
        pooled_projection_dim=sum(CLIP_WIDTHS),
        pos_embed_max_size=16,
        dual_attention_layers=size.dual_attention_layers,
        qk_norm="rms_norm",
    )
    modulations: list[Any] = [transformer.norm_out.linear, transformer.proj_out]
    blocks: Any = transformer.transformer_blocks
    for block in blocks:
        modulations += [block.norm1.linear, block.norm1_context.linear]
    for layer in modulations:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return transformer


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """SD3's scheduler."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=SCHEDULER_SHIFT)


def build_clip_tokenizer() -> CLIPTokenizer:
    """Byte-level BPE that keeps each word of the captions whole; other words fall to pieces."""
    merges: Any = learn_merges(words())
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{letter}</w>" for letter in alphabet)]
    tokens += [left + right for left, right in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TEXT_TOKENS)


def learn_merges(vocabulary: list[str]) -> list[tuple[str, str]]:
    """BPE merges until every word is one token; ties go to the first pair in the alphabet.

    `tokenizers`' own trainer breaks ties by the order of a hash map, differently in every process,
    and so gives the same word another id each time.
    """
    split = [[*word[:-1], f"{word[-1]}</w>"] for word in vocabulary]
    merges: list[tuple[str, str]] = []
    while any(len(word) > 1 for word in split):
        counts = Counter(pair for word in split for pair in pairwise(word))
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        split = [_merged(word, best) for word in split]
    return merges


def _merged(word: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for piece in word:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


def build_t5_tokenizer() -> T5TokenizerFast:
    """Unigram pieces: the words of the captions, and printable ASCII for everything else."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(f"▁{word}", -3.0) for word in words()]
    pieces += [(chr(code), -12.0) for code in range(33, 127)]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=TEXT_TOKENS)


def build_clip_text_encoder(width: int, tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """An untrained CLIP text encoder; its pooled projection is as wide as itself."""
    special: Any = tokenizer
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=3,
        num_attention_heads=width // 32,
        max_position_embeddings=TEXT_TOKENS,
        projection_dim=width,
        hidden_act="gelu",
        bos_token_id=special.bos_token_id,
        eos_token_id=special.eos_token_id,
        pad_token_id=special.pad_token_id,
    )
    encoder = CLIPTextModelWithProjection(config)
    embeddings = encoder.text_model.embeddings
    # The penultimate layer is read without a norm: start at unit scale, as T5's output does.
    nn.init.normal_(embeddings.token_embedding.weight)
    nn.init.normal_(embeddings.position_embedding.weight, std=0.3)
    return encoder


def build_t5_encoder(tokenizer: T5TokenizerFast) -> T5EncoderModel:
    """An untrained T5 encoder of two layers."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=T5_WIDTH,
        d_kv=32,
        d_ff=256,
        num_layers=2,
        num_heads=6,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return T5EncoderModel(config)


class TextEncoders(nn.Module):
    """The three text encoders together, encoding as `StableDiffusion3Pipeline` does.

    The pipeline's own `encode_prompt` tokenizes on every call; here the two steps are apart, so
    that a training set is tokenized once. A test holds that both give the same numbers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tokenizers = (build_clip_tokenizer(), build_clip_tokenizer(), build_t5_tokenizer())
        self.clip = build_clip_text_encoder(CLIP_WIDTHS[0], self.tokenizers[0])
        self.clip_2 = build_clip_text_encoder(CLIP_WIDTHS[1], self.tokenizers[1])
        self.t5 = build_t5_encoder(self.tokenizers[2])

    def tokenize(self, prompts: list[str]) -> Tensor:
        """Token ids of the three tokenizers: [N, 3, TEXT_TOKENS] int64."""
        return torch.stack([_token_ids(tokenizer, prompts) for tokenizer in self.tokenizers], 1)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings [N, 2 * TEXT_TOKENS, T5_WIDTH] and pooled projections [N, sum of widths]."""
        first = self.clip(ids[:, 0], output_hidden_states=True)
        second = self.clip_2(ids[:, 1], output_hidden_states=True)
        clips = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        clips = nn.functional.pad(clips, (0, T5_WIDTH - clips.shape[-1]))
        embeddings = torch.cat([clips, self.t5(ids[:, 2])[0].to(clips.dtype)], dim=-2)
        return embeddings, torch.cat([first[0], second[0]], dim=-1)


def _token_ids(tokenizer: CLIPTokenizer | T5TokenizerFast, prompts: list[str]) -> Tensor:
    return tokenizer(
        prompts, padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids


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
