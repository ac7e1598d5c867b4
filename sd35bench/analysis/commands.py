"""A load, a request and its prompts as overrides of a command line: nothing of them is forgotten.

Every field of a load and of a request is said, or `IMPLIED` names what it follows from; a test
holds both against the records' own fields. Prompts are untrusted text: a command names their set.
Negative prompts that a command line gave are quoted for Hydra; who prints quotes for the shell.

A command can only say which prompts a record had as the first so many of a set. So it asks for as
many as reach the highest of the records' numbers: where a search took some of a set, or some
failed, these and what lies between them, and never others in their place.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from sd35bench.architectures import architecture_name
from sd35bench.evaluations import skip_layer_text
from sd35bench.fields import FIELDS, SETTING, is_unasked
from sd35bench.loading.checkpoint import NANO_WEIGHTS, weights_digest
from sd35bench.study.columns import Some, distinct_refs, prompt_refs, prompts, texts
from sd35bench.types import Load, ModelSpec, PromptRef, Request, SkipLayerGuidance

_DEFAULT_RESULTS = "results"
_PLAIN = re.compile(r"[A-Za-z/.][\w./-]*")
_WORDS = ("null", "true", "false", "nan", "inf")
Said = dict[str, str]
"""Overrides of a command line: name → text."""
SWEPT = ("model", "backend", "threads")
"""What of a load can have several values in one command."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Elsewhere:
    """What a command is to ask for that its records do not say.

    `split` and `limit`: other prompts of the same set; `skip_layers`: a preset of skip-layer
    guidance, by the model's name for it; `results_dir` where that is not the default.
    """

    split: str | None = None
    limit: int | None = None
    skip_layers: str | None = None
    results_dir: str | None = None


def results_dir_of(path: Path) -> str | None:
    """The folder of the studies, where a command has to name it."""
    return None if path.parent == Path(_DEFAULT_RESULTS) else str(path.parent)


# A load ----------------------------------------------------------------------------------------


def load_overrides(load: Load) -> Said:
    """Everything that a command has to say for a run to hold this very load."""
    return {name: text for said in OF_LOADS.values() for name, text in said(load).items()}


def _model(load: Load) -> Said:
    model = load.model
    return {"model": model.name if model.weights == "checkpoint" else architecture_name(model)}


def _options(load: Load) -> Said:
    """A backend's options; a hosted one's live under `remote.`."""
    own = sorted(load.backend.options.items())
    found = {f"backend.{k}": _text(v) for k, v in own if k not in ("base_url", "slug")}
    return remote_overrides([load]) | found


def remote_overrides(loads: Iterable[Load]) -> dict[str, str]:
    """Overrides that say where hosted backends among `loads` are called; empty without any."""
    options = [o for load in loads if "base_url" in (o := load.backend.options)]
    urls = sorted({str(o["base_url"]) for o in options})
    found = {"remote.base_url": ",".join(urls)} if urls else {}
    slugs = sorted({str(o["slug"]) for o in options if o.get("slug") is not None})
    if slugs:
        found["remote.slug"] = ",".join(slugs)
    if any(url.startswith("http:") for url in urls):
        found["remote.allow_loopback"] = "true"
    return found


def _threads(load: Load) -> Said:
    threads = load.known_threads
    return {} if threads is None else {"threads": str(threads)}


def _path(load: Load) -> Said:
    """Where the weights are; that of what lies in the Hub's cache names its revision."""
    return {} if _is_found(load.model) else {"model.path": quoted(load.model.path)}


def _components(load: Load) -> Said:
    path = load.model.components
    return {} if path is None or _is_found(load.model) else {"model.components": quoted(path)}


def _is_found(model: ModelSpec) -> bool:
    """Whether a run finds these weights unasked."""
    if model.weights != "checkpoint" or model.path in ("", str(NANO_WEIGHTS)):
        return True
    return model.weights_digest == _packaged()


@lru_cache(maxsize=1)
def _packaged() -> str | None:
    """Digest of the weights in the package; ``None`` where they were not installed."""
    return weights_digest(NANO_WEIGHTS) if NANO_WEIGHTS.is_dir() else None


def _changes(load: Load) -> Said:
    """What changes the weights."""
    changes = load.model.changes
    found = {f"model.{c.kind}": quoted(c.path) for c in changes if c.kind != "lora"}
    loras = [f"{c.path}:{c.weight!r}" for c in changes if c.kind == "lora"]
    return found | ({"model.lora": quoted(",".join(loras))} if loras else {})


def _with_random(name: str, usual: Any) -> Callable[[Load], Said]:
    """A field that says how a model of random weights is built."""

    def said(load: Load) -> Said:
        value = getattr(load.model, name)
        is_usual = value == usual or load.model.weights != "random"
        return {} if is_usual else {f"model.{name}": _text(value)}

    return said


def _variant(load: Load) -> Said:
    return {} if load.model.variant is None else {"model.variant": load.model.variant}


OF_LOADS: dict[str, Callable[[Load], Said]] = {
    "model.name": _model,
    "backend.name": lambda load: {"backend": load.backend.name},
    "backend.options": _options,
    "threads": _threads,
    "model.path": _path,
    "model.components": _components,
    "model.changes": _changes,
    "model.variant": _variant,
    "model.weights": _with_random("weights", "checkpoint"),
    "model.layers": _with_random("layers", None),
    "model.text_encoders": _with_random("text_encoders", False),
}
"""How each field of a load is said on a command line."""
IMPLIED = {
    "backend.kind": "the backend's YAML file",
    "model.family": "the model's YAML file",
    "model.max_sequence_length": "the model's YAML file",
    "model.target_latency_s": "the model's YAML file; it is nothing of an image",
    "model.weights_digest": "the files",
    "model.revision": "model.path, which names it",
}
"""Fields of a load that a command need not say, and what they follow from."""


