import io
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from sd35bench.analysis.profiles import load_profiles
from sd35bench.analysis.recommend import recommend_document
from sd35bench.analysis.recommended import print_recommendation, write_recommended
from tests.analysis.synthetic import planted

PROFILES = Path(__file__).parents[2] / "configs" / "profile"
GRID = {(4, 1.0): (0.2, 0.05), (12, 4.0): (0.88, 0.3), (28, 4.0): (0.92, 0.7)}


@pytest.fixture
def study(tmp_path):
    return planted(tmp_path, GRID, prompts=60)


@pytest.fixture
def document(study):
    return recommend_document(study, load_profiles(PROFILES))


def test_write_recommended_round_trips(study, document):
    path = write_recommended(study, document)
    assert path == study.path / "recommended.yaml"
    assert yaml.safe_load(path.read_text()) == document
    assert "&id" not in path.read_text()
    assert [p.name for p in study.path.glob("*.tmp")] == []


def test_write_recommended_replaces_what_was_there(study, document):
    write_recommended(study, {"study": "old"})
    path = write_recommended(study, document)
    assert yaml.safe_load(path.read_text())["study"] == "synthetic"


def _printed(document) -> str:
    out = io.StringIO()
    print_recommendation(document, Console(file=out, width=120))
    return out.getvalue()


def test_print_has_the_answers_first_then_why_and_how(document):
    text = _printed(document)
    final = document["profiles"]["final"]["text-to-image"]["evidence"]["headline"]
    assert (
        text.index(final[:15]) < text.index("compared on the same") < text.index("$ sd35bench run")
    )
    assert all(
        name in text[: text.index("compared on the same")]
        for name in ("preview", "balanced", "final")
    )
    assert "not confirmed on held-out prompts" in text
    assert "sd35bench recommend synthetic --confirm" in text
    assert "from_pretrained" in text


def test_print_never_interprets_markup_of_a_prompt(document):
    entry = document["profiles"]["final"]["text-to-image"]
    entry["snippet"] = "prompt='[red]x[/red] [/nothing]'"
    assert "[red]x[/red] [/nothing]" in _printed(document)


def test_print_says_where_no_setting_meets_a_profile(study):
    document = recommend_document(study, {"fast": {"latency_limit_s": 1e-6}})
    assert "no setting is within" in _printed(document)
