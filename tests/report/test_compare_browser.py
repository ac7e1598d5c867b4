"""The comparison's page in headless Chromium: every way to look at a pair works, in silence."""

import pytest
from PIL import Image

from sd35bench.report.gate import compare_page
from tests.report.test_browser import ARGUMENTS, CHROMIUM

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH: apt-get install chromium"),
]
DOCUMENT = {
    "baseline": "main",
    "candidate": "branch",
    "policy": "drift",
    "verdict": "fail",
    "undecided_fails": False,
    "n_pairs": 2,
    "warnings": [],
    "gate": {},
    "dimensions": {},
    "comparisons": [
        {
            "title": "eager, 8 steps",
            "n_pairs": 2,
            "n_prompts": 2,
            "n_images": 2,
            "n_identical": 0,
            "differs": {},
            "environment_differs": {},
            "dimensions": {},
            "worst": [
                {"by": "mean_abs", "value": 10.0, "baseline_image": "a", "candidate_image": "b"}
            ],
        }
    ],
}


@pytest.fixture
def page(tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    for name, colour in (("a", (100, 50, 20)), ("b", (110, 50, 20))):
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{name}.png")
    path, noise = tmp_path / "compare.html", []
    find = lambda digest: tmp_path / f"{digest}.png"  # noqa: E731
    path.write_text(compare_page(DOCUMENT, find, find), encoding="utf-8")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        opened = browser.new_page()
        opened.on("console", lambda m: noise.append(m.text))
        opened.on("pageerror", lambda e: noise.append(str(e)))
        opened.goto(path.as_uri())
        yield opened
        browser.close()
    assert noise == []


def test_pairs_are_seen_in_every_way(page):
    images = page.locator(".duel img")
    assert [images.nth(i).is_visible() for i in range(2)] == [True, True]
    page.click("button[data-mode=slider]")
    page.locator(".duel input").fill("20")
    assert page.eval_on_selector(".duel", "e => e.style.getPropertyValue('--at')") == "20%"
    page.click("button[data-mode=difference]")
    assert not images.first.is_visible()
    pixel = page.eval_on_selector(
        "canvas", "c => Array.from(c.getContext('2d').getImageData(4, 4, 1, 1).data)"
    )
    assert pixel == [40, 0, 0, 255]  # 10 levels, times 4
    page.click("button[data-mode=blink]")
    # One look at both: the images change places every 0.7 s, a busy machine needs longer between
    # two looks.
    seen = page.wait_for_function(
        "() => document.querySelector('.duel').classList.contains('off')"
        " && document.querySelector('.which').textContent"
    )
    assert seen.json_value() == "baseline"
