"""Drift: how far a backend's image is from the reference backend's, for the very same request.

Not a quality: a drifted image may be as good, so it is measured on random weights too. Within one
model, every trial is held against the reference backend's trial of the same request (prompt, seed,
size, steps, cfg … all of it), like with like: of the same batch size if there is one, then of the
same thread count. The reference's own trials of another batch size or thread count are held
against its *standard* ones (batch size 1 if it ran so, the commonest thread count): that is the
noise floor, what the same arithmetic in another order does to the pixels.

The value is the mean absolute difference in levels of 255. The detail has `max_abs` (levels),
`mse`, `psnr_db` (``None`` for identical images, whose PSNR is infinite), `ssim`, `flip`, `lpips`
(only where its weights are on this machine), `cvvdp_jod` (only where its package is), each
channel's mean signed difference (`shift_red`, `shift_green`, `shift_blue`; scores of earlier
versions lack them), the latents' relative error ``||a - b|| / ||b||`` after the first and the last
step (`latent_rel_first`, `latent_rel_last`), and which reference it was.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sd35bench.analysis.drift import SHIFTS, psnr_db
from sd35bench.errors import ConfigError, MetricError
from sd35bench.metrics.base import Image, Pair, PairMetric, Value, require_uint8_rgb
from sd35bench.metrics.cvvdp import find_cvvdp
from sd35bench.metrics.flip import PIXELS_PER_DEGREE, flip
from sd35bench.metrics.lpips import LPIPS_REMEDY, Lpips, find_lpips
from sd35bench.types import BackendSpec, Record, Request

STANDARD_REFERENCE = "eager"
_LEVELS = 255.0
# The Gaussian window's side; torchmetrics fails below half of it, and less says nothing.
_SSIM_WINDOW = 11


class Drift(PairMetric):
    """Mean absolute difference from the backend named `reference`, and more in the detail."""

    def __init__(
        self,
        reference: str = STANDARD_REFERENCE,
        pixels_per_degree: float = PIXELS_PER_DEGREE,
        lpips: Lpips | None = None,
    ) -> None:
        self.reference = reference
        self.lpips = lpips
        self.cvvdp = find_cvvdp()
        self.note = "" if lpips is not None else f"without LPIPS; {LPIPS_REMEDY}"
        self.pixels_per_degree = pixels_per_degree
        self.name = "drift" if reference == STANDARD_REFERENCE else f"drift_{reference}"
        self.remedy = (
            f"it needs images by backend {reference!r} and by another one for the same model,"
            " prompts, seeds and settings; run that, or name another reference with"
            " metric.drift.reference=BACKEND"
        )

    def pairing(self, records: Sequence[Record]) -> dict[str, list[Record]]:
        """By trial key, the reference's records of the same request, like with like first."""
        models: dict[tuple[str, str], list[Record]] = defaultdict(list)
        for record in records:
            load = record.trial.load
            digest = load.known_digest
            if digest is not None:
                models[load.model.name, digest].append(record)
        # Without a digest the weights with the most images are meant.
        most = sorted(models, key=lambda key: (len(models[key]), key))
        by_name = dict(most)
        for record in records:
            name = record.trial.load.model.name
            if record.trial.load.known_digest is None:
                models[name, by_name.get(name, "")].append(record)
        found: dict[str, list[Record]] = {}
        for rows in models.values():
            found |= self._pair_model(rows)
        return found

    def _pair_model(self, rows: Sequence[Record]) -> dict[str, list[Record]]:
        named = [r for r in rows if r.trial.load.backend.name == self.reference]
        if not named:
            return {}
        standard = _Standard(named, rows)
        found: dict[str, list[Record]] = {}
        for record in rows:
            usable = standard.candidates(record)
            if usable:
                found[record.trial.key] = usable
        return found

    def about(self, record: Record, reference: Record) -> dict[str, Any]:
        """Which reference it is, and everything else that a score depends on."""
        latents = None
        if record.latents is not None and reference.latents is not None:
            latents = [record.latents, reference.latents]
        installed = {} if self.cvvdp is None else {"cvvdp": self.cvvdp.version}
        return {
            **installed,
            "reference": self.reference,
            "reference_key": reference.trial.key,
            "reference_image": reference.image,
            "latents": latents,
            "pixels_per_degree": self.pixels_per_degree,
            "lpips_weights": None if self.lpips is None else self.lpips.digest,
        }

    def score_pair(self, pair: Pair) -> Value:
        """Mean absolute difference in levels of 255, the rest in the detail."""
        detail = differences(pair.image, pair.reference, pixels_per_degree=self.pixels_per_degree)
        first = last = None
        if pair.latents is not None and pair.reference_latents is not None:
            first, last = map(relative_error, pair.latents, pair.reference_latents)
        detail |= {"latent_rel_first": first, "latent_rel_last": last}
        if self.lpips is not None:
            detail["lpips"] = self.lpips(pair.image, pair.reference)
        if self.cvvdp is not None:
            detail["cvvdp_jod"] = self.cvvdp(pair.image, pair.reference)
        return Value(detail["mean_abs"], detail)


