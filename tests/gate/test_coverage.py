"""Who did not make what the baseline made does not pass; nor does a gate that saw nothing."""

from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from sd35bench.analysis.facts import METRICS, known_metrics
from sd35bench.errors import ConfigError
from sd35bench.gate.baseline import baseline_text, read_baseline
from sd35bench.gate.judge import compare_sides, count_covered, gate_fails
from sd35bench.gate.policy import as_policy, load_policy
from sd35bench.gate.sides import read_sides
from sd35bench.report.gate import compare_page, comparison_parts, junit_xml
from sd35bench.report.render import markdown_document
from sd35bench.types import Status, Timings
from tests.studies.memory import LOAD, MemoryStudy, planted, record, session

POLICIES = Path(__file__).parents[2] / "configs" / "policy"
FAILURES = {"failures": {"required": True, "margins": {"failed": 0.01}}}


def _study(path, settings=((8, 4.0),), prompts=100, **fields):
    wanted = dict.fromkeys(settings, (0.9, 1.0))
    return planted(path, wanted, prompts=prompts, seeds=1, **fields)


def _lost(study, first, status):
    """From its `first` trial on nothing was made."""
    gone = {"status": status, "timings": None, "image": None, "error": "not tried"}
    study.kept[first:] = [replace(row, **gone) for row in study.kept[first:]]
    return study


def _judge(before, after, policy=None, distances=None):
    """Compare studies, or sides that were read already."""
    sides = [read_sides(x) if isinstance(x, MemoryStudy) else x for x in (before, after)]
    asked = {"dimensions": FAILURES} if policy is None else policy
    found = load_policy(asked, POLICIES) if isinstance(asked, str) else as_policy("own", asked)
    near = (lambda _a, _b, m: np.zeros((len(m.clusters), 4))) if distances is None else distances
    return compare_sides(*sides, found, near)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return _study(tmp_path_factory.mktemp("base"))


# What is missing -------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["all", "speed", "quality", "drift"])
def test_trials_that_were_given_up_are_failures_and_not_missing(tmp_path, base, policy):
    late = _lost(_study(tmp_path), 51, Status.SKIPPED)
    document = _judge(base, late, policy)
    assert gate_fails(document)
    assert document["dimensions"]["failures"]["verdict"] == "fail"
    (figure,) = document["comparisons"][0]["dimensions"]["failures"]["figures"]
    assert figure["candidate"] == pytest.approx(0.49)
    assert document["gate"]["coverage"]["verdict"] == "pass"


def test_fewer_pairs_fail_unless_the_policy_asks_for_fewer(tmp_path, base):
    few = _study(tmp_path, prompts=12)
    document = _judge(base, few)
    assert gate_fails(document)
    found = document["gate"]["coverage"]
    assert (found["verdict"], found["share"], found["required"]) == ("fail", 0.12, 1.0)
    assert "12 of 100 pairs" in found["reason"]
    for coverage, verdict in ((0.12, "pass"), (0.13, "fail"), (0, "pass")):
        again = _judge(base, few, {"coverage": coverage, "dimensions": FAILURES})
        assert again["gate"]["coverage"]["verdict"] == verdict
        assert any("88 pairs of the baseline only" in w for w in again["warnings"])
    assert _judge(few, base)["gate"]["coverage"]["verdict"] == "pass"  # more than was asked


def test_setting_that_is_gone_fails_the_gate(tmp_path):
    both = _study(tmp_path / "a", ((8, 4.0), (8, 7.0)))
    one = _study(tmp_path / "b")
    found = _judge(both, one)["gate"]["coverage"]
    assert (found["verdict"], found["share"]) == ("fail", 0.5)
    assert "cfg 7: no such setting" in found["reason"]
    half = {"coverage": 0.5, "dimensions": FAILURES}
    assert _judge(both, one, half)["gate"]["coverage"]["verdict"] == "pass"
    assert _judge(one, both)["gate"]["coverage"]["verdict"] == "pass"  # a new one is not missing


