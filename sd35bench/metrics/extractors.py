"""Feature extractors: open_clip models, nano's evaluator, Inception. Weights are never downloaded.

DINOv2 has a module of its own and is chosen here, too. An extractor resizes with antialiasing from
uint8 images, as its own training did, and is loaded when first asked for features. Its name holds
the weights' digest, because features of other weights must not be mixed with it.
"""

import hashlib
import json
import re
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sd35bench.disk import file_digest, file_stamp
from sd35bench.errors import MetricError
from sd35bench.metrics.base import Extractor, Image, require_uint8_rgb
from sd35bench.metrics.dinov2 import FAMILY, Dinov2, dinov2_model

_INCEPTION_WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"


@dataclass(frozen=True, slots=True)
class Backbone:
    """A set metric's options that choose its extractor instead of its name.

    `extractor` is ``inception``, ``nano``, ``clip`` (with `model`, an open_clip name or
    ``local-dir:PATH``, and its `pretrained` tag or checkpoint) or ``dinov2`` (with `model`, a Hub
    id or ``local-dir:PATH``); `weights` is Inception's file.
    """

    extractor: str | None = None
    model: str | None = None
    pretrained: str | None = None
    weights: str | None = None


class ClipExtractor(Extractor):
    """An image extractor with a text tower: `label` names the backbone in a metric's name."""

    label: str

    @abstractmethod
    def embed_texts(self, prompts: Sequence[str]) -> tuple[NDArray[np.float32], list[int]]:
        """Text features [n, d], and how many tokens of each prompt did not fit.

        The end token is kept when a prompt is cut: the features are read at its position.
        """


class NanoEvaluator(ClipExtractor):
    """The embedded model's own small CLIP (`sd35bench.nano.evaluator`), the packaged or another."""

    label = "nano"
    resize = "padded to a square by its edges, then Pillow's bicubic with antialiasing to 64 px"

    def __init__(self, folder: Path | None = None) -> None:
        own = Path(__file__).parents[1] / "nano" / "evaluator"
        self.folder = own if folder is None else folder

    @cached_property
    def _states(self) -> tuple[tuple[Any, ...], ...]:
        names = ("open_clip_config.json", "open_clip_model.safetensors")
        return tuple(
            (self.folder / name, *file_stamp((self.folder / name).stat())) for name in names
        )

    @cached_property
    def _files(self) -> tuple[bytes, str]:
        """The configuration, and the digest of it and the weights, read without torch."""
        try:
            return _read(*self._states)
        except OSError as exc:
            raise MetricError(
                f"nano's evaluator is not in {self.folder}; reinstall sd35bench, or make it with"
                " `python -m sd35bench.nano.train`"
            ) from exc

    @cached_property
    def name(self) -> str:  # type: ignore[override]
        """Name with the weights' digest, the one that the evaluator itself gives."""
        return f"nano-{self._files[1][:12]}"

    @cached_property
    def min_images(self) -> int:  # type: ignore[override]
        """Four images per dimension.

        The plug-in distance of n images from their very own distribution is not 0 but about
        (d² + 5d) / 4n in units of one feature's variance (second order, Gaussian features, exact
        reference). At n = 4d that is d/16: a sixteenth of the features' total variance, alike for
        all settings. At n = d it would be a quarter, and the covariance singular.
        """
        return 4 * int(json.loads(self._files[0])["model_cfg"]["embed_dim"])

    @cached_property
    def _model(self) -> Any:
        _ = self._files  # says what to do where there are none
        return _evaluator(self.folder, self._states)

    def embed(self, images: Sequence[Image]) -> NDArray[np.float32]:
        """Image features [n, d], not normalised."""
        require_uint8_rgb(images)
        return self._model.image_features(images)

    def embed_texts(self, prompts: Sequence[str]) -> tuple[NDArray[np.float32], list[int]]:
        """Text features [n, d], and how many words of each prompt did not fit."""
        from sd35bench.nano.evaluator import TEXT_TOKENS

        dropped = [max(0, len(p.split()) + 2 - TEXT_TOKENS) for p in prompts]
        return self._model.text_features(prompts), dropped


