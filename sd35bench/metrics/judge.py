"""Judges: models that say how well an image follows its prompt, behind one seam.

A `Judge` is a callable: images and prompts in, one `Value` each out. Kinds, by the metric's name:

    judge_vqa, judge_tifa     a model behind an OpenAI-compatible endpoint (`judge_endpoint`)
    judge_pickscore           CLIP with a learned scale, a folder in transformers' format
                              (Kirstain et al. 2023, arXiv 2305.01569)
    judge_imagereward         the package `image-reward` (Xu et al. 2023, arXiv 2304.05977)
    judge_hpsv3               the package `hpsv3` (Ma et al. 2025, arXiv 2508.03789)

The model is part of the name (`judge_pickscore_<folder>`), as values of two judges have nothing to
do with each other. A path that is not there, or a package that is not installed, is refused by
name. Nothing is downloaded by us; `hpsv3` itself loads its base model by the name in its settings.
"""

import hashlib
import importlib
import importlib.util
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from sd35bench.disk import cache_folder
from sd35bench.errors import ConfigError, MetricError
from sd35bench.metrics.base import Image, ImageMetric, Value
from sd35bench.metrics.judge_endpoint import Endpoint, check_url, read_questions
from sd35bench.types import Record

KINDS = ("vqa", "tifa", "pickscore", "imagereward", "hpsv3")
_PACKAGES = {"imagereward": ("ImageReward", "image-reward"), "hpsv3": ("hpsv3", "hpsv3")}


class Judge(Protocol):
    """Scores images against their prompts; `digests` name the images for a cache."""

    def __call__(
        self, images: Sequence[Image], prompts: Sequence[str], digests: Sequence[str]
    ) -> list[Value]:
        """One value per image. Raises: MetricError."""
        ...


class JudgeMetric(ImageMetric):
    """A judge's scores as a metric."""

    def __init__(self, name: str, judge: Judge | None) -> None:
        """`judge` ``None``: the bare family, which says what to give."""
        self.name, self._judge = name, judge

    def applies(self, record: Record) -> bool:
        """Images that were asked for in words."""
        if self._judge is None:
            raise MetricError(f"judge: name one: {', '.join('judge_' + kind for kind in KINDS)}")
        return record.trial.request.prompt != ""

    def prepare(self, records: Sequence[Record]) -> None:
        """Refuse what these records would cost, before the first call. Raises: MetricError."""
        if isinstance(self._judge, Endpoint):
            self._judge.prepare([(r.image or "", r.trial.request.prompt) for r in records])

    def score_images(
        self, images: Sequence[Image], records: Sequence[Record], inits: Sequence[Image | None]
    ) -> list[Value]:
        """One value per image."""
        assert self._judge is not None
        prompts = [r.trial.request.prompt for r in records]
        return self._judge(images, prompts, [r.image or "" for r in records])


class PickScore:
    """CLIP with a learned scale: exp(logit_scale) · cosine of image and prompt."""

    def __init__(self, folder: Path) -> None:
        """Nothing is read before the first image."""
        self.folder = folder
        self._parts: tuple[Any, Any, Any] | None = None

    def __call__(
        self, images: Sequence[Image], prompts: Sequence[str], digests: Sequence[str]
    ) -> list[Value]:
        """One value per image, from single pairs, so that no batch changes it."""
        import torch

        model, pixels, words = self._load()
        found = []
        for image, prompt in zip(images, prompts, strict=True):
            inputs = words([prompt], truncation=True, return_tensors="pt")
            inputs["pixel_values"] = pixels(images=image, return_tensors="pt")["pixel_values"]
            with torch.inference_mode():
                found.append(Value(float(model(**inputs).logits_per_image[0, 0])))
        return found

    def _load(self) -> tuple[Any, Any, Any]:
        if self._parts is None:
            from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

            try:
                self._parts = (
                    CLIPModel.from_pretrained(self.folder, local_files_only=True).eval(),
                    CLIPImageProcessor.from_pretrained(self.folder, local_files_only=True),
                    AutoTokenizer.from_pretrained(self.folder, local_files_only=True),
                )
            except (OSError, ValueError, RuntimeError, KeyError) as exc:
                raise MetricError(
                    f"metric.judge.model={self.folder}: not a CLIP in transformers' format: {exc}"
                ) from exc
        return self._parts


