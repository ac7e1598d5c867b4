"""Where a set metric's reference comes from, and what all set metrics share because of it.

The reference is the prompts' true renders (nano's world can draw any prompt), a folder of images,
or an .npz file, of statistics alone or made by `sd35bench reference make`. Its content's hash is
part of every value. Metrics on one extractor share one reference: it is embedded once. Only
text-to-image: an edit's target is one image, not a distribution.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from sd35bench.analysis.reference import (
    Reference,
    load_reference,
    read_reference,
    reference_path,
    write_reference,
)
from sd35bench.disk import file_digest
from sd35bench.errors import ConfigError, MetricError
from sd35bench.metrics.base import Extractor, Image, ReferenceData, SetMetric, is_nano, maker
from sd35bench.metrics.extractors import Backbone, NanoEvaluator, choose_extractor
from sd35bench.pictures import decode_rgb
from sd35bench.stats.frechet import Gaussian
from sd35bench.types import Record, Task, content_hash

PROMPTS = "prompts"
KEPT = 10_000
"""Rows of features that a reference keeps: 82 MB of Inception's; mean and covariance are of all."""

# Twice the images that a setting needs: the reference's own noise must not be the larger part.
_REFERENCE_FACTOR = 2
# Version 1 drew all prompts with the same seeds; its references must not pass for these.
_SEEDING = 2
_BATCH = 64
_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".gif"}


