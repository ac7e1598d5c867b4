"""Studies whose claims are true, false or empty by construction."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from sd35bench.nano.captions import parse
from sd35bench.nano.prompts import level_set, prompt_set
from sd35bench.types import Load, Record
from tests.studies.memory import LOAD, MemoryStudy, record

EXTRACTOR = "planted"
DIMENSIONS = 24


@dataclass
class ClaimsStudy(MemoryStudy):
    """A study in memory that also has pixels."""

    pixels: dict[str, np.ndarray] = field(default_factory=dict)

    def read_image(self, digest: str) -> np.ndarray:
        return self.pixels[digest]


@dataclass(frozen=True)
class Truth:
    """What is planted; the defaults make every claim true.

    `cfg`, `steps` and `follows` (by prompt_strength) are shares of images that come out right, as
    `easy` is for the prompts beyond, of which the harder levels lose `harder`. `cfg_variety` and
    `edit_variety` are how far the seeds of a prompt lie apart, `style` what all prompts of a seed
    share, `cfg_moves` how far a cfg moves an image at one seed.
    """

    cfg: Mapping[float, float] = field(
        default_factory=lambda: {1.0: 0.3, 4.0: 0.7, 7.0: 0.7, 10.0: 0.7, 15.0: 0.9}
    )
    cfg_variety: Mapping[float, float] = field(
        default_factory=lambda: {1.0: 1.6, 4.0: 1.2, 7.0: 0.9, 10.0: 0.9, 15.0: 0.5}
    )
    steps: Mapping[int, float] = field(
        default_factory=lambda: {20: 0.7, 30: 0.7, 50: 0.98, 70: 0.98}
    )
    sharpness: Mapping[int, float] = field(
        default_factory=lambda: {20: 1.0, 30: 1.0, 50: 1.2, 70: 1.3}
    )
    follows: Mapping[float, float] = field(
        default_factory=lambda: {0.5: 0.5, 0.7: 0.5, 0.8: 0.9, 0.95: 0.9}
    )
    keeps: Mapping[float, float] = field(
        default_factory=lambda: {0.5: 0.5, 0.7: 0.5, 0.8: 0.9, 0.95: 0.9}
    )
    edit_variety: Mapping[float, float] = field(
        default_factory=lambda: {0.5: 1.6, 0.7: 1.5, 0.8: 0.5, 0.95: 0.5}
    )
    easy: float = 0.9
    harder: float = 0.5
    detailed: float = 0.7
    large: float = 0.3
    style: float = 0.8
    cfg_moves: float = 0.3
    sizes: Mapping[tuple[str, int], int] = field(
        default_factory=lambda: {
            ("png", 90): 9000,
            ("jpg", 50): 1000,
            ("jpg", 90): 3000,
            ("webp", 50): 800,
            ("webp", 90): 2000,
        }
    )
    errors: Mapping[tuple[str, int], int] = field(
        default_factory=lambda: {
            ("png", 90): 0,
            ("jpg", 50): 12,
            ("jpg", 90): 3,
            ("webp", 50): 10,
            ("webp", 90): 2,
        }
    )


def planted_claims(
    path: Path, truth: Truth, *, prompts: int = 48, levels: int = 256, whole: bool = True
) -> ClaimsStudy:
    """Make the study that experiment=claims makes, with this truth in it.

    Not `whole`: cfg, steps and seeds only.
    """
    made = _Maker(ClaimsStudy(path), truth, np.random.default_rng(0))
    made.texts(prompts)
    if whole:
        made.levels(prompts, levels)
        made.edits(prompts)
        made.files(16)
    made.study.touch_images()
    return made.study


class _Maker:
    """Adds records, scores, features and pixels."""

    def __init__(self, study: ClaimsStudy, truth: Truth, rng: np.random.Generator) -> None:
        self.study, self.truth, self.rng = study, truth, rng
        study.kept_features[EXTRACTOR] = {}
        self.seed_style = rng.normal(size=(2, DIMENSIONS))
        self.luck = rng.uniform(size=(400, 2))

    def texts(self, count: int) -> None:
        for number, item in enumerate(_prompts(count)):
            base, noise = self._directions()
            moves = dict(zip(self.truth.cfg, self.rng.normal(size=(9, DIMENSIONS)), strict=False))
            for s in range(2):
                lucky = self.luck[number, s]
                for cfg, accuracy in self.truth.cfg.items():
                    row = self._text(number, item, cfg=cfg, steps=20, seed=s)
                    spread = self.truth.cfg_variety[cfg]
                    moved = base + self.truth.cfg_moves * moves[cfg]
                    self._add(row, lucky < accuracy, moved, noise[s] * spread, s)
                for steps, accuracy in self.truth.steps.items():
                    if steps == 20 and s == 0:
                        row = self._text(number, item, cfg=4.0, steps=20, seed=s)
                        self.study.score(row, "sharpness", self.truth.sharpness[20])
                    if steps > 20 and s == 0:
                        row = self._text(number, item, cfg=4.0, steps=steps, seed=s)
                        self._add(row, lucky < accuracy, base, noise[s], s)
                        sharp = self.truth.sharpness[steps] * self.rng.uniform(0.97, 1.03)
                        self.study.score(row, "sharpness", sharp)

    def levels(self, first: int, count: int) -> None:
        """More prompts at the main setting, from number `first` on, and pairs that overlap."""
        items = list(enumerate(_prompts(count)))[first:]
        for number, item in [*items, *((1000 + i, o) for i, o in enumerate(_overlaps(64)))]:
            hard = item.level in ("several", "count", "overlap")
            accuracy = self.truth.easy - (self.truth.harder if hard else 0.0)
            row = self._text(number, item, cfg=4.0, steps=20, seed=0)
            base, noise = self._directions()
            self._add(row, self.rng.uniform() < accuracy, base, noise[0], 0)

    def edits(self, count: int) -> None:
        for number in range(count):
            base, noise = self._directions()
            for s in range(2):
                lucky = self.luck[number, s]
                for strength, accuracy in self.truth.follows.items():
                    row = record(
                        number,
                        seed=s,
                        steps=20,
                        prompt=f"edit {number}",
                        init_image=f"{number:064d}",
                        prompt_strength=strength,
                        level="single",
                    )
                    spread = self.truth.edit_variety[strength]
                    self._add(row, lucky < accuracy, base, noise[s] * spread, s)
                    kept = self.truth.keeps[strength] + self.rng.uniform(-0.1, 0.1)
                    self.study.score(row, "init_kept", kept)

    def files(self, count: int) -> None:
        for number, item in enumerate(_prompts(count)):
            picture = self.rng.integers(40, 200, (16, 16, 3))
            sign = self.rng.choice([-1, 1], picture.shape)
            for (form, quality), size in self.truth.sizes.items():
                row = self._text(
                    number,
                    item,
                    cfg=4.0,
                    steps=8,
                    seed=0,
                    output_format=form,
                    output_quality=quality,
                )
                size = round(size * self.rng.uniform(0.9, 1.1))
                self.study.kept.append(replace(row, image_bytes=size))
                wrong = picture + sign * self.truth.errors[form, quality]
                self.study.pixels[str(row.image)] = wrong.astype(np.uint8)

    def _text(self, number: int, item, load: Load = LOAD, **fields) -> Record:
        return record(number, prompt=item.prompt, level=item.level, load=load, **fields)

    def _add(self, row: Record, right: bool, base, noise, seed: int) -> None:
        self.study.kept.append(row)
        self.study.score(row, "prompt_accuracy", float(right), parts=self._parts(row))
        self.study.score(row, "clip_score_nano", 90.0, features=EXTRACTOR)
        vector = base + noise + self.truth.style * self.seed_style[seed]
        self.study.kept_features[EXTRACTOR][str(row.image)] = vector.astype(np.float32)

    def _parts(self, row: Record) -> dict[str, bool]:
        """What of a single object holds: better where more is said, and where it is large."""
        names = ("background", "count", "colour", "shape")
        if row.trial.prompt.level != "single" or row.trial.request.init_image is not None:
            return dict.fromkeys(names, True)
        spec = parse(row.trial.request.prompt)
        chance = 0.45
        if spec.size is not None or spec.place is not None:
            chance += self.truth.detailed / 2
        if spec.size is not None:
            chance += self.truth.large * (0.5 if spec.size == "large" else -0.5)
        return {name: bool(self.rng.uniform() < chance) for name in names}

    def _directions(self):
        base = 2.0 * self.rng.normal(size=DIMENSIONS)
        return base, self.rng.normal(size=(2, DIMENSIONS))


@lru_cache
def _prompts(count: int):
    return tuple(prompt_set("heldout", "t2i", count))


@lru_cache
def _overlaps(count: int):
    return tuple(level_set("heldout", "overlap", count))