class PackageJudge:
    """A judge of another package, by the calls that its own page shows."""

    def __init__(self, kind: str, model: Path) -> None:
        """Nothing is loaded before the first image."""
        self.kind, self.model = kind, model
        self._loaded: Any = None

    def __call__(
        self, images: Sequence[Image], prompts: Sequence[str], digests: Sequence[str]
    ) -> list[Value]:
        """One value per image."""
        from PIL import Image as Pillow

        pictures = [Pillow.fromarray(image) for image in images]
        if self.kind == "imagereward":
            if self._loaded is None:
                self._loaded = importlib.import_module("ImageReward").load(str(self.model))
            pairs = zip(prompts, pictures, strict=True)
            return [Value(float(self._loaded.score(prompt, [each]))) for prompt, each in pairs]
        with tempfile.TemporaryDirectory() as folder:  # this one takes files
            paths = [f"{folder}/{n}.png" for n in range(len(pictures))]
            for picture, path in zip(pictures, paths, strict=True):
                picture.save(path)
            rewards = self._hpsv3().reward(prompts=list(prompts), image_paths=paths)
        return [Value(float(reward[0])) for reward in rewards]

    def _hpsv3(self) -> Any:
        if self._loaded is None:
            import torch

            made = importlib.import_module("hpsv3").HPSv3RewardInferencer
            device = "cuda" if torch.cuda.is_available() else "cpu"
            self._loaded = made(checkpoint_path=str(self.model), device=device)
        return self._loaded


def load(
    name: str,
    *,
    model: str | None = None,
    endpoint: str | None = None,
    questions: str | None = None,
    usd_per_call: float | None = None,
    max_cost_usd: float | None = None,
) -> JudgeMetric:
    """Load `judge_<kind>`.

    `model` is a checkpoint's path, or the model's name at an endpoint; `endpoint` the address
    before ``/chat/completions``, whose key comes from OPENAI_API_KEY; `questions` the JSON Lines
    file of `judge_tifa`, by prompt. One question costs `usd_per_call` (0 on this machine), and
    nothing is asked where all missing ones cost more than `max_cost_usd`.

    Raises: ConfigError, MetricError.
    """
    kind = name.removeprefix("judge").removeprefix("_").partition("_")[0]
    if kind == "":
        return JudgeMetric("judge", None)
    if kind not in KINDS:
        raise ConfigError(f"metric={name!r}: no such judge; known: {', '.join(KINDS)}")
    if kind in ("vqa", "tifa"):
        return _at_endpoint(kind, model, endpoint, questions, (usd_per_call, max_cost_usd))
    if kind in _PACKAGES:
        package, installed_as = _PACKAGES[kind]
        if importlib.util.find_spec(package) is None:
            raise MetricError(
                f"judge_{kind}: the package {installed_as!r} is not installed; pip install"
                f" {installed_as}"
            )
    path = None if model is None else Path(model).expanduser()
    if path is None or not path.exists():
        raise MetricError(
            f"judge_{kind}: there is no checkpoint at metric.judge.model={model}; give the path"
        )
    label = f"judge_{kind}_{_safe(path.stem if path.is_file() else path.name)}"
    judge = PickScore(path) if kind == "pickscore" else PackageJudge(kind, path)
    return JudgeMetric(label, judge)


def _at_endpoint(
    kind: str,
    model: str | None,
    endpoint: str | None,
    questions: str | None,
    money: tuple[float | None, float | None],
) -> JudgeMetric:
    if endpoint is None or model is None:
        raise MetricError(
            f"judge_{kind}: give metric.judge.endpoint=https://HOST/v1 and metric.judge.model=NAME"
        )
    here = check_url(endpoint)
    price, most = money
    if not here and (price is None or most is None):
        raise MetricError(
            f"judge_{kind}: {endpoint} may cost money; give metric.judge.usd_per_call= and"
            " metric.judge.max_cost_usd="
        )
    label = f"judge_{kind}_{_safe(model)}"
    asked = None
    if kind == "tifa":
        if questions is None:
            raise MetricError("judge_tifa: give metric.judge.questions=FILE.jsonl")
        asked, digest = read_questions(Path(questions).expanduser())
        label = f"{label}_{digest}"
    judge = Endpoint(
        url=endpoint,
        model=model,
        questions=asked,
        usd_per_call=0.0 if price is None else price,
        max_cost_usd=0.0 if most is None else most,
        cache=_cache_file(endpoint, model),
    )
    return JudgeMetric(label, judge)


def _cache_file(endpoint: str, model: str) -> Path:
    """Where answers are kept: ``$XDG_CACHE_HOME/sd35bench/judge``, else under ~/.cache."""
    folder = cache_folder("judge")
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{hashlib.sha256(f'{endpoint}{model}'.encode()).hexdigest()[:16]}.jsonl"


def _safe(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "-", text)
