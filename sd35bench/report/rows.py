"""Settings as the report reads them: `show --json`'s document made uniform and comparable.

`match_records` finds the records behind a row, so that the report can draw raw samples and images
without asking the analysis again. Missing keys are ``None``: a partial document is no error.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sd35bench import words
from sd35bench.analysis.facts import METRICS, facts
from sd35bench.analysis.grouping import setting_codes
from sd35bench.analysis.pairs import EDIT_QUALITY
from sd35bench.fields import CURVES, SETTING, SIZE, field_words, unusual_words, value_text
from sd35bench.study.columns import Some, coded, grouped, numbered, pick, split
from sd35bench.types import Session, to_json
from sd35bench.words import MISSING, Estimate

# The fields of a setting, in the order in which a person would name them.
SETTING_FIELDS = (
    *("model", "weights", "weights_digest", "backend", "threads", *SIZE),
    *(name for name in SETTING if name not in CURVES + SIZE),
    *CURVES,
)
DRIFT = "drift"
UNTOLD = ("threads", "weights", "weights_digest")
"""What a hosted service does not tell, and what therefore sets its rows apart from none."""
_AXES = ("task", *CURVES)
_ALSO = ("task", "environment_id")
_AS_IT_IS = (
    *("load_s", "first_call_s", "cold_compile_s", "warm_compile_s", "cold_first_call_s"),
    *("warm_first_call_s", "start_spread", "peak_vram_bytes", "peak_rss_bytes", "effective_steps"),
    *("quality_batch_size", "achieved_tflops", "limit_fraction", "gpu", "remote"),
)
"""Fields of a row that are the document's."""
_LABELS = {
    EDIT_QUALITY: "edit quality",
    **{name: family.label for name, family in METRICS.items() if family.label is not None},
}
"""Headings of metrics by the beginning of their names, in the order of the columns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One setting with its figures; seconds, bytes and TFLOP/s, ``None`` where unknown.

    `setting` holds the fields of `SETTING_FIELDS` that the document named (and the environment's
    id where it did); `latency` is p50 with its interval. `speedup` and `psnr_db` are against the
    reference backend's row, `throughput` is images per second by batch size. `identical_pairs` is
    set where every pixel of all pairs is the reference's; `remote` where a hosted service made
    the images.
    """

    id: str
    setting_id: str
    setting: dict[str, Any]
    n: int
    failed: int
    latency: Estimate | None
    latency_s: dict[str, Any]
    stage_s: dict[str, float]
    target_ratio: float | None
    load_s: float | None
    first_call_s: float | None
    peak_vram_bytes: int | None
    peak_rss_bytes: int | None
    metrics: dict[str, Estimate]
    levels: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    effective_steps: float | None = None
    quality_batch_size: int | None = None
    warnings: tuple[str, ...] = ()
    in_force: dict[str, Any] = field(default_factory=dict)
    speedup: Estimate | None = None
    achieved_tflops: float | None = None
    limit_fraction: float | None = None
    cold_compile_s: float | None = None
    warm_compile_s: float | None = None
    cold_first_call_s: float | None = None
    warm_first_call_s: float | None = None
    starts: int = 0
    start_spread: float | None = None
    throughput: dict[int, Estimate] = field(default_factory=dict)
    gpu: dict[str, Any] | None = None
    psnr_db: Estimate | None = None
    identical_pairs: int | None = None
    ambiguous: int = 0
    usd_per_image: Estimate | None = None
    remote: dict[str, Any] | None = None

    @property
    def steps(self) -> int:
        """Steps asked for."""
        return self.setting["steps"]

    @property
    def cfg(self) -> float:
        """Guidance scale."""
        return self.setting["cfg"]

    @property
    def prompt_strength(self) -> float | None:
        """Denoising strength; ``None`` for text-to-image."""
        return self.setting.get("prompt_strength")

    @property
    def task(self) -> str:
        """Text-to-image or image-to-image."""
        if "task" in self.setting:
            return self.setting["task"]
        return "text-to-image" if self.prompt_strength is None else "image-to-image"

    @property
    def rest(self) -> tuple[Any, ...]:
        """Everything but steps, cfg and strength: what the curves must hold fixed."""
        return tuple((k, _hashable(v)) for k, v in self.setting.items() if k not in _AXES)

    def tells(self, name: str) -> bool:
        """Whether who made the images tells this field; a hosted service does not tell all."""
        return self.remote is None or name not in UNTOLD

    def unsent(self, name: str) -> bool:
        """Whether a service was not told this field: it has none, or its own value."""
        return name in ((self.remote or {}).get("unsent") or ())

    def value(self, metric: str) -> float | None:
        """A metric's value, where it has one."""
        found = self.metrics.get(metric)
        return None if found is None else found.value

    def text(self, name: str) -> str:
        """A field of the setting as a table shows it; a service has neither threads nor digest."""
        if not self.tells(name):
            return "n/a"
        if name in CURVES and self.unsent(name):
            return MISSING
        return setting_text(self.setting.get(name))

    def differences(self, fields: Iterable[str]) -> str:
        """Those of some fields that are not as usual, in words; a service does not tell all."""
        known = (f for f in fields if self.tells(f) and not self.unsent(f))
        return ", ".join(unusual_words(self.setting, known))

    def name(self, extra: Iterable[str] = ()) -> str:
        """Short title: ``28 steps · cfg 4``, prompt_strength, and the `extra` fields that vary."""
        parts = [field_words(n, self.setting[n]) for n in CURVES[:2] if not self.unsent(n)]
        if self.prompt_strength is not None:
            parts.append(field_words("prompt_strength", self.prompt_strength))
        known = (f for f in extra if f in self.setting and f not in _AXES)
        shown = [f for f in known if self.tells(f)]
        parts += [_in_words(f, self.setting[f]) for f in shown if self.setting[f] is not None]
        return " · ".join(parts) if parts else str(self.setting.get("model", MISSING))


