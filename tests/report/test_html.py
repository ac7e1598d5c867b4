"""The report's HTML without a browser: complete, self-contained, and deaf to prompts."""

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from sd35bench.report import page as report_page
from sd35bench.report import wall
from sd35bench.report.gather import Source, gather, read_state
from sd35bench.report.page import (
    embed_json,
    render_report,
    write_beside,
    write_report,
)
from sd35bench.report.wall import MAX_BYTES
from sd35bench.study.store import Study
from tests.studies.drawn import HOSTILE, PROFILES, Synthetic, document_of, make_study, show_of

# Attributes that load something, and the only kinds of value that stay inside the file.
LOADING = {"src", "href", "srcset", "data", "poster", "action", "background", "xlink:href"}


class _Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def elements(html: str) -> list[tuple[str, dict[str, str | None]]]:
    parser = _Elements()
    parser.feed(html)
    return parser.found


def render(synthetic: Synthetic) -> str:
    return render_report(document_of(synthetic.study, synthetic.show, synthetic.recommend))


def outside_loads(html: str) -> list[str]:
    """What the page would load from elsewhere."""
    found = [
        str(value)
        for _, attributes in elements(html)
        for name, value in attributes.items()
        if name in LOADING and value and not value.startswith(("#", "data:"))
    ]
    css = re.findall(r"<style>(.*?)</style>", html, re.S)[0]
    return found + re.findall(r"url\([^)]*\)|@import[^;]*", css)


def policy_of(html: str) -> str:
    return next(str(a["content"]) for _, a in elements(html) if "http-equiv" in a)


def wall_of(html: str) -> dict:
    text = re.findall(r'<script type="application/json" id="wall-data">(.*?)</script>', html, re.S)
    return json.loads(text[0])


def test_report_loads_nothing_from_elsewhere(demo_page: str):
    html = demo_page
    assert outside_loads(html) == []
    assert outside_loads(html.replace("<main", '<img src="https://x.example/a.png"><main'))
    assert "default-src 'none'" in policy_of(html)


def test_report_policy_names_the_script_and_the_styles_by_hash(demo_page: str):
    html = demo_page
    policy = policy_of(html)
    assert re.search(r"script-src 'sha256-[\w+/=]+'", policy)
    assert re.search(r"style-src 'sha256-[\w+/=]+'", policy)
    assert "unsafe" not in policy
    assert not [a for _, a in elements(html) if "style" in a or any(k[:2] == "on" for k in a)]


def test_report_answers_first(demo: Synthetic, demo_page: str):
    html = demo_page
    text = re.sub(r"<[^>]+>", " ", html[: html.index('id="text-to-image"')])
    for task in ("text-to-image", "image-to-image"):
        entry = demo.recommend["profiles"]["balanced"][task]
        setting = entry["setting"]
        assert f"{setting['steps']} steps · cfg {setting['cfg']:g}" in text
    assert "preview" in text
    assert "prompt_strength" in text
    assert "not confirmed on held-out prompts" in text
    assert "n = 12" in text
    assert re.search(r"\d\.\d+ \[\d\.\d+, \d\.\d+\] s", text)


def test_report_shows_every_setting_with_interval_and_n(demo: Synthetic, demo_page: str):
    html = demo_page
    rows = re.findall(r"<tr data-row.*?</tr>", html, re.S)
    assert len(rows) == len(demo.show["settings"])
    for row in rows:
        assert len(re.findall(r"\[\d[\d.]*, \d[\d.]*\]", row)) >= 2
        assert 'title="n = 12"' in row


def test_report_says_that_fid_was_refused_and_what_it_needs(demo_page: str):
    assert "needs n ≥ 256" in demo_page


def test_report_stays_small(demo_page: str):
    assert MAX_BYTES < 0.7 * 20_000_000  # images; tables and charts are the rest
    assert len(demo_page.encode()) < 5_000_000


