"""Which trials belong together: settings, pairs, prompts.

A *setting* is a trial without prompt and seed: the unit that is compared and recommended. A *pair*
is what two trials must share to be compared image by image. Both are computed for every record of
a study, so they build plain tuples and hash a setting only once.
"""

from collections import defaultdict
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from sd35bench.types import Load, Record, Request, SkipLayerGuidance, Trial, content_hash, to_json

__all__ = [
    "HELD_OUT",
    "PairKey",
    "cluster_key",
    "is_hosted",
    "pair_key",
    "setting_fields",
    "setting_key",
    "shared_negatives",
]

PairKey = tuple[str, str, int, int, int, str | None]
HELD_OUT = "heldout"
"""The split on which a choice is confirmed, and which no choice may see."""


def setting_key(trial: Trial) -> str:
    """Short content hash (12 hex digits) of a trial's setting; batch size is not part of it."""
    return _hash(_identity(trial))


def pair_key(trial: Trial) -> PairKey:
    """Prompt, negative prompt, seed, width, height and init image of a trial."""
    r = trial.request
    return (r.prompt, r.negative_prompt, r.seed, r.width, r.height, r.init_image)


def is_hosted(load: Load) -> bool:
    """Whether a hosted service makes the images; its backends alone have a base URL."""
    return "base_url" in load.backend.options


def cluster_key(trial: Trial) -> tuple[str, str | None]:
    """Name what resampling draws together: a prompt (with its init image) in all its seeds."""
    return (trial.request.prompt, trial.request.init_image)


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
    load, request = record.trial.load, record.trial.request
    return {
        "setting": setting_key(record.trial),
        "model": load.model.name,
        "weights_digest": None if is_hosted(load) else load.model.weights_digest,
        "backend": load.backend.name,
        "backend_options": dict(load.backend.options),
        "threads": None if is_hosted(load) else load.threads,
        "task": request.task.value,
        "steps": request.steps,
        "cfg": request.cfg,
        "prompt_strength": request.prompt_strength,
        "sampler": request.sampler,
        "shift": request.shift,
        "skip_layer_guidance": to_json(request.skip_layer_guidance),
        "max_sequence_length": request.max_sequence_length,
        "width": request.width,
        "height": request.height,
        "output_format": request.output_format,
        "output_quality": request.output_quality,
    }


def _identity(trial: Trial) -> tuple[Any, ...]:
    load, model, backend = trial.load, trial.load.model, trial.load.backend
    options = tuple(sorted(backend.options.items()))
    head = (model.name, model.weights_digest, backend.name, backend.kind, options, load.threads)
    return head + _request_identity(trial.request)


def _request_identity(r: Request) -> tuple[Any, ...]:
    # The task is there because an init image without a strength is another setting than none.
    return (
        r.task.value,
        r.steps,
        float(r.cfg),
        r.prompt_strength,
        r.sampler,
        r.shift,
        _layers(r.skip_layer_guidance),
        r.max_sequence_length,
        r.width,
        r.height,
        r.output_format,
        r.output_quality,
    )


def _layers(guidance: SkipLayerGuidance | None) -> tuple[Any, ...] | None:
    if guidance is None:
        return None
    return (tuple(guidance.layers), guidance.scale, guidance.start, guidance.stop)


@lru_cache(maxsize=65536)
def _hash(identity: tuple[Any, ...]) -> str:
    return content_hash(to_json(identity))[:12]
