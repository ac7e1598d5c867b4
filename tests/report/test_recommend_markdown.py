import json
import re
from pathlib import Path

import pytest

from sd35bench.recommend.advice import recommend_document
from sd35bench.recommend.profiles import load_profiles
from sd35bench.report.recommend import paper_parts
from sd35bench.report.render import markdown_document
from tests.studies.memory import planted

PROFILES = Path(__file__).parents[2] / "configs" / "profile"
GRID = {(4, 1.0): (0.2, 0.05), (8, 4.0): (0.5, 0.1), (12, 4.0): (0.88, 0.3), (40, 5.0): (0.92, 0.7)}


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    study = planted(tmp_path_factory.mktemp("study"), GRID, prompts=50)
    more = planted(study.path, GRID, prompts=50, first=500, split="heldout", rng_seed=3)
    study.kept, study.score_rows = study.kept + more.kept, study.score_rows + more.score_rows
    return recommend_document(study, load_profiles(PROFILES))


def _blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_first_table_has_a_row_per_answer_with_figures_and_confirmation(document):
    text = markdown_document(paper_parts(document))
    rows = [line for line in text.splitlines()[4:] if line.startswith("|")][:3]
    assert [row.split("|")[1].strip() for row in rows] == ["preview", "balanced", "final"]
    for row in rows:
        assert "steps, cfg" in row
        assert "held-out prompts" in row
        assert "prompt\\_accuracy 0." in row
    assert "Chosen on prompts: nano (tune). Confirmed on held-out prompts:" in text


def test_every_table_row_has_as_many_cells_as_its_head(document):
    lines = markdown_document(paper_parts(document)).splitlines()
    width = None
    for line in lines:
        if not line.startswith("|"):
            width = None
            continue
        cells = len(re.findall(r"(?<!\\)\|", line))
        width = cells if width is None else width
        assert cells == width


def test_blocks_are_the_entrys_command_snippet_and_body(document):
    text = markdown_document(paper_parts(document))
    entry = document["profiles"]["final"]["text-to-image"]
    assert json.loads(_blocks(text, "json")[-1]) == entry["api"]["body"]
    assert _blocks(text, "python")[-1] == entry["snippet"]
    commands = _blocks(text, "sh")[-1].splitlines()
    assert commands[0] == entry["command"]
    added = [d["command"] for d in entry["named_defaults"] if d["command"] is not None]
    assert [line for line in commands[1:] if not line.startswith("#")] == added


def test_hostile_prompt_stays_inside_its_block_and_its_cell(document):
    study, entry = "a | `b` <i>", document["profiles"]["final"]["text-to-image"]
    body = entry["api"]["body"] | {"input": {"prompt": "```\n# title\n| x |"}}
    hostile = entry | {"api": entry["api"] | {"body": body}, "snippet": "x = '''\n```\n'''\n"}
    profiles = {"final": {"text-to-image": hostile}}
    text = markdown_document(paper_parts(document | {"study": study, "profiles": profiles}))
    assert "a \\| \\`b\\` \\<i>" in text
    assert "````python\nx = '''\n```\n'''\n````" in text
    assert "\n# title" not in text


def test_answer_without_a_setting_is_a_row(document):
    nothing = {"setting": None, "evidence": {"reason": "no setting is within 1 s"}}
    text = markdown_document(
        paper_parts(document | {"profiles": {"fast": {"text-to-image": nothing}}})
    )
    assert "| fast | text-to-image | none: no setting is within 1 s |" in text


def test_others_say_how_surely_they_are_dominated(document):
    text = markdown_document(paper_parts(document))
    assert text.count("| p (adjusted) | dominated | why not |") == 3
    assert text.count("Dominated: in how many of 2000 resamples") == 3
    sentence = "The choice is on the Pareto front of quality and latency; dominated in "
    assert text.count(sentence) == 3
    assert "| \\< 0.1 % (front) |" in text
