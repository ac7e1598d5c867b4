"""Pages that show every image of a study from its file: no script, 200 images each.

They stand beside a report with links (`report --images link`) and are what it points to for the
images beyond its own list. An image that several settings made alike is shown once, under the names
of all. A page costs no more than its text: browsers load what is scrolled to.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup, escape

from sd35bench.analysis.table import by_host
from sd35bench.disk import write_atomic
from sd35bench.report.render import content_policy, html_templates
from sd35bench.report.rows import Row, match_records, varying_fields
from sd35bench.report.svg import read_asset
from sd35bench.report.wall import cells_of
from sd35bench.study.columns import Some, texts
from sd35bench.study.store import Study

IMAGES_A_PAGE = 200


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
