"""Which trials belong together: settings, pairs, prompts.

A *setting* is a trial without prompt and seed: the unit that is compared and recommended. A *pair*
is what two trials must share to be compared image by image. Both are computed for every record of
a study, so they build plain tuples and hash a setting only once.
"""

import json
from collections import defaultdict
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sd35bench.columns import Columns, Records, Some
from sd35bench.fields import PAIR, asked_fields, pair_identity, setting_identity
from sd35bench.prompts import same_prompt
from sd35bench.types import Load, Record, Trial, content_hash, to_json

PairKey = tuple[Any, ...]
HELD_OUT = "heldout"
"""The split on which a choice is confirmed, and which no choice may see."""


def setting_key(trial: Trial) -> str:
    """Short content hash (12 hex digits) of a trial's setting; batch size is not part of it."""
    return _hash(_identity(trial))


def pair_key(trial: Trial) -> PairKey:
    """Prompt, negative prompt, seed, width, height and init image of a trial."""
    return pair_identity(trial.request)


def setting_keys(records: Some) -> NDArray[np.object_]:
    """The setting of each record: [n]."""
    if isinstance(records, Records):
        columns = records.columns
        return columns.kept("settings", lambda: _settings(columns))[records.places]
    return np.array([setting_key(r.trial) for r in records], object)


def tasks(records: Some) -> list[str]:
    """The task of each record, by its name."""
    if not isinstance(records, Records):
        return [r.trial.request.task.value for r in records]
    columns = records.columns

    def make() -> NDArray[np.object_]:
        init = columns.codes("init_image")[0] >= 0
        codes, firsts = columns.grouped(columns.codes("asked")[0], init)
        found = [columns.record(i).trial.request.task.value for i in firsts.tolist()]
        return np.array(found, object)[codes]

    return columns.kept("tasks", make)[records.places].tolist()


def pair_keys(records: Some) -> list[PairKey]:
    """The pair of each record."""
    if isinstance(records, Records):
        codes, keys, _ = _pairs(records.columns)
        return [keys[code] for code in codes[records.places].tolist()]
    return [pair_key(r.trial) for r in records]


def cluster_labels(records: Some) -> NDArray[np.int64]:
    """Give each record its prompt's number (with its init image), in order of appearance: [n]."""
    if isinstance(records, Records):
        codes, _, prompts = _pairs(records.columns)
        found = prompts[codes[records.places]].tolist()
    else:
        found = [cluster_key(r.trial) for r in records]
    numbers: dict[Any, int] = {}
    return np.array([numbers.setdefault(k, len(numbers)) for k in found], np.int64)


def _settings(columns: Columns) -> NDArray[np.object_]:
    """The setting of every record of a view; one record of each load and request is looked at."""
    init = columns.codes("init_image")[0] >= 0
    codes, firsts = columns.grouped(columns.codes("load")[0], columns.codes("asked")[0], init)
    return np.array([setting_key(columns.record(i).trial) for i in firsts.tolist()], object)[codes]


def _pairs(columns: Columns) -> tuple[NDArray[np.int64], list[PairKey], NDArray[np.int64]]:
    """A number for the pair of every record of a view, each pair, and the number of its prompt."""

    def make() -> tuple[NDArray[np.int64], list[PairKey], NDArray[np.int64]]:
        asked, texts = columns.codes("asked")
        numbers: dict[str, int] = {}
        of_asked = [json.loads(text) for text in texts]
        parts = [repr([a.get(name) for name in PAIR]) for a in of_asked]
        part = np.array([numbers.setdefault(p, len(numbers)) for p in parts], np.int64)[asked]
        free = (columns.codes(n)[0] for n in ("prompt", "negative_prompt", "init_image"))
        codes, firsts = columns.grouped(*free, columns.whole("seed"), part)
        trials = [columns.record(i).trial for i in firsts.tolist()]
        prompts: dict[Any, int] = {}
        labels = [prompts.setdefault(cluster_key(t), len(prompts)) for t in trials]
        return codes, [pair_key(t) for t in trials], np.array(labels, np.int64)

    return columns.kept("pairs", make)


def known_digest(load: Load) -> str | None:
    """The digest of the weights; ``None`` of a hosted service, which does not tell it."""
    return None if is_hosted(load) else load.model.weights_digest


def known_threads(load: Load) -> int | None:
    """The threads that made the images; ``None`` of a hosted service, which does not tell them."""
    return None if is_hosted(load) else load.threads


def weights_text(load: Load) -> str | None:
    """Name the weights by their files: ``base.safetensors + team.safetensors × 0.8``.

    What came with the model's name has that name; ``None`` for a hosted service.
    """
    model = load.model
    if is_hosted(load):
        return None
    path = Path(model.path)
    base = model.name if path.name in ("", "weights") else path.name
    if model.weights != "checkpoint":
        base = f"{model.name}, {model.weights} weights"
    elif model.revision is not None:
        base = f"{model.name}@{model.revision[:8]}"
    added = (
        f"{Path(c.path).name} × {c.weight:g}"
        if c.kind == "lora"
        else f"{c.kind} {Path(c.path).name}"
        for c in model.changes
    )
    return " + ".join((base, *added))


def is_hosted(load: Load) -> bool:
    """Whether a hosted service makes the images; its backends alone have a base URL."""
    return "base_url" in load.backend.options


def cluster_key(trial: Trial) -> tuple[str, str | None]:
    """Name what resampling draws together: a prompt (with its init image) in all its seeds."""
    return (same_prompt(trial.request.prompt), trial.request.init_image)


def pair_clusters(keys: Iterable[PairKey]) -> NDArray[np.int64]:
    """Number the prompts (with their init images) of pairs, in order of appearance: [n]."""
    numbers: dict[Any, int] = {}
    named = ((same_prompt(key[0]), key[5]) for key in keys)
    return np.array([numbers.setdefault(name, len(numbers)) for name in named], np.int64)


def shared_negatives(records: Iterable[Record]) -> tuple[str, ...] | None:
    """Negative prompts that a run asked for with every prompt, in the order of the alphabet.

    ``None`` where prompts bring their own: each has one, and not all the same. Without guidance
    they have no effect and are not looked at; empty where there is no guidance anywhere.
    """
    by_prompt: dict[tuple[str, str | None], set[str]] = defaultdict(set)
    for record in records:
        if record.trial.request.cfg > 1:
            by_prompt[cluster_key(record.trial)].add(record.trial.request.negative_prompt)
    found = set().union(*by_prompt.values())
    own = len(found) > 1 and all(len(each) == 1 for each in by_prompt.values())
    return None if own else tuple(sorted(found))


def setting_fields(record: Record) -> dict[str, Any]:
    """Spell out the setting as columns of a row, flat and JSON-ready.

    `threads` and `weights_digest` are ``None`` for a hosted service, which tells neither.
    """
    load = record.trial.load
    return {
        "setting": setting_key(record.trial),
        "model": load.model.name,
        "weights_digest": known_digest(load),
        "backend": load.backend.name,
        "backend_options": dict(load.backend.options),
        "threads": known_threads(load),
        **asked_fields(record.trial.request),
    }


def _identity(trial: Trial) -> tuple[Any, ...]:
    load, model, backend = trial.load, trial.load.model, trial.load.backend
    options = tuple(sorted(backend.options.items()))
    head = (model.name, model.weights_digest, backend.name, backend.kind, options, load.threads)
    return head + setting_identity(trial.request)


@lru_cache(maxsize=65536)
def _hash(identity: tuple[Any, ...]) -> str:
    return content_hash(to_json(identity))[:12]
