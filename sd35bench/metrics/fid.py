"""Fréchet distance of a setting's images from a reference, on features of a named extractor.

`fid_inception` is the FID of the literature; `fid_nano` and `fid_<clip model>` are the same formula
on other features and have numbers of their own. The reference is the prompts' true renders (nano's
world can draw any prompt), a folder of images, or an .npz of statistics; its digest is part of
every value. Only text-to-image: an edit's target is one image, not a distribution.

The distance itself is `sd35bench.analysis.frechet`, from features that are kept.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sd35bench.errors import ConfigError, MetricError
from sd35bench.metrics.base import Extractor, Image, ReferenceData, SetMetric, is_nano
from sd35bench.metrics.extractors import (
    ClipExtractor,
    Inception,
    NanoEvaluator,
    clip_extractor,
)
from sd35bench.types import Record, Task, content_hash

__all__ = ["Fid", "load"]

PROMPTS = "prompts"
# Twice the images that a setting needs: the reference's own noise must not be the larger part.
_REFERENCE_FACTOR = 2
_BATCH = 64
_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


class Fid(SetMetric):
    """Fréchet distance; `reference` is ``prompts``, a folder, or an .npz file."""

    tasks = frozenset({Task.TEXT_TO_IMAGE})
    remedy = (
        "it judges text-to-image, and needs metric.fid.reference=FOLDER or FILE.npz for models"
        " whose prompts have no true renders"
    )

    def __init__(self, extractor: Extractor, label: str, reference: str = PROMPTS) -> None:
        self.extractor = extractor
        self.reference = reference
        self.name = f"fid_{label}"

    def applies(self, record: Record) -> bool:
        """Text-to-image; nano's evaluator and true renders know nano's world only."""
        nano = is_nano(record.trial.load.model.name)
        drawn = self.reference == PROMPTS or isinstance(self.extractor, NanoEvaluator)
        return super().applies(record) and (nano or not drawn)

    def reference_key(self, records: Sequence[Record]) -> str:
        """Content hash of extractor, source and, for true renders, prompts, size and count."""
        if self.reference == PROMPTS:
            prompts, per_prompt = self._plan(records)
            size = _size(records)
            return content_hash([self.extractor.name, prompts, size, per_prompt])[:16]
        source = hashlib.sha256()
        for path in _files(Path(self.reference)):
            with open(path, "rb") as file:
                source.update(hashlib.file_digest(file, "sha256").digest())
        return content_hash([self.extractor.name, source.hexdigest()])[:16]

    def make_reference(self, records: Sequence[Record]) -> ReferenceData:
        """Render, read or load the reference and reduce it to mean and covariance."""
        path = Path(self.reference)
        if self.reference != PROMPTS and path.suffix == ".npz":
            found = _read_statistics(path)
        else:
            found = self._reduce(records)
        if found.n < self.extractor.min_images:
            raise MetricError(
                f"{self.name}: the reference {found.source} has {found.n} images,"
                f" {self.extractor.name} needs {self.extractor.min_images}"
            )
        return found

    def _reduce(self, records: Sequence[Record]) -> ReferenceData:
        if self.reference == PROMPTS:
            images, what = self._renders(records), "true renders of the prompts"
        else:
            images, what = _read_images(Path(self.reference)), str(self.reference)
        x = np.concatenate([self.extractor.embed(part) for part in _batched(images)])
        x = x.astype(np.float64)
        return ReferenceData(mean=x.mean(0), cov=np.cov(x, rowvar=False), n=len(x), source=what)

    def _plan(self, records: Sequence[Record]) -> tuple[list[str], int]:
        """The distinct prompts, sorted, and how many true renders of each are needed."""
        prompts = sorted({r.trial.request.prompt for r in records})
        wanted = _REFERENCE_FACTOR * self.extractor.min_images
        return prompts, -(-wanted // len(prompts))

    def _renders(self, records: Sequence[Record]) -> Iterator[Image]:
        prompts, per_prompt = self._plan(records)
        size = _size(records)
        for prompt in prompts:
            try:
                yield from _true_renders(prompt, size, per_prompt)
            except ValueError as exc:
                raise MetricError(
                    f"{self.name}: the prompt {prompt[:60]!r} has no true render in nano's"
                    " world; set metric.fid.reference to a folder of images or an .npz file"
                ) from exc


def load(
    name: str,
    *,
    extractor: str | None = None,
    reference: str = PROMPTS,
    model: str | None = None,
    pretrained: str | None = None,
    weights: str | None = None,
) -> Fid:
    """Load `fid`, `fid_inception`, `fid_nano` or `fid_<clip model>_<pretrained>`.

    Args:
        name: the metric's name; the bare family is Inception.
        extractor: instead of the name's: ``inception``, ``nano`` or ``clip`` (with `model`).
        reference: ``prompts``, a folder of images, or an .npz with `mean`, `cov` and `n`.
        model: for ``clip``: an open_clip model, or ``local-dir:PATH``.
        pretrained: its pretrained tag or checkpoint path.
        weights: for ``inception``: its checkpoint's path.

    Raises: ConfigError for a reference that is not there.
    """
    if reference != PROMPTS and not Path(reference).exists():
        raise ConfigError(f"metric.fid.reference={reference!r} is neither 'prompts' nor on disk")
    label = name.removeprefix("fid").removeprefix("_")
    if extractor is not None:
        label = extractor
    if label in ("", "inception"):
        return Fid(Inception(weights), "inception", reference)
    clip: ClipExtractor = clip_extractor(label, None if label == "nano" else model, pretrained)
    return Fid(clip, clip.label, reference)


def _true_renders(prompt: str, size: tuple[int, int], count: int) -> Iterator[Image]:
    """Draw a caption of nano's world `count` times. Raises: ValueError for another text."""
    from sd35bench.nano.captions import parse
    from sd35bench.nano.prompts import NanoPrompt, true_render
    from sd35bench.nano.world import Scene, Thing

    spec = parse(prompt)
    kinds = spec.kinds if len(spec.kinds) == spec.count else spec.kinds * spec.count
    things = tuple(Thing(shape, colour, 0.0, 0.0, 1.0) for shape, colour in kinds)
    scene = Scene(spec.level, things, spec.background, *size, spec.size, spec.place, spec.relation)
    item = NanoPrompt("", prompt, spec.level, *size, scene)
    for seed in range(count):
        yield true_render(item, seed, size)


