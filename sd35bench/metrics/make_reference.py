"""A set metric's reference made once, from a folder of images or from a setting of a study.

What comes out says where it came from: the images' digest, how many of how many and drawn with
which seed, the extractor with its weights' digest, how it resizes, and the versions of what
computed it. Features of a study's images are taken from the study, and kept there where they were
missing. Its prompts are kept with them, so that a kernel distance pairs sets on the same prompts.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from sd35bench.analysis.reference import Reference
from sd35bench.analysis.table import Row, read_table
from sd35bench.errors import ConfigError, MetricError
from sd35bench.metrics.base import Extractor, Image, ReferenceData
from sd35bench.metrics.reference import (
    KEPT,
    batched_images,
    image_files,
    read_image,
    reduce_features,
    reduce_images,
    skipped_files,
)
from sd35bench.stats.frechet import Gaussian
from sd35bench.types import Record, Task

Progress = Callable[[int, int], None]
"""Called with images done and images to do."""

_VERSIONS = (
    *("sd35bench", "numpy", "pillow", "torch", "torchmetrics", "open-clip-torch"),
    "transformers",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Which images, and how many rows of features to keep.

    `limit` draws so many of the images with `seed` (``None``: all); of more rows than `keep`, a
    subset drawn with `seed` is kept. Mean and covariance are of all images that were chosen.
    """

    limit: int | None = None
    keep: int = KEPT
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises: ConfigError for a number that cannot be."""
        for name, value, least in (("limit", self.limit, 2), ("keep", self.keep, 2)):
            if value is not None and value < least:
                raise ConfigError(f"{name}={value} must be at least {least}")

    def rows(self, count: int) -> list[int]:
        """Numbers of the images that are taken out of `count`, in order."""
        if self.limit is None or self.limit >= count:
            return list(range(count))
        drawn = np.random.default_rng(self.seed).choice(count, self.limit, replace=False)
        return sorted(int(i) for i in drawn)


def from_folder(
    name: str, folder: Path, extractor: Extractor, choice: Choice, progress: Progress | None = None
) -> Reference:
    """Make a reference of the images in a folder and below it.

    Raises: ConfigError for a folder that is not there, MetricError for one without images.
    """
    if not folder.is_dir():
        raise ConfigError(f"images={folder}: there is no such folder")
    files = image_files(folder)
    taken = [files[i] for i in choice.rows(len(files))]
    seen = hashlib.sha256()

    def images() -> Iterator[Image]:
        for done, path in enumerate(taken, start=1):
            data = path.read_bytes()
            seen.update(hashlib.sha256(data).digest())
            yield read_image(path, data)
            if progress is not None:
                progress(done, len(taken))

    skipped = skipped_files(folder)
    kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(skipped.items()))
    source = f"{len(taken)} of {len(files)} images of folder {folder.name}"
    source += f" (not read: {kinds})" if skipped else ""
    data = reduce_images(extractor, images(), source, keep=choice.keep, seed=choice.seed)
    about = {"images": str(folder), "images_digest": seen.hexdigest(), "found": len(files)}
    about |= {"skipped": skipped} if skipped else {}
    return _reference(name, data, extractor, choice, about)


def from_study(
    name: str,
    study: Any,
    extractor: Extractor,
    choice: Choice,
    setting: str | None = None,
    progress: Progress | None = None,
) -> Reference:
    """Make a reference of one setting's images in a study (`sd35bench.study.store.Study`).

    Its images went through the guards already; `extractor` embeds what is not embedded yet.
    `setting` begins like the setting's id in `show`, ``None`` if there is one. `progress` is called
    after each batch.

    Raises: ConfigError where there is not exactly one such setting, or it is image-to-image.
    """
    row = _one(read_table(study).rows, setting, study.name)
    usable = sorted(row.usable, key=lambda r: r.trial.key)
    records = [usable[i] for i in choice.rows(len(usable))]
    if len(records) < 2:
        raise MetricError(f"setting {row.id} of {study.name} has {len(records)} usable images")
    kept = _embedded(study, extractor, records, progress)
    rows = [kept[str(r.image)] for r in records]
    source = f"{len(records)} of {len(usable)} images of study {study.name}, setting {row.id}"
    data = reduce_features(
        [np.stack(rows)],
        source,
        [r.trial.request.prompt for r in records],
        keep=choice.keep,
        seed=choice.seed,
    )
    seen = hashlib.sha256("".join(str(r.image) for r in records).encode()).hexdigest()
    about = {"study": study.name, "setting": row.setting, "images_digest": seen}
    return _reference(name, data, extractor, choice, about | {"found": len(usable)})


def _one(rows: Sequence[Row], setting: str | None, study: str) -> Row:
    """Find the row that is meant. Raises: ConfigError."""
    found = [r for r in rows if r.usable and (setting is None or r.id.startswith(setting))]
    if len(found) != 1:
        known = ", ".join(r.id for r in rows if r.usable)
        asked = "no setting= was given" if setting is None else f"setting={setting}"
        raise ConfigError(
            f"a reference is one setting's images; {asked} and {len(found)} fit in study {study!r},"
            f" which has: {known}"
        )
    if found[0].setting["task"] != Task.TEXT_TO_IMAGE.value:
        raise ConfigError(f"setting {found[0].id} is image-to-image; set metrics judge the other")
    return found[0]


def _embedded(
    study: Any, extractor: Extractor, records: Sequence[Record], progress: Progress | None
) -> dict[str, np.ndarray]:
    """Features by image digest; those that were missing are made, and kept in the study."""
    kept = study.features(extractor.name)
    digests = list(dict.fromkeys(str(r.image) for r in records))
    new = [d for d in digests if d not in kept]
    done = 0
    for part in batched_images(study.read_image(d) for d in new):
        names = new[done : done + len(part)]
        rows = extractor.embed(part)
        study.put_features(extractor.name, names, rows)
        kept |= dict(zip(names, rows, strict=True))
        done += len(part)
        if progress is not None:
            progress(done, len(new))
    return kept


def _reference(
    name: str, data: ReferenceData, extractor: Extractor, choice: Choice, about: dict[str, Any]
) -> Reference:
    provenance = about | {
        "name": name,
        "n": data.n,
        "extractor": extractor.name,
        "resize": extractor.resize,
        "limit": choice.limit,
        "keep": choice.keep,
        "subset_seed": choice.seed,
        "versions": {package: _version(package) for package in _VERSIONS},
    }
    return Reference(
        name=name,
        gaussian=Gaussian(data.mean, data.cov, data.n),
        source=data.source,
        features=data.features,
        prompts=data.prompts,
        provenance=provenance,
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
