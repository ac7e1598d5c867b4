"""A document of text, tables and figures, and its three forms: terminal, Markdown, HTML.

A verb's page module builds parts once; a part or a column that only some forms show says so in
`forms`. Cells stay typed (text, what stands beside it, sort value) until they are drawn, so that
each form decides where an interval goes. A further form is one more function over the parts.
"""

import base64
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import rich.table
from markupsafe import Markup
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.text import Text as Rich

from sd35bench import words
from sd35bench.report.svg import element, mark, read_asset, swatch
from sd35bench.words import Estimate

if TYPE_CHECKING:
    import jinja2

TERMINAL, MARKDOWN, HTML = "terminal", "markdown", "html"
ALL = (TERMINAL, MARKDOWN, HTML)

Span = str | tuple[str, str]
"""A text, or (text, style): strong, code, raw (no escapes in Markdown), or a terminal's colour."""


@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph. In a terminal it flows unless it `wraps`, and `gap` is a blank line before it.

    `joined`: in Markdown no blank line parts it from what stands before.
    """

    spans: tuple[Span, ...]
    wraps: bool = False
    gap: bool = False
    joined: bool = False
    forms: tuple[str, ...] = ALL


def say(*spans: Span, wraps: bool = False, gap: bool = False) -> Text:
    """A line that only the terminal shows."""
    return Text(spans, wraps=wraps, gap=gap, forms=(TERMINAL,))


def paragraph(*spans: Span, joined: bool = False) -> Text:
    """A paragraph that only Markdown shows."""
    return Text(spans, joined=joined, forms=(MARKDOWN,))


@dataclass(frozen=True, slots=True)
class Heading:
    """A heading of `level` 1 to 3."""

    text: str
    level: int = 2
    forms: tuple[str, ...] = ALL


@dataclass(frozen=True, slots=True)
class Code:
    """Commands, a snippet or a JSON body, never escaped inside its block."""

    text: str
    language: str = ""
    forms: tuple[str, ...] = ALL


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A cell: its text, its interval or share `beside` it, and the number that sorting uses.

    `style` colours it in a terminal and names its class in HTML; `glyph` is drawn in HTML alone.
    """

    text: str
    beside: str = ""
    sort: float | str | None = None
    hint: str = ""
    style: str = ""
    glyph: Markup | None = None

    @property
    def line(self) -> str:
        """Both parts on one line."""
        return f"{self.text} {self.beside}".strip()


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column: its title and one cell per row.

    `rank`: on a narrow terminal the highest goes first, 0 never. `narrow` takes its place where
    intervals do not stand beside their values. `wraps`: whether a terminal may break its cells,
    `flows`: whether it always may. `key` is its name for ``--columns``. `said`: each cell where no
    title says what it is; columns that have it can be folded into one.
    """

    title: str
    cells: tuple[Cell, ...]
    numeric: bool = True
    rank: float = 0
    hint: str = ""
    narrow: "Column | None" = None
    wraps: bool = True
    flows: bool = False
    key: str = ""
    said: tuple[str, ...] = ()
    forms: tuple[str, ...] = ALL


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """One way to fit a table into a terminal; the first that fits is taken, else the last.

    `between` a value and its interval is a space, a line break, or nothing, which leaves intervals
    out. Columns of a rank from `drops` on may be left out (0: none). Where cells may be broken
    (`wraps`), the width is not asked for, but for `from_width`. Where the layout `folds`, columns
    that can be said in words are one, "what differs".
    """

    between: str | None = " "
    drops: float = 0
    from_width: int = 0
    wraps: bool = False
    folds: bool = False


FITTED = (
    Layout(),
    Layout(between="\n"),
    Layout(between=None, drops=1),
    Layout(between=None, drops=1, folds=True, wraps=True),
)
WRAPPED = (Layout(wraps=True),)


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table with its title and a note on how to read it; `frame` names its lines and padding.

    `folded` is the title of a column that others were folded into.
    """

    columns: tuple[Column, ...]
    title: str = ""
    note: str = ""
    layouts: tuple[Layout, ...] = FITTED
    frame: str = "open"
    folded: str = "what differs"
    forms: tuple[str, ...] = ALL

    def of(self, form: str) -> tuple[Column, ...]:
        """The columns that a form shows."""
        return tuple(c for c in self.columns if form in c.forms)

    def rows(self, form: str) -> list[tuple[Cell, ...]]:
        """The cells that a form shows, row by row."""
        return list(zip(*(c.cells for c in self.of(form)), strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A chart. `legend` has (class, marker, text) entries, drawn by the page in HTML.

    `keys` name for each entry the marks that it hides. `small` is drawn for a narrow screen,
    `dense` (both ways) of where most marks are. `values` are the figures that the marks stand for.
    `aside` lists what stands beside a wide chart: (setting, badge, quality, latency).
    """

    title: str
    svg: Markup
    legend: tuple[tuple[str, str, str], ...] = ()
    note: str = ""
    aside: tuple[tuple[str, str, Cell, Cell], ...] = ()
    keys: tuple[str, ...] = ()
    small: Markup | None = None
    dense: tuple[Markup, ...] = ()
    values: Table | None = None
    forms: tuple[str, ...] = (HTML,)

    def _repr_svg_(self) -> str:
        """Show itself in a notebook: the chart with its legend and styles, on its own."""
        return str(_alone(self))


Part = Text | Heading | Code | Table | Figure


def text_column(
    title: str, texts: Iterable[str], *, style: str = "", forms: tuple[str, ...] = ALL
) -> Column:
    """A column of plain texts, to the left."""
    cells = tuple(Cell(text=text, style=style) for text in texts)
    return Column(title=title, cells=cells, numeric=False, forms=forms)


def text_table(
    titles: Sequence[str], rows: Iterable[Sequence[str | Cell]], numeric: Sequence[str] = ()
) -> tuple[Column, ...]:
    """Columns of a table that is given row by row; `numeric` are titles of those to the right."""
    cells = [[c if isinstance(c, Cell) else Cell(text=c) for c in row] for row in rows]
    return tuple(
        Column(title=title, cells=tuple(row[i] for row in cells), numeric=title in numeric)
        for i, title in enumerate(titles)
    )


def estimate_cell(
    estimate: Estimate | None, decimals: Callable[[Estimate], int] | int = words.decimals_for
) -> Cell:
    """A cell of a figure whose interval stands apart; a dash where it is unknown."""
    if estimate is None or estimate.value is None:
        return Cell(text=words.number(None, 0))
    digits = decimals if isinstance(decimals, int) else decimals(estimate)
    text = words.number(estimate.value, digits)
    return Cell(text=text, beside=words.interval(estimate, digits), sort=estimate.value)


# Terminal -------------------------------------------------------------------------------------

_FRAMES: dict[str, dict[str, object]] = {
    "open": {"box": SIMPLE_HEAD, "pad_edge": False, "show_edge": False},
    "edged": {"box": SIMPLE_HEAD, "pad_edge": False},
    "padded": {"box": SIMPLE_HEAD, "padding": (0, 1, 0, 0)},
    "bare": {"box": None, "show_header": False, "padding": (0, 2, 0, 0)},
}
_RICH = {"strong": "bold", "code": "", "raw": ""}


def print_document(parts: Iterable[Part], console: Console) -> None:
    """Print what a terminal shows of a document."""
    for part in parts:
        if TERMINAL not in part.forms:
            continue
        if isinstance(part, Table):
            _print_table(part, console)
        elif isinstance(part, Heading):
            console.print()
            if part.level < 3:
                console.print(Rich(part.text, style="bold"))
            else:
                console.rule(Rich(part.text, style="bold"), align="left")
        elif isinstance(part, Code):
            console.print()
            console.print(Rich(part.text), soft_wrap=True)
        elif isinstance(part, Text):
            if part.gap:
                console.print()
            spans = (s if isinstance(s, str) else (s[0], _RICH.get(s[1], s[1])) for s in part.spans)
            console.print(Rich.assemble(*spans), soft_wrap=not part.wraps)


def _print_table(table: Table, console: Console) -> None:
    """Print a table, and what it leaves out of itself."""
    layout, shown, left_out = _fit(table, console.width)
    drawn = rich.table.Table(title=escape(table.title) or None, **_FRAMES[table.frame])  # pyright: ignore[reportArgumentType]
    drawn.title_justify, drawn.title_style = "left", "bold"
    drawn.leading = int(any(c.flows for c in shown))  # a blank line between rows of many lines
    for column in shown:
        breaks = column.flows or (layout.wraps and column.wraps)
        drawn.add_column(
            escape(column.title),
            justify="right" if column.numeric else "left",
            no_wrap=not breaks,
            overflow="fold" if layout.wraps else "ellipsis",  # a word cut in two is still there
        )
    for cells in zip(*(c.cells for c in shown), strict=True):
        drawn.add_row(*(_drawn(cell, layout.between) for cell in cells))
    if table.title:
        console.print()
    console.print(drawn)
    if table.note:
        console.print(Rich(table.note, style="dim"))
    if left_out:
        console.print(left_out, style="dim")


def _fit(table: Table, width: int) -> tuple[Layout, list[Column], str]:
    """The layout that fits, its columns, and a line on what it leaves out."""
    for layout in table.layouts:
        columns = [_laid_out(c, layout) for c in table.of(TERMINAL)]
        columns = _folded(columns, table.folded) if layout.folds else columns
        if layout.wraps and not layout.drops:
            shown, fits = columns, width >= layout.from_width
        else:
            shown = _drop(columns, width, layout) if layout.drops else columns
            fits = _width(shown, layout) <= width
        if fits or layout is table.layouts[-1]:
            return layout, shown, _left_out(columns, shown, layout)
    raise AssertionError("a table has a layout")


def _left_out(columns: Sequence[Column], shown: Sequence[Column], layout: Layout) -> str:
    """What a narrow terminal has no room for, and how to see it."""
    gone = [c for c in columns if c not in shown]
    names = [c.title.replace("\n", " ") for c in gone]
    if layout.between is None and any(cell.beside for c in columns for cell in c.cells):
        names.insert(0, "intervals")
    if not names:
        return ""
    keys = ",".join(c.key for c in gone if c.key)
    how = f"--columns {keys} shows them, --json all" if keys else "--json has them"
    return f"too narrow for: {', '.join(names)} ({how})"


FIRST_TO_GO = 8
"""From this rank on a column that has gone comes back only after all others."""
_LEAST_FOLDED = 24
"""Characters that a column of words gets at least: no word of a setting is longer."""


def _folded(columns: list[Column], title: str) -> list[Column]:
    """One column in place of those that can be said in words, where that is narrower."""
    many = [c for c in columns if c.said]
    if len(many) < 2 or _width(many, Layout()) <= _LEAST_FOLDED:
        return columns
    said = zip(*(c.said for c in many), strict=True)
    cells = tuple(Cell(text=", ".join(filter(None, row)) or words.MISSING) for row in said)
    one = Column(title=title, cells=cells, numeric=False, flows=True)
    first = columns.index(many[0])
    return [*columns[:first], one, *(c for c in columns[first:] if not c.said)]


def _laid_out(column: Column, layout: Layout) -> Column:
    if layout.between == " " or column.narrow is None:
        return column
    return replace(column.narrow, rank=column.rank, key=column.key, said=column.said)


def _drop(columns: list[Column], width: int, layout: Layout) -> list[Column]:
    """Leave out the least important columns until the rest fits into `width` characters."""
    shown = list(columns)
    while _width(shown, layout) > width and any(c.rank >= layout.drops for c in shown):
        least = max(c.rank for c in shown)
        shown.remove([c for c in shown if c.rank == least][-1])

    def left(shown: list[Column]) -> list[Column]:
        return [c for c in columns if c not in shown]

    # What had to go for a wide column may fit after that has gone.
    for column in sorted(left(shown), key=lambda c: c.rank):
        more = [c for c in columns if c in shown or c is column]
        may_return = column.rank < FIRST_TO_GO or not any(c.rank < column.rank for c in left(shown))
        if may_return and _width(more, layout) <= width:
            shown = more
    return shown


def _width(columns: Sequence[Column], layout: Layout) -> int:
    """Characters that a table of these columns takes: contents, padding and borders."""
    inner = (
        max(_longest(c.title), *(_longest(_drawn(cell, layout.between).plain) for cell in c.cells))
        for c in columns
    )
    needed = (
        min(most, _LEAST_FOLDED) if c.flows else most
        for c, most in zip(columns, inner, strict=True)
    )
    return sum(needed) + 3 * (len(columns) - 1)


def _longest(text: str) -> int:
    return max(len(line) for line in text.split("\n"))


def _drawn(cell: Cell, between: str | None) -> Rich:
    drawn = Rich(cell.text, style=cell.style)
    if between is not None and cell.beside:
        drawn.append(between + cell.beside, "dim")
    return drawn


# Markdown -------------------------------------------------------------------------------------


def markdown_document(parts: Iterable[Part]) -> str:
    """Write what Markdown shows of a document."""
    lines: list[str] = []
    for part in parts:
        if MARKDOWN not in part.forms:
            continue
        if lines and not (isinstance(part, Text) and part.joined):
            lines.append("")
        lines += _markdown_lines(part)
    return "\n".join(lines) + "\n"


def _markdown_lines(part: Part) -> list[str]:
    if isinstance(part, Table):
        return _markdown_table(part)
    if isinstance(part, Heading):
        return [f"{'#' * part.level} {escape_markdown(part.text)}"]
    if isinstance(part, Code):
        return _fenced(part)
    assert isinstance(part, Text)
    return ["".join(map(_markdown_span, part.spans))]


def _markdown_span(span: Span) -> str:
    text, style = (span, "") if isinstance(span, str) else span
    if style in ("code", "raw"):
        return f"`{text}`" if style == "code" else text
    text = escape_markdown(text)
    return f"**{text}**" if style == "strong" else text


def _markdown_table(table: Table) -> list[str]:
    columns = table.of(MARKDOWN)
    head = [escape_markdown(c.title) for c in columns]
    rule = ["---:" if c.numeric else "---" for c in columns]
    body = [
        [escape_markdown(" ".join(cell.line.split())) for cell in row]
        for row in table.rows(MARKDOWN)
    ]
    lines = [f"| {' | '.join(line)} |" for line in (head, rule, *body)]
    title = [f"## {escape_markdown(table.title)}", ""] if table.title else []
    note = ["", escape_markdown(table.note)] if table.note else []
    return [*title, *lines, *note]


def escape_markdown(text: str) -> str:
    """Keep a text on one line, and from being read as markup."""
    text = " ".join(text.splitlines())
    for sign in ("\\", "|", "<", "`", "*", "_"):
        text = text.replace(sign, f"\\{sign}")
    return text


def _fenced(code: Code) -> list[str]:
    """A code block whose fence is longer than any in the text."""
    fence = "```"
    while fence in code.text:
        fence += "`"
    return [f"{fence}{code.language}", code.text.rstrip("\n"), fence]


# HTML -----------------------------------------------------------------------------------------


def html_templates() -> "jinja2.Environment":
    """The templates; every value that is no `Markup` is escaped."""
    import jinja2  # which only pages need

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sd35bench.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["sentence"] = words.first_upper
    environment.globals["swatch"] = swatch
    return environment


def content_policy(script: str, style: str, linked: bool = False) -> str:
    """Policy under which only this script and this style run, and nothing is fetched.

    `linked`: images may be files beside the page.
    """
    return "; ".join(
        [
            "default-src 'none'",
            "img-src data: file: 'self'" if linked else "img-src data:",
            f"script-src '{_hash(script)}'",
            f"style-src '{_hash(style)}'",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )


def _hash(content: str) -> str:
    digest = hashlib.sha256(content.encode("utf-8")).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def _alone(figure: Figure) -> Markup:
    """An SVG document: the legend becomes a line above the chart."""
    width, height = map(float, figure.svg.split('viewBox="0 0 ')[1].split('"')[0].split())
    parts, x = [], 10.0
    for class_, marker, text in figure.legend:
        parts.append(mark("circle" if marker == "bar" else marker, x, -14.0, 4.0, f"pt {class_}"))
        parts.append(element("text", text, class_="name", x=x + 9, y=-10.0))
        x += 26 + len(text) * 6.2
    style = Markup(read_asset("charts.css") + "svg { background: var(--bg); }")
    inner = figure.svg[figure.svg.index(">") + 1 : figure.svg.rindex("</svg>")]
    return element(
        "svg",
        element("style", style),
        *parts,
        inner,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 -28 {width:g} {height + 28:g}",
        width=f"{width:g}",
        height=f"{height + 28:g}",
    )