def read_rows(document: Mapping[str, Any]) -> tuple[Row, ...]:
    """Rows of a `show` document, sorted by task, fixed fields, steps, cfg and strength."""
    drift = {r["id"]: r for r in (document.get("drift") or {}).get("rows") or () if "id" in r}
    rows = [
        _read_row(r, f"row {i}", drift.get(r.get("id"), {}))
        for i, r in enumerate(document.get("settings", ()))
    ]
    return tuple(sorted(rows, key=_sort_key))


def _sort_key(row: Row) -> tuple[Any, ...]:
    strength = -1.0 if row.prompt_strength is None else row.prompt_strength
    return (row.task != "text-to-image", str(row.rest), row.steps, row.cfg, strength)


def _read_row(raw: Mapping[str, Any], row_id: str, drift: Mapping[str, Any]) -> Row:
    latency = raw.get("latency_s") or {}
    setting = {f: raw[f] for f in (*SETTING_FIELDS, *_ALSO) if f in raw}
    stages = raw.get("stage_s") or {}
    return Row(
        id=str(raw.get("id", row_id)),
        setting_id=str(raw.get("setting", row_id)),
        setting=setting,
        n=raw.get("n", 0),
        failed=raw.get("failed", 0),
        latency=None if latency.get("p50") is None else words.read_estimate(latency, "p50"),
        latency_s=dict(latency),
        stage_s={k.removesuffix("_s"): v for k, v in stages.items() if v is not None},
        target_ratio=raw.get("latency_ratio"),
        metrics={k: words.read_estimate(v) for k, v in _quality(raw).items()},
        levels=_read_levels(_quality(raw)),
        warnings=tuple(str(w) for w in raw.get("warnings") or ()),
        in_force=dict(raw.get("in_force") or {}),
        speedup=_known(raw.get("speedup")),
        starts=raw.get("starts", 0),
        throughput={
            each["batch_size"]: words.read_estimate(each, "images_per_s")
            for each in raw.get("throughput") or ()
        },
        psnr_db=_known(drift.get("psnr_db")),
        identical_pairs=_identical_pairs(drift),
        ambiguous=raw.get("ambiguous", 0),
        usd_per_image=_known(raw.get("usd_per_image")),
        **{name: raw.get(name) for name in _AS_IT_IS},
    )


