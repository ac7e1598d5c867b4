"""Model families: which diffusers pipelines run them, how these are called, what they can do.

A `Family` wraps one loaded pipeline and knows nothing of speed: arguments of the call, the modules
whose calls are stages, how a step makes itself known, which sizes and prompts fit. What it cannot
do it refuses before anything runs. `pipeline.DiffusersBackend` owns the rest.

| family | pipelines | tasks | samplers |
| --- | --- | --- | --- |
| sd3 | `StableDiffusion3Pipeline`, its image-to-image twin | both | all four |
| sana | `SanaPipeline` | text-to-image | all four, its own is dpmpp_2m |
| pixart | `PixArtAlphaPipeline` | text-to-image | dpmpp_2m, its own |

Sana's and PixArt's `use_resolution_binning` is off, so that an image has the size that was asked
for, and so is `clean_caption`, which rewrites prompts where an optional package is installed.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3_img2img import (
    StableDiffusion3Img2ImgPipeline,
)
from PIL import Image

from sd35bench.backends.guided import is_plain
from sd35bench.backends.samplers import flow_scheduler, noise_scheduler
from sd35bench.backends.stages import DECODE, DENOISER, TEXT, StageMeter
from sd35bench.core.text import Embeddings, SD3Text, Text, Texts, read_by
from sd35bench.errors import BackendError, UnsupportedRequest
from sd35bench.evaluations import SAMPLERS, skip_layer_window
from sd35bench.fields import GUIDES, later_asked
from sd35bench.loading.sources import silence_truncation_warnings
from sd35bench.prompts import encoder_fields, places_of, read_weights
from sd35bench.types import Request, Task

SANA_MULTIPLE = 32
"""Source: diffusers `SanaPipeline.check_inputs`."""

Seen = Callable[[int, torch.Tensor], None]
"""Told the index of an evaluation that ended, from 0, and the latents [B, C, h, w] after it."""


class Family(ABC):
    """One loaded pipeline of a family, and how it is called.

    `pipes`: a pipeline per task, all on the same components. `samplers`: the first is the
    family's own. `skip_layers`: whether its denoiser can leave layers out. `guides`: whether its
    pipelines guide by their denoiser's two halves alone, so that `guided` can.
    """

    tasks: ClassVar[tuple[Task, ...]] = (Task.TEXT_TO_IMAGE,)
    samplers: ClassVar[tuple[str, ...]]
    skip_layers: ClassVar[bool] = False
    guides: ClassVar[bool] = False

    def __init__(self, pipe: Any) -> None:
        """Wrap a loaded pipeline; its scheduler is the model's own."""
        self.pipe = pipe
        self.own_scheduler = pipe.scheduler
        self.pipes: dict[Task, Any] = {Task.TEXT_TO_IMAGE: pipe}
        silence_truncation_warnings()

    def watch(self, meter: StageMeter, decoded: Callable[[Any], None]) -> None:
        """Have `meter` stamp the stages; `decoded` is shown what the VAE's decoder returns."""
        for pipe in self.pipes.values():
            pipe.set_progress_bar_config(disable=True)
            meter.watch(pipe, "encode_prompt", TEXT)
        meter.watch(self.pipe.transformer, "forward", DENOISER)
        meter.watch(self.pipe.vae, "decode", DECODE, decoded)

    def scheduler(self, request: Request) -> Any:
        """Build the request's scheduler from the model's own."""
        return flow_scheduler(self.own_scheduler, request.sampler, request.shift)

    def arguments(
        self, requests: Sequence[Request], inits: Sequence[np.ndarray | None], tokens: int
    ) -> dict[str, Any]:
        """Return the call's arguments for one batch, generators and callbacks left out.

        `inits`: uint8 RGB [H, W, 3] for image-to-image. `tokens`: `max_sequence_length`.
        """
        first = requests[0]
        return {
            "prompt": [r.prompt for r in requests],
            "negative_prompt": [r.negative_prompt for r in requests],
            "num_inference_steps": first.steps,
            "guidance_scale": first.cfg,
            "height": first.height,
            "width": first.width,
            "max_sequence_length": tokens,
            "output_type": "np",
        }

    def listen(self, seen: Seen) -> dict[str, Any]:
        """Return the arguments that make the call tell `seen` of every evaluation."""

        def ended(_pipe: Any, index: int, _timestep: Any, tensors: dict[str, Any]) -> dict:
            seen(index, tensors["latents"])
            return {}

        return {"callback_on_step_end": ended, "callback_on_step_end_tensor_inputs": ["latents"]}

    def refuse(self, request: Request) -> None:
        """Refuse what these pipelines cannot do. Raises: UnsupportedRequest."""
        if request.task not in self.tasks:
            raise UnsupportedRequest(f"this model does {', '.join(self.tasks)} only")
        if request.sampler not in self.samplers:
            known = ", ".join(self.samplers)
            raise UnsupportedRequest(f"sampler={request.sampler!r}: this model has {known}")
        multiple, largest = self.sizes
        for name, value_px in (("width", request.width), ("height", request.height)):
            too_large = largest is not None and value_px > largest
            if value_px < multiple or value_px % multiple or too_large:
                limit = "" if largest is None else f" up to {largest} px"
                raise UnsupportedRequest(
                    f"{name}={value_px}: this model makes multiples of {multiple}{limit}"
                )
        if request.skip_layer_guidance is not None and not self.skip_layers:
            raise UnsupportedRequest("skip_layer_guidance: this model's denoiser leaves none out")
        if not (self.guides or is_plain(request)):
            name = next(n for n in later_asked(request) if n in GUIDES)
            raise UnsupportedRequest(
                f"{name}={getattr(request, name)}: only SD3's pipelines can; leave it out"
            )

    def refuse_texts(self, request: Request) -> None:
        """Refuse texts of single encoders, and weights, where they would not be read.

        Raises: UnsupportedRequest.
        """
        for name in encoder_fields(request):
            raise UnsupportedRequest(f"{name}: this model has one text encoder; leave it out")

    @property
    @abstractmethod
    def sizes(self) -> tuple[int, int | None]:
        """The multiple of every side, and the largest side if there is one, in px."""

    @abstractmethod
    def truncated_tokens(self, prompts: list[Text], tokens: int) -> tuple[int, ...]:
        """Return, per prompt (`text_of`), the tokens that did not fit."""


