"""The report in headless Chromium: loads in silence, filters, compares, enlarges, stays inert."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sd35bench.report.page import render_report
from tests.studies.drawn import Synthetic, document_of

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def written(tmp_path_factory, demo: Synthetic, demo_page: str):
    """A study's report, written once."""
    kept: dict[int, Path] = {}

    def write(synthetic: Synthetic) -> Path:
        if id(synthetic) not in kept:
            page = demo_page
            if synthetic is not demo:
                document = document_of(synthetic.study, synthetic.show, synthetic.recommend)
                page = render_report(document)
            kept[id(synthetic)] = tmp_path_factory.mktemp("report") / "report.html"
            kept[id(synthetic)].write_text(page, encoding="utf-8")
        return kept[id(synthetic)]

    return write


@pytest.fixture
def open_report(tabs, written):
    """Open a report; what the page logs, throws or requests must stay empty."""
    noise: list[str] = []
    hears = {
        "console": lambda m: noise.append(f"console: {m.text}"),
        "pageerror": lambda e: noise.append(f"error: {e}"),
        "request": lambda r: r.url.startswith(("file:", "data:")) or noise.append(r.url),
    }

    def visit(report: Synthetic | Path, width: int = 1280, *, at: str = ""):
        path = report if isinstance(report, Path) else written(report)
        page = tabs.take(hears, width)
        page.goto(path.as_uri() + at)
        return page

    yield visit
    tabs.give_back()
    assert noise == []


def show(page, view: str) -> None:
    """Choose how images are shown; a click waits until nothing covers or moves the button."""
    page.locator(f"label:has(input[name=view][value={view}])").click()
    page.wait_for_selector(f"input[name=view][value={view}]:checked", state="attached")


def close_viewer(page) -> None:
    page.keyboard.press("Escape")
    page.wait_for_selector("#viewer", state="hidden")


def tiles(page) -> int:
    return page.locator("#wall .tile").count()


FAULTS = """() => {
  const found = [];
  const charts = [...document.querySelectorAll(".plot svg[role=img]")];
  for (const svg of charts.filter((s) => s.checkVisibility() && s.getClientRects().length)) {
    const frame = svg.getBoundingClientRect();
    const boxes = [...svg.querySelectorAll("text")].filter((t) => t.getClientRects().length)
      .map((t) => [t.textContent, t.getBoundingClientRect()]);
    boxes.forEach(([text, b], i) => {
      if (b.left < frame.left - 1 || b.right > frame.right + 1) found.push("outside: " + text);
      if (frame.left < 0 || frame.right > innerWidth) found.push("off the screen: " + text);
      for (const [other, o] of boxes.slice(0, i)) {
        const apart = b.right <= o.left + 1 || o.right <= b.left + 1
          || b.bottom <= o.top + 4 || o.bottom <= b.top + 4;
        if (!apart) found.push("overlap: " + text + " | " + other);
      }
    });
  }
  return found;
}"""
"""Texts of charts that overlap (by more than the room above and below letters) or leave."""


def test_answer_pictures_and_front_are_above_the_fold(open_report, demo: Synthetic):
    page = open_report(demo)
    for selector in (".lead", ".sides-by .by:nth-child(2) img", ".hero .chart .view > svg"):
        box = page.locator(selector).first.bounding_box()
        assert box is not None
        assert box["y"] + box["height"] <= 800
    names = page.locator(".hero").first.locator(".who strong").all_inner_texts()
    assert len(set(names)) == 2
    assert page.locator(".hero").first.locator("img").count() == 8
    alts = page.locator(".hero").first.locator("img").evaluate_all("(l) => l.map((i) => i.alt)")
    assert [a.rsplit(",", 1)[0] for a in alts[:4]] == [a.rsplit(",", 1)[0] for a in alts[4:]]