def test_setting_without_one_shared_pair_is_missing_too(tmp_path):
    before = _study(tmp_path / "a", ((8, 4.0), (8, 7.0)), prompts=20)
    after = _study(tmp_path / "b", ((8, 4.0), (8, 7.0)), prompts=20)
    after.kept = [
        record(i + 500, steps=8, cfg=7.0) if row.trial.request.cfg == 7.0 else row
        for i, row in enumerate(after.kept)
    ]
    found = _judge(before, after.touch_images())["gate"]["coverage"]
    assert (found["verdict"], found["share"]) == ("fail", 0.0)


def test_where_failures_are_not_judged_what_failed_is_missing(tmp_path, base):
    quality = {"dimensions": {"quality": {"margins": {"prompt_accuracy": 0.05}}}}
    crashed = _lost(_study(tmp_path), 60, Status.CRASHED)
    found = _judge(base, crashed, quality)["gate"]["coverage"]
    assert (found["verdict"], found["share"]) == ("fail", 0.6)
    assert "made" in found["reason"]
    # What the baseline did not make either, nobody asks for.
    assert _judge(crashed, crashed, quality)["gate"]["coverage"]["verdict"] == "pass"


def test_baseline_file_asks_for_as_much_as_its_study(tmp_path, base):
    path = tmp_path / "main.json"
    path.write_text(baseline_text(read_sides(base)))
    few = _study(tmp_path / "few", prompts=12)
    found = [_judge(before, few)["gate"]["coverage"] for before in (base, read_baseline(path))]
    assert found[0] == found[1]


def _two_places(path, first_there):
    """A study whose trials from `first_there` on ran under another version of torch."""
    study = _study(path)
    there = replace(session("t", environment="f" * 64), environment={"device": "cpu", "torch": "3"})
    study.lives = {**study.lives, "t": there}
    moved = [replace(row, session_id="t") for row in study.kept[first_there:]]
    study.kept[first_there:] = moved
    return study


def test_what_ran_in_another_environment_is_missing_and_said(tmp_path, base):
    mixed = _two_places(tmp_path / "mixed", 60)
    document = _judge(base, mixed)
    assert document["gate"]["coverage"]["share"] == 0.6
    assert gate_fails(document)
    (warning,) = [w for w in document["warnings"] if "another environment" in w]
    assert "40 pairs" in warning
    assert "torch" in warning
    assert "device" not in warning


def test_failures_in_another_environment_do_not_vanish_behind_a_mixed_baseline(tmp_path):
    before = _two_places(tmp_path / "a", 60)
    after = _lost(_two_places(tmp_path / "b", 60), 60, Status.CRASHED)
    path = tmp_path / "main.json"
    path.write_text(baseline_text(read_sides(before)))
    for baseline in (before, read_baseline(path)):
        document = _judge(baseline, after)
        assert document["gate"]["coverage"]["share"] == 0.6
        assert gate_fails(document)
        assert sum("another environment" in w for w in document["warnings"]) == 1


def test_pair_at_another_batch_size_is_there(tmp_path, base):
    (before,) = read_sides(base)
    (after,) = read_sides(_study(tmp_path, batch_size=16))
    assert count_covered(before, after, as_policy("own", {"dimensions": FAILURES})) == (100, 100)


# What cannot be seen ---------------------------------------------------------------------------


def test_required_dimension_that_nothing_could_fail_is_not_measured(tmp_path):
    other = replace(LOAD.backend, options={"dtype": "bf16"})
    loads = {"a": LOAD, "b": replace(LOAD, backend=other)}  # images of their own
    studies = [_study(tmp_path / n, prompts=1, load=load) for n, load in loads.items()]
    margins = {"prompt_accuracy": 0.05}
    required = {"dimensions": {"quality": {"required": True, "margins": margins}}}
    document = _judge(*studies, required)
    assert gate_fails(document)
    assert "could not be measured" in document["dimensions"]["quality"]["reason"]
    (figure,) = document["comparisons"][0]["dimensions"]["quality"]["figures"]
    assert (figure["p"], figure["p_adjusted"], figure["verdict"]) == (None, None, "undecided")
    lenient = _judge(*studies, {"dimensions": {"quality": {"margins": margins}}})
    assert lenient["verdict"] == "undecided"
    assert not gate_fails(lenient)


