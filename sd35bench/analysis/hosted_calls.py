"""Hosted calls: where a row's seconds went, how many images a minute came, and what they cost.

A latency is that of a call that this client made alone: with others in flight they queue for each
other, and a call that was found again after a crash was not watched. The parts of the lone calls
add up to it: the create's round trip, the queue, the service's own inference, the download, and
what no source separates. Polling sees the end late, by a bound that is recorded with every call.

Calls that ran beside others say how much the service carries. A *phase* is a stretch of one
session in which no call ran alone; its images per minute are those that came over its wall time,
from the first create to the last image's bytes, waits for rate limits included. Several settings
of one session share its phases, and then share the figure. Successive completions depend on each
other, so the interval is that of the mean gap over blocks of successive gaps (batch means).

Money is what the service reported or else its listed price, call by call, failed ones included
where they were billed. ``None`` is unknown, never 0; what a machine of one's own costs is unknown.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np

from sd35bench.analysis.grouping import cluster_labels, setting_key
from sd35bench.analysis.speed import by_start
from sd35bench.analysis.table import BESIDE, RESUMED, Row, Table
from sd35bench.stats.clustered import mean_t
from sd35bench.stats.latency import latency_interval, mean_latency
from sd35bench.study.columns import Some, has, pick
from sd35bench.types import Record, RemoteCall, Status

Calls = list[tuple[Record, RemoteCall]]
"""What was recorded of hosted calls, and the calls; a phase's are in the order of their start."""

_LEAST_PER_BLOCK = 4
_MOST_BLOCKS = 10


def remote_summary(row: Row, phases: Mapping[str, Sequence[Calls]]) -> dict[str, Any] | None:
    """Sum up a hosted row's calls; ``None`` for a row of this machine.

    `phases` are those of `concurrent_phases`. Every entry of `parts` is ``{"p50", "ci95", "mean",
    "mean_ci95", "n"}`` in seconds over lone calls: `submit`, `queue`, `predict`, `download`,
    `network` (submit and download), `other` (the part of the total that none of these explains),
    `total` (the latency) and `poll_bound` (by how much queue and total may be too long).
    """
    if not row.hosted:
        return None
    timed, calls = _calls(row.timed), [call for _, call in _calls(row.records)]
    watched = [c for c in _ok_calls(row) if not c.resumed]
    return {
        "provider": row.records[0].trial.load.backend.kind,
        "single_stream_n": len(row.timed),
        "beside_n": row.untimed[BESIDE],
        "resumed_n": row.untimed[RESUMED],
        "in_flight": max((c.in_flight for c in calls), default=None),
        "parts": {name: _spread(timed, part) for name, part in _PARTS.items()},
        "inference_share": _share(timed),
        "throughput": _throughput(row, phases),
        "polls_per_image": _mean(c.polls for c in watched),
        "refused_creates": sum(max(0, c.attempts - 1) for c in calls) if calls else None,
        "cost_usd": _cost(row),
        "ambiguous": row.ambiguous,
        "unsent": sorted({name for c in calls for name in c.unsent}),
    }


def usd_per_image(row: Row) -> dict[str, Any] | None:
    """Dollars of one image that came, over the calls whose cost is known; ``None`` where none is.

    `reported` counts those whose cost the service named; the others' is the listed price.
    """
    paid = [
        (r, call.cost_usd, call.cost_reported)
        for r, call in _calls(row.records)
        if r.status is Status.OK and call.cost_usd is not None
    ]
    if not paid:
        return None
    mean = mean_t([usd for _, usd, _ in paid], cluster_labels([r for r, _, _ in paid]))
    reported = sum(said for _, _, said in paid)
    return {"value": mean.value, "ci95": mean.ci95, "n": mean.n, "reported": reported}


def made_by_others(row: Row) -> str:
    """Models that made a row's images in place of the one that was asked for, between commas."""
    named = {call.made_by for call in _ok_calls(row) if call.made_by is not None}
    return ", ".join(sorted(named - {row.setting["model"]}))


def _ok_calls(row: Row) -> list[RemoteCall]:
    return [call for record, call in _calls(row.records) if record.status is Status.OK]


def _calls(records: Some) -> Calls:
    """The records that a hosted service was asked for, each with its call."""
    asked = pick(records, has(records, "remote"))
    return [(record, call) for record in asked if (call := record.remote) is not None]


def _cost(row: Row) -> dict[str, Any]:
    """What a row's calls cost in all, as far as it is known; a failed call may have been billed.

    `at_stake` is what the ambiguous ones cost if they were made, which is in no total.
    """
    calls = [(record.status, call) for record, call in _calls(row.records)]
    sure = [c for status, c in calls if status is not Status.AMBIGUOUS]
    known = [(c.cost_usd, c.cost_reported) for c in sure if c.cost_usd is not None]
    stake = [c.cost_usd for status, c in calls if status is Status.AMBIGUOUS]
    return {
        "total": _sum(usd for usd, _ in known),
        "n": len(known),
        "reported": sum(said for _, said in known),
        "unknown": len(sure) - len(known),
        "at_stake": _sum(usd for usd in stake if usd is not None),
    }


