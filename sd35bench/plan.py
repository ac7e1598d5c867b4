"""Turn a sweep into ordered, keyed, batched trials; pure and torch-free.

Three ideas decide the order, and with it what can be compared later:

- *No point twice.* Axis values that ask for the same image are collapsed before anything runs,
  and the plan's notes say so: guidance is off at every cfg <= 1, a strength acts only through the
  number of steps it leaves, PNG has no quality, and without guidance a negative prompt,
  guidance rules, their interval and skip-layer guidance are unused.
- *Blocks.* One prompt and seed under every setting, in seeded random order, is one block; blocks
  are in seeded random order too. A machine that warms up or slows down touches all settings alike.
- *Fixed batches.* For larger batches a block is a group of prompt-and-seed cells, so a batch's
  companions follow from the plan alone and redoing one image runs the same batch again.

Random order is a sort by content hash: the same in every process and Python version, and at batch 1
adding a prompt moves no other.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sd35bench.core.guidance import Kind
from sd35bench.errors import ConfigError
from sd35bench.evaluations import acting_steps, last_masked, planned_calls, work
from sd35bench.fields import FIELDS, PAIR, SETTING, make_trial, value_text
from sd35bench.prompts import PromptItem, encoder_fields
from sd35bench.types import Load, Request, Scalar, SkipLayerGuidance, Task, Trial, content_hash

AxisValue = Scalar | SkipLayerGuidance | tuple[tuple[str, Scalar], ...]

SETTING_AXES = tuple(name for name in SETTING if name not in PAIR)
"""Request fields that make a setting, but the size; in the order in which a grid is written."""

PAIR_AXES = tuple(name for name in PAIR if FIELDS[name].axis and name not in SETTING)
"""Request fields that, with the prompt and the size, make a pair."""

PNG_QUALITY = FIELDS["output_quality"].quiet
"""What `output_quality` says for PNG, which has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """What to run on one load.

    `axes` maps a request field to its values, one value for a point; `steps` and `cfg` must be
    there, what is absent has `Request`'s default. `sizes` are (width, height) in px.
    `prompt_strength` values apply to the items that carry an init image. Every image is made
    once at each of `batch_sizes`. Where 1 is not among them, the first `timed_limit` prompts run
    once more at batch 1, with the first seed, for latencies. `images` are the files of input
    images by digest.
    """

    load: Load
    prompts: tuple[PromptItem, ...]
    axes: Mapping[str, tuple[AxisValue, ...]]
    sizes: tuple[tuple[int, int], ...]
    batch_sizes: tuple[int, ...] = (1,)
    timed_limit: int = 0
    order_seed: int = 0
    notes: tuple[str, ...] = ()
    images: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Batch:
    """Trials that run together: one setting and one size."""

    trials: tuple[Trial, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Batches in the order in which they run.

    `inits` maps the SHA-256 of each init or input image to its file's bytes; `notes` says in plain
    words what was collapsed. `timed_batch_sizes` are those whose times count: they are warmed up.
    """

    load: Load
    batches: tuple[Batch, ...]
    inits: dict[str, bytes] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    timed_batch_sizes: frozenset[int] = frozenset({1})

    @property
    def trials(self) -> tuple[Trial, ...]:
        """All trials in order."""
        return tuple(trial for batch in self.batches for trial in batch.trials)


@dataclass(frozen=True, slots=True)
class _Cell:
    """One image's content apart from its setting: prompt, negative prompt, seed.

    `unguided`: whether it runs at cfg <= 1, where cells that differ only in the negative prompt
    are the same image; the first of them does.
    """

    item: PromptItem
    negative_prompt: str
    seed: int
    init: str | None
    digest: str
    unguided: bool


def expand(sweep: Sweep) -> Plan:
    """Expand a sweep into a plan; the same sweep gives the same plan everywhere.

    Raises: ConfigError where the sweep asks for no trial, or sweeps an axis without effect.
    """
    notes = list(sweep.notes)
    axes = _collapsed_axes(sweep, notes)
    inits = {_digest(i.init_image): i.init_image for i in sweep.prompts if i.init_image is not None}
    if not inits and "prompt_strength" in axes:
        raise ConfigError(
            "prompt_strength acts only on an init image and this prompt set has none: leave it out,"
            " or give init_image=FILE or a prompt set with init images"
        )
    cells = _cells(sweep, axes, notes)
    notes += _unused_negatives(cells, axes["cfg"])
    expander = _Expander(sweep, axes, notes)
    blocks: list[tuple[str, list[Batch]]] = []
    sizes = _batch_sizes(sweep, notes)
    for size, is_edit in itertools.product(sizes, (False, True)):
        blocks += expander.blocks([c for c in cells if (c.init is not None) == is_edit], size)
    if 1 not in sizes:
        blocks += expander.blocks(_timed_cells(sweep, cells, axes), 1)
    blocks.sort(key=lambda block: block[0])
    batches = tuple(batch for _, block in blocks for batch in block)
    if not batches:
        raise ConfigError("the sweep asks for no image: give at least one prompt and one seed")
    _refuse_idle(axes, batches, notes)
    return Plan(
        load=sweep.load,
        batches=batches,
        inits={**inits, **sweep.images},
        notes=_unique(notes),
        timed_batch_sizes=frozenset(sizes) if len(sizes) > 1 else frozenset({1}),
    )


class _Expander:
    """Builds blocks of batches."""

    def __init__(
        self, sweep: Sweep, axes: Mapping[str, tuple[AxisValue, ...]], notes: list[str]
    ) -> None:
        self._sweep, self._axes, self._notes = sweep, axes, notes
        self._settings: dict[bool, list[dict[str, Any]]] = {}

    def blocks(self, cells: Sequence[_Cell], size: int) -> Iterator[tuple[str, list[Batch]]]:
        """Yield (sort key, batches) for groups of `size` cells under every setting."""
        for start in range(0, len(cells), size):
            group = cells[start : start + size]
            name = content_hash([self._sweep.order_seed, size, [c.digest for c in group]])
            keyed = []
            for setting in self._settings_of(image_to_image=group[0].init is not None):
                batch = self._batch(group, setting, size)
                if batch.trials:
                    keyed.append((_mix(name, batch.trials[0].key), batch))
            keyed.sort(key=lambda pair: pair[0])
            yield name, [batch for _, batch in keyed]

    def _batch(self, cells: Sequence[_Cell], setting: dict[str, Any], size: int) -> Batch:
        trials = []
        for cell in cells:
            if setting["cfg"] <= 1 and not cell.unguided:
                self._notes.append(
                    f"at cfg {setting['cfg']:g} guidance is off and negative_prompt has no effect:"
                    " its values run once there"
                )
                continue
            request = Request(
                prompt=cell.item.prompt,
                negative_prompt=cell.negative_prompt,
                seed=cell.seed,
                init_image=cell.init,
                **encoder_fields(cell.item),
                **setting,
            )
            trials.append(
                make_trial(
                    load=self._sweep.load, request=request, batch_size=size, prompt=cell.item.ref
                )
            )
        return Batch(tuple(trials))

    def _settings_of(self, image_to_image: bool) -> list[dict[str, Any]]:
        if image_to_image not in self._settings:
            self._settings[image_to_image] = self._grid(image_to_image)
        return self._settings[image_to_image]

    def _grid(self, image_to_image: bool) -> list[dict[str, Any]]:
        """Every setting once, as keyword arguments of `Request`."""
        names = [n for n in SETTING_AXES if n in self._axes]
        if not image_to_image:
            names = [n for n in names if n != "prompt_strength"]
        grid: dict[tuple[Any, ...], dict[str, Any]] = {}
        for size, values in itertools.product(
            self._sweep.sizes, itertools.product(*(self._axes[name] for name in names))
        ):
            setting: dict[str, Any] = dict(zip(names, values, strict=True))
            setting["width"], setting["height"] = size
            if setting.get("output_format", "png") == "png":
                setting["output_quality"] = PNG_QUALITY
            self._settle_guidance(setting, image_to_image)
            identity = _setting_identity(setting)
            if identity not in grid:
                grid[identity] = setting
                continue
            kept, left = grid[identity].get("prompt_strength"), setting.get("prompt_strength")
            if kept != left:
                self._notes.append(
                    f"prompt_strength {left:g} at {setting['steps']} steps is the same image as"
                    f" {kept:g} (as many steps run): left out"
                )
        return list(grid.values())

    def _settle_guidance(self, setting: dict[str, Any], image_to_image: bool) -> None:
        """Take out the fields of guidance that cannot act, and say so.

        Raises: ConfigError where no step is left.
        """
        for name, why in idle_guidance(setting, image_to_image).items():
            setting[name] = FIELDS[name].quiet
            self._notes.append(f"{name} has no effect {why}: it runs without, once")
        if not work(_probe(setting, image_to_image)).calls:
            raise ConfigError(
                f"zero_init_steps={setting.get('zero_init_steps', 1)}: at {setting['steps']} steps"
                " nothing would ever move; give more steps"
            )


def idle_guidance(setting: Mapping[str, Any], image_to_image: bool) -> dict[str, str]:
    """Say why fields of guidance cannot act in a setting; those that can are left out.

    `setting`: keyword arguments of `Request` that differ from its defaults.
    """
    found: dict[str, str] = {}
    for name, find in _IDLE.items():
        asked = _probe({**setting, **{n: FIELDS[n].quiet for n in found}}, image_to_image)
        why = None if getattr(asked, name) == FIELDS[name].quiet else find(asked)
        if why is not None:
            found[name] = why
    return found


def _unguided(asked: Request) -> str | None:
    return f"at cfg {asked.cfg:g} (guidance is off)" if asked.cfg <= 1 else None


def _of_rule(rule: str) -> Callable[[Request], str | None]:
    """Idle but with a rule of guidance, which has found out first whether it acts."""
    return lambda r: None if r.guidance == rule else f"with guidance={r.guidance} (it is {rule}'s)"


def _idle_interval(asked: Request) -> str | None:
    if asked.cfg <= 1:
        return _unguided(asked)
    whole = replace(asked, guidance_interval="0-1", step_cache="none")
    if planned_calls(replace(whole, guidance_interval=asked.guidance_interval)) == planned_calls(
        whole
    ):
        return f"at {asked.steps} steps (guidance acts at every one)"
    return None


def _idle_cache(asked: Request) -> str | None:
    last = last_masked(asked.step_cache)
    if last >= asked.steps:
        return f"at {asked.steps} steps (it names step {last})"
    if not any(call.kind is Kind.PREDICTED for call in planned_calls(asked)):
        return f"at {asked.steps} steps (every one is evaluated)"
    return None


def _idle_skip_layers(asked: Request) -> str | None:
    if asked.task is Task.IMAGE_TO_IMAGE:
        return "in image-to-image (diffusers has none there)"
    skipping = asked.skip_layer_guidance
    if asked.cfg <= 1 or skipping is None:
        return _unguided(asked)
    if not acting_steps(skipping, asked.steps):
        return (
            f"at {asked.steps} steps (it acts after the first, between {skipping.start:g} and"
            f" {skipping.stop:g} of them)"
        )
    if not work(asked).skipped:
        return f"at {asked.steps} steps (where it would act, nothing is guided or evaluated)"
    return None


_IDLE: Mapping[str, Callable[[Request], str | None]] = {
    "guidance": _unguided,
    "zero_init_steps": _of_rule("cfg-zero-star"),
    "apg_eta": _of_rule("apg"),
    "apg_norm": _of_rule("apg"),
    "apg_momentum": _of_rule("apg"),
    "guidance_interval": _idle_interval,
    "step_cache": _idle_cache,
    "skip_layer_guidance": _idle_skip_layers,
}
"""Why a field cannot act; asked in this order, each after those before it were taken out."""


def _refuse_idle(
    axes: Mapping[str, tuple[AxisValue, ...]], batches: Sequence[Batch], notes: Sequence[str]
) -> None:
    """Refuse a field of guidance that acts on no trial. Raises: ConfigError."""
    for name in _IDLE:
        quiet = FIELDS[name].quiet
        given = [value for value in axes.get(name, ()) if value != quiet]
        if not given or any(getattr(t.request, name) != quiet for b in batches for t in b.trials):
            continue
        why = next(note for note in notes if note.startswith(f"{name} has no effect"))
        reason = why.removeprefix(f"{name} has ").removesuffix(": it runs without, once")
        raise ConfigError(f"{name}={value_text(given[0])}: {reason}; {_remedy(name)}leave it out")


def _remedy(name: str) -> str:
    if name == "skip_layer_guidance":
        return "give text-to-image prompts, cfg > 1 and enough steps, or "
    return ""


def _cells(
    sweep: Sweep, axes: Mapping[str, tuple[AxisValue, ...]], notes: list[str]
) -> list[_Cell]:
    """Every (prompt, negative prompt, seed) in seeded random order, each once."""
    cells: dict[str, _Cell] = {}
    unguided: set[tuple[Any, ...]] = set()
    for item in sweep.prompts:
        init = None if item.init_image is None else _digest(item.init_image)
        own = item.negative_prompt
        negatives = axes.get("negative_prompt", ("",)) if own is None else (own,)
        for negative, seed in itertools.product(negatives, axes.get("seed", (0,))):
            what = [sweep.order_seed, item.prompt, negative, seed, init]
            digest = content_hash([*what, *filter(None, [encoder_fields(item)])])
            if digest in cells:
                notes.append("prompts that are alike in everything asked for are run once")
                continue
            image = (item.prompt, seed, init, *encoder_fields(item).items())
            first = image not in unguided
            unguided.add(image)
            cells[digest] = _Cell(item, str(negative), _int(seed), init, digest, first)
    return sorted(cells.values(), key=lambda cell: cell.digest)


def _batch_sizes(sweep: Sweep, notes: list[str]) -> tuple[int, ...]:
    sizes = _unique(sweep.batch_sizes)
    if not sizes or min(sizes) < 1:
        raise ConfigError(f"batch_size={list(sizes)}: give at least one, each at least 1")
    if len(sizes) < len(sweep.batch_sizes):
        notes.append("batch_size: one was given more than once; each value runs once")
    return sizes


def _timed_cells(
    sweep: Sweep, cells: Sequence[_Cell], axes: Mapping[str, tuple[AxisValue, ...]]
) -> list[_Cell]:
    """The cells of the first prompts that are run once more at batch 1, first seed only."""
    first_seed = axes.get("seed", (0,))[0]
    ids = {item.ref.id for item in sweep.prompts[: sweep.timed_limit]}
    timed = [c for c in cells if c.seed == first_seed and c.item.ref.id in ids]
    negatives = axes.get("negative_prompt", ("",))
    return [
        c for c in timed if c.item.negative_prompt is not None or c.negative_prompt == negatives[0]
    ]


def _collapsed_axes(sweep: Sweep, notes: list[str]) -> dict[str, tuple[AxisValue, ...]]:
    """Drop repeated values, and cfg values that are the same image."""
    axes: dict[str, tuple[AxisValue, ...]] = {}
    for name, values in sweep.axes.items():
        if name not in SETTING_AXES + PAIR_AXES:
            raise ConfigError(f"{name!r} is not a request field that can be swept")
        if not values:
            raise ConfigError(f"{name} has no value: give at least one")
        kept = _unique(values)
        if len(kept) < len(values):
            twice = ", ".join(f"{v}" for v in kept if values.count(v) > 1)
            notes.append(f"{name}: {twice} was given more than once; each value runs once")
        axes[name] = kept
    unguided = [c for c in axes["cfg"] if _number(c) <= 1]
    if len(unguided) > 1:
        keep = 1.0 if 1.0 in unguided else unguided[-1]
        same = " and ".join(f"{_number(c):g}" for c in unguided)
        notes.append(
            f"cfg {same} are the same image (guidance is off at cfg <= 1): only"
            f" {_number(keep):g} runs"
        )
        axes["cfg"] = tuple(c for c in axes["cfg"] if _number(c) > 1 or c == keep)
    formats = axes.get("output_format", ("png",))
    if "png" in formats and len(axes.get("output_quality", ())) > 1:
        notes.append("output_quality has no effect on png: png runs once, not once per quality")
    return axes


def _unused_negatives(cells: Sequence[_Cell], cfgs: tuple[AxisValue, ...]) -> list[str]:
    unguided = [f"{_number(c):g}" for c in cfgs if _number(c) <= 1]
    if not unguided or not any(cell.negative_prompt for cell in cells):
        return []
    return [f"negative prompts have no effect at cfg {unguided[0]}: guidance is off there"]


def _setting_identity(setting: Mapping[str, Any]) -> tuple[Any, ...]:
    """What of a setting reaches the pixels: a strength counts as the steps that it leaves."""
    values = {k: v for k, v in setting.items() if k != "prompt_strength"}
    strength = setting.get("prompt_strength")
    if strength is not None:
        values["effective"] = replace(
            _PROBE, steps=setting["steps"], prompt_strength=strength
        ).effective_steps
    return tuple(sorted(values.items(), key=lambda item: item[0]))


_PROBE = Request(prompt="", steps=1, cfg=1.0, seed=0, width=8, height=8)


def _probe(setting: Mapping[str, Any], image_to_image: bool) -> Request:
    """A request of a setting, whatever its prompt."""
    return replace(_PROBE, init_image="" if image_to_image else None, **setting)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _mix(*parts: str) -> str:
    return hashlib.sha256("/".join(parts).encode()).hexdigest()


def _unique(values: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(values))


def _number(value: AxisValue) -> float:
    if not isinstance(value, int | float):
        raise TypeError(f"expected a number, got {value!r}")
    return float(value)


def _int(value: AxisValue) -> int:
    if not isinstance(value, int):
        raise TypeError(f"expected an integer, got {value!r}")
    return value
