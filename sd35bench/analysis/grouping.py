"""Which trials belong together: settings, pairs, prompts.

A *setting* is a trial without prompt and seed: the unit that is compared and recommended. A *pair*
is what two trials must share to be compared image by image. Both are computed for every record of
a study, so they build plain tuples and hash a setting only once.
"""

from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sd35bench.fields import FIRST_PAIR, asked_fields, pair_identity, setting_identity
from sd35bench.prompts import same_prompt
from sd35bench.study.columns import (
    FREE_TEXTS,
    Columns,
    Records,
    Some,
    coded,
    dense,
    distinct,
    grouped,
    numbered,
    pick,
    seeds,
)
from sd35bench.types import Load, Record, Request, Trial, content_hash, to_json

PairKey = tuple[Any, ...]
HELD_OUT = "heldout"
"""The split on which a choice is confirmed, and which no choice may see."""


def setting_key(trial: Trial) -> str:
    """Short content hash (12 hex digits) of a trial's setting; batch size is not part of it."""
    return _hash(_identity(trial))


def pair_key(trial: Trial) -> PairKey:
    """Prompt, negative prompt, seed, width, height and init image of a trial."""
    return pair_identity(trial.request)


def setting_codes(records: Some) -> tuple[NDArray[np.int64], list[str]]:
    """The setting of each record as a number into a list of settings: [n]."""
    if isinstance(records, Records):
        columns = records.columns
        codes, known = columns.kept("settings", lambda: _settings(columns))
        return codes[records.places], known
    numbers: dict[str, int] = {}
    codes = [numbers.setdefault(setting_key(r.trial), len(numbers)) for r in records]
    return np.array(codes, np.int64), [*numbers]


Numbered = tuple[NDArray[np.int64], NDArray[np.object_]]
"""A number of each record into a list of values."""


def of_requests(records: Some, name: str, value: Callable[[Request], Any]) -> Numbered:
    """What each request says besides its texts and seed: [n]; kept under a name."""
    if not isinstance(records, Records):
        return numbered([value(r.trial.request) for r in records])
    columns = records.columns

    def make() -> Numbered:
        init = columns.codes("init_image")[0] >= 0
        codes, firsts = grouped(columns.codes("asked")[0], init)
        found = numbered([value(columns.record(i).trial.request) for i in firsts.tolist()])
        return found[0][codes], found[1]

    codes, found = columns.kept(f"requests {name}", make)
    return codes[records.places], found


def request_codes(records: Some) -> NDArray[np.int64]:
    """A number for the request of each record, in the order of appearance: [n]."""
    if not isinstance(records, Records):
        return numbered([r.trial.request for r in records])[0]
    parts = (coded(records, name)[0] for name in ("asked", *FREE_TEXTS))
    return grouped(*parts, seeds(records))[0]


def tasks(records: Some) -> Numbered:
    """The task of each record by number into a list of names: [n]."""
    return of_requests(records, "task", lambda request: request.task.value)


def pair_codes(records: Records) -> tuple[NDArray[np.int64], int]:
    """A number for the pair of each record of a view [n], and how many pairs the view has."""
    codes, keys, _ = _pairs(records.columns)
    return codes[records.places], len(keys)


class PairNumbers:
    """Numbers of the pairs of records of one study, which are told apart by them in columns."""

    def __init__(self) -> None:
        self._numbers: dict[PairKey, int] = {}
        self._keys: list[PairKey] = []

    def of(self, records: Some) -> NDArray[np.int64]:
        """The number of each record's pair: [n]."""
        if isinstance(records, Records):
            codes, self._keys, _ = _pairs(records.columns)
            return codes[records.places]
        return self.of_keys(pair_keys(records))

    def of_keys(self, keys: Iterable[PairKey]) -> NDArray[np.int64]:
        """The numbers of pairs, of which those that are new get the next ones: [n]."""
        found = []
        for key in keys:
            number = self._numbers.setdefault(key, len(self._keys))
            if number == len(self._keys):
                self._keys.append(key)
            found.append(number)
        return np.array(found, np.int64)

    @property
    def keys(self) -> list[PairKey]:
        """The pairs by their numbers."""
        return self._keys


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
        return dense(prompts[codes[records.places]])
    numbers: dict[Any, int] = {}
    found = (cluster_key(r.trial) for r in records)
    return np.array([numbers.setdefault(k, len(numbers)) for k in found], np.int64)


