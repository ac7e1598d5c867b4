"""A synthetic study with known figures, written through the real store; nothing is generated."""

import functools
import io
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from sd35bench.analysis.summary import show_document
from sd35bench.fields import make_trial
from sd35bench.report.gather import Source
from sd35bench.report.page import Document, build_document
from sd35bench.study.store import Score, Study
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

HOSTILE = (
    "</script><script>window.pwned=1</script>",
    '<img src=x onerror="window.pwned=2">',
    "{{7*7}} {% raw %}",
    "\"><svg onload=window.pwned=3> 'quoted' & \u2028 line",
    "\u202eمربع أحمر\u202c <b>bold</b>",
)
PROFILES = {
    "preview": {"evaluations_limit": 16, "margins": {}},
    "balanced": {"margins": {"prompt_accuracy": 0.1, "edit_quality": 0.1}},
    "final": {"margins": {}},
}
COLOURS = {"red": (214, 40, 40), "blue": (40, 80, 214), "green": (40, 150, 70)}
MODEL = ModelSpec(
    name="nano", path="nano", weights_digest="ab" * 32, max_sequence_length=24, target_latency_s=0.5
)
EAGER = BackendSpec(name="eager", kind="eager", options={"dtype": "fp32"})


@dataclass
class Synthetic:
    """A study on disk with the documents that the analysis would give for it."""

    study: Study
    show: dict[str, Any]
    recommend: dict[str, Any] | None


@functools.cache
def draw(colour: str, clarity: float, seed: int) -> bytes:
    """PNG of a disc, the blurrier the lower `clarity` in [0, 1]."""
    rng = random.Random(seed)
    image = Image.new("RGB", (64, 64), (235, 235, 235))
    x, y = rng.randint(18, 46), rng.randint(18, 46)
    ImageDraw.Draw(image).ellipse((x - 14, y - 14, x + 14, y + 14), fill=COLOURS[colour])
    # Pillow's own noise takes C's rand(): other pixels after each other test.
    grey = np.random.default_rng(seed).normal(128, 120 * (1 - clarity), (64, 64))
    noise = Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8)).convert("RGB")
    buffer = io.BytesIO()
    Image.blend(image, noise, 0.6 * (1 - clarity)).save(buffer, "PNG")
    return buffer.getvalue()


def quality(steps: int, cfg: float) -> float:
    """Ground truth in [0, 1]: rises with steps, best at cfg 4."""
    return max(0.05, 0.95 * (1 - 0.8 / steps) * (1 - 0.035 * (cfg - 4) ** 2))


def make_study(
    root: Path,
    name: str = "demo",
    *,
    steps: tuple[int, ...] = (4, 12, 28),
    cfgs: tuple[float, ...] = (1.0, 4.0, 7.0),
    strengths: tuple[float, ...] = (0.3, 0.6, 0.9),
    prompts: tuple[str, ...] | None = None,
    fail_every: int | None = None,
    scored: bool = True,
) -> Study:
    """Write a study: text-to-image over steps × cfg, image-to-image over steps × strength."""
    study = Study.open(root, name, create=True)
    load = Load(model=MODEL, backend=EAGER, threads=2)
    session = Session(
        id="session-1",
        load=load,
        started_at="2026-11-22T19:00:00+00:00",
        environment_id="env-1",
        environment={"torch": "2.14.1", "device": "cpu", "cpu": "Test CPU", "commit": "abc1234"},
        load_s=1.31,
        first_call_s=0.42,
        warmup_s=0.9,
        in_force={"dtype": "fp32", "device": "cpu"},
    )
    shard = study.shard("shard-1")
    shard.append_session(session)
    if prompts is None:
        prompts = tuple(f"a {c} circle on the {p}" for c in COLOURS for p in ("left", "right"))
    init = study.put_init(draw("green", 1.0, 99))
    scores: list[Score] = []
    number = 0
    for i, prompt in enumerate(prompts):
        for seed in (0, 1):
            for request in _requests(prompt, seed, steps, cfgs, strengths, init):
                number += 1
                failed = fail_every is not None and number % fail_every == 0
                record = _record(study, load, request, i, failed)
                shard.append_record(record)
                if record.image is not None and scored:
                    scores += _scores(record)
    shard.close()
    for metric in {s.metric for s in scores}:
        study.append_scores(metric, [s for s in scores if s.metric == metric])
    return study


