"""The tests' tiny checkpoint: an untrained SD3 in the real folder format, written in a second.

The same classes as the real one (dual attention, RMS qk-norm, 16 latent channels, scaling and
shift factors far from 1 and 0, two CLIP encoders of different width, T5, the flow scheduler with
a shift that is not 1), so that anything that loads or calls SD3 can be tested without weights.
"""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import pre_tokenizers
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

TOKENS = 24
"""Length of every tokenizer's output; a character is a token."""
LAYERS = 3
SHIFT = 3.0
CLIP_WIDTHS = (16, 32)
T5_WIDTH = 64


def write_tiny_sd3(path: Path, seed: int = 0) -> Path:
    """Write the tiny checkpoint as a diffusers folder; the same seed writes the same weights."""
    build_tiny_sd3(seed).save_pretrained(path)
    return path


def build_tiny_sd3(seed: int = 0) -> StableDiffusion3Pipeline:
    """Build the tiny pipeline in fp32 on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clip_tokenizer = _clip_tokenizer()
        t5_tokenizer = _t5_tokenizer()
        first, second = (_clip_encoder(width, clip_tokenizer) for width in CLIP_WIDTHS)
        return StableDiffusion3Pipeline(
            transformer=_transformer(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
            vae=_vae(),
            text_encoder=first,
            tokenizer=clip_tokenizer,
            text_encoder_2=second,
            tokenizer_2=_clip_tokenizer(),
            text_encoder_3=_t5_encoder(t5_tokenizer),
            tokenizer_3=t5_tokenizer,
        )


def _transformer() -> SD3Transformer2DModel:
    transformer = SD3Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=LAYERS,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=sum(CLIP_WIDTHS),
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    # Untrained, text hardly moves the output; louder, its effect is far above rounding.
    for layer in (transformer.context_embedder, transformer.time_text_embed.text_embedder.linear_2):
        nn.init.normal_(layer.weight, std=0.5)
    nn.init.normal_(transformer.proj_out.weight, std=0.2)
    return transformer.eval()


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=16,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


def _clip_tokenizer() -> CLIPTokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{c}</w>" for c in alphabet), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=TOKENS)


def _t5_tokenizer() -> T5TokenizerFast:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(chr(code), -3.0) for code in range(33, 127)]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=TOKENS)


def _clip_encoder(width: int, tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    encoder = CLIPTextModelWithProjection(config)
    nn.init.normal_(encoder.text_model.embeddings.token_embedding.weight)
    return encoder.eval()


def _t5_encoder(tokenizer: T5TokenizerFast) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=T5_WIDTH,
        d_kv=16,
        d_ff=64,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return T5EncoderModel(config).eval()
