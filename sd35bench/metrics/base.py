"""What a metric is: something that turns written images into numbers.

Four kinds, so that no image is decoded or embedded twice:

    ImageMetric     looks at pixels             (prompt accuracy, init kept)
    PairMetric      looks at pixels beside those of another trial of the same request (drift)
    FeatureMetric   looks at kept features      (CLIP-score)
    SetMetric       is computed from kept features of a whole set, against a reference (FID, KID);
                    the number itself comes from `sd35bench.analysis`, without torch

Every image arrives as uint8 RGB [H, W, 3], decoded from the file that the trial wrote; anything
else is refused. Modules are imported when a metric is loaded, torch when it first needs weights.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sd35bench import plugins
from sd35bench.analysis.facts import METRICS
from sd35bench.errors import ConfigError, MetricError
from sd35bench.study.columns import Some, kinds
from sd35bench.types import Record, Task

if TYPE_CHECKING:
    from sd35bench.workers.features import Spread

Image = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Value:
    """One image's value; ``None`` with `detail["reason"]` where the metric does not apply."""

    value: float | None
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceData:
    """A set metric's reference: mean [d] and covariance [d, d] (n - 1) of n images' features.

    `features` [m, d] are those of all images or of a seeded subset, `prompts` [m] what each is a
    true render of; ``None`` where they are not known.
    """

    mean: NDArray[np.float64]
    cov: NDArray[np.float64]
    n: int
    source: str
    features: NDArray[np.float32] | None = None
    prompts: NDArray[np.str_] | None = None


class Extractor(ABC):
    """Turns images into feature vectors; `name` is safe in a path and tells weights apart.

    `min_images` is the least number of images for which a Gaussian fitted to the features is
    worth comparing; `resize` says how images come to the network's size. `spread`: workers that
    embed in its place. Pickled, it is what it was made from, without anything loaded.
    """

    name: str
    min_images: int
    resize: str = "not recorded"
    spread: "Spread | None" = None

    @abstractmethod
    def embed(self, images: Sequence[Image]) -> NDArray[np.float32]:
        """Features [n, d] of uint8 RGB images, which may differ in size."""

    def embed_all(self, batches: Iterable[Sequence[Image]]) -> Iterable[NDArray[np.float32]]:
        """Features of each batch, in order."""
        if self.spread is None:
            return map(self.embed, batches)
        return self.spread.embed_all(self, batches)

    def __getstate__(self) -> dict[str, Any]:
        own = type(self)
        return {
            name: value
            for name, value in vars(self).items()
            if name != "spread" and not isinstance(getattr(own, name, None), cached_property)
        }


class Metric(ABC):
    """A named number about images. `tasks` are those that it can judge.

    `remedy` says what to do where it applies to no image of a study, `note` which part of it is
    left out on this machine and how to get it. `quality` says that the number is about how good an
    image is: then it means nothing for a model of random weights.

    A plug-in's class declares `higher_is_better`, `bounds` (the least and the greatest value, where
    there are any) and `ranks` (False: it describes, and neither way is better).
    """

    name: str
    note: str = ""
    quality: bool = True
    higher_is_better: bool = True
    bounds: tuple[float, float] | None = None
    ranks: bool = True
    tasks: frozenset[Task] = frozenset(Task)
    remedy: str = "choose another metric"

    def applies(self, record: Record) -> bool:
        """Whether this record's image can be judged at all."""
        return record.trial.request.task in self.tasks


class ImageMetric(Metric):
    """Judges each image by its pixels; `needs_init` asks for the init image beside it."""

    needs_init: bool = False

    def prepare(self, records: Sequence[Record]) -> None:
        """Take in all records that are to be scored, before the first. Raises: MetricError."""
        return

    @abstractmethod
    def score_images(
        self, images: Sequence[Image], records: Sequence[Record], inits: Sequence[Image | None]
    ) -> list[Value]:
        """One value per image; `inits` are ``None`` unless `needs_init`."""


Latents = tuple[NDArray[np.float32], NDArray[np.float32]]
"""One image's latents [C, h, w] after the first and after the last step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """An image and its reference image, of the very same request; latents where both kept them."""

    image: Image
    reference: Image
    latents: Latents | None = None
    reference_latents: Latents | None = None


class PairMetric(Metric):
    """Holds each image against the image of another trial of the same request."""

    quality = False

    @abstractmethod
    def pairing(self, records: Sequence[Record]) -> Mapping[str, Sequence[Record]]:
        """By trial key, the records that it may be held against, best first.

        A trial without any is not there, and is not scored.
        """

    @abstractmethod
    def about(self, record: Record, reference: Record) -> dict[str, Any]:
        """What a score depends on; it goes into the detail, and another one makes it stale."""

    @abstractmethod
    def score_pair(self, pair: Pair) -> Value:
        """One value. Raises: MetricError for images of unlike sizes."""


class FeatureMetric(Metric):
    """Judges each image by its features and its record's prompt."""

    extractor: Extractor

    @abstractmethod
    def score_features(
        self, features: NDArray[np.float32], records: Sequence[Record]
    ) -> list[Value]:
        """One value per row of features [n, d]."""


