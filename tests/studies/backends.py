"""A synthetic study of several backends with planted figures: speed, drift, compile times, GPU."""

import random
from pathlib import Path
from typing import Any

from sd35bench.fields import make_trial
from sd35bench.machine.measure import RATE_FIELDS
from sd35bench.study.store import Score, Study
from sd35bench.types import (
    BackendSpec,
    Flops,
    GpuState,
    Load,
    Memory,
    PromptRef,
    Record,
    Request,
    Session,
    Status,
    Timings,
    Trial,
)
from tests.studies.drawn import MODEL, draw

FLOPS_PER_EVALUATION = 0.4e9
GAIN = {1: 1.0, 2: 1.5, 4: 1.8}
"""Images per second against batch 1, by batch size."""
SPEED = {"eager": 1.0, "compile-bf16": 2.5, "int8-w8a8": 4.0}
DRIFT = {"compile-bf16": 1.5, "int8-w8a8": 4.0}
NOISE = 0.05
PRECISION = {
    "eager": {"dtype": "fp32"},
    "compile-bf16": {"dtype": "bf16"},
    "int8-w8a8": {"dtype": "bf16", "quantised": {"layers": 12}},
}
ENVIRONMENT = {"cpu_model": "Test CPU", "cpu_count": 2, "torch": "2.14.1", "commit": "abc1234"}
RATES = {"fp32": 0.18, "bf16": 0.85, "int8": 1.75}
PROMPTS = tuple(f"a {c} circle {p}" for c in ("red", "blue", "green") for p in ("a", "b", "c", "d"))


def make_backends_study(root: Path, name: str = "backends", gpu: bool = False) -> Study:
    """Eager, compiled and quantised runs at 8 and 28 steps, batch 1, 2 and 4, two starts each.

    The second start finds the compiler's cache full. Eager runs once more with one thread: the
    noise floor.
    """
    study = Study.open(root, name, create=True)
    study.append_machine(_machine())
    scores: list[Score] = []
    references: dict[Request, Record] = {}
    for backend in SPEED:
        load = Load(model=MODEL, backend=_spec(backend), threads=2)
        _run_load(study, load, references, scores, gpu=gpu)
    one_thread = Load(model=MODEL, backend=_spec("eager"), threads=1)
    _run_load(study, one_thread, references, scores, gpu=gpu)
    for metric in sorted({s.metric for s in scores}):
        study.append_scores(metric, [s for s in scores if s.metric == metric])
    return study


def _spec(name: str) -> BackendSpec:
    dtype = PRECISION[name]["dtype"]
    return BackendSpec(name=name, kind=name.split("-")[0], options={"dtype": dtype})


def _machine() -> dict[str, Any]:
    rates = {
        name: {"best": best, "median": best * 0.95, "n": 9, "unit": "TFLOP/s"}
        for name, best in (*RATES.items(), ("copy", 43.0))
    }
    return {
        "key": "k",
        "device": "cpu",
        "threads": 2,
        "environment": dict.fromkeys(RATE_FIELDS) | _environment(2, only=RATE_FIELDS),
        "measured_at": "2026-11-22T19:00:00+00:00",
        "rates": rates,
    }


def _environment(threads: int, only: Any = None) -> dict[str, Any]:
    found = {**ENVIRONMENT, "threads": threads}
    return found if only is None else {k: v for k, v in found.items() if k in only}


def _run_load(
    study: Study,
    load: Load,
    references: dict[Request, Record],
    scores: list[Score],
    *,
    gpu: bool,
) -> None:
    for start in (0, 1):
        session = _session(load, start, gpu)
        shard = study.shard(session.id)
        shard.append_session(session)
        sizes = (1, 2, 4) if load.threads == 2 else (1,)
        for size in sizes:
            for group in _batches(load, start, size):
                for record in _records(study, session, group, gpu):
                    shard.append_record(record)
                    scores += _scores(record, references)
        shard.close()


def _session(load: Load, start: int, gpu: bool) -> Session:
    in_force: dict[str, Any] = {
        "device": "cuda:0" if gpu else "cpu",
        **PRECISION[load.backend.name],
    }
    if load.backend.name != "eager":
        cold, seconds = start == 0, {"compile-bf16": 31.0, "int8-w8a8": 44.0}[load.backend.name]
        in_force["compile"] = {
            "compile_s": seconds if cold else seconds / 10,
            "cache": "cold" if cold else "warm",
        }
    return Session(
        id=f"{load.backend.name}-{load.threads}-{start}",
        load=load,
        started_at=f"2026-11-22T19:0{start}:00+00:00",
        environment_id=f"env-{load.threads}",
        environment=_environment(load.threads),
        load_s=1.2,
        first_call_s=0.4 + in_force.get("compile", {}).get("compile_s", 0.0),
        warmup_s=1.0,
        in_force=in_force,
        start=start,
    )


