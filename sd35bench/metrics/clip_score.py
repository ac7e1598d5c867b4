"""CLIP-score: 100 · cosine between an image's and its prompt's embedding.

The backbone is part of the metric's name (`clip_score_nano`, `clip_score_ViT-B-32_openai`), since
values of two backbones have nothing to do with each other. It ranks settings; it cannot gate one
image (a black frame may out-score a healthy one), which is why the guards run before it.

Source: Hessel et al. 2021 (arXiv 2104.08718), with weight 100 as in torchmetrics and without the
clipping at 0, which would hide how wrong a wrong image is.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sd35bench.metrics.base import FeatureMetric, Value, is_nano, maker
from sd35bench.metrics.extractors import ClipExtractor, NanoEvaluator, clip_extractor
from sd35bench.types import Record

DEFAULT_LABEL = "ViT-L-14_openai"


class ClipScore(FeatureMetric):
    """100 · cosine of image and prompt, for text-to-image and image-to-image alike."""

    def __init__(self, extractor: ClipExtractor) -> None:
        self.extractor: ClipExtractor = extractor
        self.name = f"clip_score_{extractor.label}"
        self._texts: dict[str, tuple[NDArray[np.float32], int]] = {}

    def applies(self, record: Record) -> bool:
        """Nano's evaluator knows nano's world only."""
        return not isinstance(self.extractor, NanoEvaluator) or is_nano(maker(record))

    def score_features(
        self, features: NDArray[np.float32], records: Sequence[Record]
    ) -> list[Value]:
        """One value per image; `detail["truncated"]` counts prompt tokens that did not fit."""
        prompts = [r.trial.request.prompt for r in records]
        self._embed(sorted(set(prompts) - self._texts.keys()))
        texts = np.stack([self._texts[p][0] for p in prompts])
        cosines = np.einsum("nd,nd->n", _unit(features), _unit(texts))
        return [
            Value(100.0 * float(c), {"truncated": cut} if (cut := self._texts[p][1]) else {})
            for c, p in zip(cosines, prompts, strict=True)
        ]

    def _embed(self, prompts: list[str]) -> None:
        for start in range(0, len(prompts), 64):
            part = prompts[start : start + 64]
            rows, dropped = self.extractor.embed_texts(part)
            pairs = zip(rows, dropped, strict=True)
            self._texts.update(zip(part, pairs, strict=True))


def load(name: str, *, model: str | None = None, pretrained: str | None = None) -> ClipScore:
    """Load `clip_score`, `clip_score_nano` or `clip_score_<model>_<pretrained>`.

    `model` takes the place of the name's backbone (ViT-L-14 of openai for the bare family): an
    open_clip model, ``local-dir:PATH`` or ``nano``; `pretrained` is its tag or checkpoint's path.

    Raises: MetricError for an unknown backbone.
    """
    label = name.removeprefix("clip_score").removeprefix("_")
    return ClipScore(clip_extractor(label if label else DEFAULT_LABEL, model, pretrained))


def _unit(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    x = np.asarray(rows, np.float64)
    return x / np.linalg.norm(x, axis=1, keepdims=True)