def by_task(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of each task, in the order in which tasks come."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.task, []).append(row)
    return found


def latency_scope(rows: Iterable[Row]) -> str:
    """What the latencies' intervals are over, in words."""
    starts = {r.latency_s.get("starts") for r in rows if r.latency and r.latency.has_interval}
    if all(n == 1 for n in starts):
        return "within one run"
    if 1 in starts:
        return "over process starts, within one run where there is one"
    return "over process starts"


def _known(raw: Mapping[str, Any] | None) -> Estimate | None:
    return None if raw is None else words.read_estimate(raw)


def _identical_pairs(drift: Mapping[str, Any]) -> int | None:
    pairs = drift.get("n_pairs")
    return pairs if pairs and drift.get("identical") == pairs else None


def _quality(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics of quality: distance from another backend's image is none and has its own tables."""
    return {k: v for k, v in (raw.get("metrics") or {}).items() if not k.startswith(DRIFT)}


def _read_levels(metrics: Mapping[str, Any]) -> dict[str, dict[str, Estimate]]:
    """Metric → level of difficulty → estimate, where a metric says its levels."""
    return {
        name: {level: words.read_estimate(entry) for level, entry in raw["levels"].items()}
        for name, raw in metrics.items()
        if isinstance(raw, Mapping) and raw.get("levels")
    }


def setting_text(value: object) -> str:
    """A setting's value as a person types it, a dash where there is none."""
    return MISSING if value is None else value_text(value)


def failed_text(row: Row) -> str:
    """How many trials failed, and how many of them may have been billed all the same."""
    return f"{row.failed} ({row.ambiguous} ambiguous)" if row.ambiguous else str(row.failed)


def has_far(rows: Iterable[Row]) -> bool:
    """Whether a hosted row is held against one of this machine."""
    return any(r.remote is not None and r.speedup is not None for r in rows)


def usd_text(row: Row) -> str:
    """Dollars of one image; a dash where they are unknown."""
    return words.usd(None if row.usd_per_image is None else row.usd_per_image.value)


def row_words(row: Row, fields: Sequence[str]) -> str:
    """The values of some fields of a row, each with what says which field it is of."""
    said = []
    for name in fields:
        value = row.setting.get(name)
        if value is not None and row.tells(name):
            said.append(_in_words(name, value))
    return " · ".join(said) if said else MISSING


def _in_words(field: str, value: Any) -> str:
    """A varying field's value where no column title says what it is."""
    return words.plural(value, "thread") if field == "threads" else field_words(field, value)


def size_rank(value: Any) -> tuple[int, float, str]:
    """Sort key: numbers by size, then texts."""
    return (0, float(value), "") if isinstance(value, int | float) else (1, 0.0, str(value))


def _hashable(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool | None) else repr(to_json(value))


def varying_fields(rows: Sequence[Row]) -> tuple[str, ...]:
    """Fields beyond steps, cfg and strength that differ between `rows`, in reading order."""
    names = (*SETTING_FIELDS, "environment_id")
    varying = [
        f
        for f in names
        if f not in _AXES and len({_hashable(r.setting.get(f)) for r in rows if r.tells(f)}) > 1
    ]
    local = [r for r in rows if r.tells("weights")]
    if "weights" in varying and _tells(local, "weights") == _tells(local, "weights_digest"):
        varying.remove("weights_digest")
    return tuple(f for f in varying if f != "environment_id" or not told_by_threads(rows))


def _tells(rows: Sequence[Row], name: str) -> list[int]:
    """Each row's value as the number of its first appearance."""
    values = [_hashable(r.setting.get(name)) for r in rows]
    return [values.index(value) for value in values]


def told_by_threads(rows: Sequence[Row]) -> bool:
    """Whether environments differ by nothing but the thread count, which has its own column.

    A service is an environment of its own, which the backend's name tells.
    """

    def told(row: Row) -> Any:
        return row.setting.get("threads" if row.tells("threads") else "backend")

    pairs = {(told(r), r.setting.get("environment_id")) for r in rows}
    return len({name for name, _ in pairs}) == len(pairs)


def metric_names(rows: Iterable[Row]) -> tuple[str, ...]:
    """Every metric that some row has, in reading order."""
    names = dict.fromkeys(name for row in rows for name in row.metrics)
    return tuple(sorted(names, key=metric_rank))


def metric_rank(name: str) -> tuple[int, str]:
    """Sort key of the reading order."""
    ranks = (i for i, prefix in enumerate(_LABELS) if name.startswith(prefix))
    return next(ranks, len(_LABELS)), name


def metric_label(name: str) -> str:
    """A metric's name in words; what the name says of backbone or extractor is kept."""
    for prefix, label in _LABELS.items():
        if name.startswith(prefix):
            rest = name[len(prefix) :].strip("_-/:. ()[]")
            return f"{label} ({rest})" if rest else label
    return name.replace("_", " ")


def lower_is_better(name: str) -> bool:
    """Distances fall, scores rise."""
    return not facts(name).higher_is_better


def match_records(
    rows: Sequence[Row], records: Some, sessions: Mapping[str, Session]
) -> dict[str, Some]:
    """Row id → its records. Rows of one setting in unlike environments keep theirs apart."""
    index = {(r.setting_id, r.setting.get("environment_id")): r.id for r in rows}
    # A record without a session (its worker died at once) belongs to the setting's first row.
    fallback = {r.setting_id: r.id for r in reversed(rows)}
    environments = {name: s.environment_id for name, s in sessions.items()}
    (settings, keys), (started, names) = setting_codes(records), coded(records, "session_id")
    code, firsts = grouped(settings, started)
    places = (
        (keys[int(settings[i])], environments.get(names[int(started[i])])) for i in firsts.tolist()
    )
    ids = [index.get((key, place), fallback.get(key)) for key, place in places]
    which, known = numbered(ids)
    found = ((known[which[code[members[0]]]], members) for members in split(which[code]))
    return {f"{i}": pick(records, members) for i, members in found if i is not None}
