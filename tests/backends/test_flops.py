"""Operations from configurations, held against torch's own counter on real and on true shapes.

torch counts what its dispatcher sees; with the mathematical attention kernel that is every product.
"""

from dataclasses import replace
from typing import Any

import pytest

from sd35bench.backends import flops
from sd35bench.backends.flops import (
    clip_flops,
    decode_flops,
    encode_flops,
    image_flops,
    mmdit_flops,
    t5_flops,
)
from sd35bench.evaluations import evaluations, work
from sd35bench.types import Request, SkipLayerGuidance

TERA = 1e12
TRANSFORMER: dict[str, Any] = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
VAE: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 16,
    "norm_num_groups": 32,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "mid_block_add_attention": True,
}
CLIP_L: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "projection_dim": 768,
}
CLIP_G = CLIP_L | {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}
T5: dict[str, Any] = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
SD35 = {
    "transformer": TRANSFORMER,
    "vae": VAE,
    "text_encoder": CLIP_L,
    "text_encoder_2": CLIP_G,
    "text_encoder_3": T5,
}


def request(**fields: Any) -> Request:
    asked = {"prompt": "a", "steps": 4, "cfg": 5.0, "seed": 0, "width": 1024, "height": 1024}
    return Request(**{**asked, "max_sequence_length": 256, **fields})


