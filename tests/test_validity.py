"""The validity page's claims, measured again from another seed; long."""

import pytest

from tests import validity
from tests.analysis.bench_compare import measure

pytestmark = pytest.mark.slow
SEED = 7
TOLERANCE = 1.5 + 0.9
"""Points: what is claimed, and 2.6 standard errors of 4,000 repetitions."""
CAREFUL = {"accuracy 1, difference, 2 % lost", "0 → 0", "0 → 0.02"}
"""Few prompts tell anything here, and intervals are too wide on purpose."""


def _rows(table):
    head, *rows = table
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_chosen_intervals_of_means_cover_and_the_mutant_does_not():
    rows = _rows(validity.coverage_table("of", validity.MEANS, validity.MEAN_KINDS, SEED))
    for row in (r for r in rows if int(r["prompts"]) >= 128):
        low = 95 - TOLERANCE
        assert float(row["chosen"]) >= low, row
        assert row["of"] in CAREFUL or float(row["chosen"]) <= 95 + TOLERANCE, row
    normal = [float(r["by image (mutant)"]) for r in rows if r["of"] == "normal"]
    assert max(normal) < 85


def test_chosen_intervals_of_failures_cover():
    for row in _rows(validity.difference_table(SEED)):
        if int(row["prompts"]) >= 128:
            assert float(row["chosen"]) >= 95 - TOLERANCE, row


def test_a_gate_s_false_alarms_are_as_stated():
    rows = [r for r in _rows(validity.alarm_table(SEED)) if r["stated"] == "2.5 %"]
    for row in rows:
        # 2.6 standard errors of 1,000 comparisons
        assert float(row["alarms with Holm"].removesuffix(" %")) <= 2.5 + 1.3, row
    assert float(rows[2]["without"].removesuffix(" %")) > 20


def test_a_million_records_are_compared_within_30_s_and_4_gb():
    found = measure(1_000_000)
    assert found["seconds"] < 30
    assert found["peak_bytes"] < 4e9