class ReferencedMetric(SetMetric):
    """A set metric of a family, on an extractor, against a reference."""

    tasks = frozenset({Task.TEXT_TO_IMAGE})
    family: str
    default_extractor: str = "inception"
    not_taken: frozenset[str] = frozenset()
    """Options of `load` that have no meaning for this family."""
    own_least: int | None = None
    """Fewest images for a value; ``None``: the extractor's."""

    @classmethod
    def load(
        cls,
        name: str,
        *,
        reference: str = PROMPTS,
        min_images: int | None = None,
        extractor: str | None = None,
        model: str | None = None,
        pretrained: str | None = None,
        weights: str | None = None,
    ) -> Self:
        """Load the family on its default extractor, or `<family>_nano` and so on.

        `reference` is ``prompts``, a folder of images, or an .npz of `sd35bench reference make`; a
        Fréchet distance also takes one of `mean`, `cov` and `n` alone. `min_images` takes the place
        of the family's own number; `extractor`, `model`, `pretrained` and `weights` that of the
        extractor in the name, see `Backbone`.

        Raises: ConfigError for a reference that is not there or an option that is not taken,
        MetricError for an unknown backbone.
        """
        given = {"min_images": min_images, "extractor": extractor, "weights": weights}
        for option in sorted(cls.not_taken):
            if given[option] is not None:
                raise ConfigError(f"metric.{cls.family}.{option}: this metric has no such option")
        label = name.removeprefix(cls.family).removeprefix("_")
        backbone = Backbone(extractor, model, pretrained, weights)
        chosen = choose_extractor(label if label else cls.default_extractor, backbone)
        return cls(*chosen, reference, min_images)

    def __init__(
        self, extractor: Extractor, label: str, reference: str = PROMPTS, least: int | None = None
    ) -> None:
        """Take the extractor, its label in the metric's name, and `least` images if not the own.

        Raises: ConfigError for a reference that is not there, or fewer than 2 images.
        """
        option = f"metric.{self.family}.reference"
        if reference != PROMPTS and not Path(reference).exists():
            raise ConfigError(f"{option}={reference!r} is neither 'prompts' nor on disk")
        self.reference = reference
        self.extractor = extractor
        self.name = f"{self.family}_{label}"
        self._least = least
        if least is not None and least < 2:
            raise ConfigError(f"metric.{self.family}.min_images={least} must be at least 2")
        self.remedy = (
            f"it judges text-to-image, and needs {option}=FOLDER or FILE.npz for models whose"
            " prompts have no true renders"
        )

    @property
    def min_images(self) -> int:
        """Fewest images for which a value is given: as configured, or the family's own."""
        least = self.own_least if self._least is None else self._least
        return self.extractor.min_images if least is None else least

    def applies(self, record: Record) -> bool:
        """Text-to-image; nano's evaluator and true renders know nano's world only."""
        nano = is_nano(maker(record))
        drawn = self.reference == PROMPTS or isinstance(self.extractor, NanoEvaluator)
        return super().applies(record) and (nano or not drawn)

    def reference_key(self, records: Sequence[Record]) -> str:
        """Content hash of extractor, source and, for true renders, prompts, size and count."""
        if self.reference == PROMPTS:
            prompts, per_prompt = self._plan(records)
            size = _size(records)
            drawn = [self.extractor.name, prompts, size, per_prompt, _SEEDING]
            return content_hash(drawn)[:16]
        digest = folder_digest(Path(self.reference))
        return content_hash([self.extractor.name, digest])[:16]

    def make_reference(self, records: Sequence[Record]) -> ReferenceData:
        """Render, read or load the reference, and reduce it to what the metrics need."""
        path = Path(self.reference)
        if self.reference == PROMPTS:
            prompts, per_prompt = self._plan(records)
            labels = [p for p in prompts for _ in range(per_prompt)]
            images = self._renders(prompts, per_prompt, _size(records))
            found = reduce_images(self.extractor, images, "true renders of the prompts", labels)
        elif path.suffix == ".npz":
            found = self._load(path)
        else:
            found = reduce_images(self.extractor, read_images(path), self.reference)
        self.require_images(found.n, found.source)
        return found

    def _load(self, path: Path) -> ReferenceData:
        kept = load_reference(path)
        made_with = kept.provenance.get("extractor")
        if made_with is not None and made_with != self.extractor.name:
            raise MetricError(
                f"{self.name}: {path} holds features of {made_with}, this metric's are of"
                f" {self.extractor.name}; make it with the same extractor and weights"
            )
        if self.needs_features:
            _ = kept.sample  # says what to do where there are none
        return ReferenceData(
            mean=kept.gaussian.mean,
            cov=kept.gaussian.cov,
            n=kept.gaussian.n,
            source=kept.source,
            features=kept.features,
            prompts=kept.prompts,
        )

    def _plan(self, records: Sequence[Record]) -> tuple[list[str], int]:
        """The distinct prompts, sorted, and how many true renders of each are needed."""
        prompts = sorted({r.trial.request.prompt for r in records})
        wanted = _REFERENCE_FACTOR * self.extractor.min_images
        return prompts, -(-wanted // len(prompts))

    def _renders(
        self, prompts: Sequence[str], count: int, size: tuple[int, int]
    ) -> Iterator[Image]:
        for prompt in prompts:
            try:
                yield from true_renders(prompt, size, count)
            except ValueError as exc:
                raise MetricError(
                    f"{self.name}: the prompt {prompt[:60]!r} has no true render in nano's world;"
                    f" set metric.{self.family}.reference to a folder of images or an .npz file"
                ) from exc


def keep_reference(study: Any, metric: SetMetric, name: str, records: Sequence[Record]) -> None:
    """Make a metric's reference and keep it under the study, unless it is there with all it needs.

    Raises: MetricError where it cannot be had, or has too few images for this metric.
    """
    kept = _kept_reference(study, name)
    if kept is not None:  # another metric, or an earlier version, made it
        metric.require_images(kept.gaussian.n, kept.source)
        if kept.features is not None or not metric.needs_features:
            return
    data = metric.make_reference(records)
    reference = Reference(
        name=name,
        gaussian=Gaussian(data.mean, data.cov, data.n),
        source=data.source,
        min_images=metric.min_images,
        features=data.features,
        prompts=data.prompts,
    )
    write_reference(study, reference)


def _kept_reference(study: Any, name: str) -> Reference | None:
    """A reference that is there and whole; one that is damaged is made again."""
    if not reference_path(study, name).exists():
        return None
    try:
        return read_reference(study, name)
    except MetricError:
        return None


def reduce_images(
    extractor: Extractor,
    images: Iterable[Image],
    source: str,
    prompts: Sequence[str] | None = None,
    *,
    keep: int = KEPT,
    seed: int = 0,
) -> ReferenceData:
    """Embed images once; mean and covariance are of all, features of at most `keep` rows.

    Images are read in batches, of any size each. `source` says in words what they are, `prompts`
    what each is a render of. Of more rows than `keep` a subset is drawn with `seed`.

    Raises: MetricError for fewer than 2 images.
    """
    parts = list(extractor.embed_all(batched_images(images)))
    return reduce_features(parts, source, prompts, keep=keep, seed=seed)


def reduce_features(
    parts: Sequence[NDArray[np.float32]],
    source: str,
    prompts: Sequence[str] | None = None,
    *,
    keep: int = KEPT,
    seed: int = 0,
) -> ReferenceData:
    """Do the same with features [n, d] in parts. Raises: MetricError for fewer than 2 rows."""
    rows = np.concatenate(parts) if parts else np.empty((0, 1), np.float32)
    if len(rows) < 2:
        raise MetricError(f"the reference {source} has {len(rows)} images; it needs at least 2")
    x = rows.astype(np.float64)
    labels = None if prompts is None else np.array(prompts, np.str_)
    if len(rows) > keep:
        chosen = np.sort(np.random.default_rng(seed).choice(len(rows), keep, replace=False))
        rows, labels = rows[chosen], None if labels is None else labels[chosen]
    return ReferenceData(
        mean=x.mean(0),
        cov=np.cov(x, rowvar=False),
        n=len(x),
        source=source,
        features=rows.astype(np.float32),
        prompts=labels,
    )


def true_renders(prompt: str, size: tuple[int, int], count: int) -> Iterator[Image]:
    """Draw a caption of nano's world `count` times. Raises: ValueError for another text.

    Each prompt has seeds of its own: with seeds 0, 1 … for all of them, every prompt's objects
    would lie at the same places, and a reference of hundreds of renders hold a handful of layouts.
    """
    from sd35bench.nano.captions import parse
    from sd35bench.nano.prompts import NanoPrompt, true_render
    from sd35bench.nano.world import Scene, Thing

    spec = parse(prompt)
    kinds = spec.kinds if len(spec.kinds) == spec.count else spec.kinds * spec.count
    things = tuple(Thing(shape, colour, 0.0, 0.0, 1.0) for shape, colour in kinds)
    scene = Scene(spec.level, things, spec.background, *size, spec.size, spec.place, spec.relation)
    item = NanoPrompt("", prompt, spec.level, *size, scene)
    first = int(content_hash(prompt)[:12], 16)
    for number in range(count):
        yield true_render(item, first + number, size)


def image_files(path: Path) -> list[Path]:
    """Images in a folder and below, in order of name; a file is itself.

    Raises: MetricError where there are none.
    """
    if path.is_file():
        return [path]
    found = sorted(p for p in path.rglob("*") if p.suffix.lower() in _SUFFIXES)
    if not found:
        raise MetricError(f"reference {path}: no images in this folder")
    return found


def skipped_files(folder: Path) -> dict[str, int]:
    """How many files of a folder are not read as images, by suffix; hidden ones do not count."""
    others = (p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    suffixes = (p.suffix.lower() or "without suffix" for p in others)
    return dict(Counter(suffix for suffix in suffixes if suffix not in _SUFFIXES))


def folder_digest(path: Path) -> str:
    """SHA-256 over the files' digests: what is in the images, not what they are called."""
    found = hashlib.sha256()
    for file in image_files(path):
        found.update(bytes.fromhex(file_digest(file)))
    return found.hexdigest()


def read_images(folder: Path) -> Iterator[Image]:
    """Each image of a folder as uint8 RGB. Raises: MetricError for a file that is none."""
    for path in image_files(folder):
        yield read_image(path, path.read_bytes())


def read_image(path: Path, data: bytes) -> Image:
    """Decode an image file's bytes to uint8 RGB. Raises: MetricError where that cannot be."""
    try:
        return decode_rgb(data)
    except OSError as exc:
        raise MetricError(f"{path} cannot be read as an image; remove it: {exc}") from exc


def batched_images(images: Iterable[Image]) -> Iterator[list[Image]]:
    """Lists of at most 64, so that a set of any size needs little memory."""
    left = iter(images)
    while part := list(islice(left, _BATCH)):
        yield part


def _size(records: Sequence[Record]) -> tuple[int, int]:
    request = records[0].trial.request
    return request.width, request.height
