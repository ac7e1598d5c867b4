"""The truth about speed: a row's rate against the machine's limit, against eager, by batch size.

A latency alone says neither how good it is nor whether it can be true. Beside it stand the
operations that the image needs (`backends.flops`), hence the rate that was achieved, and the rate
at which this machine multiplies matrices of the same precision (`machine.rates`), measured
once per study. More than that cannot be: such a row gets a warning.

``None`` is unknown, never 0.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sd35bench.analysis.grouping import PairKey, pair_codes, pair_keys
from sd35bench.analysis.table import Row, Table
from sd35bench.machine.contention import unlike
from sd35bench.machine.measure import RATE_FIELDS, device_of
from sd35bench.stats.intervals import Interval
from sd35bench.stats.latency import (
    LEAST_IMAGES,
    LEAST_SHARE,
    Centres,
    centres,
    counted_starts,
    couple_starts,
    latency_interval,
    mean_latency,
    speed_centres,
)
from sd35bench.study.columns import (
    Floats,
    Records,
    Some,
    by_session,
    coded,
    dense,
    flops,
    grouped,
    has,
    in_time,
    is_text,
    moments,
    numbers,
    pick,
    seconds,
    split,
    texts,
)
from sd35bench.study.view import OF_TIMINGS
from sd35bench.types import Record, Session, Status
from sd35bench.words import digits, number

TOLERANCE = 1.25
"""A rate this far above the measured limit is impossible.

The limit is the fastest product that torch's libraries have here, not what the chip can do, and a
convolution may take fewer operations than are counted for it.
"""
OPENVINO_WORDS = {"f32": "fp32", "float": "fp32", "bfloat16": "bf16", "f16": "fp16"}
_OF_THIS_MACHINE = (
    *("flops", "achieved_tflops", "limit_tflops", "limit_precision", "limit_fraction", "gpu"),
    *("cold_compile_s", "cold_first_call_s", "warm_compile_s", "warm_first_call_s"),
)
LEAST_PER_START = 2
"""Lone images that a process start must have made to count for the spread between starts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Seconds from request to encoded file of `n` trials that ran alone; ``None`` without any.

    `ci95` is that of p50 and `mean_ci95` that of the mean, ``None`` where there are too few images
    (`sd35bench.stats.latency`). `starts` are the process starts that they are over: with 1 they
    hold within that run. p90 and p99 are empirical quantiles, of 10 and 100 images at least.
    """

    p50: float | None = None
    p90: float | None = None
    p99: float | None = None
    mean: float | None = None
    ci95: list[float] | None = None
    mean_ci95: list[float] | None = None
    n: int = 0
    starts: int = 0


def latency_summary(timed: Some) -> Latency:
    """Latency of trials that ran alone."""
    if isinstance(timed, Records):
        return timed.kept("latency", lambda: _latency_of(seconds_by_start(timed)))
    return _latency_of(seconds_by_start(timed))


def _latency_of(starts: Sequence[Floats]) -> Latency:
    if not starts:
        return Latency()
    p50, mean = latency_interval(starts), mean_latency(starts)
    return Latency(
        p50=p50.value,
        p90=_tail(starts, 0.9),
        p99=_tail(starts, 0.99),
        mean=mean.value,
        ci95=p50.ci95,
        mean_ci95=mean.ci95,
        n=p50.n,
        starts=p50.clusters,
    )


def seconds_by_start(timed: Some) -> list[Floats]:
    """Latencies by process start, in the order of time."""
    return list(named_seconds(timed).values())


def named_seconds(timed: Some) -> dict[str, Floats]:
    """Latencies by the process start's name, in the order of time."""

    def make() -> dict[str, Floats]:
        known = in_time(pick(timed, ~np.isnan(seconds(timed))))
        values = seconds(known)
        return {name: values[places] for name, places in by_session(known).items()}

    return timed.kept("seconds", make) if isinstance(timed, Records) else make()


def by_start(timed: Iterable[tuple[Record, float]]) -> list[Floats]:
    """A value of each record by process start, in the order of time."""
    found: dict[str, list[float]] = defaultdict(list)
    for record, value in sorted(timed, key=lambda t: t[0].started_at):
        found[record.session_id].append(value)
    return [np.array(values) for values in found.values()]


def _tail(starts: Sequence[Floats], q: float) -> float | None:
    """A quantile of all images, where at least one can be expected beyond it."""
    x = np.concatenate(list(starts))
    return float(np.quantile(x, q)) if len(x) * (1.0 - q) >= 1.0 - 1e-9 else None