@pytest.mark.parametrize("width", [pytest.param(1280, marks=pytest.mark.slow), 768, 400])
def test_no_text_of_a_chart_overlaps_or_leaves_the_screen(
    open_report, demo: Synthetic, backends: Synthetic, width: int
):
    for study in (demo, backends):
        page = open_report(study, width)
        assert page.evaluate(FAULTS) == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        chosen = page.locator("th.mark").first
        chosen.scroll_into_view_if_needed()
        box = chosen.bounding_box()
        assert box is not None
        assert box["x"] + box["width"] <= width


def test_printed_tables_fit_the_paper(open_report, demo: Synthetic, backends: Synthetic):
    paper = 703  # A4 less margins of 12 mm, at 96 dpi
    for study in (demo, backends):
        page = open_report(study, paper)
        page.emulate_media(media="print", color_scheme="dark")
        assert page.evaluate("document.documentElement.scrollWidth") <= paper
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == (
            "rgb(255, 255, 255)"
        )
        wide = (
            """(nodes, w) => nodes.filter((n) => n.getBoundingClientRect().right > w + 1).length"""
        )
        assert page.locator("table").evaluate_all(wide, paper) == 0
        assert page.evaluate(FAULTS) == []


def test_report_breaks_no_rule_of_accessibility(open_report, demo, backends, faults):
    for study in (backends, demo):
        page = open_report(study)
        page.eval_on_selector_all("details", "(l) => l.forEach((d) => { d.open = true; })")
        assert faults(page) == []
    page.locator("#wall .open").first.click()
    assert faults(page) == []


def test_rules_of_accessibility_find_what_is_wrong(tabs, faults):
    page = tabs.take({})
    page.set_content(
        "<html><title>t</title><body><main><h1>a</h1><h3 id=x>b</h3>"
        "<p id=x style='color:#bbb'>c</p><img src='data:,'><button></button>"
        "<input style='color:#aaa' value=e><div role=magic tabindex=2></div>"
        "<p aria-label=e style='width:500px'>f</p></main><div>d</div>"
    )
    told = [fault.split(": ", 1) for fault in faults(page)]
    tabs.give_back()
    assert {fault.split(":")[0].split(" ")[0] for _, fault in told} == {
        *("html-has-lang", "heading-order", "duplicate-id", "color-contrast", "image-alt"),
        *("name", "aria-roles", "tabindex", "too-wide", "region", "aria-prohibited-attr"),
    }
    assert {look for look, fault in told if "too-wide" in fault} == {"400 light", "400 dark"}
    faint = {fault for _, fault in told if "color-contrast" in fault}
    assert faint == {"color-contrast 1.92: p#x c", "color-contrast 2.32: input "}


def test_grid_has_a_cell_per_setting_and_steps_through_prompts(open_report, demo: Synthetic):
    page = open_report(demo)
    grid = page.locator("#wall table.cells")
    assert grid.locator("thead th .at").all_inner_texts() == ["steps 4", "steps 12", "steps 28"]
    assert grid.locator("tbody th .at").all_inner_texts() == ["cfg 1", "cfg 4", "cfg 7"]
    heads = grid.locator("th").all_inner_texts()
    assert all(" s" in text and "prompt accuracy" in text for text in heads)
    assert grid.locator("img").count() == 9
    assert page.locator("#count").inner_text() == "prompt 1 of 6, seed 0"
    before = page.locator("#grid-prompt").inner_text()
    page.locator("#wall .open").first.focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#count").inner_text() == "prompt 2 of 6, seed 0"
    assert page.locator("#grid-prompt").inner_text() != before
    page.select_option("#f-x", "cfg")
    page.select_option("#f-y", "steps")
    assert grid.locator("thead th .at").first.inner_text() == "cfg 1"
    page.select_option("#f-hold-task", label="image-to-image")
    page.select_option("#f-y", "prompt_strength")
    page.select_option("#f-x", "steps")
    assert grid.locator("img").count() == 9


def test_grid_shows_the_reference_while_an_image_is_held(open_report, demo: Synthetic):
    page = open_report(demo)
    cell, image = page.locator("#wall .cell").first, page.locator("#wall .cell img").first
    own = image.get_attribute("src")
    reference = page.locator("#f-ref").input_value()
    shown = page.locator(f"#wall .open[data-setting='{reference}'] img").get_attribute("src")
    image.hover()
    page.mouse.down()
    page.wait_for_selector("#wall .held")
    assert image.get_attribute("src") == shown != own
    page.mouse.up()
    assert image.get_attribute("src") == own
    assert not page.locator("#viewer").is_visible()
    cell.locator(".open").click()
    assert page.locator("#viewer").is_visible()