class SD3(Family):
    """Stable Diffusion 3 and 3.5."""

    tasks = (Task.TEXT_TO_IMAGE, Task.IMAGE_TO_IMAGE)
    samplers = SAMPLERS
    skip_layers = True
    guides = True

    def __init__(self, pipe: Any) -> None:
        """Add the image-to-image pipeline on the same components."""
        super().__init__(pipe)
        self.pipes[Task.IMAGE_TO_IMAGE] = StableDiffusion3Img2ImgPipeline(**pipe.components)
        self._random_text: Any = getattr(pipe, "random_text", None)
        self._text: Any = _PipeText(pipe) if self._random_text is None else self._random_text

    def watch(self, meter: StageMeter, decoded: Callable[[Any], None]) -> None:
        """Watch also what stands in for `encode_prompt`."""
        super().watch(meter, decoded)
        meter.watch(self._text, "encode", TEXT)

    def arguments(
        self, requests: Sequence[Request], inits: Sequence[np.ndarray | None], tokens: int
    ) -> dict[str, Any]:
        """Add the init images and skip-layer guidance."""
        first = requests[0]
        arguments = super().arguments(requests, inits, tokens)
        if first.task is Task.IMAGE_TO_IMAGE:
            arguments["image"] = [Image.fromarray(i) for i in inits if i is not None]
            arguments["strength"] = first.prompt_strength
        arguments |= _skip_layers(first) if is_plain(first) else {}
        if self._random_text is not None or any(r.prompt_weights for r in requests):
            arguments |= self._embeddings(requests, tokens)
        elif any(encoder_fields(r) for r in requests):
            for number in (1, 2):
                texts = [read_by(text_of(request), number) for request in requests]
                arguments[f"prompt_{number + 1}"] = texts
        return arguments

    def refuse(self, request: Request) -> None:
        """Refuse also layers that there are not, and guidance that diffusers would ignore."""
        super().refuse(request)
        _refuse_skip_layers(request, int(self.pipe.transformer.config.num_layers))

    @property
    def sizes(self) -> tuple[int, int | None]:
        """Patches of latents; the table of position embeddings ends somewhere."""
        config = self.pipe.transformer.config
        multiple = self.pipe.vae_scale_factor * config.patch_size
        return multiple, config.pos_embed_max_size * multiple

    def truncated_tokens(self, prompts: list[Text], tokens: int) -> tuple[int, ...]:
        """Count tokens beyond the limit, of the encoder that is cut most; T5's is `tokens`."""
        if self._random_text is not None:
            return (0,) * len(prompts)
        pipe = self.pipe
        clip = pipe.tokenizer_max_length  # diffusers cuts both at the first one's
        readers = [(pipe.tokenizer, clip), (pipe.tokenizer_2, clip)]
        if pipe.text_encoder_3 is not None:
            readers.append((pipe.tokenizer_3, tokens))
        beyond = (
            [len(ids) - limit for ids in read([read_by(p, number) for p in prompts]).input_ids]
            for number, (read, limit) in enumerate(readers)
        )
        return tuple(max(0, *each) for each in zip(*beyond, strict=True))

    def _embeddings(self, requests: Sequence[Request], tokens: int) -> dict[str, Any]:
        """Return embeddings instead of prompts: [B, T, 4096] and pooled [B, 2048]."""
        transformer = self.pipe.transformer
        place = {"device": self.pipe._execution_device, "dtype": transformer.dtype}
        texts: dict[str, list[Text]] = {"": [text_of(r) for r in requests]}
        if requests[0].cfg > 1:
            texts["negative_"] = [r.negative_prompt for r in requests]
        found: dict[str, Any] = {"prompt": None, "negative_prompt": None}
        for prefix, prompts in texts.items():
            embeds, pooled = self._text.encode(prompts, tokens)
            found[f"{prefix}prompt_embeds"] = embeds.to(**place)
            found[f"{prefix}pooled_prompt_embeds"] = pooled.to(**place)
        return found

    def refuse_texts(self, request: Request) -> None:
        """Refuse what no encoder here reads."""
        random = self._random_text is not None
        has_t5 = random or self.pipe.text_encoder_3 is not None
        if request.prompt_3 is not None and not has_t5:
            raise UnsupportedRequest("prompt_3: T5 is not loaded, which would read it")
        if request.prompt_weights is not None and random:
            raise UnsupportedRequest("prompt_weights: a model of random weights has no words")


