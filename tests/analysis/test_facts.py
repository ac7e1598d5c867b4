"""Which way a plug-in's metric is better: its class says so, and its scores for who lacks it."""

from types import SimpleNamespace

import pytest

from sd35bench import plugins
from sd35bench.analysis import facts as module
from sd35bench.analysis.facts import MetricFacts, declared, facts, known_metrics, take_declared
from sd35bench.analysis.scores import ScoreIndex
from sd35bench.errors import ConfigError
from sd35bench.gate.policy import as_policy
from sd35bench.report.leaderboard import best_first, front_ids, setting_table
from sd35bench.report.render import TERMINAL
from sd35bench.report.rows import lower_is_better, read_rows
from sd35bench.stats.verdicts import Direction
from tests.studies.wide import wide_document

CODE = """
class Grain:
    name = "grain"
    higher_is_better = False
    bounds = (0, 1)
class Usual:
    name = "usual"
"""
POLICY = {"dimensions": {"quality": {"margins": {"grain": 0.1}}}}


@pytest.fixture(autouse=True)
def nothing_read(monkeypatch):
    monkeypatch.setattr(module, "_said", {})


@pytest.fixture(scope="module")
def grain(tmp_path_factory):
    """The class, named as a YAML of --config-dir names it."""
    folder = tmp_path_factory.mktemp("code")
    (folder / "grain_metric.py").write_text(CODE)
    plugins.use_folder(f"{folder}")
    plugins.name_place("metrics", "grain", "grain_metric:Grain")
    yield plugins.load_class("metrics", "grain", object)
    plugins.use_folder(None)


@pytest.fixture
def without_it(monkeypatch):
    """Makes the plug-in unknown."""
    return lambda: monkeypatch.setattr(plugins, "added_names", lambda _: [])


def score(**detail) -> SimpleNamespace:
    return SimpleNamespace(metric="grain", key="k", image="i", value=0.5, detail=detail)


def test_a_class_says_which_way_is_better(grain):
    wanted = MetricFacts(higher_is_better=False, bounds=(0.0, 1.0))
    assert facts("grain") == facts("grain_64") == wanted
    assert lower_is_better("grain")
    assert "grain" in known_metrics()


def test_scores_say_it_where_the_class_is_not(grain, without_it):
    said = declared(grain)
    without_it()
    assert facts("grain") == MetricFacts()
    ScoreIndex([score(**said)])
    assert facts("grain") == MetricFacts(higher_is_better=False, bounds=(0.0, 1.0))


def test_what_is_as_usual_is_not_kept_with_every_score(grain):
    assert declared(plugins.load_class("metrics", "grain_metric:Usual", object)) == {}


@pytest.mark.parametrize("bounds", [(1,), "no", 3])
def test_bounds_that_are_none_are_refused_by_the_metrics_name(bounds):
    odd = SimpleNamespace(name="odd", bounds=bounds)
    with pytest.raises(ConfigError, match="metric odd: bounds="):
        declared(odd)


def test_show_and_front_go_the_way_that_scores_say(without_it):
    """Mutant: more is better of every metric that the package does not know."""
    without_it()
    document = wide_document(1, seed=3, rows=3)
    for row, value in zip(document["settings"], (0.9, 0.5, 0.1), strict=True):
        row["metrics"] = {"grain": {"value": value, "ci95": [value, value], "n": 4}}
        row["latency_s"]["p50"] = 1.0
    rows = read_rows(document)
    ends = [best_first(rows, "grain")[0].value("grain")]
    take_declared([declared(SimpleNamespace(name="grain", higher_is_better=False))])
    ends.append(best_first(rows, "grain")[0].value("grain"))
    assert ends == [0.9, 0.1]
    assert front_ids(rows, "grain") == {"2"}
    columns = setting_table(rows, ()).of(TERMINAL)
    assert [c.hint for c in columns if c.title == "grain"] == ["lower is better; 95 % interval"]


@pytest.mark.usefixtures("grain")
def test_a_gate_takes_its_margin_and_fails_the_right_way(without_it):
    policy = as_policy("own", POLICY)
    assert policy.dimensions["quality"].margins["grain"].direction is Direction.MORE
    without_it()
    with pytest.raises(ConfigError, match="grain: no metric; known:"):
        as_policy("own", POLICY)
