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


def test_page_fits_and_breaks_no_rule_of_accessibility(still: Served, visit, faults):
    page = visit(still)
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
    assert faults(page) == []
    page.set_viewport_size({"width": 360, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    page.goto(f"{still.url}/docs")
    assert page.evaluate("document.documentElement.scrollWidth") == 360


def test_every_control_has_a_name(still: Served, visit, tmp_path, faults):
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
        ("button", "Cancel: one"),
        ("group", "Aspect ratio"),
        ("button", "Use this seed again"),
    ):
        assert page.get_by_role(role, name=name, exact=True).is_visible(), name
    assert page.get_by_role("button", name="Show: one waiting").is_visible()
    assert faults(page) == []


def test_focus_is_seen(still: Served, visit):
    page = visit(still)
    page.wait_for_selector(READY)
    page.focus("#prompt")
    for _ in range(11):  # all the way to the links at the end
        outline = page.evaluate(OUTLINE)
        assert outline, page.evaluate("document.activeElement.outerHTML")
        page.keyboard.press("Tab")


def test_nothing_moves_where_motion_is_unwanted(still: Served, visit):
    page = visit(still, reduced_motion="reduce")
    page.wait_for_selector(READY)
    page.fill("#prompt", "one")
    page.click("#generate")
    page.wait_for_selector("#bar:not([hidden])")
    assert page.evaluate("document.getAnimations().length") == 0