def speed_summary(
    table: Table, row: Row, latency: Latency, machine: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Columns of one row beyond its latency.

    `latency` is the row's `latency_summary`, `machine` what `Study.machine` read. Rates are in
    TFLOP/s (TOP/s against the int8 limit), medians over lone images. A hosted service runs on
    unknown hardware: it has no rate, and its throughput is in the row's `remote`.
    """
    if row.hosted:
        gone = dict.fromkeys((*_OF_THIS_MACHINE, "device_spread", "host_spread"))
        return gone | {"throughput": []} | _starts(row)
    sessions = _sessions(table, row)
    counted = _mean_flops(row.timed if row.timed else row.usable)
    achieved = _achieved_tflops(row.timed)
    rates = _rates(sessions, machine)
    limit = rates.get(_precision(sessions))
    return {
        "flops": counted,
        "achieved_tflops": achieved,
        "limit_tflops": limit,
        "limit_precision": _precision(sessions) if limit is not None else None,
        "limit_fraction": None if achieved is None or limit is None else achieved / limit,
        **compile_seconds(table, row),
        "throughput": throughput(row, latency),
        "gpu": _gpu(row.timed, sessions),
        **_starts(row),
        **spreads(row, table.sessions),
    }


def speed_warnings(
    table: Table, row: Row, achieved: float | None, machine: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Say of a rate that the arithmetic cannot allow that it is impossible.

    A backend may run parts in float32 whatever its precision, so the bound is the faster of both.
    """
    sessions = _sessions(table, row)
    rates = _rates(sessions, machine)
    known = [r for r in (rates.get(_precision(sessions)), rates.get("fp32")) if r is not None]
    if achieved is None or not known or achieved <= TOLERANCE * max(known):
        return []
    return [
        f"impossible: {digits(achieved)} TFLOP/s, and this machine was measured to multiply at"
        f" {digits(max(known))} at most; the timing or the count of operations is wrong, or the"
        " machine was busy while it was measured (delete the study's machine/ folder and run again)"
    ]


def machine_document(machine: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Measured limits as `show --json` prints them: the latest of each machine, threads, device."""
    latest = {found["key"]: found for found in machine}
    return [
        {
            "device": found["device"],
            "name": _device_name(found),
            "threads": found["threads"],
            "torch": found["environment"].get("torch"),
            "measured_at": found["measured_at"],
            "rates": found["rates"],
            "error": found.get("error"),
        }
        for found in latest.values()
    ]


def _device_name(found: Mapping[str, Any]) -> str | None:
    return found["environment"].get("gpu_name" if found["device"] == "cuda" else "cpu_model")


# Against eager --------------------------------------------------------------------------------


def reference_rows(rows: Iterable[Row]) -> dict[str, Row]:
    """Row id → the row that it is compared with: eager in float32, all else alike.

    Where a study has no eager float32 (a full-size model on a GPU), any eager row stands in. A
    hosted row, which ran elsewhere by its nature, is held against the same setting here: of
    several thread counts or environments the one with the most lone images.
    """
    rows = list(rows)
    alike, anywhere = _eager_by(rows, _but_backend), _eager_by(rows, _asked)
    found = {}
    for row in rows:
        best = anywhere.get(_asked(row)) if row.hosted else alike.get(_but_backend(row))
        if best is not None:
            found[row.id] = best
    return found


def _eager_by(rows: Iterable[Row], key: Callable[[Row], tuple[Any, ...]]) -> dict[Any, Row]:
    """Of the timed eager rows with the same `key`, the one to compare with."""
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        if _backend(row).kind == "eager" and row.timed:
            groups[key(row)].append(row)

    def rank(row: Row) -> tuple[bool, str, int]:
        fp32 = _backend(row).options.get("dtype", "fp32") == "fp32"
        return not fp32, row.setting["backend"], -len(row.timed)

    return {k: min(members, key=rank) for k, members in groups.items()}


def speedup(row: Row, reference: Row) -> dict[str, Any] | None:
    """How many times faster than `reference`: geometric mean over shared pairs of lone images.

    From 8 pairs on without the fastest and the slowest fifth. `starts` are the process starts that
    the interval is over: with 1 it holds within these runs. ``None`` for the reference itself,
    without a shared pair, and where the machine ran in unlike regimes. `with_network` says that a
    hosted service's time is held against one that has no network in it.
    """
    if row is reference or unlike(row.clock.speed, reference.clock.speed):
        return None
    found = _row_ratio(reference, row)
    if found is None:
        return None
    return {
        "value": float(np.exp(found.value)),
        "ci95": None if found.ci95 is None else [float(np.exp(end)) for end in found.ci95],
        "n": found.n,
        "starts": found.clusters,
        "reference": reference.id,
        "with_network": row.hosted,
    }


@dataclass(frozen=True, slots=True)
class LoneImage:
    """Seconds of an image that was made alone, the process start that made it, and when."""

    latency_s: float
    session_id: str | None
    started_at: str


@dataclass(frozen=True, slots=True)
class _LoneImages:
    """The same of n images as columns; `started` sorts as their starts do."""

    latency_s: Floats
    session_id: NDArray[Any]
    started: NDArray[Any]

    def at(self, places: NDArray[Any]) -> "_LoneImages":
        """Some of them, by their places or a mask."""
        return _LoneImages(self.latency_s[places], self.session_id[places], self.started[places])

    def large_starts(self) -> list[NDArray[np.int64]]:
        """The places of each start that is a unit of its own, in the order of time."""
        order = np.argsort(self.started, kind="stable")
        found = [order[places] for places in split(dense(self.session_id[order]))]
        least = LEAST_SHARE * max(map(len, found))
        return [start for start in found if len(start) >= least]


def lone_images(row: Row) -> dict[PairKey, LoneImage]:
    """A row's timed images by pair."""
    known = pick(row.timed, ~np.isnan(seconds(row.timed)))
    fields = (texts(known, name).tolist() for name in ("session_id", "started_at"))
    images = map(LoneImage, seconds(known).tolist(), *fields)
    return dict(zip(pair_keys(known), images, strict=True))


def _row_ratio(above: Row, below: Row) -> Interval | None:
    """`log_ratio` of two rows; those of a view are matched by the numbers of their pairs."""
    sides = [pick(row.timed, ~np.isnan(seconds(row.timed))) for row in (above, below)]
    one, other = sides
    if not (isinstance(one, Records) and isinstance(other, Records)):
        return log_ratio(lone_images(above), lone_images(below))
    (mine, size), (theirs, _) = pair_codes(one), pair_codes(other)
    firsts = np.unique(mine, return_index=True)[1]
    last, match = np.full((2, size), -1)
    last[mine], match[theirs] = np.arange(len(mine)), np.arange(len(theirs))
    shared = mine[np.sort(firsts)]
    shared = shared[match[shared] >= 0]
    # Starts as numbers: they are told apart only, and a text of each image takes longer.
    images = (
        _LoneImages(seconds(x), coded(x, "session_id")[0], moments(x)).at(places[shared])
        for x, places in ((one, last), (other, match))
    )
    return _ratio_of(*images) if len(shared) else None


def log_ratio(
    above: Mapping[PairKey, LoneImage], below: Mapping[PairKey, LoneImage]
) -> Interval | None:
    """Log of how much longer the images of `above` took, over the pairs that both sides have.

    Settings that ran in the same process starts are compared within each of them, where what a
    start adds cancels. `clusters` are the starts that the interval is over, of the side that has
    more; with 1 it holds within these runs. ``None`` without a shared pair.
    """
    shared = [key for key in above if key in below]
    if not shared:
        return None
    sides = ([side[key] for key in shared] for side in (above, below))
    columns = (
        zip(*((i.latency_s, i.session_id, i.started_at) for i in x), strict=True) for x in sides
    )
    return _ratio_of(
        *(
            _LoneImages(np.array(s), np.array(i, object), np.array(at, object))
            for s, i, at in columns
        )
    )


def _ratio_of(above: _LoneImages, below: _LoneImages) -> Interval:
    """The same of images that are matched one by one."""
    order = np.argsort(above.started, kind="stable")
    above, below = above.at(order), below.at(order)
    logs = np.log(above.latency_s / below.latency_s)
    alike = np.asarray(above.session_id == below.session_id, bool)
    if 2 * alike.sum() >= len(alike):  # but for a few that were made again later
        parts = split(dense(above.session_id[alike]))
        counted = counted_starts([logs[alike][places] for places in parts])
        return _ratio(centres([x[:, None] for x in counted]), int(alike.sum()), len(counted))
    starts = [side.large_starts() for side in (above, below)]
    firsts = [
        [(side.session_id.item(int(start[0])), side.started[start[0]]) for start in found]
        for side, found in zip((above, below), starts, strict=True)
    ]
    if all(len(side) == 1 for side in starts):
        kept = {name for side in firsts for name, _ in side} - {None, -1}  # no start is known
        own = zip(above.session_id.tolist(), below.session_id.tolist(), strict=True)
        paired = logs[[one in kept and other in kept for one, other in own]]
        return _ratio(centres([paired[:, None]]), len(paired), 1)
    times = [[at for _, at in side] for side in firsts]
    couples = [(i, j) for j, i in couple_starts(times[1], times[0])]
    columns = [
        [np.log(side.latency_s[start])[:, None] for start in found]
        for side, found in zip((above, below), starts, strict=True)
    ]
    found = speed_centres(columns[0], columns[1], couples)
    return _ratio(found, len(logs), max(map(len, starts)))


def _ratio(found: Centres, n: int, starts: int) -> Interval:
    value, half = float(found.value[0]), float(found.half[0])
    if n < LEAST_IMAGES:
        return Interval(value, None, None, n, starts)
    return Interval(value, value - half, value + half, n, starts)


def starts_of(images: Iterable[LoneImage]) -> list[list[LoneImage]]:
    """The images by process start, in the order of time."""
    found: dict[str | None, list[LoneImage]] = defaultdict(list)
    for image in sorted(images, key=lambda i: i.started_at):
        found[image.session_id].append(image)
    return list(found.values())


def _backend(row: Row) -> Any:
    return row.records[0].trial.load.backend


def _but_backend(row: Row) -> tuple[Any, ...]:
    where = (row.setting["weights_digest"], row.setting["threads"], row.environment_id)
    return (*_asked(row), *where)


def _asked(row: Row) -> tuple[Any, ...]:
    """A row's model by name and its request, on any backend."""
    own = ("setting", "weights_digest", "backend", "backend_options", "threads")
    return tuple((k, repr(v)) for k, v in row.setting.items() if k not in own)


# Throughput and starts ------------------------------------------------------------------------


def throughput(row: Row, latency: Latency) -> list[dict[str, Any]]:
    """Images per second by batch size, from whole batches; each batch counts once.

    It is the batch size over the median time of a batch, files included; the interval is that of
    the median. A batch that the prompts did not fill is left out.
    """
    found = []
    if latency.p50 is not None:
        found.append(_per_second(1, latency.p50, latency.ci95, latency.n))
    sizes, made = (numbers(row.records, name) for name in ("batch_size", "batch_actual"))
    whole = (sizes > 1) & (made == sizes) & is_text(row.records, "status", Status.OK)
    whole &= ~np.isnan(numbers(row.records, "generate_s"))
    for size in np.unique(sizes[whole]).tolist():
        records = pick(row.records, whole & (sizes == size))
        # One batch's records share its start and its times.
        alike = [numbers(records, name) for name in OF_TIMINGS]
        _, firsts = grouped(coded(records, "session_id")[0], moments(records), *alike)
        middle = latency_interval(seconds_by_start(pick(records, firsts)))
        found.append(_per_second(int(size), middle.value, middle.ci95, len(firsts)))
    return found


def _per_second(size: int, seconds: float, ends: Sequence[float] | None, n: int) -> dict[str, Any]:
    interval = None if ends is None else [size / ends[1], size / ends[0]]
    return {"batch_size": size, "images_per_s": size / seconds, "ci95": interval, "n": n}


def _starts(row: Row) -> dict[str, Any]:
    return {"starts": len(by_session(row.timed)), "start_spread": _start_spread(row.timed)}


def spreads(row: Row, sessions: Mapping[str, Session]) -> dict[str, Any]:
    """How far apart devices and hosts are that share a row: slowest over fastest by median latency.

    ``None`` where there are no two of `LEAST_PER_START` images each.
    """
    where = {key: session.environment for key, session in sessions.items()}
    found = {}
    for name, fact in (("device_spread", "device_uuid"), ("host_spread", "hostname")):
        latencies: dict[Any, list[Floats]] = defaultdict(list)
        for session_id, taken in named_seconds(row.timed).items():
            place = where.get(session_id, {}).get(fact)
            if place is not None:
                latencies[place].append(taken)
        pooled = [np.concatenate(parts) for parts in latencies.values()]
        middles = [float(np.median(x)) for x in pooled if len(x) >= LEAST_PER_START]
        several = len(middles) >= 2
        found[name] = max(middles) / min(middles) if several else None
    return found


def spread_texts(row: Row, sessions: Sequence[Session]) -> list[str]:
    """Say of devices and hosts that share a row how far apart they are."""
    found = spreads(row, {session.id: session for session in sessions})
    words = {"device_spread": "devices", "host_spread": "hosts, pooled as asked,"}
    return [
        f"{word} share this row: the slowest takes {number(found[name], 2)} times the fastest's p50"
        for name, word in words.items()
        if found[name] is not None
    ]


def _start_spread(timed: Some) -> float | None:
    """Slowest over fastest process start, by the median latency of each."""
    starts = seconds_by_start(timed)
    medians = [float(np.median(x)) for x in starts if len(x) >= LEAST_PER_START]
    return max(medians) / min(medians) if len(medians) >= 2 else None


def compile_seconds(table: Table, row: Row) -> dict[str, float | None]:
    """Median compile time and first image with a cold and with a warm cache.

    Of all starts of the row's load; one whose cache was mixed, or off, says nothing of either.
    """
    key = row.records[0].trial.load.key
    starts: dict[str, list[Session]] = defaultdict(list)
    for session in table.sessions.values():
        compiled = session.in_force.get("compile")
        if not isinstance(compiled, Mapping) or compiled.get("compile_s") is None:
            continue
        if session.environment_id != row.environment_id:
            continue
        if session.load.key == key:
            starts[str(compiled.get("cache"))].append(session)
    found: dict[str, float | None] = {}
    for cache in ("cold", "warm"):
        seconds = [s.in_force["compile"]["compile_s"] for s in starts[cache]]
        firsts = [s.first_call_s for s in starts[cache]]
        found[f"{cache}_compile_s"] = median(seconds) if seconds else None
        found[f"{cache}_first_call_s"] = median(firsts) if firsts else None
    return found


# Rates ----------------------------------------------------------------------------------------


def _sessions(table: Table, row: Row) -> list[Session]:
    ids = by_session(row.timed if row.timed else row.records)
    return [table.sessions[i] for i in ids if i in table.sessions]


def _mean_flops(records: Some) -> dict[str, float] | None:
    """Operations of one image by stage; alike in all records of a setting but for rare cases."""
    codes, kinds = flops(records)
    known = codes[codes >= 0]
    if not len(known):
        return None
    stages = ("text", "encode", "denoise", "decode", "total")
    return {n: float(np.mean(np.array([getattr(f, n) for f in kinds])[known])) for n in stages}


def _achieved_tflops(timed: Some) -> float | None:
    codes, kinds = flops(timed)
    times = numbers(timed, "generate_s")
    known = (codes >= 0) & ~np.isnan(times)
    counted = np.array([f.total / 1e12 for f in kinds])
    return float(np.median(counted[codes[known]] / times[known])) if known.any() else None


def _precision(sessions: Sequence[Session]) -> str:
    """What the backend multiplies in: int8 where weights and activations are, else its dtype.

    Weights alone in int8 are widened and multiplied in the dtype. The core names its tier. OpenVINO
    may compute in another precision than the graph's, and says so in its own words.
    """
    in_force = sessions[-1].in_force if sessions else {}
    said = str(in_force.get("inference_precision", in_force.get("dtype")))
    tier = (in_force.get("core") or {}).get("tier", "exact")
    quantised = in_force.get("quantised") or {"activations": "none"}
    if tier == "int8" or quantised.get("activations") != "none":
        return "int8"
    return OPENVINO_WORDS.get(said, said) if tier == "exact" else tier


def _rates(sessions: Sequence[Session], machine: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Precision → the best rate, in tera-operations a second, of the machine that made a row."""
    if not sessions:
        return {}
    last = sessions[-1]
    where = {name: last.environment.get(name) for name in RATE_FIELDS}
    device = device_of(last.in_force)
    for found in reversed(machine):
        if found["rates"] and found["device"] == device and found["environment"] == where:
            return {k: v["best"] for k, v in found["rates"].items() if k != "copy"}
    return {}


def _gpu(timed: Some, sessions: Sequence[Session]) -> dict[str, Any] | None:
    """Clocks, power and throttling over lone images; ``None`` where no GPU made them."""
    states = [r.gpu for r in pick(timed, has(timed, "gpu")) if r.gpu is not None]
    if not states or not sessions or device_of(sessions[-1].in_force) != "cuda":
        return None
    clocks = [s.sm_clock_mhz for s in states if s.sm_clock_mhz is not None]
    power = [s.power_w for s in states if s.power_w is not None]
    known = [s.throttled for s in states if s.throttled is not None]
    return {
        "sm_clock_mhz": {"min": min(clocks), "median": median(clocks)} if clocks else None,
        "power_w": median(power) if power else None,
        "throttled_share": sum(bool(t) for t in known) / len(known) if known else None,
        "throttled": sorted({reason for reasons in known for reason in reasons}),
        "n": len(states),
    }
