"""Set metrics in the gate: verdicts, refusals, baseline files, and every form of output."""

from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from sd35bench.analysis.reference import read_reference, write_reference
from sd35bench.cli import answer
from sd35bench.cli import compare as command
from sd35bench.gate.baseline import (
    baseline_features,
    baseline_text,
    features_file,
    read_baseline,
)
from sd35bench.gate.judge import compare_sides, gate_fails
from sd35bench.gate.policy import as_policy, load_policy
from sd35bench.gate.sides import merge_starts, read_sides
from sd35bench.report.gate import compare_markdown, compare_page, junit_xml
from tests.analysis.set_studies import EXTRACTOR, set_studies
from tests.validity.set_figures import World

POLICIES = Path(__file__).parents[2] / "configs" / "policy"
SAME = World(alike=0.9)
WORSE = World(alike=0.9, worse=1.5)


def _policy(*, optional=(), required=True, **margins):
    wanted = {"required": required, "margins": margins, "optional": list(optional)}
    return as_policy("own", {"dimensions": {"quality": wanted}})


def _judge(sides, policy):
    return compare_sides(*sides, policy, lambda _a, _b, m: np.zeros(len(m.clusters)))


def _read(studies):
    return [read_sides(study) for study in studies]


def _figures(document):
    (comparison,) = document["comparisons"]
    return {f["name"]: f for f in comparison["dimensions"]["quality"]["figures"]}


@pytest.fixture(scope="module")
def same(tmp_path_factory):
    return set_studies(tmp_path_factory.mktemp("same"), SAME, prompts=128)


@pytest.fixture(scope="module")
def worse(tmp_path_factory):
    return set_studies(tmp_path_factory.mktemp("worse"), WORSE, prompts=128)


def test_gate_fails_what_lost_and_passes_what_did_not(same, worse):
    policy = _policy(kid=0.3)
    verdicts = {}
    for name, studies in (("same", same), ("worse", worse), ("better", worse[::-1])):
        document = _judge(_read(studies), policy)
        figure = _figures(document)["kid_nano"]
        verdicts[name] = (document["verdict"], figure["verdict"])
        assert figure["effect"] == pytest.approx(figure["candidate"] - figure["baseline"])
        assert figure["ci95"][0] < figure["effect"] < figure["ci95"][1]
        assert (figure["n"], figure["n_prompts"], figure["worse"]) == (128, 128, "more")
    assert verdicts == {
        "same": ("pass", "pass"),
        "worse": ("fail", "fail"),
        "better": ("pass", "pass"),
    }


def test_figures_are_one_family_and_only_what_the_policy_names_is_in_it(tmp_path):
    studies = set_studies(tmp_path, SAME, prompts=128, names=("kid_nano", "cmmd_nano"))
    one = _figures(_judge(_read(studies), _policy(kid=0.001)))
    two = _figures(_judge(_read(studies), _policy(kid=0.001, cmmd=1000.0)))
    assert set(one) == {"kid_nano"}
    assert set(two) == {"kid_nano", "cmmd_nano"}
    assert one["kid_nano"]["p"] == one["kid_nano"]["p_adjusted"] == two["kid_nano"]["p"]
    assert two["kid_nano"]["p_adjusted"] == pytest.approx(min(1.0, 2 * two["kid_nano"]["p"]))


def test_below_its_least_n_a_set_metric_does_not_apply_and_says_why(tmp_path):
    studies = set_studies(tmp_path, WORSE, prompts=127, names=("kid_nano", "fid_nano"))
    policy = _policy(kid=0.001, fid=0.001, prompt_accuracy=0.5, optional=["kid", "fid"])
    document = _judge(_read(studies), policy)
    found = _figures(document)
    assert document["verdict"] == "pass"
    for name, least in (("kid_nano", 128), ("fid_nano", 256)):
        assert found[name]["verdict"] == "not applicable"
        assert found[name]["p_adjusted"] is None
        assert f"holds from {least} prompts" in found[name]["note"]
    needed = _judge(_read(studies), _policy(kid=0.001, prompt_accuracy=0.5))
    assert gate_fails(needed)
    assert "could not be measured" in needed["dimensions"]["quality"]["reason"]