def test_report_says_what_it_left_out_and_where_the_rest_is(tmp_path, monkeypatch):
    prompts = tuple(f"a red circle {i}" for i in range(4))
    study = make_study(tmp_path, "much", steps=(4,), strengths=(), prompts=prompts)
    monkeypatch.setattr(wall, "MAX_TILES", 12)
    html = write_report(study).read_text(encoding="utf-8")
    assert re.search(r"\d+ images are not in this file", html)
    assert 'href="report/index.html"' in html


def test_linked_report_reaches_every_image(tmp_path, monkeypatch):
    monkeypatch.setattr(report_page, "IMAGES_A_PAGE", 5)
    study = make_study(tmp_path, "linked", steps=(4,), prompts=("a red <b>circle</b>", "b"))
    (study.path / "report" / "pages").mkdir(parents=True)
    stale = study.path / "report" / "pages" / "0999.html"
    stale.touch()
    path = write_report(study, link=True)
    assert path == study.path / "report" / "index.html"
    pages = sorted(path.parent.glob("pages/0*.html"))
    shown = set()
    for page in (path, *pages):
        html = page.read_text(encoding="utf-8")
        assert "<b>circle" not in html
        for tag, found in elements(html):
            if tag == "img":
                src = str(found["src"])
                assert (page.parent / src).is_file()
                shown |= {Path(src).stem} if page in pages else set()
            elif tag == "a" and not str(found["href"]).startswith("#"):
                assert (page.parent / str(found["href"])).exists(), found
    assert shown == {r.image for r in study.records()}
    assert len(pages) > 1
    assert not stale.exists()


def test_further_pages_escape_prompts_names_and_addresses():
    group = report_page.Group(prompt="<b>&", seed="1", images=(('x"<i>', 'a"><s>'), ("y", "")))
    found = str(group.figures)
    assert not any(mark in found for mark in ("<b>", "<i>", "<s>"))
    assert 'alt="&lt;b&gt;&amp;, seed 1, x&#34;&lt;i&gt;"' in found
    assert found.count("no image") == 1


def test_report_labels_failed_and_incomplete_studies_at_the_top(tmp_path, demo: Synthetic):
    def top(study) -> str:
        html = write_report(study).read_text(encoding="utf-8")
        return html[: html.index("<nav")]

    failed = make_study(tmp_path, "failed", steps=(4,), strengths=(), fail_every=7)
    assert re.search(r"5 of 36 trials failed \(14 %\)", top(failed))
    assert "Every trial failed" in top(
        make_study(tmp_path, "none", steps=(4,), prompts=("a",), fail_every=1)
    )
    assert 'class="state"' not in top(demo.study)
    (one,), _ = gather([Source(study=demo.study, show=demo.show, recommendation=None)])
    pairs = dict.fromkeys((r.id for r in one.rows), 12)
    assert read_state(one, pairs) == []
    (mark, text), *others = read_state(one, {**pairs, one.rows[0].id: 5})
    assert (mark, others) == ("open", [])
    assert "1 of 9 settings of text-to-image have fewer images" in text
    assert "(5 at the least, of 12)" in text


def test_report_is_the_same_for_the_same_study(demo: Synthetic, demo_page: str):
    assert render(demo) == demo_page


def test_report_never_interprets_prompts(hostile: Synthetic):
    html = render(hostile)
    tags = [tag for tag, _ in elements(html)]
    assert tags.count("script") == 2  # the wall's data and the report's own script
    images = [a["src"] for tag, a in elements(html) if tag == "img"]
    assert images
    assert all(str(src).startswith("data:image/webp;base64,") for src in images)
    assert not [name for _, a in elements(html) for name in a if name.startswith("on")]
    prompts = {p["text"] for p in wall_of(html)["prompts"]}
    assert prompts == set(HOSTILE)
    assert "49" not in prompts


