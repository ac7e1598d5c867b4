"""What ran, where, what failed, what to be careful about, and how to run it again."""

import math
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np

from sd35bench import words
from sd35bench.analysis.settings import is_hosted, tasks
from sd35bench.columns import (
    Some,
    by_text,
    grouped,
    is_text,
    numbers,
    pick,
    prompts,
    ref_codes,
    split,
    unlike,
)
from sd35bench.errors import count_error
from sd35bench.fields import FIELDS, PAIR, SETTING, is_unasked, value_text
from sd35bench.recommend.reproduce import quoted, remote_overrides
from sd35bench.report.rows import Row
from sd35bench.types import Request, Session, Status

_FACTS = (
    *("sd35bench", "commit", "dirty", "torch", "diffusers", "cpu_model", "gpu_name", "threads"),
    "service",
)

_RARE = tuple(
    name for name in SETTING if name not in ("steps", "cfg", "prompt_strength") and name not in PAIR
)
"""Fields that a command names only where a run would not have them unasked."""


def list_environments(sessions: Mapping[str, Session]) -> list[dict[str, Any]]:
    """Each environment once: id, worker count, and its facts in reading order."""
    groups: dict[str, list[Session]] = defaultdict(list)
    for session in sessions.values():
        groups[session.environment_id].append(session)
    return [
        {
            "id": environment_id[:12],
            "workers": len(members),
            "first": min(s.started_at for s in members),
            "facts": [(k, _plain(v)) for k, v in members[-1].environment.items()],
        }
        for environment_id, members in groups.items()
    ]