def test_figure_without_an_interval_costs_the_others_nothing(tmp_path):
    studies = []
    for name, accuracy in (("a", 0.9), ("b", 0.7)):
        study = planted(tmp_path / name, {(8, 4.0): (accuracy, 1.0)}, prompts=64, seeds=1)
        study.score(study.kept[0], "clip_score_nano", 20.0)  # one image: no interval
        studies.append(study)
    margins = {"prompt_accuracy": 0.05, "clip_score": 0.5}
    document = _judge(*studies, {"dimensions": {"quality": {"margins": margins}}})
    figures = document["comparisons"][0]["dimensions"]["quality"]["figures"]
    assert figures[0]["p"] == figures[0]["p_adjusted"] > 0
    assert figures[1]["p_adjusted"] is None


def _related(study, slower, rng_seed):
    """Its times as of a busy machine: neighbours correlate by 0.9."""
    rng, n = np.random.default_rng(rng_seed), len(study.kept)
    mood = np.zeros(n)
    for i in range(1, n):
        mood[i] = 0.9 * mood[i - 1] + 0.44 * rng.standard_normal()
    for i, row in enumerate(study.kept):
        taken = Timings(generate_s=slower * float(np.exp(0.05 * mood[i])), encode_s=0.0)
        at = f"2026-01-01T00:{i // 60:02}:{i % 60:02}"
        study.kept[i] = replace(row, timings=taken, started_at=at)
    return study


def test_times_that_are_too_alike_do_not_hide_a_slowdown(tmp_path):
    before, same, slower = (
        _related(_study(tmp_path / str(i), prompts=48), times, i)
        for i, times in enumerate((1.0, 1.0, 3.0))
    )
    policy = {"latency": {"required": True, "start_spread": 0.15, "margins": {"p50": 1.05}}}
    verdicts = [
        _judge(before, after, {"dimensions": policy})["dimensions"]["latency"]["verdict"]
        for after in (same, slower)
    ]
    assert verdicts == ["undecided", "fail"]


@pytest.mark.parametrize(
    ("margins", "more", "verdict"),
    [
        ({"prompt_accuracy": 0.05, "clip_score": 0.5}, {}, "fail"),
        ({"prompt_accuracy": 0.05, "clip_score": 0.5}, {"optional": ["clip_score"]}, "pass"),
        ({"prompt_accuracy": 0.05, "clip_score": 0.5}, {"required": False}, "pass"),
        ({"prompt_accuracy": 0.05, "init_kept": 0.05}, {}, "pass"),
        ({"prompt_accuracy": 0.05, "fid": 1.0}, {}, "fail"),
    ],
    ids=["absent", "optional", "not-required", "other-task", "set-metric"],
)
def test_named_metric_that_neither_side_has_is_not_dropped(base, margins, more, verdict):
    policy = {"dimensions": {"quality": {"required": True, "margins": margins, **more}}}
    document = _judge(base, base, {**policy, "undecided": "fail"})
    figures = document["comparisons"][0]["dimensions"]["quality"]["figures"]
    assert [f["name"] for f in figures] == list(margins)
    assert figures[1]["verdict"] == "not applicable"
    assert document["verdict"] == verdict
    if verdict == "fail":
        assert "was scored on neither side" in document["dimensions"]["quality"]["reason"]
    assert f"scored on neither side: {list(margins)[1]}" in markdown_document(
        comparison_parts(document)
    )


@pytest.mark.parametrize(
    ("dimension", "raw", "message"),
    [
        ("quality", {"prompt_acuracy": 0.05}, "prompt_acuracy: no metric; known: clip_score"),
        ("quality", {"lpips": 0.1}, "lpips: no metric"),
        ("quality", {"drift_mean_abs": 1}, "a dimension of its own"),
        ("latency", {"p50": {"margin": 1.05, "direction": "less"}}, "p50.direction='less'"),
        ("failures", {"failed": {"margin": 0.01, "direction": "more"}}, "failed.direction='more'"),
    ],
)
def test_margin_that_would_never_act_is_refused(dimension, raw, message):
    extra = {"start_spread": 0.1} if dimension == "latency" else {}
    with pytest.raises(ConfigError, match=message):
        as_policy("own", {"dimensions": {dimension: {"margins": raw, **extra}}})


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"coverage": 1.5, "dimensions": FAILURES}, "policy.coverage=1.5"),
        ({"coverage": -1, "dimensions": FAILURES}, "policy.coverage=-1"),
        ({"coverage": True, "dimensions": FAILURES}, "policy.coverage=True"),
        (
            {"dimensions": {"quality": {"margins": {"fid": 1}, "optional": ["kid"]}}},
            "optional='kid'",
        ),
        ({"dimensions": {"quality": {"margins": {"fid": 1}, "optional": "fid"}}}, "a list"),
    ],
)
def test_coverage_and_optional_are_checked(raw, message):
    with pytest.raises(ConfigError, match=message):
        as_policy("own", raw)