def _requests(prompt, seed, steps, cfgs, strengths, init):
    for n in steps:
        for cfg in cfgs:
            yield Request(prompt=prompt, steps=n, cfg=cfg, seed=seed, width=64, height=64)
        for strength in strengths:
            yield Request(
                prompt=prompt,
                steps=n,
                cfg=4.0,
                seed=seed,
                width=64,
                height=64,
                init_image=init,
                prompt_strength=strength,
            )


def _record(study: Study, load: Load, request: Request, index: int, failed: bool) -> Record:
    level = ("single", "relation")[index % 2]
    kind = "t2i" if request.init_image is None else "edit"
    ref = PromptRef(id=f"tune-{kind}-0-{index:04d}", set="nano", split="tune", level=level)
    trial = make_trial(load=load, request=request, batch_size=1, prompt=ref)
    common = {"trial": trial, "session_id": "session-1", "started_at": "2026-11-22T19:00:01+00:00"}
    if failed:
        return Record(
            **common, status=Status.INVALID_IMAGE, phase="decode", error="the image is black"
        )
    rng = random.Random(trial.key)
    denoise = request.effective_steps * 0.008 * rng.uniform(0.95, 1.15)
    colour = next((c for c in COLOURS if c in request.prompt), "red")
    data = draw(colour, quality(request.steps, request.cfg), request.seed + 10 * index)
    return Record(
        **common,
        status=Status.OK,
        timings=Timings(
            generate_s=denoise + 0.013,
            encode_s=0.001,
            text_s=0.004,
            denoise_s=denoise,
            decode_s=0.008,
            step_s=(denoise / request.effective_steps,) * request.effective_steps,
        ),
        memory=Memory(peak_rss_bytes=900 * 2**20),
        image=study.put_image(data, ".png"),
        image_bytes=len(data),
        effective_steps=request.effective_steps,
        evaluations=request.effective_steps,
        truncated_tokens=0,
    )


def _scores(record: Record) -> list[Score]:
    request, rng = record.trial.request, random.Random(record.trial.key + "score")
    strength = 1.0 if request.prompt_strength is None else request.prompt_strength
    follow = quality(request.steps, request.cfg) * min(1.0, 0.3 + strength)
    parts = {f"part {i}": rng.random() < follow for i in range(4)}
    common = {"key": record.trial.key, "image": record.image or ""}
    value = sum(parts.values()) / 4
    found = [Score(metric="prompt_accuracy", value=value, detail={"parts": parts}, **common)]
    if request.prompt_strength is not None:
        kept = min(1.0, max(0.0, 1.1 - strength + rng.uniform(-0.1, 0.1)))
        found.append(Score(metric="init_kept", value=kept, **common))
    return found


def show_of(study: Study) -> dict[str, Any]:
    """The `show` document, with a FID that was refused for its small n beside it."""
    document = show_document(study)
    for row in document["settings"]:
        if row["metrics"]:
            entry = {"value": None, "ci95": None, "n": row["n"], "needs": 256, "reason": "refused"}
            row["metrics"]["fid_nano"] = entry
    return document


def document_of(
    study: Study,
    show: dict[str, Any],
    recommend: dict[str, Any] | str | None,
    claims: dict[str, Any] | None = None,
) -> Document:
    """The report's document of one study, made from these documents."""
    source = Source(study=study, show=show, recommendation=recommend, claims=claims)
    return build_document([source])
