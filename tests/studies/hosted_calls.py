"""Records of hosted calls, made by hand."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from sd35bench.analysis.summary import show_document
from sd35bench.types import (
    BackendSpec,
    Record,
    RemoteCall,
    Timings,
)
from tests.studies.memory import LOAD, MemoryStudy, record, session

HOSTED = replace(
    LOAD,
    model=replace(LOAD.model, weights_digest="none"),
    backend=BackendSpec(
        name="eachlabs",
        kind="eachlabs",
        options={"base_url": "https://api.example.com", "slug": "sd-3-5-medium"},
    ),
    threads=7,
)
START = datetime(2026, 11, 22, 19, tzinfo=UTC)
SUBMIT, QUEUE, PREDICT, DOWNLOAD, LATE = 0.3, 1.2, 6.0, 0.1, 0.5
TOTAL = SUBMIT + QUEUE + PREDICT + DOWNLOAD


def call(number: int, at_s: float = 0.0, total_s: float = TOTAL, **fields: Any) -> Record:
    """One hosted call; `fields` go to its `RemoteCall`, or to the record where it has them."""
    own = {k: fields.pop(k) for k in ("status", "seed", "steps", "session_id") if k in fields}
    planted = {
        "provider": "eachlabs",
        "prediction_id": f"p{number}",
        "request_id": None,
        "in_flight": 1,
        "attempts": 1,
        "polls": 3,
        "submit_s": SUBMIT,
        "queue_s": QUEUE,
        "predict_s": PREDICT,
        "poll_bound_s": LATE,
        "download_s": DOWNLOAD,
        "cost_usd": 0.035,
        "cost_reported": True,
        "unsent": ("negative_prompt", "sampler"),
    }
    made = record(
        number,
        load=HOSTED,
        timings=Timings(generate_s=total_s, encode_s=0.0),
        started_at=(START + timedelta(seconds=at_s)).isoformat(timespec="milliseconds"),
        **{"session_id": "h", **own},
    )
    return replace(made, remote=RemoteCall(**{**planted, **fields}))


def made_of(path, *records: Record, lives: dict[str, Any] | None = None) -> MemoryStudy:
    there = {"s": session(), "h": session("h", "f" * 64, HOSTED)}
    study = MemoryStudy(path, lives=there if lives is None else lives)
    for one in records:
        study.add(one)
    return study.touch_images()


def row_of(path, *records: Record) -> dict[str, Any]:
    (row,) = show_document(made_of(path, *records))["settings"]
    return row


def lone(count: int = 4) -> list[Record]:
    return [call(i, at_s=10.0 * i) for i in range(count)]
