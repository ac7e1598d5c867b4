"""The report in headless Chromium: loads in silence, filters, compares, enlarges, stays inert."""

import shutil

import pytest

from sd35bench.report.page import build_document, render_report
from tests.studies.drawn import Synthetic

CHROMIUM = shutil.which("chromium")
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield launched
        launched.close()


@pytest.fixture
def open_report(browser, tmp_path):
    """Open a synthetic study's report; what the page logs, throws or requests must stay empty."""
    noise: list[str] = []
    pages = []

    def visit(synthetic: Synthetic, width: int = 1280):
        document = build_document(synthetic.study, synthetic.show, synthetic.recommend)
        path = tmp_path / "report.html"
        path.write_text(render_report(document), encoding="utf-8")
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.on("console", lambda m: noise.append(f"console: {m.text}"))
        page.on("pageerror", lambda e: noise.append(f"error: {e}"))
        page.on("request", lambda r: r.url.startswith(("file:", "data:")) or noise.append(r.url))
        page.goto(path.as_uri())
        pages.append(page)
        return page

    yield visit
    for page in pages:
        page.close()
    assert noise == []


def tiles(page) -> int:
    return page.locator("#wall .tile").count()


@pytest.mark.parametrize("width", [pytest.param(1280, marks=pytest.mark.slow), 400])
def test_report_fits_its_window(open_report, demo: Synthetic, width: int):
    page = open_report(demo, width)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.locator("#answer .values dd").first.is_visible()
    broken = "[...document.images].filter((i) => !i.complete || i.naturalWidth === 0).length"
    assert page.evaluate(broken) == 0


@pytest.mark.parametrize("width", [pytest.param(1280, marks=pytest.mark.slow), 400])
def test_backends_fit_their_window_and_scroll_inside(open_report, backends: Synthetic, width: int):
    page = open_report(backends, width)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    tables = page.locator("#backends table")
    assert tables.count() == 6
    assert tables.first.is_visible()
    # At any width a row is two lines high at most: value and interval.
    heights = "[...document.querySelectorAll('#backends tbody tr')].map((r) => r.offsetHeight)"
    assert max(page.evaluate(heights)) < 60


def test_wall_filters_by_setting_prompt_seed_and_words(open_report, demo: Synthetic):
    page = open_report(demo)
    assert tiles(page) == 12  # 6 prompts × 2 seeds at the recommended setting
    page.select_option("#f-seed", "1")
    assert tiles(page) == 6
    page.fill("#f-search", "green LEFT")
    assert tiles(page) == 1
    assert page.locator("#wall .text").inner_text() == "a green circle on the left"
    page.click("#clear")
    page.wait_for_function("document.querySelectorAll('#wall .tile').length === 60")
    assert page.locator("#count").inner_text() == "216 images"
    page.click("#more")
    assert tiles(page) == 120
    page.select_option("#f-prompt", "0")
    assert tiles(page) == 18  # 9 settings × 2 seeds


def test_compare_lays_the_same_pairs_side_by_side(open_report, demo: Synthetic):
    page = open_report(demo)
    page.check("input[value=compare]", force=True)
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
    assert section.locator("table").count() == 2
    chart = section.locator("figure svg[role=img]").bounding_box()
    assert chart is not None
    edge = chart["x"] + chart["width"]
    for label in section.locator("svg[role=img] text.row").all():
        box = label.bounding_box()
        assert box is not None
        assert box["x"] >= chart["x"] - 0.5
        assert box["x"] + box["width"] <= edge + 0.5
    fills = """(rects) => [...new Set(rects.map((r) => getComputedStyle(r).fill))]"""
    assert len(section.locator("svg[role=img] rect").evaluate_all(fills)) == 6


def test_compare_of_unlike_tasks_has_no_pairs(open_report, demo: Synthetic):
    page = open_report(demo)
    page.check("input[value=compare]", force=True)
    edit = page.locator("#f-b optgroup[label=image-to-image] option").first
    page.select_option("#f-b", edit.get_attribute("value"))
    assert page.locator("#wall .pair").count() == 0
    assert page.locator("#count").inner_text() == "0 pairs"


def test_viewer_enlarges_and_steps_by_keyboard(open_report, demo: Synthetic):
    page = open_report(demo)
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
    page.keyboard.press("Escape")
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
    page.click("#clear")
    page.wait_for_timeout(50)
    page.locator("#wall .open").first.click()
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    page.keyboard.press("Escape")
    page.check("input[value=compare]", force=True)
    assert page.locator("#wall .pair").count() > 0
    assert page.evaluate("window.pwned === undefined")
    assert page.locator("#wall script, #wall svg, #wall b").count() == 0
    assert "{{7*7}} {% raw %}" in page.locator("#wall").inner_text()


def test_content_policy_blocks_what_is_not_in_the_report(browser, demo: Synthetic, tmp_path):
    """The policy is alive: a script smuggled into the file does not run."""
    document = build_document(demo.study, demo.show, demo.recommend)
    smuggled = "<script>window.pwned = 1</script></body>"
    html = render_report(document).replace("</body>", smuggled)
    path = tmp_path / "tampered.html"
    path.write_text(html, encoding="utf-8")
    page = browser.new_page()
    page.goto(path.as_uri())
    assert page.evaluate("window.pwned === undefined")
    assert tiles(page) == 12
    page.close()
