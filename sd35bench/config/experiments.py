"""A stored experiment with another model than the one it was made for.

An experiment's prompt set and batch size are those of its own model: `defaults` has nano's coloured
shapes, 24 images of 64 px a call. Another model gets its own prompts, and one image a call, unless
the command line says otherwise.
"""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sd35bench.config.files import config_dir
from sd35bench.disk import read_yaml
from sd35bench.errors import ConfigError

_PROMPTS = ("prompts", "prompt", "prompts.path")


def with_models_own(
    settings: Sequence[str], extra: Path | None = None
) -> tuple[list[str], list[str]]:
    """The command line with the model's own prompts and batch size, and what was changed in words.

    `settings` are ``NAME=VALUE`` texts, of which only those with `experiment` and another `model`
    change; `extra` is a folder of the user's own YAML files.

    Raises: ConfigError where several models have unlike prompt sets.
    """
    given = {name: value for name, _, value in (text.partition("=") for text in settings)}
    experiment = _read("experiment", given.get("experiment", ""), extra)
    theirs, models = _default(experiment, "model"), given.get("model", "").split(",")
    if theirs is None or models in ([""], [theirs]):
        return list(settings), []
    added, said = [], []
    if not any(name in given for name in _PROMPTS):
        kept = _default(experiment, "prompts")
        own = {model: _prompts_of(model, extra) for model in models}
        if len(set(own.values())) > 1:
            listed = ", ".join(f"{model}: {name}" for model, name in own.items())
            raise ConfigError(
                f"experiment={given['experiment']}: the models have prompt sets of their own"
                f" ({listed}); give one for all, prompts=NAME"
            )
        (name,) = set(own.values())
        if None not in (name, kept) and name != kept:
            added.append(f"prompts={name}")
            said.append(f"prompts={name}, not {kept}")
    batch = experiment.get("batch_size", 1)
    if "batch_size" not in given and batch != 1:
        added.append("batch_size=1")
        said.append(f"batch_size=1, not {batch}")
    if not said:
        return list(settings), []
    note = f"experiment={given['experiment']} was made for {theirs}; here {given['model']}:"
    return [*settings, *added], [f"{note} {'; '.join(said)}"]


def _read(group: str, name: str, extra: Path | None) -> Mapping[str, Any]:
    """A group's YAML file; nothing where there is none, which composing refuses."""
    for folder in filter(None, (extra, config_dir())):
        path = folder / group / f"{name}.yaml"
        if name and path.is_file():
            with contextlib.suppress(ValueError):  # composing says what is wrong with it
                found = read_yaml(path)
                return found if isinstance(found, Mapping) else {}
    return {}


def _default(file: Mapping[str, Any], group: str) -> str | None:
    """What a file's defaults list chooses of a group."""
    for entry in file.get("defaults") or ():
        for key, value in entry.items() if isinstance(entry, Mapping) else ():
            if key.removeprefix("override ").lstrip("/").partition("@")[0] == group:
                return str(value)
    return None


def _prompts_of(model: str, extra: Path | None) -> str | None:
    """The prompt set of a model's file, or of the model that it is made from."""
    file = _read("model", model, extra)
    found = _default(file, "prompts")
    bases = [e for e in file.get("defaults") or () if isinstance(e, str)]
    for base in bases if found is None else ():
        if base not in ("schema", "_self_", model):
            found = _prompts_of(base, extra)
    return found