def _size(records: Sequence[Record]) -> tuple[int, int]:
    request = records[0].trial.request
    return request.width, request.height


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    found = sorted(p for p in path.rglob("*") if p.suffix.lower() in _SUFFIXES)
    if not found:
        raise MetricError(f"metric.fid.reference={path}: no images in this folder")
    return found


def _read_images(folder: Path) -> Iterator[Image]:
    from PIL import Image as Pillow

    for path in _files(folder):
        with Pillow.open(path) as image:
            yield np.asarray(image.convert("RGB"))


def _read_statistics(path: Path) -> ReferenceData:
    with np.load(path) as data:
        missing = {"mean", "cov", "n"} - set(data.files)
        if missing:
            raise MetricError(f"{path} lacks {', '.join(sorted(missing))}; it needs mean, cov, n")
        mean, cov = _square(path, data["mean"], data["cov"])
        return ReferenceData(mean=mean, cov=cov, n=int(data["n"]), source=str(path))


def _square(path: Path, mean: NDArray, cov: NDArray) -> tuple[NDArray, NDArray]:
    if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
        raise MetricError(f"{path}: mean {mean.shape} and cov {cov.shape} do not fit each other")
    return mean.astype(np.float64), cov.astype(np.float64)


def _batched(images: Iterator[Image]) -> Iterator[list[Image]]:
    part: list[Image] = []
    for image in images:
        part.append(image)
        if len(part) == _BATCH:
            yield part
            part = []
    if part:
        yield part
