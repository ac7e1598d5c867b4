"""A synthetic study of eager beside two hosted services with planted seconds, prices and drift."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sd35bench.fields import make_trial
from sd35bench.study.journal import Shard
from sd35bench.study.store import Score, Study
from sd35bench.types import (
    BackendSpec,
    Load,
    Memory,
    PromptRef,
    Record,
    RemoteCall,
    Request,
    Session,
    Status,
    Timings,
)
from tests.studies.drawn import EAGER, MODEL, draw

SECONDS = {
    "eachlabs": {"submit": 0.31, "queue": 1.12, "predict": 5.9, "download": 0.17, "late": 0.45},
    "replicate": {"submit": 0.22, "queue": None, "predict": None, "download": 0.4, "late": 0.9},
}
"""Of a lone call at 28 steps; replicate says nothing of its insides but makes 7 s of it."""
UNTOLD_S = 7.0
USD = {"eachlabs": 0.035, "replicate": 0.04}
STEPS = (8, 28)
PROMPTS = tuple(f"a {c} circle {p}" for c in ("red", "blue", "green") for p in ("a", "b", "c", "d"))
LONE = 4
AMBIGUOUS = 2
UNSENT = ("max_sequence_length", "negative_prompt", "sampler", "shift")
ABSURD_S = 1e5
_START = datetime(2026, 11, 22, 19, tzinfo=UTC)


def make_hosted_study(root: Path, name: str = "hosted") -> Study:
    """Both services and eager, 12 prompts at 8 and 28 steps.

    Four prompts of each setting ran alone, the rest four at a time; one call was found again after
    an absurd time. Eachlabs' images are eager's bytes, replicate's are others; two of eachlabs'
    trials are ambiguous.
    """
    study = Study.open(root, name, create=True)
    scores: list[Score] = []
    local = Load(model=MODEL, backend=EAGER, threads=2)
    references = _run(study, local, [_local(study, local, r, i) for i, r in _requests()])
    for service in SECONDS:
        load = Load(model=replace(MODEL, weights_digest="none"), backend=_spec(service), threads=2)
        made = _run(study, load, list(_calls(study, load)))
        scores += [_drift(record, references) for record in made.values()]
    both = [*references.values()]
    study.append_scores("prompt_accuracy", [_accuracy(r) for r in both])
    study.append_scores("drift", scores)
    return study


def _spec(service: str) -> BackendSpec:
    options = {"base_url": f"https://api.{service}.example", "slug": "stable-diffusion-3.5-medium"}
    return BackendSpec(name=service, kind=service, options=options)


def _requests() -> list[tuple[int, Request]]:
    return [
        (i, Request(prompt=p, steps=steps, cfg=4.0, seed=0, width=64, height=64))
        for steps in STEPS
        for i, p in enumerate(PROMPTS)
    ]


def _run(study: Study, load: Load, records: list[Record]) -> dict[Request, Record]:
    """Write a session and its records; returns the OK ones by request."""
    hosted = load.backend.name in SECONDS
    shard: Shard = study.shard(f"shard-{load.backend.name}")
    shard.append_session(
        Session(
            id=f"session-{load.backend.name}",
            load=load,
            started_at=_START.isoformat(),
            environment_id=f"env-{load.backend.name}",
            environment={
                "commit": "abc1234",
                "cpu_model": None if hosted else "Test CPU",
                "service": f"api.{load.backend.name}.example" if hosted else None,
            },
            load_s=0.0 if hosted else 1.3,
            first_call_s=0.0 if hosted else 0.4,
            warmup_s=0.0 if hosted else 0.9,
            in_force=dict(load.backend.options) if hosted else {"dtype": "fp32", "device": "cpu"},
        )
    )
    for record in records:
        shard.append_record(record)
    shard.close()
    return {r.trial.request: r for r in records if r.status is Status.OK}


def _local(study: Study, load: Load, request: Request, number: int) -> Record:
    seconds = (0.02 + 0.008 * request.steps) * (1 + 0.02 * (number % 5))
    return replace(
        _record(study, load, request, number),
        timings=Timings(generate_s=seconds, encode_s=0.001, denoise_s=0.8 * seconds),
        memory=Memory(peak_rss_bytes=900 * 2**20),
    )


def _record(study: Study, load: Load, request: Request, number: int, other: int = 0) -> Record:
    ref = PromptRef(id=f"heldout-t2i-0-{number:04d}", set="nano", split="heldout", level="single")
    data = draw(request.prompt.split()[1], 1.0, number + 100 * request.steps + 10_000 * other)
    return Record(
        trial=make_trial(load=load, request=request, batch_size=1, prompt=ref),
        status=Status.OK,
        session_id=f"session-{load.backend.name}",
        started_at=_START.isoformat(timespec="milliseconds"),
        image=study.put_image(data, ".png"),
        image_bytes=len(data),
    )


def _calls(study: Study, load: Load) -> list[Record]:
    service, made = load.backend.name, []
    lone = [(i, r) for i, r in _requests() if i < LONE]
    beside = [(i, r) for i, r in _requests() if i >= LONE]
    for place, (i, request) in enumerate(lone):
        made.append(_call(_record(study, load, request, i, _other(service)), 12.0 * place, {}))
    for place, (i, request) in enumerate(beside):
        more: dict[str, Any] = {"in_flight": 4}
        if place == 0:
            more = {"in_flight": 1, "resumed": True}
        record = _record(study, load, request, i, _other(service))
        made.append(_call(record, 200.0 + 2.0 * place, more))
    if service == "eachlabs":
        made[-AMBIGUOUS:] = [_lost(r) for r in made[-AMBIGUOUS:]]
    return made


def _lost(record: Record) -> Record:
    """What is left of a call whose create was never answered; its price counts as spent."""
    assert record.remote is not None
    unknown = dict.fromkeys(("prediction_id", "submit_s", "queue_s", "predict_s", "download_s"))
    return replace(
        record,
        status=Status.AMBIGUOUS,
        phase="create",
        error="the answer to the create was lost, and the service lists nothing like it",
        timings=None,
        image=None,
        image_bytes=None,
        remote=replace(record.remote, cost_reported=False, poll_bound_s=None, **unknown),
    )


def _other(service: str) -> int:
    """Eachlabs makes the very images that eager makes."""
    return int(service != "eachlabs")


def _call(record: Record, at_s: float, more: dict[str, Any]) -> Record:
    service, request = record.trial.load.backend.name, record.trial.request
    number = int(record.trial.prompt.id.rpartition("-")[2])
    planted = SECONDS[service]
    slower = 1 + 0.03 * (number % 4 - 1.5)
    scale = slower * (1.0 if request.steps == 28 else 0.5)
    parts = {k: None if v is None else v * scale for k, v in planted.items()}
    told = [parts[k] for k in ("submit", "queue", "predict", "download")]
    untold = UNTOLD_S * scale if parts["predict"] is None else 0.0
    total = sum(s for s in told if s is not None) + untold
    remote = RemoteCall(
        **{
            "provider": service,
            "prediction_id": record.trial.key,
            "request_id": None,
            "in_flight": 1,
            "attempts": 1,
            "polls": 3 + number % 2,
            "submit_s": parts["submit"],
            "queue_s": parts["queue"],
            "predict_s": parts["predict"],
            "poll_bound_s": parts["late"],
            "download_s": parts["download"],
            "cost_usd": USD[service],
            "cost_reported": service == "eachlabs",
            "unsent": UNSENT,
            **more,
        }
    )
    seconds = ABSURD_S if remote.resumed else total
    started = _START + timedelta(seconds=at_s)
    return replace(
        record,
        timings=Timings(generate_s=seconds, encode_s=0.0),
        started_at=started.isoformat(timespec="milliseconds"),
        remote=remote,
    )


def _accuracy(record: Record) -> Score:
    return Score(
        metric="prompt_accuracy", key=record.trial.key, image=record.image or "", value=0.9
    )


def _drift(record: Record, references: dict[Request, Record]) -> Score:
    """Zero for the same bytes, three levels for others."""
    reference = references[record.trial.request]
    moved = 0.0 if record.image == reference.image else 3.0
    detail = {
        "reference_key": reference.trial.key,
        "reference_image": reference.image,
        "max_abs": round(10 * moved),
        "mean_abs": moved,
        "mse": moved**2,
        "psnr_db": None,
        "ssim": 1 - moved / 50,
        "flip": moved / 60,
        "latent_rel_first": None,
        "latent_rel_last": None,
    }
    own = {"key": record.trial.key, "image": record.image or ""}
    return Score(metric="drift", value=moved, detail=detail, **own)
