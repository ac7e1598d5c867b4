import copy
import errno
import io
import json
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from sd35bench import words
from sd35bench.errors import ConfigError, DiskFull
from sd35bench.recommend.advice import recommend_document
from sd35bench.recommend.profiles import load_profiles
from sd35bench.report.recommend import (
    SNIPPETS,
    answer_parts,
    evidence_parts,
    front_cell,
    paper_parts,
    snippets,
    write_recommended,
)
from sd35bench.report.render import markdown_document, print_document
from tests.studies.memory import planted

PROFILES = Path(__file__).parents[2] / "configs" / "profile"
GRID = {(4, 1.0): (0.2, 0.05), (12, 4.0): (0.88, 0.3), (28, 4.0): (0.92, 0.7)}


@pytest.fixture
def study(tmp_path):
    return planted(tmp_path, GRID, prompts=60)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    study = planted(tmp_path_factory.mktemp("planted"), GRID, prompts=60)
    return recommend_document(study, load_profiles(PROFILES))


@pytest.fixture
def document(kept):
    return copy.deepcopy(kept)


def test_write_recommended_has_the_answers_on_few_lines(study, document):
    path = write_recommended(study, document)
    assert path == study.path / "recommended.yaml"
    text = path.read_text()
    assert len(text.splitlines()) <= 100
    assert "&id" not in text
    written = yaml.safe_load(text)
    for profile, tasks in document["profiles"].items():
        entry, answer = tasks["text-to-image"], written["profiles"][profile]["text-to-image"]
        assert answer["setting"] == entry["setting"]
        assert answer["command"] == entry["command"]
        assert answer["quality"]["ci95"] == entry["evidence"]["quality"]["ci95"]
        assert answer["latency_s"]["n"] == entry["evidence"]["latency_s"]["n"]
        assert answer["definitive"] is entry["evidence"]["definitive"]
    assert [p.name for p in study.path.glob("*.tmp")] == []


def test_write_recommended_replaces_what_was_there(study, document):
    write_recommended(study, document | {"study": "old"})
    path = write_recommended(study, document)
    assert yaml.safe_load(path.read_text())["study"] == "synthetic"


def test_full_disk_is_ours_and_leaves_what_was_there(study, document, monkeypatch):
    path = write_recommended(study, document | {"study": "old"})

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("sd35bench.disk.os.fsync", full)
    with pytest.raises(DiskFull):
        write_recommended(study, document)
    assert yaml.safe_load(path.read_text())["study"] == "old"
    assert [p.name for p in study.path.glob("*.tmp")] == []


def test_the_answer_fits_a_screen_and_says_how_to_see_more(document):
    """Two tasks, another answer for each profile, warnings: the most that there is."""
    tasks = {}
    for number, (profile, found) in enumerate(document["profiles"].items()):
        entry = found["text-to-image"]
        answer = entry["evidence"]["headline"].split(", provisional")[0]
        said = f"{answer}, provisional: about {number}000 images would decide"
        entry = entry | {"evidence": entry["evidence"] | {"headline": said}}
        tasks[profile] = {"text-to-image": entry, "image-to-image": entry}
    out = io.StringIO()
    warned = {"profiles": tasks, "warnings": ["so"] * 30}
    print_document(answer_parts(document | warned), Console(file=out, width=80))
    text = out.getvalue()
    assert len(text.splitlines()) <= 25
    assert max(map(len, text.splitlines())) <= 80
    assert "runner-up: " in text
    assert "30 warnings" in text
    assert "--why" in text


@pytest.mark.parametrize("kind", SNIPPETS)
def test_a_snippet_is_what_can_be_copied(document, kind):
    final = {"profiles": {"final": document["profiles"]["final"]}}
    entry = final["profiles"]["final"]["text-to-image"]
    text = snippets(final, kind)
    if kind == "api":
        assert json.loads(text) == entry["api"]["body"]
    else:
        assert text == entry["command" if kind == "command" else "snippet"]
    assert snippets(document, kind).count("# ") >= (len(set(_ids(document))) > 1)


def test_a_snippet_that_there_is_not_says_why(document):
    entry = document["profiles"]["final"]["text-to-image"]
    entry["api"] = {"body": None, "why_not": "the protocol has no sampler"}
    with pytest.raises(ConfigError, match=r"--snippet=api: final, .* the protocol has no sampler"):
        snippets({"profiles": {"final": {"text-to-image": entry}}}, "api")


def _ids(document) -> list[str]:
    found = (tasks["text-to-image"] for tasks in document["profiles"].values())
    return [entry["setting_id"] for entry in found]


def _printed(document) -> str:
    out = io.StringIO()
    print_document(evidence_parts(document), Console(file=out, width=120))
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


def test_print_and_markdown_say_how_many_trials_failed(document):
    assert "trials failed" not in _printed(document) + markdown_document(paper_parts(document))
    for entry in document["profiles"].values():
        entry["text-to-image"]["evidence"] |= {"failed": 1, "n_trials": 120}
    for text in (_printed(document), markdown_document(paper_parts(document))):
        assert "1 of its 120 trials failed" in " ".join(text.split())


def test_print_never_interprets_markup_of_a_prompt(document):
    entry = document["profiles"]["final"]["text-to-image"]
    entry["snippet"] = "prompt='[red]x[/red] [/nothing]'"
    assert "[red]x[/red] [/nothing]" in _printed(document)


def test_print_says_where_no_setting_meets_a_profile(study):
    document = recommend_document(study, {"fast": {"latency_limit_s": 1e-6}})
    assert "no setting is within" in _printed(document)


def test_print_says_how_surely_a_setting_is_dominated(document):
    text = " ".join(_printed(document).split())
    evidence = document["profiles"]["final"]["text-to-image"]["evidence"]
    share = words.share(evidence["p_dominated"])
    sentence = f"on the Pareto front of quality and latency; dominated in {share} of resamples."
    assert f"The choice is {sentence}" in text
    assert "dominated why not" in text
    assert "in how many of 2000 resamples of the prompts" in text
    worst = document["profiles"]["final"]["text-to-image"]["alternatives"][-1]
    assert f"{front_cell(worst)} {worst['why_not'][:10]}" in text


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.0, "< 0.1 %"), (0.0046, "0.5 %"), (0.12, "12 %"), (0.995, "99.5 %"), (1.0, "> 99.9 %")],
)
def test_share_is_never_0_or_100_percent(share, text):
    assert words.share(share) == text
    assert front_cell({"on_front": True, "p_dominated": share}) == f"{text} (front)"


def test_front_of_one_prompt_has_no_probability():
    assert front_cell({"on_front": True, "p_dominated": None}) == "(front)"
    assert front_cell({"on_front": None, "p_dominated": None}) == ""
