"""The headline: which steps, cfg and prompt_strength to use, and what they cost.

Read from `recommend`'s document. Without one (nothing scored, say) the best measured setting is
named as just that, and without any measurement the report says so. The first look at a task shows
the chosen setting's images beside a default's, and the front; each answer has the best and the
worst images of its setting beside it. All are images of the wall, with links that open them there.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from sd35bench import words
from sd35bench.pictures import PIXEL_ART_PX
from sd35bench.recommend.entry import confirmation_text
from sd35bench.report.leaderboard import best_first, primary_metric
from sd35bench.report.recommend import (
    SHOWN,
    body_text,
    compared,
    default_table,
    front_cell,
    front_note,
    front_sentence,
)
from sd35bench.report.render import HTML, Figure, Table, text_table
from sd35bench.report.rows import Row, by_task, metric_label, metric_names
from sd35bench.report.wall import EXTREMES
from sd35bench.words import Estimate

_MAIN_PROFILE = "balanced"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One profile's answer for one task: the setting, what it gives and costs, and why.

    `row_id` is ``None`` where nothing could be recommended; `why` then says the reason. `others`
    are the settings not chosen; `more` counts those not listed, and `others_note` says what
    "dominated" means. `defaults` are the named defaults beside the choice. `confirmed` is what
    held-out prompts say, with a mark for its colour: good, bad or open. `provisional`: the evidence
    does not settle the choice. `body` is the create of the hosted protocol.
    `study` is named where a report has several.
    """

    profile: str
    task: str
    row_id: str | None
    values: tuple[tuple[str, str], ...]
    gives: tuple[tuple[str, str, str], ...]
    why: tuple[str, ...] = ()
    others: Table | None = None
    others_note: str = ""
    more: int = 0
    defaults: Table | None = None
    confirmed: tuple[str, str] = ("", "")
    provisional: bool = False
    adding: tuple[str, ...] = ()
    command: str = ""
    snippet: str = ""
    body: str = ""
    study: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Headline:
    """The answers by task, the main one of each in a sentence, and which rows were chosen.

    A sentence of `lead` is (before, the setting, after); the page stresses the setting. `defaults`
    is task → the row that the choice is shown beside, and what that row is.
    """

    lead: tuple[tuple[str, str, str], ...]
    answers: tuple[tuple[str, tuple[Answer, ...]], ...]
    notes: tuple[str, ...] = ()
    badges: dict[str, tuple[str, ...]] = field(default_factory=dict)
    defaults: dict[str, tuple[str, str]] = field(default_factory=dict)

    def beside(self, rows: Sequence[Row]) -> dict[str, tuple[str, str]]:
        """Task → the row that the choice is shown beside, and what it is.

        A named default where the study has one, the vendor's first; else the most steps.
        """
        found, tasks = {}, by_task(rows)
        for task, _ in self.answers:
            members = tasks.get(task, [])
            chosen = self.pinned(task, members)
            if chosen is None:
                continue
            row_id, what = self.defaults.get(task, ("", ""))
            if row_id in {r.id for r in members if r.id != chosen.id}:
                found[task] = row_id, what
                continue
            others = [r for r in members if r.rest == chosen.rest and r.id != chosen.id]
            others = others if others else [r for r in members if r.id != chosen.id]
            if others:
                cfg = chosen.cfg
                most = max(others, key=lambda r: (r.steps, -abs(r.cfg - cfg)))
                found[task] = most.id, "the most steps; no vendor's default is in this study"
        return found

    def pinned(self, task: str, rows: Sequence[Row]) -> Row | None:
        """The row that charts of `task` hold fixed: the main answer's that is among `rows`."""
        answers = [a for t, group in self.answers if t == task for a in group]
        return next((r for a in _main_first(answers) for r in rows if r.id == a.row_id), None)

    def compare(self, rows: Sequence[Row]) -> list[str]:
        """The two settings that the wall compares first: the recommended and the cheapest."""
        first = self.pinned("text-to-image", rows) or self.pinned("image-to-image", rows)
        if first is None:
            return [r.id for r in rows[:2]]
        others = [r for r in rows if r.task == first.task and r.id != first.id]
        others.sort(key=lambda r: r.latency.value if r.latency and r.latency.value else 0.0)
        return [first.id, *(r.id for r in others[:1])]


def _main_first(answers: Iterable[Answer]) -> list[Answer]:
    """The answers that name a setting: the balanced profile's, then the others as they come."""
    chosen = (a for a in answers if a.row_id is not None)
    return sorted(chosen, key=lambda a: a.profile != _MAIN_PROFILE)


