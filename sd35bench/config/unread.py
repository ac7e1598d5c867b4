"""A field that nobody reads is refused: asked for in vain, it would be measured as if it acted.

Only what the command line itself sets counts; where some jobs of a sweep read a field, the others
ignore it, and their plans say so.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig

from sd35bench.config.model_inputs import has_input, known_inputs
from sd35bench.config.model_weights import ON_TOP
from sd35bench.errors import ConfigError, nearest
from sd35bench.prompts import READERS, prompt_set
from sd35bench.remote.inputs import EXTRA, IMAGE
from sd35bench.remote.providers import is_provider

_FILES = tuple(kind for kind in READERS if kind not in ("nano", "given"))


def _is_hosted(conf: DictConfig) -> bool:
    return is_provider(conf.backend.kind)


def _values(conf: DictConfig, name: str) -> list[Any]:
    return list(conf.axes[name]) if conf.axes[name] else [conf[name]]


def _takes(name: str) -> Callable[[DictConfig], bool]:
    return lambda conf: has_input(name, conf.model, conf.backend)


def _reads(name: str, *kinds: str) -> Callable[[DictConfig], bool]:
    """Whether prompts of these kinds, or of a plug-in that says so, read a field."""

    def reads(conf: DictConfig) -> bool:
        kind = conf.prompts.kind
        return kind in kinds or (kind not in READERS and name in prompt_set(kind).reads)

    return reads


_NO_INPUT = "the hosted model has no input for it"
_HERE = (lambda conf: not _is_hosted(conf), "it acts on backends that run here")
_WEIGHTS = (lambda conf: conf.backend.needs_weights, "no backend of this run reads weights")
_FILE = (lambda conf: conf.prompts.kind == "file", "only prompts=file reads it")
_NANO = (
    lambda conf: conf.prompts.kind == "nano",
    "it is of generated sets; only prompts=nano reads it",
)
_INITS = (
    lambda conf: conf.init_image is not None or conf.prompts.kind == "file",
    "it is of init images; give init_image=FILE",
)
READS: Mapping[str, tuple[Callable[[DictConfig], bool], str]] = {
    "remote.": (_is_hosted, "it acts on hosted services; add a backend such as backend=eachlabs"),
    "remote.auth": (
        lambda conf: conf.backend.kind == "eachlabs",
        "only backend=eachlabs has two headers for a key",
    ),
    "model.path": _WEIGHTS,
    "model.weights": _WEIGHTS,
    "model.layers": _WEIGHTS,
    "model.text_encoders": _WEIGHTS,
    "model.components": _WEIGHTS,
    "timed_limit": (
        lambda conf: _is_hosted(conf) or 1 not in _values(conf, "batch_size"),
        "every trial is timed at batch_size=1; leave it out",
    ),
    **{f"model.{name}": _WEIGHTS for name in ON_TOP},
    "threads": _HERE,
    "starts": _HERE,
    "workers": _HERE,
    "engine": _HERE,
    "ray.": (lambda conf: conf.engine == "ray", "it acts with engine=ray only; add engine=ray"),
    "max_failures": _HERE,
    "deadline_s": _HERE,
    "memory_limit_gb": _HERE,
    "keep_latents": _HERE,
    "contention": _HERE,
    "noise_floor": _HERE,
    "prompts.path": (
        _reads("path", *_FILES),
        f"these prompts are no file; add prompts={_FILES[0]}",
    ),
    "prompts.columns.": _FILE,
    "prompts.skip_empty": _FILE,
    "prompts.first_frame": _INITS,
    "prompts.init_background": _INITS,
    "prompts.task": _NANO,
    "prompts.seed": (_reads("seed", "nano"), _NANO[1]),
    "steps": (_takes("steps"), _NO_INPUT),
    "cfg": (_takes("cfg"), _NO_INPUT),
    "output_format": (_takes("output_format"), _NO_INPUT),
    "output_quality": (
        lambda conf: any(name != "png" for name in _values(conf, "output_format")),
        "it acts on jpg and webp; add output_format=webp",
    ),
}
"""Field, or what fields begin with: which configurations read it, and what to do where none does.

A field that is not here is read by every run, or refused elsewhere (`freeze`).
"""


def refuse_unread(asked: Sequence[str], configs: Sequence[DictConfig]) -> None:
    """Refuse what the command line sets and no job of the sweep reads.

    `asked`: NAME=VALUE as typed. Raises: ConfigError naming field, value and remedy.
    """
    for text in asked:
        name = text.partition("=")[0].lstrip("+")
        if name.startswith((EXTRA, IMAGE)) and not any(_takes(name)(conf) for conf in configs):
            raise ConfigError(f"{text.lstrip('+')}: {_no_input(name, configs)}")
        for prefix, (reads, why) in READS.items():
            named = name.startswith(prefix) if prefix.endswith(".") else name == prefix
            if named and not any(reads(conf) for conf in configs):
                raise ConfigError(f"{text}: nothing in this run reads it: {why}")


def _no_input(name: str, configs: Sequence[DictConfig]) -> str:
    """Say that no model of the sweep has such an input, and which they have."""
    kind = EXTRA if name.startswith(EXTRA) else IMAGE
    known = {n for conf in configs for n in known_inputs(conf.model, conf.backend)}
    has = sorted(n for n in known if n.startswith(kind))
    said = f"there are {', '.join(has)}" if has else "there are none"
    return f"nothing in this run has such an input; {said}{nearest(name, has)}"
