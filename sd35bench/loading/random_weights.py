"""Models of true shape filled with seeded noise: latency and memory without any weights.

What a kernel costs depends on shapes and dtypes; what it computes matters only in that values must
neither vanish nor overflow, or kernels take short cuts (zeros) and images are refused (NaN). So
matrices get the deviation 1/sqrt(fan-in), which keeps activations near 1 through any depth, gains
lie around 1 and biases around 0.

Cost: a module is built on the meta device, and each parameter is then allocated once, in its final
dtype and place: the peak is the model's own size. Drawing 2.2 billion normals would take half a
minute; one block per parameter is drawn and repeated instead. The block's length is prime, so that
no two rows of a matrix are alike and its rank is full.

There are no tokenizers, so a prompt is only a seed of its text embeddings. Either the embeddings
themselves are noise of the size that real ones have, and text costs nothing; or the true encoders
run, filled with noise, on random token ids, and text costs what it costs.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import diffusers
import psutil
import torch
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import (
    StableDiffusion3Pipeline,
)
from torch import nn

from sd35bench import words
from sd35bench.architectures import SEED, TEXT_PARTS, architecture_name, random_parts
from sd35bench.core.text import Text
from sd35bench.errors import OutOfMemory
from sd35bench.loading.empty import build_empty, dtype_of, restore_buffers
from sd35bench.types import ModelSpec

BLOCK = 1_048_573
"""Values drawn per parameter at most: the largest prime below 2**20."""
BIAS_STD = 0.02
GAIN_STD = 0.1
CLIP_STD = 1.0
T5_STD = 0.1
"""T5-XXL's outputs are about a tenth the size of CLIP's hidden states."""

Embeddings = tuple[torch.Tensor, torch.Tensor]


def load_random(spec: ModelSpec, dtype: torch.dtype, device: torch.device | None = None) -> Any:
    """Build an SD3 pipeline of the specified shapes, filled with noise, on `device` (or the CPU).

    Raises: OutOfMemory before anything is allocated, where the weights would not fit.
    """
    where = torch.device("cpu") if device is None else device
    parts = random_parts(architecture_name(spec), spec.layers)
    names = ["transformer", "vae", *(TEXT_PARTS if spec.text_encoders else ())]
    models: dict[str, Any] = {name: build_empty(parts[name]) for name in names}
    _refuse_too_large(spec, sum(size_bytes(m, dtype) for m in models.values()), where)
    for name, model in models.items():
        fill(model, name, dtype, where)
    encoders = [models[name] for name in TEXT_PARTS if name in models]
    pipe: Any = _pipeline(models, parts["scheduler"])
    pipe.random_text = EncodedText(encoders) if encoders else NoiseText(parts, dtype)
    pipe.facts = {
        "weights": "random",
        "seed": SEED,
        "layers": parts["transformer"]["num_layers"],
        "text": "random encoders" if encoders else "random embeddings",
    }
    return pipe


def _pipeline(models: dict[str, Any], scheduler: dict[str, Any]) -> Any:
    """Put the parts together; what nobody built is ``None``."""
    scheduler_class: Any = getattr(diffusers, scheduler["_class_name"])
    parts: dict[str, Any] = {**models, "scheduler": scheduler_class.from_config(scheduler)}
    for name in TEXT_PARTS:
        parts.setdefault(name, None)
        parts[name.replace("text_encoder", "tokenizer")] = None
    return StableDiffusion3Pipeline(**parts)


def size_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of a module's parameters and buffers in `dtype`."""
    parameters = sum(
        p.numel() * dtype_of(model, name, dtype).itemsize for name, p in model.named_parameters()
    )
    floats = [b for b in model.buffers() if b.is_floating_point()]
    return parameters + sum(b.numel() for b in floats) * dtype.itemsize


def available_bytes(device: torch.device) -> int:
    """Memory that an allocation on the device can count on."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def fill(model: nn.Module, part: str, dtype: torch.dtype, device: torch.device) -> None:
    """Put seeded noise into every parameter of a module on the meta device, and true buffers.

    A parameter's values depend on `part`, its name and shape only, but for rounding to `dtype`.
    """
    made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # the first keeps its id from reuse
    for prefix, module in model.named_modules():
        for name, empty in list(module.named_parameters(recurse=False)):
            if id(empty) not in made:
                path = f"{prefix}.{name}"
                wanted, source = dtype_of(model, path, dtype), seeded(f"{part}.{path}")
                at = _distribution(module, name, empty)
                values = _noise(empty.shape, wanted, device, source, *at)
                made[id(empty)] = (empty, nn.Parameter(values, requires_grad=empty.requires_grad))
            module.register_parameter(name, made[id(empty)][1])
    restore_buffers(model, dtype, device)


def _noise(
    shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    source: torch.Generator,
    mean: float,
    std: float,
) -> torch.Tensor:
    """Normal values of a shape, repeating after `BLOCK` of them."""
    count = shape.numel()
    # Drawn before the values are allocated, and kept: freed in between, its place would be
    # taken by small values and the next block would need another; the heap grew by a sixth.
    drawn = torch.empty(min(count, BLOCK)).normal_(mean, std, generator=source)
    block = drawn.to(device=device, dtype=dtype)
    values = torch.empty(shape, dtype=dtype, device=device)
    flat = values.view(-1)
    whole = count // len(block) * len(block)
    flat[:whole].view(-1, len(block)).copy_(block)
    flat[whole:].copy_(block[: count - whole])
    return values


def _distribution(module: nn.Module, name: str, parameter: torch.Tensor) -> tuple[float, float]:
    """Mean and deviation by what the parameter does."""
    if parameter.ndim < 2:
        return (1.0, GAIN_STD) if name == "weight" else (0.0, BIAS_STD)
    if isinstance(module, nn.Embedding):
        return 0.0, 1.0
    return 0.0, (parameter.numel() / parameter.shape[0]) ** -0.5


def _refuse_too_large(spec: ModelSpec, needed_bytes: int, device: torch.device) -> None:
    """Refuse before allocating what cannot fit; activations come on top. Raises: OutOfMemory."""
    free_bytes = available_bytes(device)
    if needed_bytes > free_bytes:
        raise OutOfMemory(
            f"{spec.name} needs {words.size_in(needed_bytes, 'GB')} for its weights alone, {device}"
            f" has {words.size_in(free_bytes, 'GB')} free; use backend.dtype=bf16 or fewer layers"
            " (model.layers=N)"
        )


class RandomText(ABC):
    """Stands where diffusers' `encode_prompt` would; the same prompt always gives the same."""

    def encode(self, prompts: Sequence[Text], max_sequence_length: int) -> Embeddings:
        """Embed prompts: [B, CLIP tokens + `max_sequence_length`, width] and pooled [B, pooled]."""
        sources = [_generator(prompt) for prompt in prompts]
        return self._embed(sources, max_sequence_length)

    @abstractmethod
    def _embed(self, sources: list[torch.Generator], t5_tokens: int) -> Embeddings:
        """Embed one prompt per source of randomness."""


