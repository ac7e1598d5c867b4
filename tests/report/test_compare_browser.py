"""The comparison's page in headless Chromium: every way to look at a pair works, in silence."""

import pytest
from PIL import Image

from sd35bench.report.gate import compare_page

pytestmark = pytest.mark.browser


def figure(verdict: str, note: str | None = None) -> dict:
    return {
        "name": "prompt_accuracy",
        "kind": "difference",
        "unit": "metric",
        "verdict": verdict,
        "baseline": 0.9,
        "candidate": 0.8,
        "effect": -0.1,
        "interval": [-0.2, -0.05],
        "margin": 0.05,
        "n": 64,
        "note": note,
    }


def dimension(verdict: str, note: str | None = None) -> dict:
    figures = [figure(verdict, note)]
    return {"verdict": verdict, "required": True, "reason": "because", "figures": figures}


def comparison(title: str, *verdicts: str, worst: int = 0) -> dict:
    pair = {"by": "mean_abs", "value": 10.0, "baseline_image": "a", "candidate_image": "b"}
    return {
        "title": title,
        "n_pairs": 2,
        "n_prompts": 2,
        "n_images": 2,
        "n_identical": 0,
        "differs": {"lora": [None, "a" * 70]},
        "environment_differs": {},
        "dimensions": {f"{v} {i}": dimension(v, f"n {i}") for i, v in enumerate(verdicts)},
        "worst": [pair] * worst,
    }


DOCUMENT = {
    "baseline": "main",
    "candidate": "branch",
    "policy": "drift",
    "verdict": "fail",
    "undecided_fails": False,
    "n_pairs": 2,
    "warnings": ["drift is undecided"],
    "gate": {"settings": {"verdict": "fail", "reason": "a setting is not there"}},
    "dimensions": {},
    "comparisons": [
        comparison("eager, 8 steps", "fail", "undecided", "not applicable", "pass", worst=1),
        comparison("eager, 12 steps", "undecided"),
        comparison("eager, 28 steps", "pass"),
    ],
}
"""Every verdict, of the whole, of settings and of figures; a pair of images to look at."""


@pytest.fixture
def page(tabs, tmp_path):
    for name, colour in (("a", (100, 50, 20)), ("b", (110, 50, 20))):
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{name}.png")
    path, noise = tmp_path / "compare.html", []
    find = lambda digest: tmp_path / f"{digest}.png"  # noqa: E731
    path.write_text(compare_page(DOCUMENT, find, find), encoding="utf-8")
    opened = tabs.take(
        {
            "console": lambda m: noise.append(m.text),
            "pageerror": lambda e: noise.append(str(e)),
        }
    )
    opened.goto(path.as_uri())
    yield opened
    tabs.give_back()
    assert noise == []


def test_page_breaks_no_rule_of_accessibility(page, faults):
    page.click("summary")
    assert faults(page) == []
    page.click("button[data-mode=slider]")
    assert faults(page) == []


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