class _PipeText:
    """Embeds texts with a pipeline's own encoders, whatever they are by then."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe

    def encode(self, prompts: Sequence[Text], max_sequence_length: int) -> Embeddings:
        """Embed prompts whose words have weights."""
        pipe, names = self._pipe, ("", "_2", "_3")
        text = SD3Text(
            [getattr(pipe, f"tokenizer{name}") for name in names],
            [getattr(pipe, f"text_encoder{name}") for name in names],
            pipe.transformer.config.joint_attention_dim,
        )
        embeds, pooled = text.encode(prompts, max_sequence_length)
        return embeds.clone(), pooled.clone()  # tensors of inference mode would be compiled anew


def text_of(request: Request) -> Text:
    """What the encoders read of a request."""
    if not encoder_fields(request):
        return request.prompt
    second, third = (
        request.prompt if t is None else t for t in (request.prompt_2, request.prompt_3)
    )
    read = (request.prompt, second, third)
    weights = read_weights(request.prompt_weights or "")
    places = ([(*at, w) for words, w in weights for at in places_of(words, text)] for text in read)
    return Texts(read, tuple(tuple(each) for each in places))


class _ExactFamily(Family):
    """A family whose pipeline would choose the nearest size it knows, and rewrite the prompt."""

    def arguments(
        self, requests: Sequence[Request], inits: Sequence[np.ndarray | None], tokens: int
    ) -> dict[str, Any]:
        """Ask for the very size and the very prompt."""
        asked = super().arguments(requests, inits, tokens)
        return {**asked, "use_resolution_binning": False, "clean_caption": False}

    def truncated_tokens(self, prompts: list[str], tokens: int) -> tuple[int, ...]:
        """Count the text encoder's tokens beyond the limit, its instruction not counted."""
        lengths = [len(ids) for ids in self.pipe.tokenizer(_plain(prompts)).input_ids]
        return tuple(max(0, length - tokens) for length in lengths)


