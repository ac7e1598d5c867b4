"""`compare --plan`: what is said to be seen is seen, and what is seen needs fewer prompts."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sd35bench.gate import power
from sd35bench.gate.policy import as_policy, load_policy
from sd35bench.gate.power import COUPLES, PROMPTS, plan_document
from sd35bench.gate.sides import read_sides
from sd35bench.report.gate import plan_parts
from sd35bench.report.render import markdown_document
from sd35bench.stats.clustered import mean_t
from sd35bench.stats.verdicts import POWER, Direction, Verdict, decide, judge
from tests.studies.memory import planted

POLICIES = Path(__file__).parents[2] / "configs" / "policy"
READY = ("all", "drift", "exact", "quality", "speed")
ACCURACY = {"dimensions": {"quality": {"margins": {"prompt_accuracy": 0.05}}}}


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    root = tmp_path_factory.mktemp("plan")
    return [
        read_sides(planted(root / n, {(8, 4.0): (a, 1.0)}, prompts=64, seeds=1))[0]
        for n, a in (("a", 0.9), ("b", 0.85))
    ]


def _plan(before, after=None, policies=READY):
    rules = [
        load_policy(p, POLICIES) if isinstance(p, str) else as_policy("own", p) for p in policies
    ]
    return plan_document(before, after, rules, lambda _a, _b, m: np.zeros((len(m.clusters), 4)))


def test_every_ready_policy_says_what_it_sees_at_which_n(sides):
    for pilot in (None, sides[1]):
        document = _plan(sides[0], pilot)
        json.dumps(document, allow_nan=False)
        assert set(document["policies"]) == set(READY)
        for found in document["policies"].values():
            assert found["rows"]
            for row in found["rows"]:
                known = [harm for _, harm in row["sees"] if harm is not None]
                more = known if row["counts"] == "prompts" else known[1:]
                assert more == sorted(more, reverse=True), "more prompts see less"
                assert all(harm > row["margin"] for harm in known)
                numbers = [n for n, _ in row["sees"]]
                assert tuple(numbers) in (PROMPTS, COUPLES)
        assert "| changed | 0 % | 9.6 % |" in markdown_document(plan_parts(document))


def test_exact_sees_a_share_of_images_that_chance_would_show(sides):
    rows = {r["name"]: r for r in _plan(sides[0], policies=("exact",))["policies"]["exact"]["rows"]}
    seen = dict(map(tuple, rows["changed"]["sees"]))
    assert 1 - (1 - seen[64]) ** 64 == pytest.approx(POWER)
    assert rows["changed"]["passes_from"] == 1


def _failing(loss: float, n: int, repetitions: int = 400) -> float:
    """How often a loss of accuracy, one way only, fails alone at a margin of 0.05."""
    rng, failed = np.random.default_rng(1), 0
    for _ in range(repetitions):
        lost = -1.0 * (rng.random(n) < loss)
        tested = judge(mean_t(lost, range(n), bounds=(-1, 1)), 0.05, Direction.LESS)
        failed += decide(tested, tested.p_fail) is Verdict.FAIL
    return failed / repetitions


def test_what_is_said_to_be_seen_fails_in_four_of_five(sides, monkeypatch):
    def said(n: int) -> float:
        (row,) = _plan(sides[0], policies=(ACCURACY,))["policies"]["own"]["rows"]
        return dict(map(tuple, row["sees"]))[n]

    assert _failing(said(128), 128) == pytest.approx(POWER, abs=0.1)
    # Mutant: without the spread of a loss itself two images that agree would see anything.
    monkeypatch.setattr(power, "_spread_at", lambda known, _: known.sd)
    assert _failing(said(128), 128) < 0.2


def test_pilot_s_spread_takes_the_place_of_what_is_assumed(sides):
    drift = {"dimensions": {"drift": {"margins": {"mean_abs": 1.0}}}}
    (alone,) = _plan(sides[0], policies=(drift,))["policies"]["own"]["rows"]
    assert alone["assumed"]
    rng = np.random.default_rng(0)
    levels = np.tile(rng.normal(1, 0.1, (64, 1)), 4)
    other = planted_images(sides[1])
    found = plan_document(sides[0], other, [as_policy("own", drift)], lambda *_: levels)
    (row,) = found["policies"]["own"]["rows"]
    assert not row["assumed"]
    assert dict(map(tuple, row["sees"]))[64] < dict(map(tuple, alone["sees"]))[64]


def planted_images(side):
    """The same side with images of its own."""
    return replace(side, images=tuple(f"{i:064x}" for i in range(len(side.pairs))))