def counted(call: Any) -> int:
    """What torch's counter sees in one call without gradients."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


# True shapes, on the meta device ----------------------------------------------------------------


@pytest.fixture(scope="module")
def meta_transformer():
    import torch
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

    with torch.device("meta"):
        return SD3Transformer2DModel(**TRANSFORMER).eval()


@pytest.mark.parametrize(
    ("px", "batch", "published"),
    [
        (1024, 1, 11.25),
        pytest.param(512, 2, 4.89, marks=pytest.mark.slow),
        pytest.param(1024, 2, 22.50, marks=pytest.mark.slow),
        pytest.param(512, 1, 2.44, marks=pytest.mark.slow),
    ],
    ids=["1024-b1", "512-b2", "1024-b2", "512-b1"],
)
def test_mmdit_at_its_true_shape_is_what_torch_counts(meta_transformer, px, batch, published):
    import torch

    latent = px // 8
    with torch.device("meta"):
        seen = counted(
            lambda: meta_transformer(
                hidden_states=torch.empty(batch, 16, latent, latent),
                encoder_hidden_states=torch.empty(batch, 333, 4096),
                pooled_projections=torch.empty(batch, 2048),
                timestep=torch.empty(batch),
            )
        )
    ours = batch * mmdit_flops(TRANSFORMER, (latent, latent), 333)
    assert ours == pytest.approx(seen, rel=0.005)
    assert ours / TERA == pytest.approx(published, rel=0.005)


def test_mmdit_without_skipped_layers_is_what_torch_counts():
    import torch
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

    config = TRANSFORMER | {"num_layers": 5, "dual_attention_layers": (0, 1)}
    with torch.device("meta"):
        transformer = SD3Transformer2DModel(**config).eval()
        seen = counted(
            lambda: transformer(
                hidden_states=torch.empty(1, 16, 64, 112),
                encoder_hidden_states=torch.empty(1, 154, 4096),
                pooled_projections=torch.empty(1, 2048),
                timestep=torch.empty(1),
                skip_layers=[1, 2, 3],
            )
        )
    assert mmdit_flops(config, (64, 112), 154, (1, 2, 3)) == pytest.approx(seen, rel=0.005)


@pytest.mark.parametrize(
    ("px", "published", "quantised"),
    [
        (1024, 10.47, False),
        (512, 2.51, True),
        pytest.param(512, 2.51, False, marks=pytest.mark.slow),
        pytest.param(1024, 10.47, True, marks=pytest.mark.slow),
    ],
    ids=["1024", "512-quant-convolutions", "512", "1024-quant-convolutions"],
)
def test_vae_at_its_true_shape_is_what_torch_counts(px, published, quantised):
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    config = VAE | {"use_quant_conv": quantised, "use_post_quant_conv": quantised}
    with torch.device("meta"):
        vae: Any = AutoencoderKL(**config).eval()
        decoding = counted(lambda: vae.decode(torch.empty(1, 16, px // 8, px // 8)))
        encoding = counted(lambda: vae.encode(torch.empty(1, 3, px, px)))
    assert decode_flops(config, (px // 8, px // 8)) == pytest.approx(decoding, rel=0.005)
    assert encode_flops(config, (px, px)) == pytest.approx(encoding, rel=0.005)
    assert decoding / TERA == pytest.approx(published, rel=0.005)


@pytest.mark.parametrize(
    ("config", "published"),
    [(CLIP_L, 0.013), pytest.param(CLIP_G, 0.098, marks=pytest.mark.slow)],
    ids=["clip-l", "big-g"],
)
def test_clip_at_its_true_shape_is_what_torch_counts(config, published):
    import torch
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    tokens = {"vocab_size": 9, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    with torch.device("meta"):
        model = CLIPTextModelWithProjection(CLIPTextConfig(**tokens, **config)).eval()
        seen = counted(lambda: model(input_ids=torch.zeros(1, 77, dtype=torch.long)))
    assert clip_flops(config) == pytest.approx(seen, rel=0.005)
    assert seen / TERA == pytest.approx(published, rel=0.03)  # published with two digits


@pytest.mark.parametrize("feed_forward", ["gated-gelu", "relu"])
def test_t5_at_its_true_shape_is_what_torch_counts(feed_forward):
    import torch
    from transformers import T5Config, T5EncoderModel

    config = T5 | {"feed_forward_proj": feed_forward}
    if feed_forward == "relu":
        config |= {"num_layers": 2}  # published is the other
    with torch.device("meta"):
        model = T5EncoderModel(T5Config(vocab_size=9, **config)).eval()
        seen = counted(lambda: model(input_ids=torch.zeros(1, 256, dtype=torch.long)))
    assert t5_flops(config, 256) == pytest.approx(seen, rel=0.005)
    if feed_forward == "gated-gelu":
        assert seen / TERA == pytest.approx(2.40, rel=0.005)


# Real runs of whole pipelines -------------------------------------------------------------------


def configurations(pipe: Any) -> dict[str, Any]:
    encoders = {
        name: getattr(pipe, name).config.to_dict()
        for name in ("text_encoder", "text_encoder_2", "text_encoder_3")
    }
    return {"transformer": dict(pipe.transformer.config), "vae": dict(pipe.vae.config), **encoders}


@pytest.fixture(scope="module")
def tiny():
    from tests.studies.tiny import build_tiny_sd3

    return build_tiny_sd3()


@pytest.fixture(scope="module")
def nano():
    from importlib.resources import files

    from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import (
        StableDiffusion3Pipeline,
    )

    folder = str(files("sd35bench.nano") / "weights")
    return StableDiffusion3Pipeline.from_pretrained(folder).to(dtype=_float32())


def _float32() -> Any:
    import torch

    return torch.float32


CASES = {
    "plain": {"cfg": 1.0},
    "guided": {"cfg": 4.0},
    "heun": {"cfg": 4.0, "sampler": "heun"},
    "skip-layers": {
        "cfg": 4.0,
        "steps": 5,
        "skip_layer_guidance": SkipLayerGuidance(layers=(1,), scale=2.0, start=0.1, stop=0.7),
    },
}


@pytest.mark.model
@pytest.mark.parametrize(
    ("case", "model"),
    [
        *((case, "tiny") for case in CASES),
        pytest.param("skip-layers", "nano", marks=pytest.mark.slow),
    ],
)
def test_text_to_image_is_what_torch_counts(model, case, request_of, request):
    pipe = request.getfixturevalue(model)
    asked = request_of(model, **CASES[case])
    pipe.set_progress_bar_config(disable=True)
    seen = counted(lambda: pipe(**arguments(pipe, asked)))
    ours = image_flops(configurations(pipe), asked, evaluations(asked))
    assert ours.total == pytest.approx(seen, rel=0.005)
    assert ours.encode == 0.0
    assert min(ours.text, ours.denoise, ours.decode) > 0
    if case == "skip-layers":
        assert work(asked).skipped == 3


@pytest.mark.model
@pytest.mark.parametrize("model", ["tiny", "nano"])
def test_image_to_image_is_what_torch_counts(model, request_of, request):
    import PIL.Image
    from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3_img2img import (
        StableDiffusion3Img2ImgPipeline,
    )

    pipe = request.getfixturevalue(model)
    twin = StableDiffusion3Img2ImgPipeline(**pipe.components)
    twin.set_progress_bar_config(disable=True)
    asked = request_of(model, cfg=4.0, init_image="a" * 64, prompt_strength=0.5)
    init = PIL.Image.new("RGB", (asked.width, asked.height), "red")
    seen = counted(lambda: twin(**arguments(twin, asked), image=init, strength=0.5))
    ours = image_flops(configurations(pipe), asked, evaluations(asked))
    assert evaluations(asked) == 2
    assert ours.total == pytest.approx(seen, rel=0.005)
    assert ours.encode > 0


@pytest.fixture
def request_of():
    """A request in a model's own size and length."""

    def make(model: str, **fields: Any) -> Request:
        side, tokens = {"tiny": (32, 24), "nano": (64, 16)}[model]
        own = {"width": side, "height": side, "max_sequence_length": tokens, "steps": 4}
        return request(**{**own, **fields})

    return make


