"""`show`: a study's settings with latency, speed, memory and metrics, each with n and interval.

Latency is what one image alone took, from request to encoded file, in trials that ran at batch
size 1 after warm-up; nothing else enters it. A hosted service's row has the same columns, of its
lone calls, and `remote` beside them. ``None`` is unknown, never 0.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from sd35bench.analysis.drift import drift_document
from sd35bench.analysis.grouping import weights_text
from sd35bench.analysis.hosted_calls import (
    concurrent_phases,
    made_by_others,
    remote_summary,
    usd_per_image,
)
from sd35bench.analysis.quality import row_metric
from sd35bench.analysis.speed import (
    Latency,
    latency_summary,
    machine_document,
    reference_rows,
    speed_summary,
    speed_warnings,
    speedup,
    spread_texts,
)
from sd35bench.analysis.table import GUARD, Row, Table, ambiguous_text, part_held_out, read_table
from sd35bench.machine.contention import DISTURBED, unlike
from sd35bench.study.columns import (
    Floats,
    Some,
    by_session,
    floats,
    is_text,
    numbers,
    pick,
    seconds,
    step_seconds,
)
from sd35bench.types import Session, Status, to_json
from sd35bench.words import plural


def show_document(
    study: Any, table: Table | None = None, pool_hosts: bool = False
) -> dict[str, Any]:
    """Summarise a study (`sd35bench.study.store.Study`) as `show --json` prints it.

    `table` is the study's, where it was read already; `pool_hosts` as of `read_table`.
    """
    table = read_table(study, pool_hosts) if table is None else table
    kept, held_out = part_held_out(table.rows)
    table = replace(table, rows=kept)
    notes = [_apart(held_out)] if held_out else []
    metrics = sorted(name for name in table.scores if name != GUARD)
    environments = {s.environment_id: s.environment for s in table.sessions.values()}
    rows = sorted(table.rows, key=_order)
    machine, references = study.machine(), reference_rows(rows)
    phases = concurrent_phases(table)
    settings = []
    for row in rows:
        latency = latency_summary(row.timed)
        summary = _row(study, table, row, metrics, latency)
        summary |= speed_summary(table, row, latency, machine)
        reference = references.get(row.id)
        summary["speedup"] = None if reference is None else speedup(row, reference)
        if reference is not None and unlike(row.clock.speed, reference.clock.speed):
            summary["warnings"].append("no ratio to eager: the machine ran at another speed then")
        summary |= {"usd_per_image": usd_per_image(row), "remote": remote_summary(row, phases)}
        summary["warnings"] += speed_warnings(table, row, summary["achieved_tflops"], machine)
        settings.append(summary)
    return {
        "study": study.name,
        "settings": settings,
        "machine": machine_document(machine),
        "drift": drift_document(study, table),
        "environments": environments,
        "clock": table.clock,
        "warnings": [*table.busy, *table.warnings, *notes],
    }


def _apart(images: int) -> str:
    return (
        f"{images} images on held-out prompts are in no row: they confirm a choice and are compared"
        " with each other alone; sd35bench recommend says what came of it"
    )


def _order(row: Row) -> tuple[Any, ...]:
    s = row.setting
    strength = -1.0 if s["prompt_strength"] is None else s["prompt_strength"]
    return (
        s["task"] != "text-to-image",
        s["model"],
        s["backend"],
        s["width"] * s["height"],
        s["steps"],
        s["cfg"],
        strength,
        row.id,
    )


def _row(
    study: Any, table: Table, row: Row, metrics: list[str], latency: Latency
) -> dict[str, Any]:
    ok = pick(row.records, is_text(row.records, "status", Status.OK))
    named = by_session(ok if ok else row.records)
    sessions = [table.sessions[i] for i in named if i in table.sessions]
    target = row.records[0].trial.load.model.target_latency_s
    p50 = latency.p50
    measured, loads = row.here(row.records), row.here(sessions)
    return row.setting | {
        "id": row.id,
        "weights": weights_text(row.records[0].trial.load),
        "environment_id": row.environment_id,
        "environment": sessions[-1].environment if sessions else None,
        "effective_steps": _common(numbers(ok, "effective_steps")),
        "evaluations": _common(numbers(ok, "evaluations")),
        "n": len(row.records) - row.failed,
        "failed": row.failed,
        "ambiguous": row.ambiguous,
        "excluded": dict(row.excluded),
        "quality_batch_size": row.quality_batch_size,
        "latency_s": to_json(latency),
        "contention": row.clock.document(),
        "target_latency_s": target,
        "latency_ratio": None if target is None or p50 is None else p50 / target,
        "stage_s": _stages(row.here(row.timed)),
        "load_s": _median(floats(s.load_s for s in loads)),
        "first_call_s": _median(floats(s.first_call_s for s in loads)),
        "peak_vram_bytes": _peak(numbers(measured, "peak_vram_bytes")),
        "peak_allocator_bytes": _peak(numbers(measured, "peak_allocator_bytes")),
        "peak_rss_bytes": _peak(numbers(measured, "peak_rss_bytes")),
        "image_bytes": _median(numbers(row.usable, "image_bytes")),
        "truncated_prompts": int((numbers(row.usable, "truncated_tokens") > 0).sum()),
        "in_force": sessions[-1].in_force if sessions else None,
        "metrics": {name: row_metric(study, table, row, name) for name in metrics},
        "warnings": _warnings(row, sessions),
    }


def _stages(timed: Some) -> dict[str, float | None]:
    """Mean seconds by stage; with `other_s`, what no stage explains, they add up to the latency.

    `step_s` is the mean of one step, a part of `denoise_s`.
    """
    names = ("text_s", "denoise_s", "decode_s", "encode_s")
    stages = {name: _mean(numbers(timed, name)) for name in names}
    mean = _mean(seconds(timed))
    explained = sum(s for s in stages.values() if s is not None)
    return {
        **stages,
        "other_s": None if mean is None else mean - explained,
        "step_s": _mean(step_seconds(timed)),
    }


def _warnings(row: Row, sessions: Sequence[Session]) -> list[str]:
    found = [f"{plural(n, 'image')} left out: {why}" for why, n in row.excluded.most_common()]
    if row.failed > row.ambiguous:
        found.append(f"{plural(row.failed - row.ambiguous, 'trial')} failed")
    if row.ambiguous:
        found.append(ambiguous_text(row.ambiguous))
    found += [f"{n} timed images in no latency: {why}" for why, n in row.clock.left.most_common()]
    if row.clock.marked:
        found.append(
            f"{row.clock.disturbed} of {len(row.timed)} timed images {DISTURBED}; they count"
        )
    for why, n in row.untimed.most_common():
        found.append(f"{n} call{'s' * (n > 1)} {why}: no latency from {'them' if n > 1 else 'it'}")
    stand_ins = made_by_others(row)
    if stand_ins:
        found.append(f"images made by {stand_ins}, which stood in: no figure is of this model")
    found += spread_texts(row, sessions)
    if not row.timed:
        alone = "call of this setting ran alone"
        lone = alone if row.hosted else "trial of this setting ran at batch size 1"
        found.append(f"no latency: no {lone}")
    timed = by_session(row.timed)
    runs = Counter(s.start for s in sessions if s.id in timed)
    if max(runs.values(), default=0) > 1:  # the starts of one run are asked for, and shown
        found.append(f"figures from {max(runs.values())} separate runs in one environment")
    return found


def _common(values: Floats) -> float | None:
    """Return the value that all known ones share, else their mean."""
    known = np.unique(values[~np.isnan(values)].astype(np.int64)).tolist()
    if not known:
        return None
    return known[0] if len(known) == 1 else float(np.mean(known))


def _mean(values: Floats) -> float | None:
    known = values[~np.isnan(values)]
    return float(np.mean(known)) if len(known) else None


def _median(values: Floats) -> float | None:
    known = values[~np.isnan(values)]
    return float(np.median(known)) if len(known) else None


def _peak(values: Floats) -> int | None:
    known = values[~np.isnan(values)]
    return int(known.max()) if len(known) else None
