"""SVG by hand: scales, axes, marks, label placement. Text and attributes are always escaped.

Server-side SVG keeps the report small, sharp and without a script; colours are classes, so the
page's light and dark palettes apply. Lengths are user units, about CSS pixels.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources

from markupsafe import Markup, escape

RAMP = 8
MARKERS = ("circle", "square", "diamond", "triangle", "nabla", "cross")
SHAPES = (*MARKERS, *(f"hollow {name}" for name in MARKERS))
CHARACTER = 6.9
"""Width of a character: 0.6 of a label's 11.5 px."""
SMALL = (360.0, 300.0)
"""Size of a chart on a narrow screen, in CSS pixels, so that its text is as large as the page's."""


def read_asset(name: str) -> str:
    """Text of a style or script of the pages, a file in `assets/`: ``charts.css``."""
    return resources.files("sd35bench.report").joinpath("assets", name).read_text("utf-8")


def units(length: float) -> str:
    """A length as a path has it, to 0.1 units."""
    return f"{length:.1f}"


def element(tag: str, *children: str, **attributes: object) -> Markup:
    """An element; ``class_`` and ``stroke_width`` become ``class`` and ``stroke-width``.

    Children that are not `Markup` are text and are escaped. Floats are written to 0.1 units.
    """
    parts = []
    for name, value in attributes.items():
        if value is None:
            continue
        shown = units(value) if isinstance(value, float) else value
        parts.append(f' {name.rstrip("_").replace("_", "-")}="{escape(shown)}"')
    inner = Markup("").join(children)
    return Markup(f"<{tag}{''.join(parts)}>") + inner + Markup(f"</{tag}>")


@dataclass(frozen=True, slots=True)
class Box:
    """A plot's size and the margins around its panel."""

    width: float
    height: float
    left: float = 52.0
    right: float = 18.0
    top: float = 34.0
    bottom: float = 44.0

    @property
    def x_end(self) -> float:
        """Right edge of the panel."""
        return self.width - self.right

    @property
    def y_end(self) -> float:
        """Bottom edge of the panel."""
        return self.height - self.bottom


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps a domain onto pixels, linearly or by logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    @classmethod
    def fit(
        cls, values: Sequence[float], start: float, end: float, *, log: bool = False
    ) -> "Scale":
        """Cover `values` with a margin of 6 %; a domain without extent is widened."""
        low, high = min(values), max(values)
        if log:
            low, high = math.log10(low), math.log10(high)
        pad = (high - low) * 0.06
        if pad == 0:
            pad = 0.08 if log else max(abs(high) * 0.1, 1e-6)
        low, high = low - pad, high + pad
        return cls(10**low, 10**high, start, end, True) if log else cls(low, high, start, end)

    def __call__(self, value: float) -> float:
        """Pixel position of `value`."""
        low, high, at = self.low, self.high, value
        if self.log:
            low, high, at = math.log10(low), math.log10(high), math.log10(value)
        return self.start + (at - low) / (high - low) * (self.end - self.start)

    def inside(self, value: float) -> float:
        """Pixel position of `value`, at the domain's end where it lies outside."""
        return self(min(max(value, self.low), self.high))

    def ticks(self, count: int = 5) -> list[float]:
        """Round values inside the domain."""
        if self.log:
            found = self._log_ticks((1, 2, 5))
            if len(found) > 1.6 * count:
                found = self._log_ticks((1,))
            if len(found) >= 3:
                return found
        step = _nice((self.high - self.low) / count)
        first = math.ceil(self.low / step)
        return [round(i * step, 10) for i in range(first, math.floor(self.high / step) + 1)]

    def _log_ticks(self, mantissas: Sequence[int]) -> list[float]:
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        values = [float(f"{m}e{d}") for d in decades for m in mantissas]
        return [v for v in values if self.low <= v <= self.high]


def _nice(step: float) -> float:
    power = 10 ** math.floor(math.log10(step))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= step * 0.999)


def ramp(index: int, count: int) -> str:
    """Class of the `index`-th of `count` ordered colours."""
    return f"c{1 if count <= 1 else round(index * (RAMP - 1) / (count - 1))}"


def axes(
    box: Box, x: Scale, y: Scale, labels: tuple[str, str], x_ticks: Sequence[float] | None = None
) -> Markup:
    """Grid, ticks, and titles: x below the panel, y upright above it."""
    parts = []
    for tick in y.ticks():
        at = y(tick)
        parts.append(element("line", class_="grid", x1=box.left, x2=box.x_end, y1=at, y2=at))
        parts.append(
            element("text", f"{tick:g}", class_="tick end", x=box.left - 8, y=at, dy="0.32em")
        )
    parts += tick_texts(x, x.ticks() if x_ticks is None else x_ticks, box.y_end, 17)
    parts.append(
        element("line", class_="axis", x1=box.left, x2=box.x_end, y1=box.y_end, y2=box.y_end)
    )
    parts.append(element("text", labels[0], class_="name end", x=box.x_end, y=box.height - 8))
    parts.append(element("text", labels[1], class_="name", x=4.0, y=16.0))
    return Markup("").join(parts)


def tick_texts(x: Scale, ticks: Sequence[float], y: float, below: float) -> list[Markup]:
    """Notches below a panel, each with its number where that does not touch the one before."""
    parts, end = [], -math.inf
    for tick in ticks:
        at, text = x(tick), f"{tick:g}"
        half = len(text) * CHARACTER / 2
        parts.append(element("line", class_="notch", x1=at, x2=at, y1=y, y2=y + 4))
        if at - half > end + 4:
            parts.append(element("text", text, class_="tick mid", x=at, y=y + below))
            end = at + half
    return parts


