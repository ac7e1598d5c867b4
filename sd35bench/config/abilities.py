"""What a model on a backend can do: tasks, samplers, skip-layer guidance; refused before running.

A model's YAML says what its scheduler and denoiser allow, a backend's what it has built; a sweep
must stay inside both. No weights are looked at: that is the backend's own, later, check.
"""

from collections.abc import Iterable
from dataclasses import replace

from sd35bench.config.fields import nearest
from sd35bench.config.schema import BackendConf, ModelConf
from sd35bench.errors import ConfigError
from sd35bench.guidance import parse_skip_layers
from sd35bench.types import SkipLayerGuidance, Task

__all__ = ["check_family", "check_task", "sampler_axis", "skip_layer_axis"]

OFF = "none"
WRITTEN = "LAYERS@SCALE:START-STOP (such as 7-8-9@2.5:0.01-0.2)"


def check_family(model: ModelConf, backend: BackendConf) -> None:
    """Refuse a model that the backend cannot run.

    Raises: ConfigError.
    """
    if model.family not in backend.families:
        raise ConfigError(
            f"backend={backend.name}: it runs models of the family {', '.join(backend.families)}"
            f" only, {model.name} is of {model.family}; take backend=eager or backend=compile"
        )


def check_task(model: ModelConf, backend: BackendConf, task: Task) -> None:
    """Refuse a task that the model or the backend does not do.

    Raises: ConfigError.
    """
    for who, tasks in ((model.name, model.tasks), (f"backend {backend.name}", backend.tasks)):
        if task.value not in tasks:
            field = "init_image" if task is Task.IMAGE_TO_IMAGE else "prompts.task=t2i"
            raise ConfigError(
                f"{field}: {who} does {', '.join(tasks)} only, these prompts ask for {task.value};"
                " take other prompts, another model or another backend"
            )


def sampler_axis(
    model: ModelConf, backend: BackendConf, asked: Iterable[str | None]
) -> tuple[str, ...]:
    """Return the samplers; ``None``, and none at all, mean the model's first.

    Raises: ConfigError for one that the model's scheduler or the backend does not allow.
    """
    values = tuple(model.samplers[0] if name is None else name for name in asked)
    values = values if values else (model.samplers[0],)
    for name in values:
        for who, known in (
            (model.name, model.samplers),
            (f"backend {backend.name}", backend.samplers),
        ):
            if name not in known:
                raise ConfigError(f"sampler={name}: {who} has {', '.join(known)}")
    return values


def skip_layer_axis(
    model: ModelConf,
    backend: BackendConf,
    presets: tuple[str, ...],
    scales: tuple[float | None, ...],
) -> tuple[SkipLayerGuidance | None, ...]:
    """Return every preset under every scale, each once; "none" has no scale.

    Raises: ConfigError for an unknown preset, a scale without guidance, a model or backend
    without layers to leave out.
    """
    found: dict[SkipLayerGuidance | None, None] = {}
    for name in presets:
        if name == OFF:
            found[None] = None
            continue
        preset = _preset(model, backend, name)
        for scale in scales if scales else (None,):
            found[preset if scale is None else replace(preset, scale=scale)] = None
    given = [scale for scale in scales if scale is not None]
    if given and set(found) == {None}:
        raise ConfigError(
            f"skip_layer_scale={given[0]:g}: it acts only with skip_layer_guidance; give"
            " skip_layer_guidance=NAME or leave skip_layer_scale out"
        )
    return tuple(found)


def _preset(model: ModelConf, backend: BackendConf, name: str) -> SkipLayerGuidance:
    if not backend.skip_layers or not model.skip_layer_guidance:
        who = model.name if backend.skip_layers else f"backend {backend.name}"
        raise ConfigError(
            f"skip_layer_guidance={name}: {who} cannot leave layers out; use"
            " skip_layer_guidance=none"
        )
    written = parse_skip_layers(name)
    if written is None:
        if name not in model.skip_layer_guidance:
            known = ", ".join([OFF, *model.skip_layer_guidance])
            raise ConfigError(
                f"skip_layer_guidance={name}: {model.name} has {known}, or write {WRITTEN}"
                f"{nearest(name, model.skip_layer_guidance)}"
            )
        preset = model.skip_layer_guidance[name]
        written = SkipLayerGuidance(
            layers=tuple(preset.layers), scale=preset.scale, start=preset.start, stop=preset.stop
        )
    if not 0 <= written.start < written.stop <= 1 or not written.layers or written.scale <= 0:
        raise ConfigError(
            f"skip_layer_guidance={name}: needs layers, a scale above 0 and 0 <= start < stop <= 1"
        )
    return written