class OpenClip(ClipExtractor):
    """An open_clip model: by name and pretrained tag, by name and checkpoint file, or a folder.

    `model` is a name, or ``local-dir:PATH`` of a folder with its configuration; `pretrained` a tag
    that is in the local cache, or a checkpoint's path, ``None`` with ``local-dir:``.
    """

    def __init__(self, model: str, pretrained: str | None = None) -> None:
        self.model = model
        self.pretrained = pretrained
        base = Path(model.removeprefix("local-dir:")).name if _is_folder(model) else model
        tag = "" if pretrained is None else f"_{Path(pretrained).stem}"
        self.label = _safe(base + tag)

    @cached_property
    def _weights(self) -> Path:
        if _is_folder(self.model):
            return _folder_weights(Path(self.model.removeprefix("local-dir:")))
        return _checkpoint(self.model, self.pretrained)

    @cached_property
    def name(self) -> str:  # type: ignore[override]
        """Name with the weights' digest."""
        return f"openclip-{self.label}-{file_digest(self._weights)[:12]}"

    @cached_property
    def _loaded(self) -> tuple[Any, Any, Any]:
        import open_clip

        weights = self._weights  # says what is missing better than open_clip does
        tag = None if _is_folder(self.model) else str(weights)
        try:
            model, _, preprocess = open_clip.create_model_and_transforms(self.model, pretrained=tag)
            tokenizer = open_clip.get_tokenizer(self.model)
        except (RuntimeError, OSError, ValueError, KeyError) as exc:
            raise MetricError(f"open_clip cannot load {self.label}: {exc}") from exc
        return model.eval(), preprocess, tokenizer

    @property
    def resize(self) -> str:  # type: ignore[override]
        """The model's own preprocessing, as torchvision spells it."""
        return " ".join(str(self._loaded[1]).split())

    @property
    def min_images(self) -> int:  # type: ignore[override]
        """Twice the dimensions, and at least 1024: below, the covariance is mostly noise."""
        width = self._loaded[0].visual.output_dim
        return max(1024, 2 * int(width))

    def embed(self, images: Sequence[Image]) -> NDArray[np.float32]:
        """Image features [n, d], not normalised; the preprocessing is the model's own."""
        require_uint8_rgb(images)
        import torch
        from PIL import Image as Pillow

        model, preprocess, _ = self._loaded
        batch = torch.stack([preprocess(Pillow.fromarray(image)) for image in images])
        with torch.inference_mode():
            return model.encode_image(batch).float().numpy()

    def embed_texts(self, prompts: Sequence[str]) -> tuple[NDArray[np.float32], list[int]]:
        """Text features [n, d] and the tokens dropped."""
        import torch

        model, _, tokenizer = self._loaded
        tokens = tokenizer(list(prompts))
        length = tokens.shape[1]
        dropped = [max(0, _token_count(tokenizer, p) - length) for p in prompts]
        with torch.inference_mode():
            return model.encode_text(tokens).float().numpy(), dropped


class Inception(Extractor):
    """Inception-v3 as FID defines it, through torchmetrics and torch-fidelity.

    `weights`: path of torch-fidelity's checkpoint; ``None`` looks in torch's cache.
    """

    min_images = 2048  # as many as dimensions: with fewer the covariance is singular
    resize = (
        "inside the network: TensorFlow 1's bilinear to 299 px, without antialiasing, as FID is"
    )

    def __init__(self, weights: str | None = None) -> None:
        self.weights = weights

    @cached_property
    def _path(self) -> Path:
        import torch

        hub = Path(torch.hub.get_dir()) / "checkpoints" / _INCEPTION_WEIGHTS
        path = hub if self.weights is None else Path(self.weights)
        if not path.is_file():
            raise MetricError(
                f"Inception's weights are not at {path}; put torch-fidelity's"
                f" {_INCEPTION_WEIGHTS} there, or use extractor=nano or a CLIP model"
            )
        return path

    @cached_property
    def name(self) -> str:  # type: ignore[override]
        """Name with the weights' digest."""
        return f"inception-{file_digest(self._path)[:12]}"

    @cached_property
    def _model(self) -> Any:
        from torchmetrics.image.fid import NoTrainInceptionV3

        try:
            model = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(self._path))
        except ModuleNotFoundError as exc:
            raise MetricError("fid_inception needs `pip install torch-fidelity`") from exc
        return model.eval()

    def embed(self, images: Sequence[Image]) -> NDArray[np.float32]:
        """Pool-3 features [n, 2048]."""
        require_uint8_rgb(images)
        import torch

        rows = []
        with torch.inference_mode():
            for image in images:  # the network resizes inside, sizes may differ
                pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None]
                rows.append(self._model(pixels).reshape(1, -1))
        return torch.cat(rows).float().numpy()