def arguments(pipe: Any, asked: Request) -> dict[str, Any]:
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
        FlowMatchEulerDiscreteScheduler,
    )
    from diffusers.schedulers.scheduling_flow_match_heun_discrete import (
        FlowMatchHeunDiscreteScheduler,
    )

    kind = FlowMatchHeunDiscreteScheduler if asked.sampler == "heun" else None
    pipe.scheduler = (kind or FlowMatchEulerDiscreteScheduler)(shift=3.0)
    skip: dict[str, Any] = {}
    if asked.skip_layer_guidance is not None:
        guidance = asked.skip_layer_guidance
        skip = {
            "skip_guidance_layers": list(guidance.layers),
            "skip_layer_guidance_scale": guidance.scale,
            "skip_layer_guidance_start": guidance.start,
            "skip_layer_guidance_stop": guidance.stop,
        }
    return {
        "prompt": asked.prompt,
        "negative_prompt": "",
        "num_inference_steps": asked.steps,
        "guidance_scale": asked.cfg,
        "width": asked.width,
        "height": asked.height,
        "max_sequence_length": asked.max_sequence_length,
        "output_type": "np",
        **skip,
    }


# Arithmetic -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "published"), [(40, 913), (28, 643), (20, 463)])
def test_a_whole_image_costs_what_was_published(steps, published):
    asked = request(steps=steps)
    whole = image_flops({"transformer": TRANSFORMER, "vae": VAE}, asked, steps)
    assert whole.total / TERA + 2.51 == pytest.approx(published, rel=0.003)
    assert image_flops(SD35, asked, steps).text / TERA == pytest.approx(2 * 2.51, rel=0.005)


def test_missing_text_encoders_cost_nothing_and_leave_the_tokens():
    bare = {"transformer": TRANSFORMER, "vae": VAE}
    without, with_all = (image_flops(c, request(), 4) for c in (bare, SD35))
    assert without.text == 0.0
    assert without.denoise == with_all.denoise


def test_guidance_doubles_text_and_denoising_only():
    off, on = (image_flops(SD35, request(cfg=cfg), 4) for cfg in (1.0, 5.0))
    assert (on.text, on.denoise, on.decode) == (2 * off.text, 2 * off.denoise, off.decode)


def test_another_token_length_changes_denoising():
    short, long = (
        image_flops(SD35, request(max_sequence_length=n), 4).denoise / TERA for n in (77, 256)
    )
    assert short < long
    assert long == pytest.approx(8 * 11.25, rel=0.005)


def test_a_length_that_was_not_filled_in_is_refused():
    with pytest.raises(ValueError, match="max_sequence_length"):
        image_flops(SD35, replace(request(), max_sequence_length=None), 4)


def test_a_negative_count_is_refused():
    with pytest.raises(ValueError, match="evaluations=-1"):
        image_flops(SD35, request(), -1)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("_attention", lambda tokens, width: 2.0 * tokens * tokens * width), ("MLP_RATIO", 3)],
    ids=["half-the-attention", "a-narrower-mlp"],
)
def test_the_published_figure_catches_a_wrong_formula(monkeypatch, name, wrong):
    monkeypatch.setattr(flops, name, wrong)
    assert mmdit_flops(TRANSFORMER, (128, 128), 333) / TERA != pytest.approx(11.25, rel=0.05)
