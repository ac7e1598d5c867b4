"""What ran, where, what failed, what to be careful about, and how to run it again."""

import math
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np

from sd35bench import plugins, words
from sd35bench.analysis.commands import (
    SWEPT,
    Elsewhere,
    asked_overrides,
    load_overrides,
    negative_overrides,
    prompt_overrides,
)
from sd35bench.analysis.grouping import Numbered, setting_codes, shared_negatives, tasks
from sd35bench.errors import count_error
from sd35bench.fields import FIELDS, SETTING
from sd35bench.report.render import Part, paragraph
from sd35bench.report.rows import Row
from sd35bench.study.columns import (
    Some,
    by_session,
    grouped,
    is_ref,
    is_text,
    numbered,
    numbers,
    pick,
    prompts,
    ref_codes,
    seeds,
    split,
    unlike,
)
from sd35bench.types import Session, Status

_FACTS = (
    *("sd35bench", "commit", "dirty", "torch", "diffusers", "cpu_model", "gpu_name", "threads"),
    "service",
)


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


def closing_parts(
    environments: Mapping[str, Mapping[str, Any]], warnings: Iterable[str]
) -> Iterator[Part]:
    """What ran a document's images, a line for each unlike environment, and its warnings."""
    facts = [
        ", ".join(f"{name} {environment[name]}" for name in _FACTS if environment.get(name))
        for environment in environments.values()
    ]
    ran = ((f"Environment: {text}.", "raw") for text in dict.fromkeys(facts))
    for i, line in enumerate((*ran, *(f"Warning: {text}" for text in warnings))):
        yield paragraph(line, joined=i > 0)


def list_loads(sessions: Mapping[str, Session], records: Some) -> list[dict[str, Any]]:
    """Each model on a backend: process starts, load, first call, peaks, what is in force."""
    places = by_session(records)
    peaks = {name: pick(records, found) for name, found in places.items()}
    groups: dict[str, list[Session]] = defaultdict(list)
    for session in sessions.values():
        groups[session.load.key].append(session)
    return [_load(members, peaks) for members in groups.values()]


def _load(sessions: Sequence[Session], peaks: Mapping[str, Some]) -> dict[str, Any]:
    load = sessions[0].load
    parts = [peaks[s.id] for s in sessions if s.id in peaks]
    vram, rss = (_highest(parts, f"peak_{kind}_bytes") for kind in ("vram", "rss"))
    threads = load.known_threads
    options = {**load.backend.options, "threads": "n/a" if threads is None else threads}

    def middle(seconds: Iterable[float]) -> str:
        return words.seconds(load.told(median(seconds)))

    return {
        "model": load.model.name,
        "digest": load.model.weights_digest[:12],
        "backend": load.backend.name,
        "options": ", ".join(f"{k}={_plain(v)}" for k, v in options.items()),
        "starts": len(sessions),
        "load": middle(s.load_s for s in sessions),
        "first_call": middle(s.first_call_s for s in sessions),
        "warmup": middle(s.warmup_s for s in sessions),
        "rss": words.size(load.told(rss)),
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


def rerun_commands(
    study: str, records: Some, results_dir: str | None = None
) -> list[dict[str, str]]:
    """The sweeps as command lines, from the axes that were recorded: those that make these images.

    One for each task, prompt set, and values of a load that a command has only one of.
    """
    refs = (ref_codes(records, name) for name in ("set", "split"))
    parts = (tasks(records), *refs, _nano_sets(records), _fixed(records))
    code, _ = grouped(*(codes for codes, _ in parts))
    found = {
        tuple(values[codes[members[0]]] for codes, values in parts): pick(records, members)
        for members in split(code)
    }
    return [_rerun(study, found[key], results_dir) for key in sorted(found, reverse=True)]


def _nano_sets(records: Some) -> Numbered:
    """Which of nano's prompt sets each record's is, "" for another's, as a number into texts: [n].

    A prompt's id says it: split-kind-seed-number.
    """
    codes, ids = ref_codes(records, "id")
    numbers, texts = numbered([f"{each}".rpartition("-")[0] for each in ids])
    is_nano = is_ref(records, "set", "nano")
    return np.where(is_nano, numbers[codes], len(texts)), np.array([*texts, ""], object)


def _fixed(records: Some) -> Numbered:
    """The part of each record's load that a command has once, as a number into texts: [n]."""
    codes, firsts = grouped(setting_codes(records)[0])
    loads = [load_overrides(record.trial.load) for record in pick(records, firsts)]
    numbers, texts = numbered([f"{[*_not_swept(load).items()]}" for load in loads])
    return numbers[codes], texts


def _not_swept(load: Mapping[str, str]) -> dict[str, str]:
    return {name: text for name, text in load.items() if name not in SWEPT}


def _rerun(study: str, records: Some, results_dir: str | None) -> dict[str, str]:
    kinds = unlike(records)
    loads = [load_overrides(r.trial.load) for r in kinds]
    requests = [r.trial.request for r in kinds]
    others = (r for r in kinds if r.trial.load.model.family != "sd3")
    unsent = {name for record in others for name in record.unsent}  # a run refuses them
    swept = {name: [load[name] for load in loads if name in load] for name in SWEPT}
    seeds_of = sorted(set(seeds(records).tolist()))
    words_of = {
        **{name: ",".join(sorted(set(texts), key=_by_size)) for name, texts in swept.items()},
        **asked_overrides(kinds[0].trial.load, requests),
        "seed": ",".join(map(str, seeds_of)),
        **_not_swept(loads[0]),
    }
    where = {"study": study, "results_dir": "" if results_dir is None else results_dir}
    typed = [f"{n}={text}" for n, text in words_of.items() if text and n not in unsent]
    typed += [*negative_overrides(shared_negatives(records))]
    typed += prompt_overrides(records, Elsewhere())
    typed += [f"{name}={text}" for name, text in {**_batches(records), **where}.items() if text]
    names = [*(name for name in SETTING if FIELDS[name].axis), "seed"]
    settings = {
        (*(load.get(n) for n in SWEPT), *(getattr(request, n) for n in names))
        for load, request in zip(loads, requests, strict=True)
    }
    product = math.prod(len(set(values)) for values in zip(*settings, strict=True))
    note = "" if len(settings) == product else "The study holds only a part of this grid."
    command = plugins.command(shlex.join(["run", "-m", *typed]))
    return {"task": requests[0].task.value, "command": command, "note": note}


def _by_size(text: str) -> tuple[int, str]:
    return int(text) if text.isdecimal() else 0, text


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