def test_address_leads_to_a_cell_a_pair_and_a_setting(open_report, demo: Synthetic):
    page = open_report(demo)
    page.locator("#wall .open").nth(4).click()
    title, address = page.locator("#viewer-title").inner_text(), page.evaluate("location.hash")
    caption = page.locator("#viewer figcaption").first.inner_text()
    again = open_report(demo, at=address)
    assert again.locator("#viewer-title").inner_text() == title
    assert again.locator("#viewer figcaption").first.inner_text() == caption
    close_viewer(again)
    show(again, "compare")
    again.select_option("#f-prompt", "")
    again.select_option("#f-seed", "")
    again.fill("#f-search", "green")
    pair = open_report(demo, at=again.evaluate("location.hash"))
    assert pair.locator("#wall .pair").count() == again.locator("#wall .pair").count() == 4
    worst = pair.locator(".strip .more").first
    worst.click()
    pair.wait_for_selector("#wall .tile")
    values = pair.locator("#wall .tile .under:last-child").all_inner_texts()
    known = [float(text.split("accuracy ")[1].split(" ")[0]) for text in values]
    assert known == sorted(known)


def test_charts_name_marks_hide_series_and_zoom(open_report, demo: Synthetic):
    page = open_report(demo)
    chart = page.locator("#text-to-image figure.wide").first
    marks = chart.locator(".view:not(.dense) > svg g.hit")
    assert marks.count() == 9
    chart.locator(".view:not(.dense) > svg").focus()
    page.keyboard.press("ArrowRight")
    assert "latency p50" in chart.locator(".tip").inner_text()
    entry = chart.locator(".legend button", has_text="cfg 7")
    entry.click()
    assert entry.get_attribute("aria-pressed") == "false"
    assert chart.locator(".view:not(.dense) > svg g.hit:visible").count() == 6
    entry.click()
    assert chart.locator(".view:not(.dense) > svg g.hit:visible").count() == 9
    chart.locator("summary").click()
    assert chart.locator(".values-of tbody tr").count() == 9


