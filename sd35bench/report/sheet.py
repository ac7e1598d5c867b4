"""A contact sheet: one prompt and seed, a field along each side, an image a cell."""

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from sd35bench.analysis.grouping import setting_fields
from sd35bench.errors import ConfigError, nearest
from sd35bench.fields import value_text
from sd35bench.report.rows import size_rank
from sd35bench.study.store import Study
from sd35bench.types import Record, Status

LEAST_PX = 128
"""Smaller images are shown larger by a whole number, so that each pixel stays square."""
_GAP_PX = 4
_FONT_PX = 14
_MARGIN_PX = 6
_NO_AXIS = ("setting", "task", "weights_digest", "backend_options")


def contact_sheet(
    study: Study,
    prompt: str | int,
    x: str,
    y: str,
    seed: int | None = None,
    fixed: Mapping[str, Any] | None = None,
) -> Image.Image:
    """Draw the images of one prompt with field `x` along the top and `y` down the side.

    `prompt`: its text, a part of it that no other has, or its number from 0. `seed` ``None`` is the
    least. `fixed` keeps only settings with these values.

    Raises: ConfigError for a prompt or a field that is not there, and where settings that differ
    in a further field would share a cell.
    """
    records = _of_prompt(study, prompt)
    records = _of_seed(records, seed)
    rows = [(record, setting_fields(record)) for record in records]
    names = [name for name in rows[0][1] if name not in _NO_AXIS]
    for name in (x, y, *(fixed or {})):
        if name not in names:
            raise ConfigError(f"{name}: no field of a setting{nearest(name, names)}")
    for name, value in (fixed or {}).items():
        there = sorted({value_text(fields[name]) for _, fields in rows})
        rows = [(r, fields) for r, fields in rows if fields[name] == value]
        if not rows:
            raise ConfigError(f"{name}={value}: no image has it; there are {', '.join(there)}")
    cells: dict[tuple[Any, Any], Record] = {}
    for record, fields in sorted(rows, key=lambda row: row[0].trial.batch_size):
        cells.setdefault((fields[x], fields[y]), record)
    _refuse_shared([fields for _, fields in rows], {x, y}, (x, y))
    return _drawn(study, cells, (x, y))


def _of_prompt(study: Study, prompt: str | int) -> list[Record]:
    whole = study.images().whole
    records = [r for r in study.records() if r.status is Status.OK and r.image in whole]
    prompts = list(dict.fromkeys(r.trial.request.prompt for r in records))
    if isinstance(prompt, int):
        if not 0 <= prompt < len(prompts):
            raise ConfigError(f"prompt={prompt}: there are {len(prompts)} prompts with images")
        chosen = prompts[prompt]
    else:
        found = [p for p in prompts if p == prompt] or [p for p in prompts if prompt in p]
        if len(found) != 1:
            few = "; ".join((found or prompts)[:3])
            raise ConfigError(f"prompt={prompt!r}: {len(found)} prompts have it, such as {few}")
        chosen = found[0]
    return [r for r in records if r.trial.request.prompt == chosen]


def _of_seed(records: Sequence[Record], seed: int | None) -> list[Record]:
    seeds = sorted({r.trial.request.seed for r in records})
    wanted = seeds[0] if seed is None else seed
    if wanted not in seeds:
        raise ConfigError(f"seed={seed}: this prompt has {', '.join(map(str, seeds))}")
    return [r for r in records if r.trial.request.seed == wanted]


def _refuse_shared(
    rows: Sequence[Mapping[str, Any]], axes: set[str], sides: tuple[str, str]
) -> None:
    """Refuse cells of several settings: the caller has to choose one."""
    seen: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for fields in rows:
        other = seen.setdefault(tuple(fields[side] for side in sides), fields)
        apart = [n for n in fields if n not in axes | {"setting"} and other[n] != fields[n]]
        if apart:
            name = apart[0]
            values = sorted({value_text(row[name]) for row in rows})
            raise ConfigError(
                f"settings differ in {', '.join(apart)} beside {' and '.join(sides)}; choose one:"
                f" {name}=, there are {', '.join(values)}"
            )


def _drawn(
    study: Study, cells: Mapping[tuple[Any, Any], Record], sides: tuple[str, str]
) -> Image.Image:
    columns, rows = (_ordered({key[i] for key in cells}) for i in (0, 1))
    images = {key: Image.fromarray(study.read_image(f"{r.image}")) for key, r in cells.items()}
    longest = max(max(image.size) for image in images.values())
    scale = max(1, -(-LEAST_PX // longest))
    width, height = (scale * max(image.size[i] for image in images.values()) for i in (0, 1))
    font = ImageFont.load_default(_FONT_PX)
    heads = [f"{sides[0]} {value_text(value)}" for value in columns]
    names = [f"{sides[1]} {value_text(value)}" for value in rows]
    left = round(max(font.getlength(name) for name in names)) + 2 * _MARGIN_PX
    top = _FONT_PX + 2 * _MARGIN_PX
    width = max(width, round(max(font.getlength(head) for head in heads)) + _MARGIN_PX)
    step_x, step_y = width + _GAP_PX, height + _GAP_PX
    sheet = Image.new("RGB", (left + len(columns) * step_x, top + len(rows) * step_y), "white")
    draw = ImageDraw.Draw(sheet)
    for number, head in enumerate(heads):
        draw.text((left + number * step_x, _MARGIN_PX), head, "black", font)
    for number, name in enumerate(names):
        draw.text((_MARGIN_PX, top + number * step_y), name, "black", font)
    for (x, y), image in images.items():
        place = (left + columns.index(x) * step_x, top + rows.index(y) * step_y)
        larger = (image.width * scale, image.height * scale)
        sheet.paste(image.resize(larger, Image.Resampling.NEAREST), place)
    return sheet


def _ordered(values: set[Any]) -> list[Any]:
    """Numbers by size, then texts; nothing (``None``) first."""
    return sorted(values, key=lambda value: (value is not None, size_rank(value)))