def clip_extractor(label: str, model: str | None, pretrained: str | None) -> ClipExtractor:
    """Choose by the end of a metric's name (`nano`, `ViT-B-32_openai`) or by explicit options.

    Raises: MetricError for a backbone that nobody knows.
    """
    if model == "nano" or (model is None and label == "nano"):
        return NanoEvaluator()
    if model is not None:
        return OpenClip(model, pretrained)
    import open_clip

    tags = {_safe(f"{name}_{tag}"): (name, tag) for name, tag in open_clip.list_pretrained()}
    if label not in tags:
        raise MetricError(
            f"{label!r} is no open_clip model and pretrained tag; give model= and pretrained="
            " (a path), or use `nano`"
        )
    return OpenClip(*tags[label])


def choose_extractor(label: str, backbone: Backbone) -> tuple[Extractor, str]:
    """Return the extractor of a set metric's options or of its name's end, and its label.

    `label` is what follows the family in the metric's name: `inception`, `nano`, `dinov2-base`,
    `ViT-B-32_openai`; the option `extractor` goes before it.

    Raises: MetricError for a backbone that nobody knows.
    """
    if backbone.extractor is not None:
        label = backbone.extractor
    if label == "inception":
        return Inception(backbone.weights), label
    if label == FAMILY or label.startswith(f"{FAMILY}-"):
        found = Dinov2(dinov2_model(label, backbone.model))
        return found, found.label
    model = None if label == "nano" else backbone.model
    clip = clip_extractor(label, model, backbone.pretrained)
    return clip, clip.label


def _is_folder(model: str) -> bool:
    return model.startswith("local-dir:")


def _folder_weights(folder: Path) -> Path:
    for name in ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"):
        if (folder / name).is_file():
            return folder / name
    raise MetricError(f"{folder} holds no open_clip weights (open_clip_model.safetensors)")


def _checkpoint(model: str, pretrained: str | None) -> Path:
    """Find a checkpoint on disk: a path, or what the Hugging Face cache has of a tag."""
    if pretrained is not None and Path(pretrained).is_file():
        return Path(pretrained)
    import huggingface_hub
    import open_clip

    known = None if pretrained is None else open_clip.get_pretrained_cfg(model, pretrained)
    repository = str((known or {}).get("hf_hub") or "").strip("/")
    for file in ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"):
        found = huggingface_hub.try_to_load_from_cache(repository, file) if repository else None
        if isinstance(found, str):
            return Path(found)
    where = f"`hf download {repository}`" if repository else "download its checkpoint"
    raise MetricError(
        f"the weights of {model} {pretrained} are not on this machine; {where} where there is"
        " network, or set metric.clip_score.pretrained to a checkpoint's path"
    )


def _token_count(tokenizer: Any, prompt: str) -> int:
    """Tokens of a prompt with start and end, untruncated."""
    if hasattr(tokenizer, "encode"):
        return len(tokenizer.encode(prompt)) + 2
    return len(tokenizer.tokenizer(prompt, truncation=False)["input_ids"])


@lru_cache(maxsize=2)
def _evaluator(folder: Path, _states: tuple[tuple[Any, ...], ...]) -> Any:
    """The evaluator of files in this state; the metrics of one command share it."""
    from sd35bench.nano.evaluator import load_evaluator

    return load_evaluator(folder)


@lru_cache(maxsize=4)
def _read(*files: tuple[Any, ...]) -> tuple[bytes, str]:
    """The first file, and the digest of all; `files`: path and state. Every command asks for it."""
    found = [Path(path).read_bytes() for path, *_ in files]
    return found[0], hashlib.sha256(b"".join(found)).hexdigest()


def _safe(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)
