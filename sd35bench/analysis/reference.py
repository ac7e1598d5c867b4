"""What set metrics are held against, as a file: statistics, features, and where they came from.

    mean, cov, n          all images' features as a Gaussian: what a Fréchet distance needs
    features, prompts     rows for kernel distances and neighbours: all of them, or a seeded subset;
                          the prompt of each where the images are renders of prompts
    source, provenance    what it is; by whom and from what it was made (a JSON object)
    digest                SHA-256 of all of that: a file that was cut short or altered is refused

Only `mean`, `cov` and `n` must be there, so that statistics of other tools, and those that earlier
versions wrote, can be read; metrics that need features say so.
"""

import hashlib
import io
import json
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sd35bench.disk import write_atomic
from sd35bench.errors import MetricError, StoreError
from sd35bench.prompts import same_prompt
from sd35bench.stats.frechet import Gaussian
from sd35bench.stats.kernel import Sample

_NEEDED = frozenset({"mean", "cov", "n"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """What a set metric is held against: `name` is its file's stem, `source` says what it is.

    `min_images` is the least number of images for which the metric that made it gives a value.
    `features` are [m, d] of m ≤ n images, `prompts` [m] text; ``None`` where they are not kept.
    """

    name: str
    gaussian: Gaussian
    source: str
    min_images: int = 2
    features: NDArray[np.float32] | None = None
    prompts: NDArray[np.str_] | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def sample(self) -> Sample:
        """Features and prompts. Raises: MetricError where only statistics were kept."""
        if self.features is None:
            raise MetricError(
                f"the reference {self.name} ({self.source}) has mean and covariance only; this"
                " metric needs features: make it with `sd35bench reference make`"
            )
        if self.prompts is None or self.prompts.dtype.kind != "U":  # numbers tell prompts apart
            return Sample(self.features, self.prompts)
        return Sample(self.features, np.array([same_prompt(str(text)) for text in self.prompts]))


def save_reference(path: Path, reference: Reference) -> str:
    """Write a reference, whole or not at all, and return its digest."""
    arrays: dict[str, Any] = {
        "mean": reference.gaussian.mean,
        "cov": reference.gaussian.cov,
        "n": reference.gaussian.n,
        "source": reference.source,
        "min_images": reference.min_images,
        "provenance": json.dumps(reference.provenance, sort_keys=True),
    }
    if reference.features is not None:
        arrays["features"] = np.asarray(reference.features, np.float32)
    if reference.prompts is not None:
        arrays["prompts"] = np.asarray(reference.prompts, np.str_)
    digest = _digest(arrays)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays, digest=digest)
    write_atomic(path, buffer.getvalue())
    return digest


def load_reference(path: Path) -> Reference:
    """Read a reference's file, of this or an earlier format.

    Raises: MetricError where it is no such file, lacks something, or is not what was written.
    """
    try:
        with np.load(path, allow_pickle=False) as data:
            arrays = {name: data[name] for name in data.files}
    except Exception as exc:  # numpy and zipfile raise a dozen kinds for damaged bytes
        raise MetricError(
            f"{path} cannot be read as .npz: {exc}; make it again with `sd35bench reference make`"
        ) from exc
    missing = _NEEDED - arrays.keys()
    if missing:
        raise MetricError(f"{path} lacks {', '.join(sorted(missing))}; it needs mean, cov, n")
    stored = arrays.pop("digest", None)
    if stored is not None and str(stored) != _digest(arrays):
        raise MetricError(
            f"{path} is not what was written (its digest differs); make it again with `sd35bench"
            " reference make`"
        )
    return Reference(
        name=path.stem,
        gaussian=_gaussian(path, arrays),
        source=str(arrays.get("source", path)),
        min_images=int(arrays.get("min_images", 2)),
        features=_features(path, arrays),
        prompts=arrays.get("prompts"),
        provenance=json.loads(str(arrays.get("provenance", "{}"))),
    )


def reference_path(study: Any, name: str) -> Path:
    """Where a study keeps the reference of this name."""
    return study.path / "references" / f"{name}.npz"


def write_reference(study: Any, reference: Reference) -> None:
    """Keep a reference under the study; written whole or not at all."""
    save_reference(reference_path(study, reference.name), reference)


def read_reference(study: Any, name: str) -> Reference:
    """Read a kept reference. Raises: StoreError if it is gone."""
    path = reference_path(study, name)
    if not path.exists():
        raise StoreError(f"{path} is missing; delete the study's scores/ and score it again")
    return _read(path, path.stat().st_mtime_ns)


# Two: a setting's metrics share one, and features of Inception take 80 MB.
@lru_cache(maxsize=2)
def _read(path: Path, _mtime_ns: int) -> Reference:
    return load_reference(path)


def _gaussian(path: Path, arrays: dict[str, NDArray]) -> Gaussian:
    mean, cov = arrays["mean"], arrays["cov"]
    if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
        raise MetricError(f"{path}: mean {mean.shape} and cov {cov.shape} do not fit each other")
    return Gaussian(mean.astype(np.float64), cov.astype(np.float64), int(arrays["n"]))


def _features(path: Path, arrays: dict[str, NDArray]) -> NDArray[np.float32] | None:
    features, prompts = arrays.get("features"), arrays.get("prompts")
    if features is None:
        return None
    if features.ndim != 2 or features.shape[1] != len(arrays["mean"]):
        raise MetricError(
            f"{path}: features {features.shape} do not fit mean's {len(arrays['mean'])}"
        )
    if prompts is not None and len(prompts) != len(features):
        raise MetricError(f"{path}: {len(prompts)} prompts for {len(features)} rows of features")
    return features.astype(np.float32)


def _digest(arrays: dict[str, Any]) -> str:
    """SHA-256 over names, types, shapes and bytes, in order of name."""
    found = hashlib.sha256()
    for name in sorted(arrays):
        value = np.ascontiguousarray(arrays[name])
        found.update(f"{name} {value.dtype.str} {value.shape}\n".encode())
        found.update(value.tobytes())
    return found.hexdigest()
