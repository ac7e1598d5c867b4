"""The report: gathered from a study and its documents, and written as one HTML file.

Nothing in the template computes. A partial study (no metrics, no image-to-image, failures only)
gives a page with fewer parts, each still true. The file needs nothing else: no network, no other
file, no server. Jinja2 escapes every value; images are data URIs; the wall's data is JSON whose
markup characters are escaped. A content security policy lets run only the script and the styles
that are in the file, by their hashes, and forbids every connection.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from markupsafe import Markup, escape

from sd35bench import words
from sd35bench.analysis.commands import results_dir_of
from sd35bench.analysis.summary import show_document
from sd35bench.analysis.table import Table as StudyTable
from sd35bench.analysis.table import by_host, read_table
from sd35bench.claims.catalogue import claims_document, is_claims_study
from sd35bench.disk import write_atomic
from sd35bench.errors import ConfigError
from sd35bench.recommend.advice import recommend_document
from sd35bench.report.blocks import comparison_blocks
from sd35bench.report.charts import (
    front_figures,
    line_figures,
    speed_figures,
    throughput_figures,
    tradeoff_figures,
)
from sd35bench.report.claims import claims_section
from sd35bench.report.gather import (
    Gathered,
    Source,
    gather,
    join_headlines,
    join_shares,
    read_facts,
    read_state,
)
from sd35bench.report.headline import Extremes, Headline, Hero, extremes, heroes
from sd35bench.report.hosted import hosted_blocks, hosted_figures, hosted_sentences
from sd35bench.report.leaderboard import Leaderboard, build_leaderboard
from sd35bench.report.provenance import (
    list_environments,
    list_failures,
    list_loads,
    list_warnings,
    rerun_commands,
)
from sd35bench.report.render import Figure, Table, content_policy, html_templates, text_table
from sd35bench.report.rows import (
    Row,
    by_task,
    match_records,
    metric_label,
    read_rows,
    varying_fields,
)
from sd35bench.report.svg import read_asset
from sd35bench.report.wall import Wanted, build_wall, cells_of, join_walls, pack_wall
from sd35bench.study.columns import Some, texts, unlike
from sd35bench.study.result_cache import kept_show
from sd35bench.study.store import Study
from sd35bench.types import Record

# ASCII output already writes U+2028 and lone surrogates as escapes.
_ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSection:
    """Everything about one task: leaderboard, charts of quality, figures by level of difficulty."""

    task: str
    leaderboard: Leaderboard
    fronts: Sequence[Figure]
    tradeoffs: Sequence[Figure]
    lines: Sequence[Figure]
    lines_note: str
    levels: Table | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """What the template shows."""

    study: str
    facts: Sequence[tuple[str, str]]
    state: Sequence[tuple[str, str]]
    headline: Headline
    heroes: dict[str, Hero]
    extremes: dict[str, Extremes]
    claims: dict[str, Any] | None
    tasks: Sequence[TaskSection]
    speed: Sequence[Figure]
    speed_note: str
    loads: Sequence[dict[str, Any]]
    hosted: Sequence[Table]
    hosted_lead: Sequence[tuple[str, str]]
    hosted_figures: Sequence[Figure]
    backends: Sequence[Table]
    throughput: Sequence[Figure]
    wall: dict[str, Any]
    environments: Sequence[dict[str, Any]]
    failures: Sequence[dict[str, Any]]
    warnings: Sequence[str]
    commands: Sequence[dict[str, str]]


def build_document(sources: Sequence[Source], link: bool = False) -> Document:
    """Gather the report on one study, or on several side by side.

    `link`: images are the study's files, beside the page.
    """
    parts, extra = gather(sources)
    rows = tuple(row for part in parts for row in part.rows)
    matched = {row_id: found for part in parts for row_id, found in part.matched.items()}
    headline, shares = join_headlines(parts), join_shares(parts)
    speed, speed_note = speed_figures(rows, matched, headline.badges, extra)
    targets = {_target(part.records) for part in parts}
    target_s = targets.pop() if len(targets) == 1 else None
    wall = _wall(parts, headline, extra, link)
    claims = sources[0].claims if len(sources) == 1 else None
    draw = partial(
        front_figures, badges=headline.badges, extra=extra, target_s=target_s, shares=shares
    )
    halves = {task: draw(members, half=True)[:1] for task, members in by_task(rows).items()}
    fronts = {task: figures[0] for task, figures in halves.items() if figures}
    return Document(
        study=" beside ".join(part.name for part in parts),
        facts=_each(parts, read_facts, lambda name, fact: (f"{name} {fact[0]}", fact[1])),
        state=_each(
            parts,
            lambda p: read_state(p, wall["counts"]),
            lambda name, said: (said[0], f"{name}: {said[1]}"),
        ),
        headline=headline,
        heroes=heroes(rows, headline, wall, fronts, extra),
        extremes=_extremes(rows, headline, wall, extra),
        claims=None if claims is None else claims_section(claims),
        tasks=_tasks(rows, headline, extra, shares, draw),
        speed=speed,
        speed_note=speed_note,
        loads=_each(parts, lambda p: list_loads(p.sessions, p.records)),
        hosted=hosted_blocks(rows),
        hosted_lead=_each(parts, lambda p: hosted_sentences(p.source.show, p.rows)),
        hosted_figures=hosted_figures(rows),
        backends=_each(
            parts,
            lambda p: comparison_blocks(p.source.show, p.rows),
            lambda name, table: replace(table, title=f"{name}: {table.title}"),
        ),
        throughput=throughput_figures(rows),
        wall=wall,
        environments=_each(parts, lambda p: list_environments(p.sessions)),
        failures=_each(parts, lambda p: list_failures(p.records)),
        warnings=_each(
            parts,
            lambda p: list_warnings(p.source.show, p.rows, extra),
            lambda name, text: f"{name}: {text}",
        ),
        commands=_each(parts, _commands),
    )


def _commands(part: Gathered) -> list[dict[str, str]]:
    study = part.source.study
    return rerun_commands(study.name, part.records, results_dir_of(study.path))


T = TypeVar("T")


def _each(
    parts: Sequence[Gathered],
    read: Callable[[Gathered], Iterable[T]],
    named: Callable[[str, T], T] = lambda _, item: item,
) -> list[T]:
    """What every study has; of several each item is `named` with its study."""
    if len(parts) == 1:
        return list(read(parts[0]))
    return [named(part.name, item) for part in parts for item in read(part)]


def _target(records: Sequence[Record]) -> float | None:
    found = {r.trial.load.model.target_latency_s for r in unlike(records)}
    return found.pop() if len(found) == 1 else None


def _tasks(
    rows: Sequence[Row],
    headline: Headline,
    extra: Sequence[str],
    shares: Mapping[str, Mapping[str, float]],
    fronts: Callable[[Sequence[Row]], list[Figure]],
) -> list[TaskSection]:
    sections = []
    for task, members in by_task(rows).items():
        pinned = headline.pinned(task, members)
        lines, note = line_figures(members, pinned)
        sections.append(
            TaskSection(
                task=task,
                leaderboard=build_leaderboard(members, headline.badges, extra, shares),
                fronts=fronts(members),
                tradeoffs=tradeoff_figures(members, pinned),
                lines=lines,
                lines_note=note,
                levels=_levels(members, headline, extra),
            )
        )
    return sections


def _levels(rows: Sequence[Row], headline: Headline, extra: Sequence[str]) -> Table | None:
    """By difficulty, for the recommended settings: where the average hides what fails."""
    shown = [r for r in rows if r.id in headline.badges and r.levels]
    if not shown:
        return None
    metric = next(iter(sorted(shown[0].levels, reverse=True)))
    names = tuple(dict.fromkeys(level for r in shown for level in r.levels.get(metric, {})))
    if len(names) < 2:
        return None
    known = [r.levels.get(metric, {}) for r in shown]
    cells = ([words.estimate(levels.get(name)) for name in names] for levels in known)
    named = ([r.name(extra), *row] for r, row in zip(shown, cells, strict=True))
    return Table(title=metric_label(metric), columns=text_table(("setting", *names), named, names))


def _extremes(
    rows: Sequence[Row], headline: Headline, wall: Mapping[str, Any], extra: Sequence[str]
) -> dict[str, Extremes]:
    chosen = (r for r in rows if r.id in headline.badges)
    found = {r.id: extremes(r.id, r.name(extra), wall) for r in chosen}
    return {row_id: each for row_id, each in found.items() if each is not None}


def _wall(
    parts: Sequence[Gathered], headline: Headline, extra: Sequence[str], link: bool
) -> dict[str, Any]:
    """The images, and what the page shows of them at first."""
    rows = tuple(row for part in parts for row in part.rows)
    beside = headline.beside(rows)
    chosen = {task: headline.pinned(task, rows) for task in beside}
    against = {r.id: beside[task][0] for task, r in chosen.items() if r is not None}
    ids = dict.fromkeys((*headline.badges, *(row_id for row_id, _ in beside.values())))
    walls = []
    for part in parts:
        own = {r.id for r in part.rows}
        wanted = Wanted(
            rows=[i for i in ids if i in own], beside=against, link=link, share=len(parts)
        )
        walls.append(build_wall(part.source.study, part.rows, part.matched, wanted, extra))
    first = next(iter(against.items()), None)
    return {
        **(walls[0] if len(walls) == 1 else join_walls(walls, rows, extra)),
        "first": headline.compare(rows) if first is None or len(parts) == 1 else list(first),
        "badges": {k: list(v) for k, v in headline.badges.items()},
        "beside": {task: list(found) for task, found in beside.items()},
        "chosen": {task: r.id for task, r in chosen.items() if r is not None},
    }


# The file -------------------------------------------------------------------------------------


def write_report(
    study: Study,
    profiles: Mapping[str, Any] | None = None,
    name: str = "report.html",
    link: bool = False,
) -> Path:
    """Write `results/<study>/report.html` and return its path; replaced whole or not at all.

    `profiles` are those of `recommend`; without them the report names no recommended setting.
    `link`: write `report/index.html` instead, which shows every image of the study from its file,
    with further pages that need no script.

    Raises: DiskFull, StoreError.
    """
    source = _read(study, profiles)
    document = build_document([source], link)
    path = study.path / name
    if link:
        path = study.path / path.stem / "index.html"
        write_pages(study, read_rows(source.show), path.parent / "pages")
    write_atomic(path, render_report(document).encode("utf-8", "replace"))
    return path


def write_beside(studies: Sequence[Study], profiles: Mapping[str, Any] | None = None) -> Path:
    """Write one report on several studies side by side, in the first one's folder.

    Raises: DiskFull, StoreError.
    """
    document = build_document([_read(study, profiles) for study in studies])
    others = "-".join(study.name for study in studies[1:])
    path = studies[0].path / f"report-beside-{others}.html"
    write_atomic(path, render_report(document).encode("utf-8", "replace"))
    return path


def _read(study: Study, profiles: Mapping[str, Any] | None) -> Source:
    table = read_table(study)
    return Source(
        study=study,
        show=kept_show(study, lambda: show_document(study, table), looked=True),
        recommendation=_recommend(study, profiles, table),
        claims=claims_document(study, table=table) if is_claims_study(study, table) else None,
    )


def _recommend(
    study: Study, profiles: Mapping[str, Any] | None, table: StudyTable
) -> dict[str, Any] | str | None:
    """The recommendation, or why there is none."""
    if profiles is None:
        return None
    try:
        return recommend_document(study, profiles, table)
    except ConfigError as exc:
        return f"No recommendation: {exc}"


def render_report(document: Document) -> str:
    """HTML of a document; pure."""
    script, style = (
        Markup(read_asset("report.js") + read_asset("images.js")),
        Markup(read_asset("charts.css") + read_asset("report.css")),
    )
    policy = content_policy(script, style, linked=bool(document.wall["base"]))
    template = html_templates().get_template("report.html.j2")
    known = ("first", "badges", "beside", "chosen")
    data = {**pack_wall(document.wall), **{name: document.wall[name] for name in known}}
    return template.render(
        d=document, policy=policy, script=script, style=style, data=embed_json(data)
    )


def embed_json(value: Mapping[str, Any]) -> Markup:
    """JSON that is safe inside a `<script>` element, whatever its strings hold."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for mark, escaped in _ESCAPES.items():
        text = text.replace(mark, escaped)
    return Markup(text)