@pytest.mark.parametrize("prompts", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_images_are_filtered_without_an_element_each(
    open_report, demo: Synthetic, tmp_path, prompts: int
):
    """Of 100 settings: 10,000 images, and 100,000 in the slow suite."""
    rng = np.random.default_rng(0)
    settings = [f"{n} steps" for n in range(100)]
    made = [
        {
            "setting": settings[i % 100],
            "prompt": i // 100,
            "seed": "0",
            "image": None,
            "width": 64,
            "height": 64,
            "parts": [],
            "error": "no picture",
            "scores": [("prompt accuracy", float(score))],
        }
        for i, score in enumerate(rng.random(100 * prompts))
    ]
    names = ("latency", "quality")
    wall = {
        "settings": [
            {"id": s, "name": s, "task": "text-to-image", "metric": "", **dict.fromkeys(names)}
            for s in settings
        ],
        "fields": [
            {"name": n, "label": n, "values": settings, "at": list(range(100))}
            for n in ("steps", "cfg")
        ],
        "prompts": [
            {
                "id": f"p{i}",
                "ref": f"p{i}",
                "text": f"prompt number {i}",
                "negative": "",
                "init": None,
            }
            for i in range(prompts)
        ],
        "tiles": made,
        "images": [],
        "base": "",
        "lower": [],
        "note": "",
        "left_out": 0,
        "first": settings[:2],
        "badges": {},
        "beside": {},
        "chosen": {},
    }
    document = document_of(demo.study, demo.show, demo.recommend)
    path = tmp_path / "large.html"
    path.write_text(render_report(replace(document, wall=wall)), encoding="utf-8")
    page = open_report(path)

    def counted() -> tuple[str, int]:
        """What is shown, and how many of the rows were read for it."""
        wall = page.locator("#wall")
        return page.locator("#count").inner_text(), int(f"{wall.get_attribute('data-read')}")

    found = sum("77" in f"{i}" for i in range(prompts))
    assert counted() == (f"prompt 1 of {prompts}, seed 0", 100)  # the rows of one prompt
    show(page, "wall")
    assert counted() == (f"{prompts} images", 0)
    page.select_option("#f-order", "best")
    assert counted() == (f"{prompts} images", prompts)
    page.select_option("#f-order", "")
    page.select_option("#f-seed", "0")  # which all have
    assert counted() == (f"{prompts} images", 0)
    page.fill("#f-search", "number 77")
    assert counted() == (f"{found} image{'s' * (found > 1)}", prompts)
    page.select_option("#f-setting", "")
    assert counted() == (f"{100 * found} images", 100 * found)
    page.select_option("#f-order", "worst")
    assert counted() == (f"{100 * found} images", 2 * 100 * found)
    page.fill("#f-search", "")
    assert counted()[0] == f"{100 * prompts} images"
    page.select_option("#f-order", "")
    assert counted() == (f"{100 * prompts} images", 0)
    page.select_option("#f-prompt", "p7")
    assert counted() == ("100 images", 0)
    assert tiles(page) == 60
    assert page.locator("#wall *").count() < 60 * 12
    show(page, "compare")
    page.select_option("#f-prompt", "")
    assert counted() == (f"{prompts} pairs", 0)


@pytest.mark.parametrize("width", [pytest.param(1280, marks=pytest.mark.slow), 400])
def test_report_fits_its_window(open_report, demo: Synthetic, width: int):
    page = open_report(demo, width)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.locator("#answer .values dd").first.is_visible()
    for image in page.locator("#answer img").all():
        assert image.evaluate("(i) => i.decode().then(() => i.naturalWidth)") == 64


@pytest.mark.parametrize("width", [pytest.param(1280, marks=pytest.mark.slow), 400])
def test_backends_fit_their_window_and_scroll_inside(open_report, backends: Synthetic, width: int):
    page = open_report(backends, width)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    tables = page.locator("#backends .scroll > table:not(.values-of table)")
    assert tables.count() == 6
    assert tables.first.is_visible()
    # At any width a row is two lines high at most: value and interval.
    heights = "(rows) => rows.map((r) => r.checkVisibility() ? r.offsetHeight : 0)"
    assert max(page.locator("#backends tbody tr").evaluate_all(heights)) < 60


def test_wall_filters_by_setting_prompt_seed_and_words(open_report, demo: Synthetic):
    page = open_report(demo)
    show(page, "wall")
    assert tiles(page) == 12  # 6 prompts × 2 seeds at the recommended setting
    page.select_option("#f-seed", "1")
    assert tiles(page) == 6
    page.fill("#f-search", "green LEFT")
    assert tiles(page) == 1
    assert page.locator("#wall .text").inner_text() == "a green circle on the left"
    page.click("#clear")
    page.locator("#wall .tile").nth(59).wait_for()
    assert page.locator("#count").inner_text() == "216 images"
    page.click("#more")
    assert tiles(page) == 120
    page.select_option("#f-prompt", index=1)
    assert tiles(page) == 18  # 9 settings × 2 seeds


def test_compare_lays_the_same_pairs_side_by_side(open_report, demo: Synthetic):
    page = open_report(demo)
    show(page, "compare")
    pairs = page.locator("#wall .pair")
    assert pairs.count() == 12
    assert pairs.first.locator("img").count() == 2
    names = pairs.first.locator(".cap").all_inner_texts()
    page.click("#swap")
    swapped = pairs.first.locator(".cap").all_inner_texts()
    assert [n[3:] for n in swapped] == [n[3:] for n in reversed(names)]
    assert len({n[3:] for n in names}) == 2
    edits = page.locator("#f-a optgroup[label=image-to-image] option")
    page.select_option("#f-a", edits.nth(0).get_attribute("value"))
    page.select_option("#f-b", edits.nth(1).get_attribute("value"))
    assert pairs.count() == 12
    assert pairs.first.locator("img").count() == 3  # the init image is beside them


@pytest.mark.parametrize("width", [pytest.param(1280, marks=pytest.mark.slow), 400])
def test_hosted_calls_fit_their_window_and_scroll_inside(
    open_report, hosted: Synthetic, width: int
):
    page = open_report(hosted, width)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    section = page.locator("#hosted")
    assert section.locator("table:not(.values-of table)").count() == 2
    fills = """(rects) => [...new Set(rects.map((r) => getComputedStyle(r).fill))]"""
    assert len(section.locator(".view > svg rect").evaluate_all(fills)) == 6
    assert page.evaluate(FAULTS) == []


def test_compare_of_unlike_tasks_has_no_pairs(open_report, demo: Synthetic):
    page = open_report(demo)
    show(page, "compare")
    edit = page.locator("#f-b optgroup[label=image-to-image] option").first
    page.select_option("#f-b", edit.get_attribute("value"))
    assert page.locator("#wall .pair").count() == 0
    assert page.locator("#count").inner_text() == "0 pairs"


def test_viewer_enlarges_and_steps_by_keyboard(open_report, demo: Synthetic):
    page = open_report(demo)
    show(page, "wall")
    page.locator("#wall .open").first.focus()
    page.keyboard.press("Enter")
    viewer = page.locator("#viewer")
    assert viewer.is_visible()
    assert "1 of 12" in viewer.inner_text()
    assert page.locator("#viewer .parts li").count() == 4
    box = page.locator("#viewer img").bounding_box()
    assert box is not None
    assert box["width"] >= 256
    page.keyboard.press("ArrowRight")
    assert "2 of 12" in viewer.inner_text()
    close_viewer(page)
    assert not viewer.is_visible()


def test_leaderboard_sorts_by_any_column(open_report, demo: Synthetic):
    page = open_report(demo)
    table = page.locator("table.sortable").first
    head = table.locator("th", has_text="latency s")
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "descending"
    read = """(head) => [...head.closest("table").tBodies[0].rows]
        .map((row) => Number(row.cells[head.cellIndex].dataset.sort))"""
    falling = head.evaluate(read)
    assert falling == sorted(falling, reverse=True)
    assert len(set(falling)) > 3
    head.locator("button").click()
    assert head.evaluate(read) == falling[::-1]


def test_metric_tabs_show_one_chart_at_a_time(open_report, demo: Synthetic):
    page = open_report(demo)
    charts = page.locator("#image-to-image figure.wide")
    assert charts.count() == 3
    visible = [charts.nth(i).is_visible() for i in range(3)]
    assert visible == [True, False, False]
    page.locator("#image-to-image .tabs button").nth(2).click()
    assert [charts.nth(i).is_visible() for i in range(3)] == [False, False, True]


def test_hostile_prompts_stay_text_in_every_view(open_report, hostile: Synthetic):
    page = open_report(hostile)
    show(page, "wall")
    page.click("#clear")
    page.locator("#wall .tile").nth(10).wait_for()
    page.locator("#wall .open").first.click()
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    close_viewer(page)
    show(page, "compare")
    assert page.locator("#wall .pair").count() > 0
    assert page.evaluate("window.pwned === undefined")
    assert page.locator("#wall script, #wall svg, #wall b").count() == 0
    assert "{{7*7}} {% raw %}" in page.locator("#wall").inner_text()


def test_content_policy_blocks_what_is_not_in_the_report(tabs, demo_page: str, tmp_path):
    """The policy is alive: a script smuggled into the file does not run."""
    smuggled = "<script>window.pwned = 1</script></body>"
    html = demo_page.replace("</body>", smuggled)
    path = tmp_path / "tampered.html"
    path.write_text(html, encoding="utf-8")
    page = tabs.take({})
    page.goto(path.as_uri())
    assert page.evaluate("window.pwned === undefined")
    assert page.locator("#wall .cell").count() == 9
    tabs.give_back()