def mark(marker: str, x: float, y: float, size: float, class_: str) -> Markup:
    """A marker centred on a point; `size` is its radius. "hollow square" has no filling."""
    if marker.startswith("hollow "):
        marker, class_ = marker.removeprefix("hollow "), f"{class_} hollow"
    if marker == "circle":
        return element("circle", class_=class_, cx=x, cy=y, r=size)
    shapes: dict[str, Callable[[float], list[tuple[float, float]]]] = {
        "square": lambda s: [(-s, -s), (s, -s), (s, s), (-s, s)],
        "diamond": lambda s: [(0, -1.3 * s), (1.3 * s, 0), (0, 1.3 * s), (-1.3 * s, 0)],
        "triangle": lambda s: [(0, -1.2 * s), (1.15 * s, 0.9 * s), (-1.15 * s, 0.9 * s)],
        "nabla": lambda s: [(0, 1.2 * s), (1.15 * s, -0.9 * s), (-1.15 * s, -0.9 * s)],
        "cross": lambda s: [
            *((-1.2 * s, -0.4 * s), (-0.4 * s, -0.4 * s), (-0.4 * s, -1.2 * s)),
            *((0.4 * s, -1.2 * s), (0.4 * s, -0.4 * s), (1.2 * s, -0.4 * s)),
            *((1.2 * s, 0.4 * s), (0.4 * s, 0.4 * s), (0.4 * s, 1.2 * s)),
            *((-0.4 * s, 1.2 * s), (-0.4 * s, 0.4 * s), (-1.2 * s, 0.4 * s)),
        ],
    }
    points = " ".join(f"{units(x + dx)},{units(y + dy)}" for dx, dy in shapes[marker](size))
    return element("polygon", class_=class_, points=points)


def swatch(class_: str, marker: str) -> Markup:
    """A legend's sample of a mark."""
    if marker == "bar":
        drawn = element("rect", class_=f"pt {class_}", x=6, y=1, width=3, height=12)
    else:
        drawn = mark(marker, 7.0, 7.0, 4.3, f"pt {class_}")
    return element("svg", drawn, class_="swatch", viewBox="0 0 14 14", aria_hidden="true")


def spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move labels apart to at least `gap`, in order, staying between `low` and `high`."""
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    moved = [positions[i] for i in order]
    for i in range(1, len(moved)):
        moved[i] = max(moved[i], moved[i - 1] + gap)
    ceiling = high
    for i in reversed(range(len(moved))):
        moved[i] = max(low + i * gap, min(moved[i], ceiling))
        ceiling = moved[i] - gap
    result = [0.0] * len(positions)
    for place, i in enumerate(order):
        result[i] = moved[place]
    return result


@dataclass(frozen=True, slots=True)
class Label:
    """A text that belongs to a point; `gap` keeps it off the point's mark.

    `short` takes its place where there is no room for it; `keys` are the legend's entries of it.
    """

    x: float
    y: float
    text: str
    class_: str = "label"
    gap: float = 8.0
    keys: str = ""
    short: str = ""


def place_labels(
    wanted: Sequence[Label], avoid: Sequence[tuple[float, float]], box: Box
) -> list[Markup]:
    """Draw labels where there is room; the first come first, one without room is left out.

    Six places around each point are tried; a label must not touch another label, nor cover a
    point of `avoid`.
    """
    taken = [(px - 4, py - 4, px + 4, py + 4) for px, py in avoid]
    drawn: list[Markup] = []
    for label in wanted:
        found = _free_place(label, label.text, taken, box)
        if found is None and label.short:
            found = _free_place(label, label.short, taken, box)
        if found is not None:
            area, text = found
            drawn.append(text)
            taken.append(area)
    return drawn


Area = tuple[float, float, float, float]


def _free_place(
    label: Label, text: str, taken: Sequence[Area], box: Box
) -> tuple[Area, Markup] | None:
    """The first place of a label's text that touches nothing: what it covers, and the text."""
    width = len(text) * CHARACTER * (1.1 if "strong" in label.class_ else 1.0)
    for x, y, anchor in _places(label):
        left = {"end": x - width, "mid": x - width / 2}.get(anchor, x)
        area = (left, y - 10, left + width, y + 3)
        if _is_free(area, taken, box):
            class_ = f"{label.class_} {anchor}".strip()
            return area, element("text", text, class_=class_, x=x, y=y, data_k=label.keys or None)
    return None


def _places(label: Label) -> list[tuple[float, float, str]]:
    x, y, gap = label.x, label.y, label.gap
    return [
        (x - gap, y - 5, "end"),
        (x + gap, y + 13, ""),
        (x + gap, y - 5, ""),
        (x - gap, y + 13, "end"),
        (x, y - gap - 4, "mid"),
        (x, y + gap + 12, "mid"),
    ]


def _is_free(area: Area, taken: Sequence[Area], box: Box) -> bool:
    left, top, right, bottom = area
    if left < box.left or right > box.width - 2 or top < box.top - 8 or bottom > box.y_end:
        return False
    return all(right < a or left > c or bottom < b or top > d for a, b, c, d in taken)


def chart(box: Box, parts: Sequence[Markup], title: str) -> Markup:
    """A chart of these parts; `title` is what a screen reader says."""
    return element(
        "svg",
        element("title", title),
        *parts,
        viewBox=f"0 0 {box.width:g} {box.height:g}",
        role="img",
    )


def cut(text: str, most: int) -> str:
    """Text of at most `most` characters."""
    return text if len(text) <= most else text[: most - 1] + "…"
