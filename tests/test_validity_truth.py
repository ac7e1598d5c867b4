"""Choices held against a whole grid: the harness itself, on a grid whose rule is known."""

import itertools

import numpy as np
import pytest

from sd35bench.errors import ConfigError
from sd35bench.recommend.profiles import Profile
from sd35bench.study.store import Study
from tests.tune_driver import accuracy, score
from tests.validity_runs import choices, grid, kept, page, searches, truth

pytestmark = pytest.mark.usefixtures("all_fakes_here")

MARGINS = {"prompt_accuracy": 0.05}
ANY = Profile(name="any", margins=MARGINS)
QUICK = Profile(name="quick", margins=MARGINS, evaluations_limit=16)


def made_up() -> truth.Truth:
    """Four settings on 20 prompts: means 0.9, 0.85, 0.6 and 0.9, of which the last is slow."""
    means = (0.9, 0.85, 0.6, 0.9)
    return truth.Truth(
        metric="prompt_accuracy",
        settings=[(16, 4.0), (8, 4.0), (4, 4.0), (28, 7.0)],
        numbers={"a": 0, "b": 1, "c": 2, "d": 3},
        prompts=[f"p{i}" for i in range(20)],
        p50_s=np.array([2.0, 1.0, 0.5, 4.0]),
        quality=np.array([[float(i < 20 * mean) for i in range(20)] for mean in means]),
    )


def test_regret_is_held_against_the_best_that_the_limits_allow():
    held = truth.held_against(ANY, made_up(), [*"bbbc", None])
    assert (held["within"], held["none"], held["over"]) == (0.6, 1, 0)
    assert held["missed"] == [pytest.approx(0.3)]
    assert held["mean_regret"] == pytest.approx((3 * 0.05 + 0.3) / 4)
    quick = truth.held_against(QUICK, made_up(), ["b", "d"])
    assert (quick["within"], quick["over"], quick["mean_regret"]) == (0.5, 1, 0.0)


def test_always_taking_the_best_is_slower():
    held = truth.held_against(ANY, made_up(), ["d"])
    assert (held["within"], held["slower"]) == (1.0, 4.0)
    assert truth.held_against(ANY, made_up(), ["b"])["slower"] == 1.0


def test_prompts_that_were_seen_do_not_count_where_the_rest_is_asked():
    rest = made_up().without([f"p{i}" for i in range(18)])
    assert rest.prompts == ["p18", "p19"]
    assert rest.quality.mean() == 0.0, "the last two prompts are hard for all"
    assert made_up().half_width(ANY) > 0.0


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory):
    """A grid of 3 x 2 settings on 32 prompts, made by the fake backend and scored by the rule."""
    root = tmp_path_factory.mktemp("grid")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grid, "AXES", ("steps=1,2,8", "cfg=2,7"))
        words = grid.grid_words(root, grid.SEED, 32, "fake")
        assert grid.command("run", "-m", *words, "prompts.split=tune")[1] == 0
        score(Study.open(root, "truth"))
        yield root


def test_searches_and_choices_find_the_rule_s_best_without_an_image(small):
    count = len(Study.open(small, "truth").records())
    found = searches.measure(small, grid.SEED, "balanced", searches=3, backend="fake")
    assert found["all"]["within"] == 1.0
    assert {run["chosen"] for run in found["all"]["runs"]} == {"8 steps, cfg 2"}
    assert all(0 < run["share"] <= 0.4 for run in found["all"]["runs"])
    assert found["half"]["chosen"]["8 steps, cfg 2"] >= 2, "16 prompts pay for 3 of 6 settings"
    small_budget = choices.measure(small, grid.SEED, 16, repetitions=4)
    final = small_budget["profiles"]["final"]
    assert final["all"]["chosen"] == {"8 steps, cfg 2": 4}
    assert (final["definitive"], final["definitive_beyond"]) == (0, 0), "16 prompts show nothing"
    assert "| definitive |" in page.choice_table({"16": small_budget})
    assert len(Study.open(small, "truth").records()) == count == 6 * 32


def test_answers_that_say_they_are_shown_are_counted_and_held_against_the_truth(small, monkeypatch):
    """Every answer says so; every second one names a setting that loses most of the quality."""
    known = truth.read_truth(grid.open_grid(small, grid.SEED))
    hopeless = next(key for key, i in known.numbers.items() if known.settings[i] == (1, 7.0))
    real, calls = choices.recommend_document, itertools.count()

    def sure(view, profiles):
        document = real(view, profiles)
        odd = next(calls) % 2
        for tasks in document["profiles"].values():
            entry = tasks["text-to-image"]
            entry["evidence"]["definitive"] = True
            entry["setting_id"] = hopeless if odd else entry["setting_id"]
        return document

    monkeypatch.setattr(choices, "recommend_document", sure)
    held = choices.measure(small, grid.SEED, 16, repetitions=4)["profiles"]["final"]
    assert (held["definitive"], held["definitive_beyond"]) == (4, 2)


def test_document_of_a_grid_has_its_truth_and_what_looking_away_costs(small):
    document = truth.document(grid.open_grid(small, grid.SEED))
    means = {(s["steps"], s["cfg"]): s["value"] for s in document["settings"]}
    assert all(abs(mean - accuracy(*key)) < 0.25 for key, mean in means.items())
    held = document["profiles"]["final"]
    assert (held["best"], held["fastest"]) == ("8 steps, cfg 2", "8 steps, cfg 2")
    assert held["blind"]["at random"]["regret"] > held["margin"]
    assert "| 8 |" in page.grid_table({"truth": document})


def test_search_refuses_a_grid_with_holes(small):
    view = grid.open_grid(small, grid.SEED)
    tuning = searches.read_tuning(
        [w for w in grid.grid_words(small, grid.SEED, 32, "fake") if "cfg" not in w] + ["cfg=1,2"]
    )
    with pytest.raises(ConfigError, match="lacks"):
        searches.search(view, tuning)


def test_grid_that_was_not_run_is_named_with_its_command(tmp_path):
    with pytest.raises(ConfigError, match="truth-3"):
        grid.open_grid(tmp_path, 3)


def test_figure_has_a_mark_per_search_and_a_line_per_margin():
    runs = [
        {"seed": i, "chosen": "8 steps, cfg 4", "regret": 0.03, "share": 0.3, "images": 1920}
        for i in range(3)
    ]
    none = {"seed": 3, "chosen": None, "regret": None, "share": 0.1, "images": 640}
    row = {"margin": 0.08, "searches": 4, "all": {"within": 0.75, "runs": [*runs, none]}}
    drawn = page.drawn({"balanced": row})
    assert drawn.count(", search ") == 3, "a search that chose nothing has no regret to draw"
    assert "balanced: 3 of 4 within 0.08" in drawn
    assert drawn.count("margin of balanced") == 1


@pytest.fixture
def searched():
    """The kept searches on nano, once they were made."""
    rows = kept.read("tune")
    if not rows:
        pytest.skip("not measured yet: python -m tests.validity_runs tune --keep")
    return rows


def test_page_s_figure_is_drawn_from_the_kept_searches(searched):
    assert (page.PAGE.parent / page.FIGURE).read_text("utf-8") == page.drawn(searched)


def test_kept_searches_kept_to_their_images(searched):
    for row in searched.values():
        assert max(run["share"] for run in row["all"]["runs"]) <= 0.4
    assert searched["balanced"]["all"]["within"] >= 0.9