# Pages of every image, from its file, without a script ---------------------------------------


IMAGES_A_PAGE = 200
"""Images that several settings made alike are shown once; browsers load what is scrolled to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """One prompt and seed: (settings, address of their image) of each; "" where it is gone."""

    prompt: str
    seed: str
    images: tuple[tuple[str, str], ...]

    @property
    def figures(self) -> Markup:
        """All images as HTML: a template takes ten times as long, and there are 100,000."""
        what = escape(f"{self.prompt}, seed {self.seed}, ")
        return Markup(
            "".join(_figure(what, escape(name), escape(src)) for name, src in self.images)
        )


def write_pages(study: Study, rows: Sequence[Row], folder: Path) -> int:
    """Write `folder/0001.html` and so on with a list of them, and return how many there are.

    Pages of an earlier report that are too many are removed. Raises: DiskFull, StoreError.
    """
    matched = match_records(rows, study.records(), by_host(study.sessions()))
    pages = list(_pages(_groups(study, rows, matched)))
    style = Markup(read_asset("charts.css") + read_asset("report.css"))
    page = html_templates().get_template("images.html.j2")
    policy = content_policy("", style, linked=True)
    common = {"study": study.name, "policy": policy, "style": style, "last": len(pages)}
    firsts = [groups[0].prompt for groups in pages]
    for number, groups in enumerate(pages, 1):
        text = page.render(**common, number=number, groups=groups, firsts=())
        write_atomic(folder / f"{number:04d}.html", text.encode("utf-8", "replace"))
    index = page.render(**common, number=0, groups=(), firsts=firsts)
    write_atomic(folder / "index.html", index.encode("utf-8", "replace"))
    for path in folder.glob("[0-9][0-9][0-9][0-9]*.html"):
        if path.stem.isdigit() and int(path.stem) > len(pages):
            path.unlink()
    return len(pages)


def _groups(study: Study, rows: Sequence[Row], matched: Mapping[str, Some]) -> Iterator[Group]:
    """Prompt by prompt, every setting's image."""
    files, extra = study.stored_names("images"), varying_fields(rows)
    names = [row.name(extra) for row in rows]
    cells = cells_of(rows, matched)
    images = cells.taken([texts(matched.get(row.id, []), "image") for row in rows]).tolist()
    settings = [names[place] for place in cells.row.tolist()]
    starts = cells.starts.tolist()
    for i in sorted(range(len(cells.pairs)), key=lambda i: repr(cells.pairs[i])):
        by_image: dict[str, list[str]] = {}
        part = slice(starts[i], starts[i + 1])
        for image, setting in zip(images[part], settings[part], strict=True):
            by_image.setdefault(files.get(image or "", ""), []).append(setting)
        found = ((" · ".join(made), _address(file)) for file, made in by_image.items())
        pair = cells.pairs[i]
        yield Group(prompt=pair[0], seed=str(pair[2]), images=tuple(found))


def _figure(what: str, name: str, src: str) -> str:
    """An image, or that there is none; all three are escaped."""
    shown = '<span class="frame failed">no image</span>'
    if src:
        image = f'<img loading="lazy" decoding="async" src="{src}" alt="{what}{name}">'
        shown = f'<a href="{src}">{image}</a>'
    return f'    <figure class="tile">{shown}<figcaption>{name}</figcaption></figure>\n'


def _address(file: str) -> str:
    return f"../../images/{file[:2]}/{file}" if file else ""


def _pages(groups: Iterator[Group]) -> Iterator[list[Group]]:
    """Groups by page; a prompt's settings stay together."""
    page: list[Group] = []
    count = 0
    for group in groups:
        if page and count + len(group.images) > IMAGES_A_PAGE:
            yield page
            page, count = [], 0
        page.append(group)
        count += len(group.images)
    if page:
        yield page