def _settings(columns: Columns) -> tuple[NDArray[np.int64], list[str]]:
    """The setting of every record of a view; one record of each load and request is looked at."""
    init = columns.codes("init_image")[0] >= 0
    codes, firsts = grouped(columns.codes("load")[0], columns.codes("asked")[0], init)
    numbers: dict[str, int] = {}
    found = (setting_key(columns.record(i).trial) for i in firsts.tolist())
    each = np.array([numbers.setdefault(key, len(numbers)) for key in found], np.int64)
    return each[codes], [*numbers]


_PROMPT_AT, _INIT_AT = map(FIRST_PAIR.index, ("prompt", "init_image"))
_FREE = (*FREE_TEXTS, "seed")
"""What of a pair is a column of its own; one record of each request says the rest."""


def _pairs(columns: Columns) -> tuple[NDArray[np.int64], list[PairKey], NDArray[np.int64]]:
    """A number for the pair of every record of a view, each pair, and the number of its prompt."""

    def make() -> tuple[NDArray[np.int64], list[PairKey], NDArray[np.int64]]:
        asked, samples = grouped(columns.codes("asked")[0])
        like = [pair_key(columns.record(i).trial) for i in samples.tolist()]
        at = [FIRST_PAIR.index(name) for name in _FREE]
        kinds: dict[Any, int] = {}
        rest = (tuple(v for i, v in enumerate(key) if i not in at) for key in like)
        part = np.array([kinds.setdefault(r, len(kinds)) for r in rest], np.int64)[asked]
        own = (columns.codes(name)[0] for name in FREE_TEXTS)
        codes, firsts = grouped(*own, columns.whole("seed"), part)
        values = [columns.texts(name)[firsts].tolist() for name in FREE_TEXTS]
        found, labels = [], []
        prompts: dict[Any, int] = {}
        seeds = columns.whole("seed")[firsts].tolist()
        for kind, *free in zip(asked[firsts].tolist(), *values, seeds, strict=True):
            key = [*like[kind]]
            for place, value in zip(at, free, strict=True):
                key[place] = value
            found.append(tuple(key))
            labels.append(prompts.setdefault((same_prompt(free[0]), free[2]), len(prompts)))
        return codes, found, np.array(labels, np.int64)

    return columns.kept("pairs", make)


def weights_text(load: Load) -> str | None:
    """Name the weights by their files: ``base.safetensors + team.safetensors × 0.8``.

    What came with the model's name has that name; ``None`` for a hosted service.
    """
    model = load.model
    if load.known_digest is None:
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


def cluster_key(trial: Trial) -> tuple[str, str | None]:
    """Name what resampling draws together: a prompt (with its init image) in all its seeds."""
    return (same_prompt(trial.request.prompt), trial.request.init_image)


def pair_prompt(key: PairKey) -> tuple[str, str | None]:
    """The prompt of a pair and its init image."""
    return key[_PROMPT_AT], key[_INIT_AT]


def pair_clusters(keys: Iterable[PairKey]) -> NDArray[np.int64]:
    """Number the prompts (with their init images) of pairs, in order of appearance: [n]."""
    numbers: dict[Any, int] = {}
    named = ((same_prompt(prompt), init) for prompt, init in map(pair_prompt, keys))
    return np.array([numbers.setdefault(name, len(numbers)) for name in named], np.int64)


def shared_negatives(records: Some, asking: Request | None = None) -> tuple[str, ...] | None:
    """Negative prompts that a run asked for with every prompt, in the order of the alphabet.

    ``None`` where prompts bring their own: each has one, and not all the same. Without guidance
    they have no effect and are not looked at; empty where there is no guidance anywhere.
    `asking`: a request that all prompts are to be in instead.
    """
    if asking is None:
        codes, guided = of_requests(records, "guided", lambda request: request.cfg > 1)
        asked = pick(records, guided.astype(bool)[codes])
    else:
        asked = records if asking.cfg > 1 else ()
    if not asked:
        return ()
    found, prompts = distinct(asked, "negative_prompt"), cluster_labels(asked)
    _, firsts = grouped(prompts, coded(asked, "negative_prompt")[0])
    own = len(found) > 1 and len(firsts) == int(prompts.max()) + 1
    return None if own else tuple(sorted(found))


def setting_fields(record: Record) -> dict[str, Any]:
    """Spell out the setting as columns of a row, flat and JSON-ready.

    `threads` and `weights_digest` are ``None`` for a hosted service, which tells neither.
    """
    load = record.trial.load
    return {
        "setting": setting_key(record.trial),
        "model": load.model.name,
        "weights_digest": load.known_digest,
        "backend": load.backend.name,
        "backend_options": dict(load.backend.options),
        "threads": load.known_threads,
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
