"""The report's HTML without a browser: complete, self-contained, and deaf to prompts."""

import json
import re
from html.parser import HTMLParser

import pytest

from sd35bench.report.page import build_document, embed_json, render_report, write_report
from sd35bench.store import Study
from tests.studies.drawn import HOSTILE, PROFILES, Synthetic, make_study, show_of

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
    return render_report(build_document(synthetic.study, synthetic.show, synthetic.recommend))


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


def test_report_loads_nothing_from_elsewhere(demo: Synthetic):
    html = render(demo)
    assert outside_loads(html) == []
    assert outside_loads(html.replace("<main", '<img src="https://x.example/a.png"><main'))
    assert "default-src 'none'" in policy_of(html)


def test_report_policy_names_the_script_and_the_styles_by_hash(demo: Synthetic):
    html = render(demo)
    policy = policy_of(html)
    assert re.search(r"script-src 'sha256-[\w+/=]+'", policy)
    assert re.search(r"style-src 'sha256-[\w+/=]+'", policy)
    assert "unsafe" not in policy
    assert not [a for _, a in elements(html) if "style" in a or any(k[:2] == "on" for k in a)]


def test_report_answers_first(demo: Synthetic):
    html = render(demo)
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


def test_report_shows_every_setting_with_interval_and_n(demo: Synthetic):
    html = render(demo)
    rows = re.findall(r"<tr data-row.*?</tr>", html, re.S)
    assert len(rows) == len(demo.show["settings"])
    for row in rows:
        assert len(re.findall(r"\[\d[\d.]*, \d[\d.]*\]", row)) >= 2
        assert 'title="n = 12"' in row


def test_report_says_that_fid_was_refused_and_what_it_needs(demo: Synthetic):
    assert "needs n ≥ 256" in render(demo)


def test_report_stays_small(demo: Synthetic):
    assert len(render(demo).encode()) < 5_000_000


def test_report_is_the_same_for_the_same_study(demo: Synthetic):
    assert render(demo) == render(demo)


def test_report_never_interprets_prompts(hostile: Synthetic):
    html = render(hostile)
    tags = [tag for tag, _ in elements(html)]
    assert tags.count("script") == 2  # the wall's data and the report's own script
    assert "<img" not in html
    assert "onload=window" not in re.sub(r"<script.*?</script>", "", html, flags=re.S)
    wall = wall_of(html)
    assert {p["text"] for p in wall["prompts"]} == set(HOSTILE)
    assert "49" not in {p["text"] for p in wall["prompts"]}


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
    wall = wall_of(write_report(study).read_text(encoding="utf-8"))
    assert [t["image"] for t in wall["tiles"]] == [None, None]


def test_write_report_replaces_the_file_whole(tmp_path):
    study = make_study(tmp_path, "twice", steps=(4,), cfgs=(1.0,), strengths=(), prompts=("a",))
    first = write_report(study)
    assert first == study.path / "report.html"
    assert write_report(study).read_bytes() == first.read_bytes()
    assert not list(study.path.glob("*.tmp"))


def test_report_explains_why_nothing_is_recommended(tmp_path):
    study = make_study(tmp_path, "few", steps=(4,), cfgs=(1.0,), strengths=(), prompts=("a",))
    document = build_document(study, show_of(study), "No recommendation: one setting only")
    assert "one setting only" in render_report(document)