def test_scored_on_one_side_alone_is_unmeasured_and_on_none_not_there(same):
    sides = _read(same)
    blind = [replace(sides[1][0], sets={})]
    for policy in (
        _policy(kid=0.3, prompt_accuracy=0.05),
        _policy(kid=0.3, prompt_accuracy=0.05, optional=["kid"]),
    ):
        document = _judge((sides[0], blind), policy)
        assert document["verdict"] == "fail"
        reason = document["dimensions"]["quality"]["reason"]
        assert "kid_nano was not scored on the candidate" in reason
    lenient = _policy(kid=0.3, prompt_accuracy=0.05, required=False)
    assert _judge((sides[0], blind), lenient)["verdict"] == "undecided"
    neither = [replace(sides[0][0], sets={})], blind
    assert _judge(neither, _policy(kid=0.3, prompt_accuracy=0.05))["verdict"] == "fail"
    spared = _judge(neither, _policy(kid=0.3, prompt_accuracy=0.05, optional=["kid"]))
    assert spared["verdict"] == "pass"
    assert _figures(spared)["kid"]["verdict"] == "not applicable"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extractor": "nano-other"}, "another extractor"),
        ({"parameters": {"normalise": True}}, "another parameters"),
        ({"reference": "another"}, "unlike references"),
        ({"read_features": dict}, "features of 128 of 128 images of b are not there"),
    ],
)
def test_sides_that_were_scored_differently_are_unmeasured(same, change, message):
    before, (after,) = _read(same)
    if "reference" in change:  # neither covers the prompts: other images
        bare = replace(after.sets["kid_nano"].read_reference(), prompts=None)
        change = {**change, "read_reference": lambda: bare}
        other = replace(before[0].sets["kid_nano"], read_reference=lambda: bare)
        before = [replace(before[0], sets={"kid_nano": other})]
    changed = replace(after, sets={"kid_nano": replace(after.sets["kid_nano"], **change)})
    found = _figures(_judge((before, [changed]), _policy(kid=0.3)))["kid_nano"]
    assert found["verdict"] == "undecided"
    assert found["effect"] is None
    assert message in found["note"]


def test_lost_prompt_does_not_stop_the_comparison(tmp_path):
    """It takes its prompt out of the candidate's reference, which then has another name."""
    before, after = set_studies(tmp_path, SAME, prompts=129)
    gone = after.kept.pop()
    after.score_rows = [s for s in after.score_rows if s.key != gone.trial.key]
    reference = read_reference(after, f"{EXTRACTOR}-r")
    kept = reference.prompts != gone.trial.request.prompt
    left = {"features": reference.features[kept], "prompts": reference.prompts[kept]}
    write_reference(after, replace(reference, name="fewer", **left))
    for row in after.score_rows:
        if "reference" in row.detail:
            row.detail["reference"] = "fewer"
    figure = _figures(_judge(_read((before, after)), _policy(kid=0.3)))["kid_nano"]
    assert (figure["verdict"], figure["n"]) == ("pass", 128)
    assert "of two references" in figure["note"]


def test_baseline_file_gives_the_same_figures_with_its_features_and_fails_without(tmp_path, worse):
    sides, path = _read(worse), tmp_path / "main.json"
    path.write_text(baseline_text(sides[0]))
    policy = _policy(kid=0.3)
    alone = _judge((read_baseline(path), sides[1]), policy)
    assert gate_fails(alone)
    assert ".features.npz" in alone["dimensions"]["quality"]["reason"]
    features = baseline_features(sides[0])
    assert features is not None
    assert len(features) < 36_000  # 128 images of 48 dimensions
    features_file(path).write_bytes(features)
    mine, theirs = (
        _figures(_judge((before, sides[1]), policy))["kid_nano"]
        for before in (read_baseline(path), sides[0])
    )
    assert mine == theirs
    files = _judge((read_baseline(path), read_baseline(path)), policy)
    assert "not with two files" in _figures(files)["kid_nano"]["note"]


