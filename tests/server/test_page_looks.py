"""The page at / as it is seen, read and reached: sizes, contrast, names, focus, motion."""

import pytest

from tests.server.page_server import Served, picture

pytestmark = pytest.mark.browser
READY = "#fields:enabled"
OUTLINE = """() => {
    const seen = document.activeElement.matches("[type=radio]")
        ? document.activeElement.parentElement : document.activeElement;
    const { outlineStyle, outlineWidth } = getComputedStyle(seen);
    return outlineStyle !== "none" && parseFloat(outlineWidth) >= 2;
}"""

NAMELESS = """() => [...document.querySelectorAll("input, textarea, select, button, a, img, pre")]
    .filter((e) => e.checkVisibility())
    .filter((e) => !(e.labels?.length || e.getAttribute("aria-label") || e.textContent.trim()
        || e.hasAttribute("alt")))
    .map((e) => e.outerHTML)"""

CONTRAST = """() => {
    const rgba = (text) => {
        const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number);
        return [r, g, b, a];
    };
    const light = ([r, g, b]) => [r, g, b]
        .map((v) => v / 255)
        .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const under = (element) => {
        for (let e = element; e; e = e.parentElement) {
            const found = rgba(getComputedStyle(e).backgroundColor);
            if (found[3] === 1) return found;
        }
        return [255, 255, 255, 1];
    };
    const below = [];
    let checked = 0;
    for (const element of document.querySelectorAll("body *")) {
        const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
        const isField = element.matches("input, select, textarea");
        if (!(own || isField) || !element.checkVisibility() || element.matches("option")) continue;
        const [a, b] = [rgba(getComputedStyle(element).color), under(element)].map(light);
        const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        checked += 1;
        if (ratio < 4.5) below.push([element.outerHTML.slice(0, 80), ratio]);
    }
    return { checked, below };
}"""


@pytest.mark.parametrize(("width", "scheme"), [(1280, "dark"), (360, "light")])
def test_page_fits_and_can_be_read(visit, still: Served, width: int, scheme: str):
    page = visit(still, width, color_scheme=scheme)
    page.wait_for_selector(READY)
    for prompt in ("w" * 300, "a green ring", "three stars", "one more"):
        page.fill("#prompt", prompt)
        page.click("#generate")
        page.wait_for_function(
            "(p) => document.querySelector('.row-prompt')?.textContent === p", arg=prompt
        )
    still.finish(picture(112, 48))
    still.fail("because")
    page.get_by_role("button", name="Cancel: one more").click()
    page.locator(".badge.cancelled").wait_for()
    page.get_by_role("button", name="Show: www").click()
    page.wait_for_selector("#picture:not([hidden])")
    page.click("summary")
    page.fill("#steps", "99")
    page.click("#generate")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    faint = page.evaluate(CONTRAST)
    assert faint["checked"] > 40
    assert faint["below"] == []


def test_every_control_has_a_name(visit, still: Served, tmp_path):
    (tmp_path / "init.png").write_bytes(picture())
    page = visit(still)
    page.wait_for_selector(READY)
    page.set_input_files("#image", tmp_path / "init.png")
    page.fill("#prompt", "one")
    page.click("#generate")
    page.wait_for_selector("#rows li")
    for role, name in (
        ("textbox", "Prompt"),
        ("spinbutton", "Steps"),
        ("spinbutton", "CFG"),
        ("textbox", "Seed"),
        ("combobox", "Format"),
        ("spinbutton", "Quality"),
        ("spinbutton", "Prompt strength"),
        ("radio", "16:9"),
        ("button", "Generate"),
        ("button", "Remove image"),
        ("button", "Show: one"),
        ("button", "Cancel: one"),
        ("group", "Aspect ratio"),
        ("button", "Use this seed again"),
    ):
        assert page.get_by_role(role, name=name, exact=True).is_visible(), name
    nameless = page.evaluate(NAMELESS)
    assert nameless == []


def test_focus_is_seen(visit, still: Served):
    page = visit(still)
    page.wait_for_selector(READY)
    page.focus("#prompt")
    for _ in range(11):  # all the way to the links at the end
        outline = page.evaluate(OUTLINE)
        assert outline, page.evaluate("document.activeElement.outerHTML")
        page.keyboard.press("Tab")


def test_nothing_moves_where_motion_is_unwanted(visit, still: Served):
    page = visit(still, reduced_motion="reduce")
    page.wait_for_selector(READY)
    page.fill("#prompt", "one")
    page.click("#generate")
    page.wait_for_selector("#bar:not([hidden])")
    assert page.evaluate("document.getAnimations().length") == 0
