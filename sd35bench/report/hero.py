"""The first look at a task: the chosen setting's images beside a default's, and the front.

Beside each answer stand the best and the worst images of its setting, by the first metric that
judges single images. All of them are images of the wall, named by the link that opens them there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from sd35bench import words
from sd35bench.pictures import PIXEL_ART_PX
from sd35bench.report.headline import Headline
from sd35bench.report.leaderboard import primary_metric
from sd35bench.report.render import Figure
from sd35bench.report.rows import Row, by_task, metric_label
from sd35bench.report.wall import EXTREMES

_PAIRS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Shot:
    """One image: its address, the link that opens it in the page, and what it shows."""

    src: str
    href: str
    alt: str
    caption: str = ""
    pixels: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One setting of the first look: its name, what it is, its figures, an image per prompt."""

    name: str
    what: str
    figures: str
    href: str
    shots: tuple[Shot, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Hero:
    """The settings of one task beside each other on the same `prompts`, and the front."""

    task: str
    sides: tuple[Side, ...]
    prompts: tuple[str, ...]
    front: Figure | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Extremes:
    """The best and the worst images of a setting by `metric`, and the link to all of them."""

    metric: str
    best: tuple[Shot, ...]
    worst: tuple[Shot, ...]
    href: str


def heroes(
    rows: Sequence[Row],
    headline: Headline,
    wall: Mapping[str, Any],
    fronts: Mapping[str, Figure],
    extra: Sequence[str],
) -> dict[str, Hero]:
    """Task → its first look; a task without an answer, or with neither images nor chart, has none.

    `fronts` is task → its first chart of quality over latency, drawn for half a page.
    """
    beside = headline.beside(rows)
    found = {}
    tasks = by_task(rows)
    for task, _ in headline.answers:
        members = tasks.get(task, [])
        chosen = headline.pinned(task, members)
        if chosen is None:
            continue
        other_id, what = beside.get(task, ("", ""))
        other = next((r for r in members if r.id == other_id), None)
        shown = [chosen] if other is None else [chosen, other]
        pairs = _common(wall, [r.id for r in shown])
        said = (", ".join(headline.badges.get(chosen.id, ())), what)
        sides = tuple(
            Side(
                name=row.name(extra),
                what=text,
                figures=_figures(row),
                href=wall_href(setting=row.id),
                shots=tuple(_shot(wall, pair[row.id], row.name(extra)) for pair in pairs),
            )
            for row, text in zip(shown, said, strict=False)
        )
        prompts = tuple(wall["prompts"][p[chosen.id]["prompt"]]["text"] for p in pairs)
        if pairs or task in fronts:
            found[task] = Hero(task=task, sides=sides, prompts=prompts, front=fronts.get(task))
    return found


def _common(wall: Mapping[str, Any], ids: Sequence[str]) -> list[dict[str, Any]]:
    """The first pairs that all these settings have an image of, each prompt once."""
    pairs: dict[tuple[int, str], dict[str, Any]] = {}
    for tile in wall["tiles"]:
        if tile["setting"] in ids and tile["image"] is not None:
            pairs.setdefault((tile["prompt"], tile["seed"]), {})[tile["setting"]] = tile
    whole = [pair for pair in pairs.values() if len(pair) == len(set(ids))]
    by_prompt = {next(iter(pair.values()))["prompt"]: pair for pair in reversed(whole)}
    return [by_prompt[i] for i in reversed(by_prompt)][:_PAIRS]


def _figures(row: Row) -> str:
    """Latency and the first metric, without intervals, which the answer has."""
    said = []
    if row.latency is not None:
        said.append(words.latency(row.latency.without_interval))
    if (metric := primary_metric([row])) is not None:
        shown = words.estimate(row.metrics[metric].without_interval)
        said.append(f"{metric_label(metric)} {shown}")
    return " · ".join(said)


def extremes(row_id: str, name: str, wall: Mapping[str, Any]) -> Extremes | None:
    """The best and the worst of a setting's images on the wall; ``None`` where few are judged.

    By the first metric, in reading order, that judges single images; `name` is the setting's.
    """
    tiles = [t for t in wall["tiles"] if t["setting"] == row_id and t["image"] is not None]
    label = next((t["scores"][0][0] for t in tiles if t["scores"]), None)
    judged = [(dict(t["scores"]).get(label), t) for t in tiles]
    known = [(value, tile) for value, tile in judged if value is not None]
    if label is None or len(known) <= 2 * EXTREMES:
        return None
    known.sort(key=lambda found: found[0], reverse=label not in wall["lower"])
    best, worst = known[:EXTREMES], known[-EXTREMES:][::-1]
    return Extremes(
        metric=label,
        best=tuple(_shot(wall, t, name, words.significant(value)) for value, t in best),
        worst=tuple(_shot(wall, t, name, words.significant(value)) for value, t in worst),
        href=wall_href(setting=row_id, order="worst"),
    )


def _shot(
    wall: Mapping[str, Any], tile: Mapping[str, Any], setting: str, caption: str = ""
) -> Shot:
    prompt = wall["prompts"][tile["prompt"]]
    return Shot(
        src=address(wall, tile["image"]),
        href=wall_href(setting=tile["setting"], prompt=prompt["ref"], seed=tile["seed"], open=1),
        alt=f"{prompt['text']}, seed {tile['seed']}, {setting}",
        caption=caption,
        pixels=max(tile["width"], tile["height"]) <= PIXEL_ART_PX,
    )


def address(wall: Mapping[str, Any], image: int) -> str:
    """Where an image is: inside the page, or a file beside it."""
    name = wall["images"][image]
    return f"{wall['base']}{name[:2]}/{name}" if wall["base"] and name[:2] != ".." else name


def wall_href(**asked: object) -> str:
    """A link to the wall: what it shows is in the address."""
    parts = (f"{name}={quote(str(value), safe=':')}" for name, value in asked.items())
    return "#view=wall&" + "&".join(parts)