def test_baseline_make_writes_features_that_compare_finds(monkeypatch, tmp_path, worse):
    studies, path = dict(zip("ab", worse, strict=True)), tmp_path / "main.json"
    monkeypatch.setattr(command, "open_study", lambda _, name: studies[name])
    monkeypatch.setattr(command, "score_missing", lambda _: {"refused": {}})
    monkeypatch.setattr(command, "read_with_reruns", read_sides)
    monkeypatch.setattr(worse[0], "done_keys", lambda: {"some"}, raising=False)
    made = answer("baseline", ["make", "a", str(path)])
    assert made.document["features"] == str(features_file(path))
    found = _judge((read_baseline(path), read_sides(worse[1])), _policy(kid=0.3))
    assert _figures(found)["kid_nano"]["verdict"] == "fail"


def test_file_of_an_earlier_version_has_no_set_metric(tmp_path, same):
    sides, path = _read(same), tmp_path / "main.json"
    plain = [replace(sides[0][0], sets={})]
    path.write_text(baseline_text(plain).replace('"sets": {}, ', ""))
    figure = _figures(_judge((read_baseline(path), sides[1]), _policy(kid=0.3)))["kid_nano"]
    assert "not scored on the baseline" in figure["note"]
    assert baseline_features(plain) is None


def test_reruns_add_no_images_to_a_set(same):
    (side,) = read_sides(same[0])
    merged = merge_starts(side, [side])
    assert len(merged.sets["kid_nano"].rows) == 256
    assert merged.sets["kid_nano"].rows.sum() == 128


def test_every_form_of_output_has_the_figure(worse):
    document = _judge(_read(worse), _policy(kid=0.3, prompt_accuracy=0.05))
    row = next(x for x in compare_markdown(document).splitlines() if "kid\\_nano" in x)
    assert row.startswith("| fail | quality |")
    (failure,) = ElementTree.fromstring(junit_xml(document)).iter("failure")
    assert "kid_nano is worse than the margin allows" in failure.get("message", "")
    page = compare_page(document, lambda _: None, lambda _: None)
    assert "kid_nano" in page
    unscored = _judge(_read(worse), _policy(fid=1.0, kid=0.3, optional=["fid"]))
    assert "| not applicable | quality | fid |" in compare_markdown(unscored)


def test_refusal_is_said_in_every_form(tmp_path):
    studies = set_studies(tmp_path, SAME, prompts=128, names=("fid_nano",))
    document = _judge(_read(studies), _policy(fid=1.0, prompt_accuracy=0.05, optional=["fid"]))
    page = compare_page(document, lambda _: None, lambda _: None)
    for text in (compare_markdown(document), junit_xml(document), page):
        assert "holds from 256 prompts" in text


@pytest.mark.parametrize("name", ["quality", "all"])
def test_ready_policies_name_set_metrics_with_margins_of_their_own(name):
    quality = load_policy(name, POLICIES).dimensions["quality"]
    for metric in ("kid_nano", "fid_nano"):
        margin = quality.margin(metric)
        assert margin is not None
        assert margin.direction == "more"
        assert margin.margin > 0
        assert metric in quality.optional
    assert quality.margin("cmmd_nano") is quality.margin("kid_inception") is None


@pytest.mark.slow
def test_a_a_raises_no_more_alarms_than_stated(tmp_path):
    """300 comparisons of a backend with itself, at a margin of nothing: the worst allowed."""
    policy, alarms = _policy(kid=0.0, cmmd=0.0), 0
    for seed in range(300):
        names = ("kid_nano", "cmmd_nano")
        world = World(seeds=1)
        studies = set_studies(tmp_path / str(seed), world, prompts=128, names=names, seed=seed)
        alarms += gate_fails(_judge(_read(studies), policy))
    assert alarms / 300 <= 0.025 + 2.6 * np.sqrt(0.025 * 0.975 / 300)