class _Standard:
    """The reference backend of one model: its options, and the thread count and batch size.

    Where several loads have the name, it is the one at fp32, then the one with the most images. Its
    thread count is the commonest among all images of the model.
    """

    def __init__(self, named: Sequence[Record], everyone: Sequence[Record]) -> None:
        sizes = Counter(_identity(r.trial.load.backend) for r in named)
        by_identity = {_identity(r.trial.load.backend): r.trial.load.backend for r in named}

        def rank(identity: tuple[Any, ...]) -> tuple[bool, int, str]:
            fp32 = by_identity[identity].options.get("dtype") == "fp32"
            return fp32, sizes[identity], repr(identity)

        self.identity = max(sizes, key=rank)
        own = [r for r in named if _identity(r.trial.load.backend) == self.identity]
        threads = {r.trial.load.threads for r in own}
        # A thread count that nobody told says nothing, unless there is no other.
        told = [t for r in everyone if (t := r.trial.load.known_threads) in threads]
        every = [r.trial.load.threads for r in everyone]
        self.threads = _commonest(told if told else [t for t in every if t in threads])
        alone = any(r.trial.batch_size == 1 for r in own)
        self.batch_size = 1 if alone else _commonest(r.trial.batch_size for r in own)
        self.by_request: dict[Request, list[Record]] = defaultdict(list)
        for record in own:
            self.by_request[record.trial.request].append(record)

    def candidates(self, record: Record) -> list[Record]:
        """The reference's records for this one, best first; empty for the standard itself."""
        load, batch_size = record.trial.load, record.trial.batch_size
        told = load.known_threads
        threads = self.threads if told is None else told
        found = self.by_request.get(record.trial.request, [])
        if _identity(record.trial.load.backend) == self.identity:
            # Its own noise: held against standard threads and, unless these differ, batch size.
            found = [
                r
                for r in found
                if r.trial.load.threads == self.threads
                and r.trial.batch_size in {self.batch_size, batch_size}
                and (threads != self.threads or r.trial.batch_size != batch_size)
                and (threads, batch_size) != (self.threads, self.batch_size)
            ]

        def unlike(other: Record) -> tuple[bool, bool, bool, bool, str]:
            theirs = other.trial
            return (
                theirs.batch_size != batch_size,
                theirs.load.threads != threads,
                theirs.load.threads != self.threads,
                theirs.batch_size != self.batch_size,
                theirs.key,
            )

        return sorted(found, key=unlike)