def test_every_metric_that_can_be_scored_can_be_named_in_a_policy():
    unknown = [name for name in METRICS if not name.startswith(known_metrics())]
    assert unknown == []


@pytest.mark.parametrize(
    ("metric", "worse"),
    [
        ("sharpness", "both"),
        ("contrast", "both"),
        ("prompt_accuracy", "less"),
        ("kid_nano", "more"),
    ],
)
def test_default_direction_is_the_metric_s_own(metric, worse):
    policy = as_policy("own", {"dimensions": {"quality": {"margins": {metric: 0.1}}}})
    assert policy.dimensions["quality"].margins[metric].direction == worse


def test_candidate_s_own_noise_excuses_no_drift(base):
    policy = {"dimensions": {"drift": {"required": True, "margins": {"mean_abs": 1}}}}
    (before,), levels = read_sides(base), np.random.default_rng(0).uniform(2.5, 3.5, (100, 4))
    quiet, noisy = replace(before, floor_levels=0.5), replace(before, floor_levels=10.0)
    document = _judge([quiet], [noisy], policy, lambda *_: levels)
    (figure,) = document["comparisons"][0]["dimensions"]["drift"]["figures"]
    assert (document["verdict"], figure["margin"]) == ("fail", 1.5)
    assert "the candidate's own is larger, 10" in figure["note"]
    unmeasured = _judge([before], [noisy], policy, lambda *_: levels)
    assert unmeasured["verdict"] == "fail"
    assert _judge([noisy], [quiet], policy, lambda *_: levels)["verdict"] == "pass"


# What is said ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lacking(base, tmp_path_factory):
    """A comparison whose dimensions all pass, and whose candidate lacks pairs."""
    few = _study(tmp_path_factory.mktemp("few"))
    del few.kept[60:]
    quality = {"quality": {"required": True, "margins": {"prompt_accuracy": 0.2}}}
    return _judge(base, few, {"dimensions": quality})


def test_every_form_says_why_the_gate_failed(lacking):
    assert lacking["dimensions"]["quality"]["verdict"] == "pass"
    suites = ElementTree.fromstring(junit_xml(lacking))
    (failure,) = suites.iter("failure")
    assert "60 of 100 pairs" in failure.get("message", "")
    assert [s.get("failures") for s in suites.iter("testsuite")] == ["0", "1"]
    page = compare_page(lacking, lambda _: None, lambda _: None)
    for text in (markdown_document(comparison_parts(lacking)), page):
        assert "60 of 100 pairs" in text


def test_gate_that_measured_nothing_has_a_failing_test(base):
    nothing = {"dimensions": {"quality": {"margins": {"clip_score": 0.5}}}}
    document = _judge(base, base, nothing)
    assert gate_fails(document)
    (failure,) = ElementTree.fromstring(junit_xml(document)).iter("failure")
    assert "nothing was measured" in failure.get("message", "")


def test_study_against_itself_is_said(tmp_path, base):
    assert any("the same runs" in w for w in _judge(base, base)["warnings"])
    other = _study(tmp_path)
    other.lives = {"other": session("other")}
    other.kept = [replace(row, session_id="other") for row in other.kept]
    assert not any("the same runs" in w for w in _judge(base, other)["warnings"])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"environment": {"device": "cpu"}', '"environment": null'),
        ('"cfg": 4.0', '"cfg": "4"'),
        ('"width": 64', '"width": "64"'),
        ('"task": ', '"tusk": '),
        ('"setting": {', '"setting": 1, "was": {'),
    ],
    ids=["no-environment", "cfg-is-text", "width-is-text", "no-task", "no-setting"],
)
def test_baseline_file_that_lacks_what_a_comparison_reads_is_wrong_input(tmp_path, base, old, new):
    path, text = tmp_path / "main.json", baseline_text(read_sides(base))
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigError, match="damaged"):
        read_baseline(path)
