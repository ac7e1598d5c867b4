"""Studies of known truth, in memory: settings with planted accuracy and latency."""

import copy
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from sd35bench.fields import make_trial
from sd35bench.study.content_files import Scan
from sd35bench.types import (
    BackendSpec,
    Load,
    Memory,
    ModelSpec,
    PromptRef,
    Record,
    Request,
    Session,
    Status,
    Timings,
)

MODEL = ModelSpec(name="nano", path="/models/nano", weights_digest="d" * 64, max_sequence_length=16)
LOAD = Load(
    model=MODEL,
    backend=BackendSpec(name="eager", kind="eager", options={"dtype": "fp32"}),
    threads=2,
)


def session(name: str = "s", environment: str = "e" * 64, load: Load = LOAD) -> Session:
    return Session(
        id=name,
        load=load,
        started_at="2026-01-01T00:00:00",
        environment_id=environment,
        environment={"device": "cpu"},
        load_s=2.0,
        first_call_s=1.0,
        warmup_s=1.0,
        in_force={"dtype": "fp32"},
    )


def record(number: int = 0, *, load: Load = LOAD, **fields: Any) -> Record:
    """One OK record; `fields` go to the request, or to the record where it has them."""
    own = {
        "status": Status.OK,
        "session_id": "s",
        "timings": Timings(generate_s=1.0, encode_s=0.0),
        "memory": Memory(peak_rss_bytes=1),
        "batch_actual": 1,
        "evaluations": None,
        "truncated_tokens": 0,
        "image": "auto",
        "error": None,
        "flops": None,
        "gpu": None,
        "started_at": "2026-01-01T00:00:00",
        "surroundings": None,
    }
    taken = {k: fields.pop(k, v) for k, v in own.items()}
    batch_size = fields.pop("batch_size", 1)
    level, ref_set = fields.pop("level", None), fields.pop("prompt_set", "nano")
    split = fields.pop("split", "tune")
    kind = "t2i" if fields.get("init_image") is None else "edit"
    ref_id = f"{split}-{kind}-0-{number:04d}" if ref_set == "nano" else f"{number:05d}"
    asked = {"steps": 8, "cfg": 4.0, "seed": 0, "width": 64, "height": 64, **fields}
    asked.setdefault("prompt", f"prompt {number}")
    trial = make_trial(
        load=load,
        request=Request(**asked),
        batch_size=batch_size,
        prompt=PromptRef(id=ref_id, set=ref_set, split=split, level=level),
    )
    if taken["image"] == "auto":
        taken["image"] = trial.key.ljust(64, "0") if taken["status"] is Status.OK else None
    if taken["status"] is not Status.OK:
        taken["timings"] = None
    return Record(trial=trial, **taken)


@lru_cache(16)
def _images_of(path: Path) -> set[str]:
    return set()


@dataclass
class MemoryStudy:
    """What analysis needs of a study, without a disk.

    `there`: images beside those on it, which studies of one path share.
    """

    path: Path
    kept: list[Record] = field(default_factory=list)
    score_rows: list[Any] = field(default_factory=list)
    lives: dict[str, Session] = field(default_factory=lambda: {"s": session()})
    kept_features: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    name: str = "synthetic"
    machines: list[dict[str, Any]] = field(default_factory=list)
    there: set[str] = field(init=False)

    def __post_init__(self) -> None:
        self.there = _images_of(self.path)

    def machine(self) -> list[dict[str, Any]]:
        return self.machines

    def records(self) -> list[Record]:
        return self.kept

    def all_records(self) -> list[Record]:
        return self.kept

    def sessions(self) -> dict[str, Session]:
        return self.lives

    def scores(self) -> list[Any]:
        return self.score_rows

    def features(self, extractor: str) -> dict[str, np.ndarray]:
        return self.kept_features[extractor]

    def images(self) -> Scan:
        return Scan(whole=self.there | {p.stem for p in (self.path / "images").glob("*/*")})

    def init_path(self, digest: str) -> Path:
        return self.path / "inits" / digest

    def add(self, row: Record, **metrics: float | None) -> None:
        self.kept.append(row)
        for name, value in metrics.items():
            self.score(row, name, value)

    def score(self, row: Record, name: str, value: float | None, **detail: Any) -> None:
        self.score_rows.append(
            SimpleNamespace(
                metric=name, key=row.trial.key, image=row.image, value=value, detail=detail
            )
        )

    def touch_images(self, absent: tuple[str, ...] = ()) -> "MemoryStudy":
        """Say that image files are there, as analysis asks; a real one takes 0.3 ms."""
        self.there |= {row.image for row in self.kept if row.image is not None} - set(absent)
        return self


def planted(
    path: Path,
    settings: dict[tuple[int, float], tuple[float, float]],
    *,
    prompts: int = 64,
    seeds: int = 2,
    rng_seed: int = 0,
    difficulty: float = 0.0,
    first: int = 0,
    **fields: Any,
) -> MemoryStudy:
    """A text-to-image study: (steps, cfg) → (accuracy, latency in s), paired over settings.

    One uniform number per (prompt, seed) decides all settings, so that of two settings the better
    one is right wherever the worse one is: pairs carry almost all the information. `difficulty`
    spreads the prompts; `first` is the first prompt's number.
    """
    shape = (prompts, seeds, rng_seed, difficulty, first)
    asked = (tuple(settings.items()), shape, tuple(fields.items()))
    try:
        kept, rows = _planted(*asked)
    except TypeError:  # a field that has no hash
        kept, rows = _planted.__wrapped__(*asked)
    return MemoryStudy(path, list(kept), list(map(copy.copy, rows))).touch_images()


@lru_cache(64)
def _planted(
    settings: tuple[tuple[tuple[int, float], tuple[float, float]], ...],
    shape: tuple[int, int, int, float, int],
    fields: tuple[tuple[str, Any], ...],
) -> tuple[list[Record], list[Any]]:
    """Its records and scores, drawn once: 0.15 ms each."""
    prompts, seeds, rng_seed, difficulty, first = shape
    rng = np.random.default_rng(rng_seed)
    study = MemoryStudy(Path())
    ease = rng.uniform(-difficulty, difficulty, prompts)
    luck = rng.uniform(size=(prompts, seeds))
    for (steps, cfg), (accuracy, latency) in settings:
        for p in range(prompts):
            for s in range(seeds):
                timings = Timings(generate_s=latency * rng.uniform(0.95, 1.05), encode_s=0.0)
                asked = {"steps": steps, "cfg": cfg, "seed": s, "timings": timings}
                row = record(first + p, **asked, **dict(fields))
                study.add(row, prompt_accuracy=float(luck[p, s] < accuracy + ease[p]))
    return study.kept, study.score_rows
