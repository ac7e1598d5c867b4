"""Floating-point operations of one image, from the components' configurations alone.

Counted is what a matmul, convolution or attention unit does, a multiply-add as 2; norms,
activations and the sampler are left out (under 1 % of a step), as in torch's own counter
(`torch.utils.flop_counter`), which the tests hold these formulas against. With D the width, N
image tokens and T text tokens, one block of MMDiT-X costs about

    24 (N + T) D^2   linears (attention's four, the MLP's two of 4 D)
     4 (N + T)^2 D   joint attention, scores and values
     8 N D^2 + 4 N^2 D   more in a dual-attention block (image tokens attend to themselves again)

so at 1024^2 px (N = 4096, T = 333) attention is 38 % of the forward pass, at 512^2 about 15 %.
Guidance doubles it and the text encoders' share. What was really run may be less (a cached step)
or more (padding to a graph's static shape): these are the operations that the images need.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from sd35bench.evaluations import work
from sd35bench.types import Flops, Request, Task

Config = Mapping[str, Any]

TIME_CHANNELS = 256
"""Width of the sinusoidal timestep embedding. Source: diffusers `CombinedTimestepTextProj…`."""
MLP_RATIO = 4
CLIP_TOKENS = 77
CLIPS = ("text_encoder", "text_encoder_2")
T5 = "text_encoder_3"


def image_flops(components: Mapping[str, Config], request: Request, evaluations: int) -> Flops:
    """Count the operations of one image of an SD3 pipeline.

    Args:
        components: configurations by diffusers' component name; "transformer" and "vae" must be
            there, a missing text encoder costs nothing.
        request: with `max_sequence_length` filled in, the model's own where none was asked.
        evaluations: calls of the denoiser, skip-layer guidance's extra ones included. A call
            carries the image twice where guidance acts and once outside its interval; an extra
            one carries it once, without the skipped layers.

    Raises: ValueError without `max_sequence_length`, or with a negative count.
    """
    if request.max_sequence_length is None:
        raise ValueError("max_sequence_length is None: fill in the model's own before counting")
    if evaluations < 0:
        raise ValueError(f"evaluations={evaluations}: must be at least 0")
    transformer, vae = components["transformer"], components["vae"]
    latent = latent_size(vae, request.width, request.height)
    text_tokens = clip_tokens(components) + request.max_sequence_length
    guided = 2 if request.cfg > 1 else 1
    planned = work(request)
    extra = min(planned.skipped, evaluations)
    alone = min(planned.alone, evaluations - extra)
    skipped = () if request.skip_layer_guidance is None else request.skip_layer_guidance.layers
    sequences = guided * (evaluations - extra - alone) + alone
    denoise = sequences * mmdit_flops(transformer, latent, text_tokens)
    if extra:
        denoise += extra * mmdit_flops(transformer, latent, text_tokens, skipped)
    is_edit = request.task is Task.IMAGE_TO_IMAGE
    return Flops(
        text=guided * _text_flops(components, request.max_sequence_length),
        denoise=float(denoise),
        decode=decode_flops(vae, latent),
        encode=encode_flops(vae, (request.height, request.width)) if is_edit else 0.0,
    )


def latent_size(vae: Config, width: int, height: int) -> tuple[int, int]:
    """(height, width) of the latents of an image in px."""
    scale = 2 ** (len(vae["block_out_channels"]) - 1)
    return height // scale, width // scale


def clip_tokens(components: Mapping[str, Config]) -> int:
    """Tokens that the CLIP encoders give, their tokenizers' padded length: 77 for OpenAI's."""
    config = components.get("text_encoder")
    return CLIP_TOKENS if config is None else config["max_position_embeddings"]


# The transformer ------------------------------------------------------------------------------


def mmdit_flops(
    config: Config, latent: tuple[int, int], text_tokens: int, skipped: Sequence[int] = ()
) -> float:
    """Count one forward pass of MMDiT-X for one sequence (batch 1).

    `latent` is (height, width) of the latents; `skipped` are blocks that are left out.
    Source: diffusers `SD3Transformer2DModel` and `JointTransformerBlock`.
    """
    width = config["num_attention_heads"] * config["attention_head_dim"]
    patch = config["patch_size"]
    tokens = (latent[0] // patch) * (latent[1] // patch)
    patch_channels = patch * patch
    total = _linear(tokens, config["in_channels"] * patch_channels, width)
    total += _linear(1, TIME_CHANNELS, width) + _linear(1, width, width)
    total += _linear(1, config["pooled_projection_dim"], width) + _linear(1, width, width)
    total += _linear(text_tokens, config["joint_attention_dim"], config["caption_projection_dim"])
    dual, last = set(config["dual_attention_layers"]), config["num_layers"] - 1
    for index in range(config["num_layers"]):
        if index not in skipped:
            total += _block(tokens, text_tokens, width, index in dual, index == last)
    out_channels = config["out_channels"]
    if out_channels is None:
        out_channels = config["in_channels"]
    total += _linear(1, width, 2 * width)
    return total + _linear(tokens, width, patch_channels * out_channels)


def _block(tokens: int, text_tokens: int, width: int, dual: bool, last: bool) -> float:
    """Count one joint block; the last one gives no text stream."""
    both = tokens + text_tokens
    total = _linear(1, width, (9 if dual else 6) * width)
    total += _linear(1, width, (2 if last else 6) * width)
    total += 3 * _linear(both, width, width) + _attention(both, width)
    out = tokens if last else both
    total += _linear(out, width, width) + 2 * _linear(out, width, MLP_RATIO * width)
    if dual:
        total += 4 * _linear(tokens, width, width) + _attention(tokens, width)
    return total


# Text encoders --------------------------------------------------------------------------------


def _text_flops(components: Mapping[str, Config], t5_tokens: int) -> float:
    """Count all text encoders for one prompt."""
    total = sum(clip_flops(components[name]) for name in CLIPS if components.get(name) is not None)
    t5 = components.get(T5)
    return total + (0.0 if t5 is None else t5_flops(t5, t5_tokens))


def clip_flops(config: Config) -> float:
    """Count a CLIP text encoder with projection for one prompt, padded to its full length."""
    tokens, width = config["max_position_embeddings"], config["hidden_size"]
    layer = 4 * _linear(tokens, width, width) + _attention(tokens, width)
    layer += 2 * _linear(tokens, width, config["intermediate_size"])
    return config["num_hidden_layers"] * layer + _linear(1, width, config["projection_dim"])


def t5_flops(config: Config, tokens: int) -> float:
    """Count a T5 encoder for one prompt padded to `tokens`; a gated MLP has three products."""
    width, inner = config["d_model"], config["num_heads"] * config["d_kv"]
    products = 3 if str(config["feed_forward_proj"]).startswith("gated") else 2
    layer = 4 * _linear(tokens, width, inner) + _attention(tokens, inner)
    layer += products * _linear(tokens, width, config["d_ff"])
    return config["num_layers"] * layer


# The VAE --------------------------------------------------------------------------------------


def decode_flops(vae: Config, latent: tuple[int, int]) -> float:
    """Count AutoencoderKL's decoder for one image. Source: diffusers `Decoder`."""
    widths = list(reversed(vae["block_out_channels"]))
    height, width = latent
    pixels, channels = height * width, vae["latent_channels"]
    total = _conv(pixels, channels, channels, 1) if vae["use_post_quant_conv"] else 0.0
    total += _conv(pixels, channels, widths[0]) + _middle(vae, pixels, widths[0])
    previous = widths[0]
    for index, current in enumerate(widths):
        total += _resnets(pixels, previous, current, vae["layers_per_block"] + 1)
        previous = current
        if index < len(widths) - 1:
            pixels *= 4
            total += _conv(pixels, current, current)
    return total + _conv(pixels, widths[-1], vae["out_channels"])