def load(
    name: str,
    *,
    reference: str | None = None,
    pixels_per_degree: float = PIXELS_PER_DEGREE,
    lpips: str | None = None,
) -> Drift:
    """Load `drift` (from eager) or `drift_<backend>`.

    `reference` is a backend's name, `pixels_per_degree` (> 0) is of FLIP's viewer; `lpips` has
    torchvision's AlexNet weights: ``None`` is torch's cache, and no LPIPS without them.

    Raises: ConfigError for a viewer that cannot be, or weights that are not there.
    """
    if not pixels_per_degree > 0:
        raise ConfigError(
            f"metric.drift.pixels_per_degree={pixels_per_degree} must be greater than 0"
        )
    label = name.removeprefix("drift").removeprefix("_")
    chosen = reference if reference is not None else label if label else STANDARD_REFERENCE
    return Drift(chosen, pixels_per_degree, find_lpips(lpips))


def differences(
    image: Image, reference: Image, *, pixels_per_degree: float = PIXELS_PER_DEGREE
) -> dict[str, Any]:
    """Hold an image against another, both uint8 RGB [H, W, 3].

    Returns: `max_abs` and `mean_abs` in levels of 255, `mse` in squared levels, `psnr_db` (``None``
    if identical), `ssim` (``None`` below 11 pixels), `flip`, and the mean signed difference of each
    channel, image minus reference (`shift_red`, `shift_green`, `shift_blue`, levels).

    Raises: MetricError for images that are not uint8 RGB or of unlike sizes.
    """
    require_uint8_rgb([image, reference])
    if image.shape != reference.shape:
        raise MetricError(
            f"drift needs images of one size, got {list(image.shape)} and"
            f" {list(reference.shape)}; compare trials of the same request"
        )
    change = np.subtract(image, reference, dtype=np.int16)
    shift = change.mean(axis=(0, 1), dtype=np.float64)
    delta = np.abs(change)
    mse = float(np.square(delta, dtype=np.float64).mean())
    return {
        "max_abs": int(delta.max()),
        "mean_abs": float(delta.mean(dtype=np.float64)),
        "mse": mse,
        "psnr_db": psnr_db(mse),
        "ssim": 1.0 if mse == 0 else ssim(image, reference),
        "flip": 0.0 if mse == 0 else flip(image, reference, pixels_per_degree=pixels_per_degree),
        **dict(zip(SHIFTS, map(float, shift), strict=True)),
    }


def ssim(image: Image, reference: Image) -> float | None:
    """Mean structural similarity of uint8 RGB images, at most 1; ``None`` below 11 pixels a side.

    Source: Wang et al. 2004, "Image Quality Assessment: From Error Visibility to Structural
    Similarity", with its Gaussian window (11 pixels, sigma 1.5), by torchmetrics, over channels.
    """
    if min(image.shape[:2]) < _SSIM_WINDOW:
        return None
    import torch
    from torchmetrics.functional.image import structural_similarity_index_measure

    # Single precision is good to 1e-5; double takes 17 times as long (29 s at 1024 x 1024).
    pair = [torch.tensor(x).permute(2, 0, 1)[None].float() for x in (image, reference)]
    value: Any = structural_similarity_index_measure(pair[0], pair[1], data_range=_LEVELS)
    return float(value)


def relative_error(latents: NDArray[np.float32], reference: NDArray[np.float32]) -> float | None:
    """``||a - b|| / ||b||`` of latents of one shape; ``None`` where that is no finite number."""
    if latents.shape != reference.shape:
        return None
    a, b = latents.astype(np.float64), reference.astype(np.float64)
    norm = float(np.linalg.norm(b))
    error = float(np.linalg.norm(a - b)) / norm if norm > 0 else np.nan
    return error if np.isfinite(error) else None


def _identity(backend: BackendSpec) -> tuple[Any, ...]:
    return backend.name, backend.kind, tuple(sorted(backend.options.items()))


def _commonest(values: Iterable[int]) -> int:
    """The most frequent value; of equals the larger, so that the choice never depends on order."""
    counts: Mapping[int, int] = Counter(values)
    return max(counts, key=lambda value: (counts[value], value))