class SetMetric(Metric):
    """Compares the features of a set with a reference.

    `statistic` names the number in `sd35bench.analysis.set_metrics`, `parameters` what it takes;
    a Fréchet distance has neither in its scores, as it was there first. `needs_features` says that
    the reference's mean and covariance are not enough.
    """

    extractor: Extractor
    statistic: str | None = None
    needs_features: bool = False

    @property
    def parameters(self) -> dict[str, Any]:
        """What the statistic takes; it goes into the scores, and another one makes them stale."""
        return {}

    @property
    def min_images(self) -> int:
        """Fewest images for which a value is given."""
        return self.extractor.min_images

    def require_images(self, n: int, source: str) -> None:
        """Refuse a reference of too few images. Raises: MetricError."""
        if n < self.min_images:
            raise MetricError(
                f"{self.name}: the reference {source} has {n} images, it needs {self.min_images}"
            )

    @abstractmethod
    def reference_key(self, records: Sequence[Record]) -> str:
        """Content hash of the reference that these records (one task and size) are held against.

        Cheap: nothing is rendered or embedded for it.
        """

    @abstractmethod
    def make_reference(self, records: Sequence[Record]) -> ReferenceData:
        """Compute that reference. Raises: MetricError where it cannot be had."""


def load_metric(name: str, **options: Any) -> Metric:
    """Load a metric by family (`fid`) or full name (`fid_nano`, `clip_score_ViT-B-32_openai`).

    Raises: ConfigError for an unknown name or option, MetricError where weights are missing.
    """
    families = known_families()
    known = [family for family in families if name == family or name.startswith(f"{family}_")]
    if not known:
        raise ConfigError(f"metric={name!r} is unknown; known: {', '.join(families)}")
    family = max(known, key=len)
    places = {each: own.load for each, own in METRICS.items()}
    load: Any = plugins.load_own("metrics", family, Metric, places)
    return load(name, **options)


def known_families() -> list[str]:
    """Names of all metric families, plug-ins' too, in the order of the alphabet."""
    return sorted({*METRICS, *plugins.added_names("metrics")})


def default_metrics(model: str, task: Task) -> tuple[str, ...]:
    """Name the metrics that every study of this model gets without asking."""
    if not is_nano(model):
        return ("clip_score",)
    if task is Task.IMAGE_TO_IMAGE:
        return ("prompt_accuracy", "init_kept", "clip_score_nano")
    return ("prompt_accuracy", "clip_score_nano", "fid_nano")


def maker(record: Record) -> str:
    """The model that made a record's image: the one asked for, or what a server says stood in."""
    said = None if record.remote is None else record.remote.made_by
    return record.trial.load.model.name if said is None else said


def is_nano(model: str) -> bool:
    """Whether a model lives in nano's world: itself, or a variant named after it."""
    return model == "nano" or model.startswith("nano-")


def is_own(metric: Metric) -> bool:
    """Whether a metric is of this package, whose metrics ask the same of records of one kind."""
    return type(metric).__module__.partition(".")[0] == __name__.partition(".")[0]


def judged(metric: Metric, records: Some) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which records a metric applies to, and of which of these it has anything to say: [n] each.

    Quality of random weights is none. Our own metrics are asked of one record of each kind, others
    of every record.
    """
    codes, unlike = kinds(records) if is_own(metric) else (np.arange(len(records)), [*records])
    fit = np.array([metric.applies(r) for r in unlike], bool)
    random = np.array([r.trial.load.model.weights == "random" for r in unlike], bool)
    useful = fit & ~random if metric.quality else fit
    return fit[codes], useful[codes]


def require_uint8_rgb(images: Sequence[Any]) -> None:
    """Refuse floats of unknown range, grey images and batches in channels-first order.

    Raises: MetricError.
    """
    for image in images:
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
            kind = getattr(image, "dtype", type(image).__name__)
            raise MetricError(f"images must be uint8 RGB arrays, got {kind}; pass what was written")
        if image.ndim != 3 or image.shape[2] != 3:
            raise MetricError(f"images must be [height, width, 3], got {list(image.shape)}")
