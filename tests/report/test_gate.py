"""A comparison on paper: JUnit that parses, Markdown that escapes, a page that is inert."""

import io
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from sd35bench.gate.judge import compare_sides, worst_pairs
from sd35bench.gate.policy import as_policy
from sd35bench.gate.sides import read_sides
from sd35bench.report.gate import (
    about,
    compare_page,
    comparison_parts,
    junit_xml,
    verdict_of,
)
from sd35bench.report.render import markdown_document, print_document
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
    a, b = map(read_sides, studies)
    noise = np.random.default_rng(0).uniform(0.0, 2.0, 128)
    return compare_sides(a, b, as_policy("own", POLICY), lambda _a, _b, _m: noise[:, None])


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
    text = markdown_document(comparison_parts(document))
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


# Many settings ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Sixteen settings of which the last but one got worse."""
    root = tmp_path_factory.mktemp("many")
    worse = {(18, 4.0): (0.4, 1.0)}
    same = {(steps, 4.0): (0.9, 1.0) for steps in range(4, 20)}
    a, b = (
        read_sides(planted(root / name, chosen, prompts=32))
        for name, chosen in (("a", same), ("b", same | worse))
    )
    quality = {"required": True, "margins": {"prompt_accuracy": 0.3}}
    policy = as_policy("own", {"dimensions": {"quality": quality}})
    return compare_sides(a, b, policy, lambda _a, _b, _m: "no images")


def printed(document) -> str:
    out = io.StringIO()
    print_document(comparison_parts(document), Console(file=out, width=80, highlight=False))
    return out.getvalue()


def test_of_many_settings_the_failures_come_first_and_the_passed_are_folded(many):
    text = printed(many)
    rows = [line.split() for line in text.splitlines() if " steps" in line]
    matrix = rows[:16]
    assert (matrix[0][1], matrix[0][-1]) == ("18", "fail")
    verdicts = [row[-1] for row in matrix]
    assert verdicts == sorted(verdicts, key=["fail", "undecided", "pass"].index)
    passed = verdicts.count("pass")
    assert f"{passed} settings passed" in text
    assert len(text.splitlines()) < 80
    details = [row for row in rows[16:] if row[:1] != ["warning"]]
    assert len(details) == 16 - passed


def test_markdown_and_page_fold_what_passed(many):
    text = markdown_document(comparison_parts(many))
    head, folded = text.split("<details><summary>")
    assert head.index("18 steps") < head.index("4 steps")
    assert "\n</details>\n" in folded
    assert folded.count("\n## ") == sum(verdict_of(c) == "pass" for c in many["comparisons"])
    page = compare_page(many, lambda _d: None, lambda _d: None)
    assert page.count('href="#setting-') == page.count('<section id="setting-') == 16
    first = page.index('<section id="setting-1"')
    assert "18 steps" in page[first : page.index("</h2>", first)]
    assert page.count("<details>") == folded.count("\n## ")


def test_a_note_of_every_figure_is_said_once(document):
    """Mutant: a note after each figure, as it was."""
    drift = {**document["comparisons"][0]["dimensions"]["drift"]}
    figure = {**drift["figures"][0], "note": "all 128 images are the same"}
    drift["figures"] = [figure, {**figure, "name": "shift_red"}]
    quality = {"verdict": "pass", "required": False, "reason": "", "figures": [figure]}
    comparison = {
        **document["comparisons"][0],
        "dimensions": {"drift": drift, "quality": quality},
        "worst": [],
    }
    page = compare_page({**document, "comparisons": [comparison]}, lambda _d: None, lambda _d: None)
    assert page.count("all 128 images are the same") == 1
    assert "Drift; quality: all 128 images are the same." in page


def test_one_of_a_thing_is_singular(document):
    comparison = {**document["comparisons"][0], "n_pairs": 1, "n_prompts": 1}
    assert about(comparison).startswith("1 pair of 1 prompt")
    assert "1 pair\n" in printed({**document, "n_pairs": 1, "comparisons": [comparison]})


def test_with_a_baseline_file_alone_the_candidates_images_are_shown(document, tmp_path):
    worst = document["comparisons"][0]["worst"][0]["candidate_image"]
    Image.new("RGB", (16, 16), (20, 90, 60)).save(tmp_path / "image.png")
    page = compare_page(
        document,
        lambda _d: None,
        lambda digest: tmp_path / "image.png" if digest == worst else None,
        {worst: "a red circle (seed 3)"},
    )
    assert page.count("data:image/webp") == 1
    assert "a red circle (seed 3)" in page
    assert "The candidate's images; the baseline's are not there" in page
    assert '<figure class="duel"' not in page


def test_drift_without_images_still_names_the_pairs_that_changed(tmp_path):
    studies = [planted(tmp_path / n, {(8, 4.0): (0.9, 1.0)}) for n in ("a", "b")]
    (a,), (b,) = map(read_sides, studies)
    b = replace(b, images=("ff" * 16, *b.images[1:]))
    policy = as_policy("own", {"dimensions": {"drift": {"margins": {"mean_abs": 1.0}}}})
    found = worst_pairs(a, b, policy, lambda _a, _b, _m: "the baseline's are not there")
    changed = [p for p in found if p["candidate_image"] == "ff" * 16]
    assert [(p["by"], p["value"]) for p in changed] == [("changed", 1.0)]


def test_weights_are_named_by_their_files(document):
    """Mutant: the digests, which tell a person nothing."""
    named = ("base.safetensors", "base.safetensors + team.safetensors × 0.8")
    comparison = {
        **document["comparisons"][0],
        "differs": {"weights_digest": ["0123456789", "fedcba9876"]},
        "baseline_setting": {"weights": named[0]},
        "candidate_setting": {"weights": named[1]},
    }
    assert f"Differs: weights: {named[0]} → {named[1]}." in about(comparison)
    old = {**comparison, "baseline_setting": {}}
    assert "weights_digest: 0123456789 → fedcba9876" in about(old)