def _batches(load: Load, start: int, size: int) -> list[list[Trial]]:
    """This start's half of the prompts, in whole batches, at both settings."""
    prompts = list(enumerate(PROMPTS))[start::2]
    prompts = prompts[: len(prompts) // size * size]
    found = []
    for steps in (8, 28):
        trials = [
            make_trial(
                load=load,
                request=Request(prompt=p, steps=steps, cfg=4.0, seed=0, width=64, height=64),
                batch_size=size,
                prompt=PromptRef(
                    id=f"heldout-t2i-0-{i:04d}", set="nano", split="heldout", level="single"
                ),
            )
            for i, p in prompts
        ]
        found += [trials[i : i + size] for i in range(0, len(trials), size)]
    return found


def _records(study: Study, session: Session, trials: list[Trial], gpu: bool) -> list[Record]:
    load, request, size = session.load, trials[0].request, trials[0].batch_size
    rng = random.Random(trials[0].key)
    slow = 1.05 if session.start else 1.0
    lone_s = (0.02 + 0.008 * request.steps) / SPEED[load.backend.name] * slow
    spent_s = lone_s * size / GAIN[size] * rng.uniform(0.97, 1.03)
    stages = {"text_s": 0.1 * spent_s, "denoise_s": 0.8 * spent_s, "decode_s": 0.1 * spent_s}
    denoise = 2 * request.steps * FLOPS_PER_EVALUATION
    clock = 1800 - 300 * (rng.random() < 0.25)
    made = []
    for number, trial in enumerate(trials):
        data = draw(trial.request.prompt.split()[1], 0.9, rng.randrange(1000))
        made.append(
            Record(
                trial=trial,
                status=Status.OK,
                session_id=session.id,
                started_at=f"2026-11-22T19:10:00.{trials[0].key[:8]}",
                timings=Timings(generate_s=spent_s, encode_s=0.001, **stages),
                memory=Memory(
                    peak_rss_bytes=(900 + number) * 2**20,
                    peak_vram_bytes=7 * 2**30 if gpu else None,
                ),
                image=study.put_image(data, ".png"),
                image_bytes=len(data),
                effective_steps=request.steps,
                evaluations=request.steps,
                truncated_tokens=0,
                batch_actual=size,
                flops=Flops(text=2e6, denoise=denoise, decode=3e7),
                gpu=_gpu(clock) if gpu else None,
            )
        )
    return made


def _gpu(clock: int) -> GpuState:
    return GpuState(
        sm_clock_mhz=clock,
        memory_clock_mhz=2619,
        power_w=612.0,
        temperature_c=60,
        throttled=() if clock == 1800 else ("power-cap",),
    )


def _scores(record: Record, references: dict[Request, Record]) -> list[Score]:
    """Quality of every image, and its drift from eager's image of the same request at batch 1."""
    load, request = record.trial.load, record.trial.request
    rng = random.Random(record.trial.key + "score")
    own = {"key": record.trial.key, "image": record.image or ""}
    found = [Score(metric="prompt_accuracy", value=float(rng.random() < 0.85), **own)]
    lone = record.trial.batch_size == 1
    if lone and load.backend.name == "eager" and load.threads == 2:
        references[request] = record
    reference = references.get(request)
    if reference is None or reference is record:
        return found
    moved = DRIFT.get(load.backend.name, NOISE) * rng.uniform(0.8, 1.2)
    detail = {
        "reference_key": reference.trial.key,
        "reference_image": reference.image,
        "max_abs": round(10 * moved),
        "mean_abs": moved,
        "mse": moved**2,
        "psnr_db": None,
        "ssim": 1 - moved / 50,
        "flip": moved / 60,
        "latent_rel_first": 1e-3 * moved,
        "latent_rel_last": 1e-2 * moved,
    }
    return [*found, Score(metric="drift", value=moved, detail=detail, **own)]


def with_impossible(study: Study) -> Study:
    """The same study on a machine that is measured to be too slow for what it did."""
    slow = {k: {**v, "best": v["best"] / 100} for k, v in _machine()["rates"].items()}
    study.append_machine(_machine() | {"rates": slow})
    return study
