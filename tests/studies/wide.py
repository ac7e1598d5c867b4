"""`show` documents of settings that differ in any number of fields, and the words for them."""

import random
from typing import Any

from sd35bench.fields import FIELDS, SETTING

_TEXTS = {
    "sampler": ("euler", "heun", "dpmpp_2m", "unipc"),
    "skip_layer_guidance": ("7-8-9@2.5:0.01-0.2", "7-8-9@4:0.01-0.2", "7@1.5:0.1-0.3"),
    "guidance": ("cfg", "cfg-zero-star", "apg"),
    "guidance_interval": ("0-1", "0.1-0.7", "0.2-0.8"),
    "step_cache": ("none", "2", "0-1-3-6-9-12-15"),
    "output_format": ("png", "jpg", "webp"),
}
_UNTYPED = ("extra", "images", "prompt_strength")
VARYING = (
    *("steps", "cfg", "backend", "threads", "model", "weights"),
    *(name for name in SETTING if name not in ("steps", "cfg", *_UNTYPED)),
)
"""Fields that `wide_document` can vary, in the order in which it takes them."""


_RATES = [{"batch_size": size, "images_per_s": 3.21 * size, "n": 4} for size in (1, 4, 16)]


def _value(name: str, row: int, rng: random.Random) -> Any:
    if name in _TEXTS:
        return _TEXTS[name][row % len(_TEXTS[name])]
    if name in ("backend", "model", "weights"):
        return f"{name}-{'long-' * rng.randint(0, 2)}{row}"
    whole = name not in FIELDS or FIELDS[name].grid in (1, None)
    return 1000 + row if whole else round(rng.uniform(2, 9), 3)


def wide_document(fields: int, seed: int, rows: int = 2) -> dict[str, Any]:
    """A document of `rows` settings of which the first `fields` of `VARYING` differ."""
    rng = random.Random(seed)
    usual = {name: FIELDS[name].quiet for name in SETTING}
    usual |= {"steps": 28, "cfg": 4.0, "width": 64, "height": 64, "sampler": "euler"}
    usual |= {"model": "nano", "backend": "eager", "threads": 2, "weights": "own"}
    usual |= {"task": "text-to-image", "extra": {}, "images": {}}
    found = [
        usual
        | {name: _value(name, row, rng) for name in VARYING[:fields]}
        | _figures(f"{row}", rng)
        | {"throughput": _RATES if fields % 5 == 0 else []}
        for row in range(rows)
    ]
    recommended = {"path": "results/wide/recommended.yaml", "is_older": False}
    return {"study": "wide", "settings": found, "recommended": recommended}


def _figures(row_id: str, rng: random.Random) -> dict[str, Any]:
    middle = rng.uniform(0.05, 20)
    metrics = {
        name: {"value": middle, "ci95": [middle * 0.9, middle * 1.1], "n": 48}
        for name in ("prompt_accuracy", "clip_score_nano", "fid_nano")
    }
    return {
        "id": row_id,
        "setting": row_id,
        "n": 48,
        "failed": rng.randint(0, 30),
        "latency_s": {"p50": middle, "ci95": [middle * 0.98, middle * 1.03], "n": 48},
        "latency_ratio": middle,
        "peak_rss_bytes": 2**30,
        "metrics": metrics,
        "front": True,
        "chosen_for": ["preview", "balanced", "final"],
    }