@pytest.mark.parametrize("text", [*HOSTILE, "<!--", "]]>", "\ud800 lone surrogate"])
def test_embed_json_holds_no_markup_and_comes_back(text: str):
    embedded = str(embed_json({"text": text}))
    assert not set("<>&\u2028\u2029") & set(embedded)
    assert json.loads(embedded) == {"text": text}


def test_report_survives_a_lone_surrogate_in_a_prompt(tmp_path):
    study = make_study(
        tmp_path, "odd", steps=(4,), cfgs=(1.0,), strengths=(), prompts=("a \ud800",)
    )
    assert write_report(study).read_bytes().decode("utf-8")


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        pytest.param({"scored": False}, "not scored", id="no metrics"),
        pytest.param({"fail_every": 1}, "Every trial of this study failed", id="only failures"),
        pytest.param({"strengths": ()}, "28 steps", id="no image-to-image"),
        pytest.param({"cfgs": ()}, "strength", id="only image-to-image"),
        pytest.param({"fail_every": 3}, "the image is black", id="some failures"),
        pytest.param(
            {"steps": (4,), "cfgs": (1.0,), "strengths": ()}, "best measured", id="one setting"
        ),
    ],
)
def test_report_of_a_partial_study_says_what_is_true(tmp_path, kwargs, says):
    prompts = ("a red circle", "a blue circle")
    study = make_study(tmp_path, "partial", prompts=prompts, **kwargs)
    html = write_report(study, PROFILES).read_text(encoding="utf-8")
    assert says in html
    assert "nan" not in re.sub(r"<(script|style).*?</\1>", "", html, flags=re.S).lower().split()


def test_report_of_an_empty_study_says_so(tmp_path):
    study = Study.open(tmp_path, "empty", create=True)
    assert "holds no trials yet" in write_report(study).read_text(encoding="utf-8")


def test_report_names_images_that_are_gone(tmp_path):
    study = make_study(tmp_path, "gone", steps=(4,), cfgs=(1.0,), strengths=(), prompts=("a",))
    for path in (study.path / "images").glob("*/*"):
        path.unlink()
    column = wall_of(write_report(study).read_text(encoding="utf-8"))["columns"]["image"]
    assert np.frombuffer(base64.b64decode(column), "<i4").tolist() == [-1, -1]


def test_write_report_replaces_the_file_whole(tmp_path):
    study = make_study(tmp_path, "twice", steps=(4,), cfgs=(1.0,), strengths=(), prompts=("a",))
    first = write_report(study)
    assert first == study.path / "report.html"
    assert write_report(study).read_bytes() == first.read_bytes()
    assert not list(study.path.glob("*.tmp"))


def test_report_explains_why_nothing_is_recommended(tmp_path):
    study = make_study(tmp_path, "few", steps=(4,), cfgs=(1.0,), strengths=(), prompts=("a",))
    document = document_of(study, show_of(study), "No recommendation: one setting only")
    assert "one setting only" in render_report(document)


def test_reports_beside_each_other_tell_studies_apart_everywhere(tmp_path):
    one = {"steps": (4, 12), "strengths": (), "prompts": ("a red circle", "a blue circle")}
    studies = [make_study(tmp_path, name, **one) for name in ("before", "after")]
    path = write_beside(studies, PROFILES)
    assert path == studies[0].path / "report-beside-after.html"
    html = path.read_text(encoding="utf-8")
    wall = wall_of(html)
    assert [s["name"][-6:] for s in wall["settings"]].count("before") == 6
    assert len({s["id"] for s in wall["settings"]}) == 12
    assert len(wall["prompts"]) == 2
    assert {f["name"] for f in wall["fields"]} == {"study", "steps", "cfg"}
    assert wall["first"][0].startswith("before.")
    assert wall["first"][1].startswith("after.")
    assert re.search(r"before: For text-to-image.*after: For text-to-image", html, re.S)
    assert "chosen in after" in html