class NoiseText(RandomText):
    """Noise in the shape of embeddings; `parts` are the model's configurations."""

    def __init__(self, parts: dict[str, dict[str, Any]], dtype: torch.dtype) -> None:
        """Take the widths from the configurations, as the pipeline would from the encoders."""
        clips = (parts["text_encoder"], parts["text_encoder_2"])
        self._tokens = int(clips[0]["max_position_embeddings"])
        self._clip_width = sum(int(clip["hidden_size"]) for clip in clips)
        self._width = int(parts["transformer"]["joint_attention_dim"])
        self._pooled = int(parts["transformer"]["pooled_projection_dim"])
        self._dtype = dtype

    def _embed(self, sources: list[torch.Generator], t5_tokens: int) -> Embeddings:
        shape = (len(sources), self._tokens + t5_tokens, self._width)
        embeds = torch.zeros(shape, dtype=self._dtype)
        pooled = torch.empty(len(sources), self._pooled, dtype=self._dtype)
        for row, source in enumerate(sources):
            pooled[row] = torch.randn(self._pooled, generator=source) * CLIP_STD
            clip = torch.randn(self._tokens, self._clip_width, generator=source)
            embeds[row, : self._tokens, : self._clip_width] = clip * CLIP_STD
            t5 = torch.randn(t5_tokens, self._width, generator=source)
            embeds[row, self._tokens :] = t5 * T5_STD
        return embeds, pooled


class EncodedText(RandomText):
    """The encoders (CLIP-L, OpenCLIP bigG, T5) on random token ids."""

    def __init__(self, encoders: Sequence[nn.Module]) -> None:
        """Keep the three encoders, which may be moved to a device later."""
        self._clips: Sequence[Any] = encoders[:2]
        self._t5: Any = encoders[2]

    def _embed(self, sources: list[torch.Generator], t5_tokens: int) -> Embeddings:
        clip_ids = [[_clip_ids(clip.config, source) for source in sources] for clip in self._clips]
        t5_ids = [_t5_ids(self._t5.config, source, t5_tokens) for source in sources]
        return self.embed_ids([torch.stack(ids) for ids in clip_ids], torch.stack(t5_ids))

    @torch.no_grad()
    def embed_ids(self, clip_ids: Sequence[torch.Tensor], t5_ids: torch.Tensor) -> Embeddings:
        """Embed token ids ([B, T] per encoder) as diffusers' `encode_prompt` does.

        Source: diffusers `StableDiffusion3Pipeline.encode_prompt`: penultimate hidden states of
        both CLIPs side by side, padded with zeros to T5's width, then T5's; pooled side by side.
        """
        hidden, pooled = [], []
        for clip, ids in zip(self._clips, clip_ids, strict=True):
            output = clip(ids.to(clip.device), output_hidden_states=True)
            hidden.append(output.hidden_states[-2])
            pooled.append(output[0])
        t5 = self._t5(t5_ids.to(self._t5.device))[0].to(self._t5.dtype)
        clips = torch.cat(hidden, dim=-1)
        padded = nn.functional.pad(clips, (0, t5.shape[-1] - clips.shape[-1]))
        return torch.cat([padded, t5], dim=-2), torch.cat(pooled, dim=-1)


def _generator(prompt: Text) -> torch.Generator:
    return seeded(prompt if isinstance(prompt, str) else "\n".join(prompt.read))


def seeded(name: str) -> torch.Generator:
    """A source of noise named by a text, on the CPU, so that a name means one noise."""
    digest = hashlib.sha256(f"{SEED}:{name}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:7], "big"))


def _clip_ids(config: Any, source: torch.Generator) -> torch.Tensor:
    """Ids [T] between a start and an end token; the pooled output is taken at the end."""
    ids = torch.randint(config.vocab_size - 2, (config.max_position_embeddings,), generator=source)
    ids[0], ids[-1] = config.bos_token_id, config.eos_token_id
    return ids


def _t5_ids(config: Any, source: torch.Generator, tokens: int) -> torch.Tensor:
    ids = torch.randint(2, config.vocab_size, (tokens,), generator=source)
    ids[-1] = config.eos_token_id
    return ids
