"""A verdict, its words and its interval follow from one another, and same images are the same."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sd35bench.gate import judge as gate_judge
from sd35bench.gate.figure import Figure
from sd35bench.gate.judge import _decide, _dimension, _Judged, _tested
from sd35bench.gate.policy import Dimension, MetricMargin
from sd35bench.stats.clustered import mean_t
from sd35bench.stats.intervals import Interval
from sd35bench.stats.verdicts import TAIL, Direction, holm, holm_sizes

ACROSS = "reaches across the margin"
_MARGINS = (0.0, 0.05, 0.5)


def _item(figure: Figure) -> _Judged:
    return _tested("quality", figure)


def _figure(effect: Interval, margin: float, direction: Direction, **more) -> Figure:
    return Figure(
        name="clip_score", unit="metric", kind="difference", allowed=margin,
        margin=MetricMargin(margin, direction), effect=effect, **more,
    )  # fmt: skip


def _judged(items: Sequence[_Judged]) -> dict:
    _decide(items)
    return _dimension(Dimension(required=False, margins={}), items)


def contradictions(document: dict) -> list[str]:
    """What a reader would find at odds: figure by figure, verdict against interval and words."""
    found = []
    for figure in document["figures"]:
        (low, high), margin = figure["interval"], figure["margin"]
        harms = {"more": [(low, high)], "less": [(-high, -low)]}
        ends = harms.get(figure["worse"], [(low, high), (-high, -low)])
        beyond = any(lower > margin for lower, _ in ends)
        within = all(upper <= margin for _, upper in ends)
        said = {"fail": beyond, "pass": within, "undecided": not beyond and not within}
        if not said[figure["verdict"]]:
            found.append(f"{figure['verdict']} beside {low} to {high}, margin {margin}")
        if not low <= figure["effect"] <= high:
            found.append(f"{figure['effect']} outside of {low} to {high}")
        if figure["p_adjusted"] is not None and (figure["p_adjusted"] < TAIL) != beyond:
            found.append(f"p {figure['p_adjusted']} beside {low} to {high}, margin {margin}")
    if document["verdict"] != "undecided":
        return found
    open_ = [f for f in document["figures"] if f["verdict"] == "undecided"]
    alone = [f for f in open_ if f["p"] is not None and f["p"] < TAIL]
    said = ("alone it would fail" in document["reason"], ACROSS in document["reason"])
    if said != (bool(alone), len(alone) < len(open_)):
        found.append(f"{document['reason']!r} beside {[(f['p'], f['ci95']) for f in open_]}")
    return found


@st.composite
def families(draw) -> list[_Judged]:
    """Up to six figures of random spread, size and direction."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    found = []
    for _ in range(draw(st.integers(1, 6))):
        margin = draw(st.sampled_from(_MARGINS))
        direction = draw(st.sampled_from(list(Direction)))
        prompts = draw(st.integers(2, 40))
        share = draw(st.booleans())
        values = rng.choice([-1.0, 0.0, 1.0], prompts, p=rng.dirichlet([1, 3, 1]))
        if not share:
            values = rng.normal(rng.normal(0, 0.5), rng.uniform(0, 1), prompts)
        span = (-1.0, 1.0) if share else None
        effect = mean_t(values, np.arange(prompts), bounds=span)
        figure = _figure(effect, margin, direction, span=span, unchanged=not values.any())
        found.append(_item(figure))
    return found


@settings(max_examples=60, deadline=None)
@given(families())
def test_words_interval_and_verdict_never_contradict_each_other(family):
    assert contradictions(_judged(family)) == []


CLIP = Interval(-8.7, -20.1, -1.59, 10, 10)
"""A VAE without its shift factor: worse by itself, not as one of three figures."""


def _clip_beside_two_others() -> list[_Judged]:
    others = [mean_t([0.01, -0.02, 0.03, -0.01], range(4)) for _ in range(2)]
    figures = [_figure(effect, 0.5, Direction.LESS) for effect in others]
    return [_item(f) for f in (_figure(CLIP, 0.5, Direction.LESS), *figures)]


def test_an_interval_that_lies_beyond_the_margin_is_not_said_to_reach_across_it():
    """The reason is the correction, and the interval beside the verdict is the corrected one."""
    document = _judged(_clip_beside_two_others())
    clip = document["figures"][0]
    assert (document["verdict"], clip["verdict"], clip["family"]) == ("undecided", "undecided", 3)
    assert "alone it would fail" in document["reason"]
    assert "one of 3 figures" in document["reason"]
    assert ACROSS not in document["reason"]
    assert clip["p"] < TAIL < clip["p_adjusted"] == pytest.approx(3 * clip["p"])
    assert clip["ci95"] == [-20.1, -1.59]
    assert clip["interval"][0] == -20.1, "the end that no harm lies on is as it was"
    assert clip["interval"][1] > -0.5


def test_mutant_plain_intervals_contradict_the_corrected_verdict(monkeypatch):
    """Without the correction of the interval the check above finds what a reader found."""
    monkeypatch.setattr(gate_judge, "decisive", lambda effect, *_: effect)
    assert contradictions(_judged(_clip_beside_two_others()))


def test_figure_without_variation_takes_no_place_of_the_others():
    """`failed` is 0 on both sides: of three figures two are judged, which is what CLIP needs."""
    clip = _figure(Interval(-8.7, -20.1, -1.2, 10, 10), 0.5, Direction.LESS)
    still = [
        _figure(mean_t([0.0] * 20, range(20), bounds=(-1, 1)), 0.05, Direction.MORE, unchanged=seen)
        for seen in (True, False)
    ]
    corrected = []
    for failed in still:
        document = _judged([_item(failed), _item(clip)])
        assert contradictions(document) == []
        corrected.append(document["figures"][1]["p_adjusted"] / document["figures"][1]["p"])
    assert corrected == pytest.approx([1.0, 2.0]), "2 is the mutant: it costs the other a place"


def test_sizes_are_those_by_which_holm_decides():
    rng = np.random.default_rng(0)
    for _ in range(200):
        p = rng.uniform(0, 0.08, rng.integers(1, 7)) ** rng.uniform(1, 2)
        sizes = holm_sizes(p.tolist())
        rejected = [one < TAIL for one in holm(p.tolist())]
        assert [size * one < TAIL for size, one in zip(sizes, p, strict=True)] == rejected