# A request -------------------------------------------------------------------------------------


def asked_overrides(
    load: Load, requests: Sequence[Request], skip_layers: str | None = None
) -> Said:
    """What a command asks for: of each field all values, nothing where a run has them unasked.

    `skip_layers`: a preset to ask for where these requests have none.
    """
    said = {}
    for name in (name for name in SETTING if FIELDS[name].typed):
        values = {getattr(request, name) for request in requests}
        own = name == "sampler" and load.model.family != "sd3"  # the model's own is another
        if own or not all(is_unasked(name, value) for value in values):
            said[name] = ",".join(_asked_text(name, v) for v in sorted(values, key=_place))
    if skip_layers is not None:
        said.setdefault("skip_layer_guidance", skip_layers)
    last = said.pop("skip_layer_guidance", None)
    own_inputs: dict[str, dict[str, None]] = {}
    for name, value in (pair for request in requests for pair in request.extra):
        own_inputs.setdefault(f"extra.{name}", {})[_own_value(value)] = None
    roles = dict.fromkeys(role for request in requests for role, _ in request.images)
    return {
        **said,
        **({} if last is None else {"skip_layer_guidance": last}),
        **{name: ",".join(values) for name, values in own_inputs.items()},
        **{f"images.{role}": f"{role.upper()}_FILE" for role in roles},
    }


def _asked_text(name: str, value: Any) -> str:
    if value is None:
        return "none" if FIELDS[name].unasked == "none" else "null"
    return _text(value)


def _place(value: Any) -> tuple[bool, float, str]:
    """Numbers by size, texts by the alphabet, what is the model's own last."""
    is_number = isinstance(value, int | float)
    return value is None, value if is_number else 0.0, "" if is_number else _text(value)


def negative_overrides(negatives: tuple[str, ...] | None) -> list[str]:
    """Negative prompts to ask for; none where there are none, or where the prompts bring them."""
    if negatives is None or negatives in ((), ("",)):
        return []
    return [f"negative_prompt={','.join(map(quoted, negatives))}"]


# Prompts ---------------------------------------------------------------------------------------


def prompt_overrides(records: Some, asked: Elsewhere) -> list[str]:
    """Which prompts: nano's generated set exactly, a file by its name; `prompt` is repeated."""
    first = records[0].trial.prompt
    split = first.split if asked.split is None else asked.split
    count = _reach(records) if asked.limit is None else asked.limit
    limit = [] if count is None else [f"prompts.limit={count}"]
    if first.set == "nano":
        task = _nano_set(first)
        if records[0].trial.request.init_image is not None and "prompts.task=edit" not in task:
            task.append("init_image=INIT_FILE")  # one for all; a record has its digest only
        return ["prompts=nano", f"prompts.split={split}", *task, *limit]
    if first.set == "starter.txt":
        return ["prompts=starter", f"prompts.split={split}", *limit]
    part = [f"prompts.split={split}"]
    if first.set == "given":
        given = dict(zip(prompt_refs(records, "id"), texts(records, "prompt"), strict=True))
        return [f"prompt={quoted(given[number])}" for number in sorted(given)]
    if first.set in ("geneval", "coco"):
        path = first.source.get("path", f"{first.set.upper()}_FILE")
        part = [] if split == "all" else part
        return [f"prompts={first.set}", f"prompts.path={quoted(path)}", *part, *limit]
    source = {"path": first.set, **first.source}
    file = [f"prompts.{name}={quoted(value)}" for name, value in source.items()]
    return ["prompts=file", *file, *part, *limit]


def _nano_set(ref: PromptRef) -> list[str]:
    """Which of nano's sets, where it is not the usual one; ids are split-kind-seed-number."""
    _, kind, seed, _ = ref.id.split("-")
    task = [] if kind == "t2i" else [f"prompts.task={kind}"]
    return task if seed == "0" else [*task, f"prompts.seed={seed}"]


def _reach(records: Some) -> int | None:
    """How many of a set's first prompts hold all of the records'; ``None``: only the whole does.

    A prompt's number is its place in the set or, of a file, in all splits together, so that of one
    split the same number of prompts reaches as far or farther. COCO and files with identifiers of
    their own do not tell the place.
    """
    first = records[0].trial.prompt.set
    refs = distinct_refs(records, "set", "id")
    numbers = [number.rpartition("-")[2] if name == "nano" else number for name, number in refs]
    width = 4 if first == "nano" else 5
    if first == "coco" or not all(n.isdecimal() and len(n) >= width for n in numbers):
        return None
    return max(len(prompts(records)), 1 + max(map(int, numbers)))


# Values ----------------------------------------------------------------------------------------


def _text(value: Any) -> str:
    """A value as an override: 4 for 4.0, true in YAML's words."""
    if isinstance(value, SkipLayerGuidance):
        return skip_layer_text(value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and float(f"{value:g}") == value:
        return f"{value:g}"
    return str(value)


def _own_value(value: Any) -> str:
    return quoted(value) if isinstance(value, str) else _text(value)


def quoted(text: str) -> str:
    """A text as an override's value: as it is where it is plain, else in Hydra's quotes."""
    if _PLAIN.fullmatch(text) and text.lower() not in _WORDS:
        return text
    # Hydra takes a backslash for itself only before a quotation mark.
    escaped = re.sub(r'(\\*)("|\Z)', lambda m: m[1] * 2 + m[2].replace('"', '\\"'), text)
    return f'"{escaped}"'