def environment_lines(environments: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What ran a document's images: a line for each unlike environment."""
    facts = [
        ", ".join(f"{name} {environment[name]}" for name in _FACTS if environment.get(name))
        for environment in environments.values()
    ]
    return [f"Environment: {text}." for text in dict.fromkeys(facts)]


def list_loads(sessions: Mapping[str, Session], records: Some) -> list[dict[str, Any]]:
    """Each model on a backend: process starts, load, first call, peaks, what is in force."""
    places = by_text(records, "session_id")
    peaks = {name: pick(records, found) for name, found in places.items()}
    groups: dict[str, list[Session]] = defaultdict(list)
    for session in sessions.values():
        groups[session.load.key].append(session)
    return [_load(members, peaks) for members in groups.values()]


def _load(sessions: Sequence[Session], peaks: Mapping[str, Some]) -> dict[str, Any]:
    load = sessions[0].load
    parts = [peaks[s.id] for s in sessions if s.id in peaks]
    vram, rss = (_highest(parts, f"peak_{kind}_bytes") for kind in ("vram", "rss"))
    hosted = is_hosted(load)  # what it loads and takes, nobody told us
    options = {**load.backend.options, "threads": "n/a" if hosted else load.threads}

    def middle(seconds: Iterable[float]) -> str:
        return words.seconds(None if hosted else median(seconds))

    return {
        "model": load.model.name,
        "digest": load.model.weights_digest[:12],
        "backend": load.backend.name,
        "options": ", ".join(f"{k}={_plain(v)}" for k, v in options.items()),
        "starts": len(sessions),
        "load": middle(s.load_s for s in sessions),
        "first_call": middle(s.first_call_s for s in sessions),
        "warmup": middle(s.warmup_s for s in sessions),
        "rss": words.size(None if hosted else rss),
        "vram": words.size(vram),
        "in_force": [(k, _plain(v)) for k, v in sessions[-1].in_force.items()],
    }


def _highest(parts: Sequence[Some], name: str) -> int | None:
    found = np.concatenate([numbers(part, name) for part in parts] or [np.empty(0)])
    known = found[~np.isnan(found)]
    return int(known.max()) if len(known) else None


def _plain(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k}={_plain(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_plain(v) for v in value)
    return words.plain(value)


def list_failures(records: Some) -> list[dict[str, Any]]:
    """Failures grouped by status, phase and kind of message, the most frequent first."""
    groups: dict[tuple[str, str], dict[str, int]] = defaultdict(dict)
    for record in pick(records, ~is_text(records, "status", Status.OK)):
        status = _STATUS.get(record.status, record.status.value)
        count_error(groups[status, record.phase or ""], record.error or "")
    found = [
        {"status": status, "phase": phase, "error": error, "count": count}
        for (status, phase), errors in groups.items()
        for error, count in errors.items()
    ]
    return sorted(found, key=lambda group: -int(group["count"]))


_STATUS = {Status.AMBIGUOUS: "ambiguous: may have been billed; run again to look for it"}


def list_warnings(
    document: Mapping[str, Any], rows: Sequence[Row], extra: Sequence[str]
) -> list[str]:
    """The study's warnings, then those of single settings, each said once with its settings."""
    found = [str(w) for w in document.get("warnings") or ()]
    by_warning: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        for warning in row.warnings:
            by_warning[warning].append(row.name(extra))
    for text, names in by_warning.items():
        if len(names) == len(rows):
            found.append(f"{text} (all settings)")
        elif len(names) > 3:
            found.append(f"{text} ({len(names)} settings, {names[0]} the first)")
        else:
            found.append(f"{text} ({'; '.join(names)})")
    return found


def rerun_commands(study: str, records: Some) -> list[dict[str, str]]:
    """Per task and prompt set, the sweep as a command line, from the axes that were recorded."""
    parts = (tasks(records), ref_codes(records, "set"), ref_codes(records, "split"))
    code, _ = grouped(*(codes for codes, _ in parts))
    found = {
        tuple(values[codes[members[0]]] for codes, values in parts): pick(records, members)
        for members in split(code)
    }
    return [_rerun(study, key, found[key]) for key in sorted(found, reverse=True)]


def _rerun(study: str, key: tuple[Any, ...], records: Some) -> dict[str, str]:
    task, prompt_set, split = key
    kinds = unlike(records)
    loads, requests = [r.trial.load for r in kinds], [r.trial.request for r in kinds]
    axes = {
        "model": _axis(load.model.name for load in loads),
        "backend": _axis(load.backend.name for load in loads),
        "steps": _axis(r.steps for r in requests),
        "cfg": _axis(r.cfg for r in requests),
        "prompt_strength": _axis(
            r.prompt_strength for r in requests if r.prompt_strength is not None
        ),
        "seed": _axis(r.seed for r in requests),
        **{name: _rare_axis(name, requests) for name in _RARE},
        **_prompts_of(prompt_set, records[0].trial.prompt.source),
        "prompts.split": split,
        "prompts.task": "edit" if prompt_set == "nano" and task == "image-to-image" else "",
        "prompts.limit": str(len(prompts(records))),
        **remote_overrides(loads),
        **_batches(records),
        "study": study,
    }
    typed = [shlex.quote(f"{k}={v}") for k, v in axes.items() if v]
    names = ("steps", "cfg", "prompt_strength", "seed", *_RARE)
    settings = {tuple(getattr(r, name) for name in names) for r in requests}
    product = math.prod(len({getattr(r, name) for r in requests}) for name in names)
    note = "" if len(settings) == product else "The study holds only a part of this grid."
    return {"task": task, "command": "sd35bench run -m " + " ".join(typed), "note": note}


def _prompts_of(name: str, source: Mapping[str, str]) -> dict[str, str]:
    """Overrides that read a prompt set again: a group's name, or a file's."""
    if name in ("nano", "given"):
        return {"prompts": name}
    if name in ("geneval", "coco"):
        path = source.get("path", f"{name.upper()}_FILE")
        return {"prompts": name, "prompts.path": quoted(path)}
    if name == "starter.txt":
        return {"prompts": "starter"}
    return {f"prompts.{key}": quoted(text) for key, text in {"path": name, **source}.items()}


def _rare_axis(name: str, requests: Sequence[Request]) -> str:
    """A field's values; empty where all are what a run has unasked."""
    values = {getattr(r, name) for r in requests}
    if all(is_unasked(name, value) for value in values):
        return ""
    none = "none" if FIELDS[name].unasked == "none" else "null"
    return ",".join(sorted(none if value is None else value_text(value) for value in values))


def _batches(records: Some) -> dict[str, str]:
    """Batch sizes, and how many prompts were timed one at a time besides."""
    sizes = numbers(records, "batch_size")
    images = Counter(map(int, sizes.tolist()))
    larger = sorted(size for size in images if size > 1)
    if not larger:
        return {}
    if images[1] == images[larger[-1]]:  # batch 1 was swept too: as many images as the others
        return {"batch_size": _axis(images)}
    timed = len(prompts(pick(records, sizes == 1)))
    return {"batch_size": _axis(larger), "timed_limit": str(timed)}


def _axis(values: Any) -> str:
    return ",".join(words.plain(v) for v in sorted(set(values)))