def _sum(dollars: Iterable[float]) -> float | None:
    known = list(dollars)
    return math.fsum(known) if known else None


# Seconds --------------------------------------------------------------------------------------


def _network(call: RemoteCall, _: float | None) -> float | None:
    if call.submit_s is None or call.download_s is None:
        return None
    return call.submit_s + call.download_s


def _other(call: RemoteCall, total_s: float | None) -> float | None:
    """What is left of the latency; ``None`` where nothing of it is known."""
    parts = (call.submit_s, call.queue_s, call.predict_s, call.download_s)
    known = [seconds for seconds in parts if seconds is not None]
    return total_s - sum(known) if known and total_s is not None else None


def _total(record: Record) -> float | None:
    return None if record.timings is None else record.timings.latency_s


_PARTS: dict[str, Callable[[RemoteCall, float | None], float | None]] = {
    "submit": lambda call, _: call.submit_s,
    "queue": lambda call, _: call.queue_s,
    "predict": lambda call, _: call.predict_s,
    "download": lambda call, _: call.download_s,
    "network": _network,
    "other": _other,
    "total": lambda _, total_s: total_s,
    "poll_bound": lambda call, _: call.poll_bound_s,
}
"""Seconds of a call by what they went to, of the call and its latency."""


def _spread(
    timed: Calls, part: Callable[[RemoteCall, float | None], float | None]
) -> dict[str, Any]:
    """Median and mean over the calls that have this part, each with its interval."""
    known = [(r, s) for r, call in timed if (s := part(call, _total(r))) is not None]
    if not known:
        return dict.fromkeys(("p50", "ci95", "mean", "mean_ci95")) | {"n": 0}
    starts = by_start(known)
    p50, mean = latency_interval(starts), mean_latency(starts)
    return {
        "p50": p50.value,
        "ci95": p50.ci95,
        "mean": mean.value,
        "mean_ci95": mean.ci95,
        "n": mean.n,
    }


def _share(timed: Calls) -> dict[str, Any] | None:
    """Which share of a lone call's latency the service's own inference is: mean over calls."""
    known = [
        (r, call.predict_s / total)
        for r, call in timed
        if call.predict_s is not None and (total := _total(r))
    ]
    if not known:
        return None
    labels = cluster_labels([r for r, _ in known])
    mean = mean_t([s for _, s in known], labels, bounds=(0.0, 1.0))
    return {"value": mean.value, "ci95": mean.ci95, "n": mean.n}


def _mean(values: Iterable[float]) -> dict[str, Any] | None:
    known = list(values)
    return {"value": float(np.mean(known)), "n": len(known)} if known else None


# Images per minute ----------------------------------------------------------------------------


def concurrent_phases(table: Table) -> dict[str, list[Calls]]:
    """Session → the stretches in which its calls ran beside others, over all of its settings."""
    sessions: dict[str, Calls] = defaultdict(list)
    for row in table.rows:
        for record, call in _calls(row.records):
            if not call.resumed:
                sessions[record.session_id].append((record, call))
    found: dict[str, list[Calls]] = {}
    for name, calls in sessions.items():
        phases: list[Calls] = [[]]
        for record, call in sorted(calls, key=lambda pair: _start_s(pair[0])):
            if call.in_flight > 1:
                phases[-1].append((record, call))
            elif phases[-1]:
                phases.append([])
        found[name] = [p for p in phases if p]
    return found


def _throughput(row: Row, phases: Mapping[str, Sequence[Calls]]) -> dict[str, Any] | None:
    """Images a minute over the phases that a row has a part in; ``None`` without a finished one.

    `n` counts the phases' images, `settings` whose they are; `in_flight` is the most at once.
    """
    sessions = dict.fromkeys(r.session_id for r in row.records)
    key = row.setting["setting"]
    own = [
        phase
        for name in sessions
        for phase in phases.get(name, ())
        if any(setting_key(r.trial) == key for r, _ in phase)
    ]
    gaps = [gap for phase in own for gap in _gaps(phase)]
    wall_s = float(np.sum(gaps))
    if wall_s <= 0:
        return None
    blocks = min(_MOST_BLOCKS, max(1, len(gaps) // _LEAST_PER_BLOCK))
    mean = mean_t(gaps, [i * blocks // len(gaps) for i in range(len(gaps))])
    ends = mean.ci95
    return {
        "images_per_min": 60.0 / mean.value,
        "ci95": None if ends is None or ends[0] <= 0 else [60.0 / ends[1], 60.0 / ends[0]],
        "n": len(gaps),
        "wall_s": wall_s,
        "in_flight": max(call.in_flight for phase in own for _, call in phase),
        "settings": len({setting_key(r.trial) for phase in own for r, _ in phase}),
    }


def _gaps(phase: Calls) -> list[float]:
    """Seconds from the phase's start to its first image, and from each to the next."""
    ends = sorted(
        _start_s(r) + r.timings.latency_s
        for r, _ in phase
        if r.status is Status.OK and r.timings is not None
    )
    return [float(gap) for gap in np.diff([_start_s(phase[0][0]), *ends])]


def _start_s(record: Record) -> float:
    return datetime.fromisoformat(record.started_at).timestamp()