def encode_flops(vae: Config, image: tuple[int, int]) -> float:
    """Count AutoencoderKL's encoder for one image of (height, width) px."""
    widths = vae["block_out_channels"]
    pixels, moments = image[0] * image[1], 2 * vae["latent_channels"]
    total = _conv(pixels, vae["in_channels"], widths[0])
    previous = widths[0]
    for index, current in enumerate(widths):
        total += _resnets(pixels, previous, current, vae["layers_per_block"])
        previous = current
        if index < len(widths) - 1:
            pixels //= 4
            total += _conv(pixels, current, current)
    total += _middle(vae, pixels, widths[-1]) + _conv(pixels, widths[-1], moments)
    return total + (_conv(pixels, moments, moments, 1) if vae["use_quant_conv"] else 0.0)


def _middle(vae: Config, pixels: int, channels: int) -> float:
    """Count two residual blocks around one attention of a single head."""
    total = _resnets(pixels, channels, channels, 2)
    if vae["mid_block_add_attention"]:
        total += 4 * _linear(pixels, channels, channels) + _attention(pixels, channels)
    return total


def _resnets(pixels: int, first: int, channels: int, count: int) -> float:
    """Count `count` residual blocks, the first of which comes from `first` channels."""
    total = _conv(pixels, first, channels) + (2 * count - 1) * _conv(pixels, channels, channels)
    return total + (_conv(pixels, first, channels, 1) if first != channels else 0.0)


# Units ----------------------------------------------------------------------------------------


def _linear(rows: int, inputs: int, outputs: int) -> float:
    return 2.0 * rows * inputs * outputs


def _attention(tokens: int, width: int) -> float:
    """Scores and their product with the values, all heads."""
    return 4.0 * tokens * tokens * width


def _conv(pixels: int, inputs: int, outputs: int, kernel: int = 3) -> float:
    return 2.0 * pixels * inputs * outputs * kernel * kernel