def read_headline(
    rows: Sequence[Row], recommendation: Mapping[str, Any] | str | None, extra: Sequence[str]
) -> Headline:
    """Headline from a `recommend` document; from plain measurements where there is none.

    A text instead of a document says why nothing could be recommended.
    """
    if not isinstance(recommendation, Mapping):
        reason = (recommendation,) if recommendation else ()
        return _measured(rows, extra, reason)
    by_id = {r.id: r for r in rows}
    answers: dict[str, list[Answer]] = defaultdict(list)
    for profile, tasks in recommendation["profiles"].items():
        for task, entry in tasks.items():
            if entry is not None:
                answers[task].append(_answer(profile, task, entry, by_id, extra))
    found = [a for group in answers.values() for a in group]
    if not found:
        return _measured(rows, extra, tuple(recommendation.get("notes") or ()))
    return Headline(
        lead=tuple(_lead(answers, by_id, extra)),
        answers=tuple((task, tuple(group)) for task, group in answers.items()),
        notes=tuple(_notes(recommendation)),
        badges=_badges(found),
        defaults=_defaults(recommendation),
    )


def _defaults(recommendation: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Task → the first named default that is a setting of the study, the vendor's before others."""
    found: dict[str, tuple[str, str]] = {}
    for tasks in recommendation["profiles"].values():
        for task, entry in tasks.items():
            for default in (entry or {}).get("named_defaults") or ():
                if default["status"] == "in the study":
                    found.setdefault(task, (default["setting_id"], _default_name(default)))
    return found


def _default_name(default: Mapping[str, Any]) -> str:
    name = default["name"]
    return f"the {name}'s default" if name == "vendor" else f"the default of {name}"


def objective_estimates(recommendation: Mapping[str, Any] | str | None) -> dict[str, Any]:
    """Row id → {metric: estimate} of what `recommend` judged by, where rows do not have it."""
    found: dict[str, dict[str, Estimate]] = defaultdict(dict)
    for metric, row_id, judged in _judged(recommendation):
        if judged["quality"] is not None:
            found[row_id][metric] = words.read_estimate(judged["quality"])
    return found


def dominated_shares(recommendation: Mapping[str, Any] | str | None) -> dict[str, dict[str, float]]:
    """Metric → row id → in which share of resamples it is dominated, as `recommend` judged."""
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for metric, row_id, judged in _judged(recommendation):
        if judged["p_dominated"] is not None:
            found[metric][row_id] = judged["p_dominated"]
    return found


def _judged(
    recommendation: Mapping[str, Any] | str | None,
) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """(metric, row id, evidence) of every choice and of every setting that it was held against."""
    if not isinstance(recommendation, Mapping):
        return
    for entry in (e for tasks in recommendation["profiles"].values() for e in tasks.values()):
        if entry is None or entry["setting"] is None:
            continue
        metric = entry["evidence"]["quality"]["metric"]
        yield metric, entry["setting_id"], entry["evidence"]
        for other in entry["alternatives"]:
            yield metric, other["setting_id"], other


def _answer(
    profile: str,
    task: str,
    entry: Mapping[str, Any],
    by_id: Mapping[str, Row],
    extra: Sequence[str],
) -> Answer:
    evidence = entry["evidence"]
    row = by_id.get(entry.get("setting_id") or "")
    if row is None:
        why = (words.as_sentence(evidence["reason"]),)
        return Answer(profile=profile, task=task, row_id=None, values=(), gives=(), why=why)
    return Answer(
        profile=profile,
        task=task,
        row_id=row.id,
        values=setting_values(row, extra),
        gives=gives(row),
        why=tuple(_why(evidence)),
        others=_others_on_page(entry["alternatives"][: SHOWN[HTML]], by_id, extra),
        others_note=words.as_sentence(front_note(evidence)),
        more=max(0, len(entry["alternatives"]) - SHOWN[HTML]),
        defaults=default_table(entry, HTML),
        confirmed=_confirmed(entry["confirmation"]),
        provisional=not evidence.get("definitive", True),
        adding=tuple(d["command"] for d in entry["named_defaults"] if d["command"]),
        command=entry.get("command") or "",
        snippet=entry.get("snippet") or "",
        body=body_text(entry["api"]) or "",
    )


_MARKS = {"confirmed": "good", "contradicted": "bad"}


def _confirmed(confirmation: Mapping[str, Any]) -> tuple[str, str]:
    """The sentence of a confirmation, and its mark."""
    text = words.as_sentence(confirmation_text(confirmation))
    return text, _MARKS.get(confirmation["status"], "open")


def _why(evidence: Mapping[str, Any]) -> list[str]:
    lines = [words.as_sentence(evidence["reason"])]
    difference = evidence.get("difference_from_best")
    if difference is not None:
        objective = metric_label(evidence["quality"]["metric"])
        held = evidence.get("reference", "best")
        held = "the best" if held == "best" else f"the default of {held}"
        lines.append(f"Against {held} in {objective}: {_signed(difference)}, paired.")
    more = evidence.get("more_images")
    if more is not None:
        lines.append(words.as_sentence(more["text"]))
    lines.append(f"{compared(evidence)} each. {front_sentence(evidence)}")
    return lines


def _others_on_page(
    others: Sequence[Mapping[str, Any]], by_id: Mapping[str, Row], extra: Sequence[str]
) -> Table | None:
    if not others:
        return None
    rows = [by_id.get(o["setting_id"]) for o in others]
    differences = (o.get("difference_from_best") for o in others)
    return Table(
        columns=text_table(
            ("setting", "quality against the best", "dominated", "why not"),
            zip(
                ("a setting without a row" if r is None else r.name(extra) for r in rows),
                ("" if d is None else _signed(d) for d in differences),
                map(front_cell, others),
                (o["why_not"] for o in others),
                strict=True,
            ),
            numeric=("quality against the best", "dominated"),
        )
    )


def _signed(raw: Mapping[str, Any]) -> str:
    return words.estimate(words.read_estimate(raw), sign="+")


def _lead(
    answers: Mapping[str, Sequence[Answer]], by_id: Mapping[str, Row], extra: Sequence[str]
) -> list[tuple[str, str, str]]:
    """The main answer of each task: the balanced profile's, or the first that chose."""
    lead = []
    for task, group in answers.items():
        chosen = _main_first(group)
        if not chosen:
            lead.append((f"For {task} no setting meets any profile.", "", ""))
            continue
        row = by_id[chosen[0].row_id or ""]
        sure = ", provisional" if chosen[0].provisional else ""
        after = f" ({chosen[0].profile}{sure}): {_cost(row)}."
        lead.append((f"For {task}: ", row.name(extra), after))
    return lead


def _cost(row: Row) -> str:
    said = []
    if row.latency is not None:
        said.append(f"{words.latency(row.latency)} an image")
    if row.usd_per_image is not None:
        said.append(f"{words.usd(row.usd_per_image.value)} an image")
    if (metric := primary_metric([row])) is not None:
        said.append(f"{metric_label(metric)} {words.estimate(row.metrics[metric])}")
    return ", ".join(said)


def _notes(recommendation: Mapping[str, Any]) -> list[str]:
    places = {f"{p['set']} ({p['split']})" for p in recommendation.get("prompts") or ()}
    notes = [f"Prompts: {', '.join(sorted(places))}."] if places else []
    if recommendation.get("confirmation"):
        notes.append(words.as_sentence(recommendation["confirmation"]))
    notes += [words.as_sentence(n) for n in recommendation.get("notes") or ()]
    return notes


def _measured(rows: Sequence[Row], extra: Sequence[str], notes: tuple[str, ...]) -> Headline:
    """Best measured setting per task; not a recommendation, and it says so."""
    answers: dict[str, tuple[Answer, ...]] = {}
    for task, members in by_task(rows).items():
        metric = primary_metric(members)
        if metric is None:
            continue
        best = best_first(members, metric)[0]
        answers[task] = (
            Answer(
                profile="best measured",
                task=task,
                row_id=best.id,
                values=setting_values(best, extra),
                gives=gives(best),
                why=(f"The highest {metric_label(metric)} in this study; not a recommendation.",),
            ),
        )
    if not answers:
        return Headline(lead=(("", "", _nothing_sentence(rows)),), answers=(), notes=notes)
    return Headline(
        lead=(("", "", "No recommendation was made; the best measured settings are:"),),
        answers=tuple(answers.items()),
        notes=notes,
        badges=_badges([a for group in answers.values() for a in group]),
    )


def _nothing_sentence(rows: Sequence[Row]) -> str:
    if not rows:
        return "This study holds no trials yet."
    if all(r.n == 0 for r in rows):
        return "Every trial of this study failed; there is nothing to recommend from."
    return "Images were made and timed but not scored, so no setting can be recommended yet."


def _badges(answers: Sequence[Answer]) -> dict[str, tuple[str, ...]]:
    found: dict[str, list[str]] = defaultdict(list)
    for answer in answers:
        if answer.row_id is not None:
            found[answer.row_id].append(answer.profile)
    return {row_id: tuple(names) for row_id, names in found.items()}


def setting_values(row: Row, extra: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """(name, value) of what a person would type."""
    values = [("steps", str(row.steps)), ("cfg", words.plain(row.cfg))]
    more = (f for f in ("prompt_strength", *extra) if row.setting.get(f) is not None)
    return (*values, *((f, row.text(f)) for f in more))


def gives(row: Row) -> tuple[tuple[str, str, str], ...]:
    """(name, figure with interval, n) of what a setting gives and costs."""
    found = []
    if row.latency is not None:
        found.append(("latency", words.latency(row.latency), _n(row.latency)))
    if row.target_ratio is not None:
        found.append(("of target", words.ratio(row.target_ratio), ""))
    if row.usd_per_image is not None:
        usd = row.usd_per_image
        found.append(("price", f"{words.usd(usd.value)} an image", _n(usd)))
    for name in metric_names([row]):
        estimate = row.metrics[name]
        if estimate.value is not None:
            found.append((metric_label(name), words.estimate(estimate), _n(estimate)))
    memory = row.peak_rss_bytes if row.peak_vram_bytes is None else row.peak_vram_bytes
    kind = "host memory" if row.peak_vram_bytes is None else "GPU memory"
    if memory is not None:
        found.append((kind, words.size(memory), ""))
    return tuple(found)


def _n(estimate: Estimate) -> str:
    return "" if estimate.n is None else f"n = {estimate.n}"


# The first look ------------------------------------------------------------------------------


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
