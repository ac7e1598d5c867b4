"""A comparison on paper: JUnit that parses, Markdown that escapes, a page that is inert."""

from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from sd35bench.gate.judge import compare_sides
from sd35bench.gate.policy import as_policy
from sd35bench.gate.sides import read_sides
from sd35bench.report.gate import compare_markdown, compare_page, junit_xml
from tests.studies.memory import planted

POLICY = {
    "dimensions": {
        "failures": {"required": True, "margins": {"failed": 0.1}},
        "quality": {"required": True, "margins": {"prompt_accuracy": 0.05}},
        "drift": {"margins": {"mean_abs": 1.0}},
        "memory": {"margins": {"peak_vram_bytes": 1.05}},
    }
}


@pytest.fixture
def document(tmp_path):
    """Accuracy fell, drift is undecided, memory of the GPU does not apply, failures pass."""
    studies = [planted(tmp_path / n, {(8, 4.0): (p, 1.0)}) for n, p in (("a", 0.9), ("b", 0.6))]
    studies[1].name = "b|<script>\x07"
    sides = [read_sides(study) for study in studies]
    noise = np.random.default_rng(0).uniform(0.0, 2.0, 128)
    return compare_sides(*sides, as_policy("own", POLICY), lambda _a, _b, _m: noise[:, None])


def test_junit_has_one_test_per_dimension_and_says_why(document):
    suite = ElementTree.fromstring(junit_xml(document)).find("testsuite")
    assert suite is not None
    assert {k: suite.get(k) for k in ("tests", "failures", "skipped", "errors")} == {
        "tests": "4",
        "failures": "1",
        "skipped": "2",
        "errors": "0",
    }
    (failure,) = suite.iter("failure")
    assert "prompt_accuracy is worse" in failure.get("message", "")
    assert "prompt_accuracy: fail; baseline 0.82" in str(failure.text)


def test_junit_fails_on_undecided_where_the_policy_does(document):
    suite = ElementTree.fromstring(junit_xml({**document, "undecided_fails": True}))
    assert len(list(suite.iter("failure"))) == 2


def test_markdown_is_a_table_with_escaped_cells(document):
    text = compare_markdown(document)
    assert text.startswith("# Fail: b\\|\\<script>")
    row = next(line for line in text.splitlines() if "prompt\\_accuracy" in line)
    assert row.startswith("| fail | quality |")
    assert row.count(" | ") == 8
    assert "Warning: drift is undecided" in text


def test_page_shows_the_worst_pairs_and_escapes_names(document, tmp_path):
    worst = document["comparisons"][0]["worst"]
    for name in ("baseline", "candidate"):
        for i, pair in enumerate(worst[:3]):
            path = tmp_path / f"{name}-{pair[f'{name}_image']}.png"
            Image.new("RGB", (16, 16), (20 * i, 90, 60)).save(path)

    def find(name):
        def path(digest):
            found = tmp_path / f"{name}-{digest}.png"
            return found if found.exists() else None

        return path

    captions = {worst[0]["candidate_image"]: "a </script><b>prompt"}
    page = compare_page(document, find("baseline"), find("candidate"), captions)
    assert page.count("<figure") == 3
    assert page.count("data:image/webp") == 6
    assert "a &lt;/script&gt;&lt;b&gt;prompt" in page
    assert "b|<script>" not in page
    assert page.count("<script>") == 1
    assert 'content="default-src' in page


def test_page_without_images_says_so(document):
    page = compare_page(document, lambda _d: None, lambda _d: None)
    assert "<figure" not in page
    assert "are not there to be shown" in page