class Sana(_ExactFamily):
    """Sana: linear attention, 32-fold autoencoder, Gemma as text encoder.

    Latents and their noise are float32 whatever the model's dtype.
    """

    samplers = ("dpmpp_2m", "euler", "heun", "unipc")

    @property
    def sizes(self) -> tuple[int, int | None]:
        """Patches of latents, and what diffusers insists on; no table ends."""
        patch = self.pipe.vae_scale_factor * self.pipe.transformer.config.patch_size
        return math.lcm(patch, SANA_MULTIPLE), None


class PixArt(_ExactFamily):
    """PixArt-alpha: a T5-conditioned DiT that predicts noise, not flow."""

    samplers = ("dpmpp_2m",)

    def __init__(self, pipe: Any) -> None:
        """Refuse a checkpoint whose scheduler is not the one that runs. Raises: BackendError."""
        super().__init__(pipe)
        noise_scheduler(pipe.scheduler, None)

    def scheduler(self, request: Request) -> Any:
        """Return the model's own."""
        return noise_scheduler(self.own_scheduler, request.shift)

    def listen(self, seen: Seen) -> dict[str, Any]:
        """Use the older form of callback, the only one that this pipeline has."""
        return {"callback": lambda index, _timestep, latents: seen(index, latents)}

    def refuse(self, request: Request) -> None:
        """Refuse also a single step: there this pipeline expects a distilled model's scheduler."""
        super().refuse(request)
        if request.steps == 1:
            raise UnsupportedRequest("steps=1: this pipeline needs 2 or more")

    @property
    def sizes(self) -> tuple[int, int | None]:
        """Patches of latents; position embeddings are computed for every size."""
        return self.pipe.vae_scale_factor * self.pipe.transformer.config.patch_size, None


FAMILIES: dict[str, type[Family]] = {"sd3": SD3, "sana": Sana, "pixart": PixArt}


def family_of(name: str, pipe: Any) -> Family:
    """Wrap a loaded pipeline of the family called `name`.

    Raises: BackendError for an unknown family.
    """
    if name not in FAMILIES:
        raise BackendError(f"model.family={name!r} is unknown; known: {', '.join(FAMILIES)}")
    return FAMILIES[name](pipe)


def _skip_layers(request: Request) -> dict[str, Any]:
    skipping = request.skip_layer_guidance
    if skipping is None:
        return {}
    start, stop = skip_layer_window(skipping, request.steps, request.sampler)
    return {
        "skip_guidance_layers": list(skipping.layers),
        "skip_layer_guidance_scale": skipping.scale,
        "skip_layer_guidance_start": start,
        "skip_layer_guidance_stop": stop,
    }


def _refuse_skip_layers(request: Request, layers: int) -> None:
    """Refuse skip-layer guidance where it cannot act: diffusers would fail or ignore it.

    Raises: UnsupportedRequest.
    """
    skipping = request.skip_layer_guidance
    if skipping is None:
        return
    if request.task is Task.IMAGE_TO_IMAGE:
        raise UnsupportedRequest("skip_layer_guidance exists only in text-to-image")
    if request.cfg <= 1:
        raise UnsupportedRequest(f"skip_layer_guidance acts only with cfg > 1, not {request.cfg}")
    outside = [layer for layer in skipping.layers if not 0 <= layer < layers]
    if outside or not skipping.layers:
        raise UnsupportedRequest(
            f"skip_layer_guidance layers {list(skipping.layers)}: this model has 0 to {layers - 1}"
        )


def _plain(prompts: list[str]) -> list[str]:
    """Return prompts as diffusers hands them to Sana's and PixArt's tokenizers."""
    return [prompt.lower().strip() for prompt in prompts]
