"""The validity page's claims, measured again from another seed; long."""

import pytest

from tests.analysis.bench_compare import measure
from tests.validity.alarms import alarm_table
from tests.validity.coverage import (
    CLAIMED,
    OFF,
    SIGN,
    coverage_table,
    quantile_table,
    ratio_table,
)
from tests.validity.drawn import FAILURES, MEANS, SHARES
from tests.validity.kinds import MEAN_KINDS, chosen
from tests.validity.latencies import KINDS, latency_table
from tests.validity.page import END, MARK, PAGE, markdown, split, tables
from tests.validity.population import MEASURES, population, population_table

SEED = 7
TOLERANCE = OFF + 0.6
"""Points: what is claimed, and 2.6 standard errors of 10,000 repetitions."""
BLIND = {"0 → 0"}
"""No prompt tells anything here: what is discrete cannot be held in 95 % of cases."""
MUTANTS = ("both ends follow (mutant)", "by image (mutant)")


def _rows(table):
    head, *rows = table
    return [dict(zip(head, row, strict=True)) for row in rows if len(row) > 1]


def _percent(cell):
    return float(cell.removesuffix(SIGN))


def _claimed(rows, title="prompts"):
    return [row for row in rows if int(row[title]) >= CLAIMED]


def _assert_near_95(rows, column="chosen"):
    for row in _claimed(rows):
        if next(iter(row.values())) not in BLIND:
            assert abs(_percent(row[column]) - 95) <= TOLERANCE, row


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_chosen_intervals_of_means_cover_and_the_mutants_do_not():
    kinds = {name: MEAN_KINDS[name] for name in ("chosen", *MUTANTS)}
    rows = _rows(coverage_table("of", MEANS, kinds, SEED))
    _assert_near_95(rows)
    by_name = {(row["of"], row["prompts"]): row for row in rows}
    assert _percent(by_name["normal", "128"]["by image (mutant)"]) < 85
    follows = by_name["accuracy 0.9, difference, no loss", "128"]["both ends follow (mutant)"]
    assert _percent(follows) < 95 - TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("sources", [SHARES, FAILURES], ids=["shares", "failures"])
def test_chosen_intervals_of_rare_and_frequent_shares_cover(sources):
    _assert_near_95(_rows(coverage_table("of", sources, {"chosen": chosen}, SEED)))


@pytest.mark.slow
def test_ratios_of_sums_cover_and_the_mutant_does_not():
    rows = _rows(ratio_table(SEED))
    _assert_near_95(rows)
    assert max(_percent(row["by image (mutant)"]) for row in rows) < 85


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_quantiles_cover_where_they_are_told_and_are_refused_where_n_is_worth_too_little():
    rows = _rows(quantile_table(SEED, 2000))
    spells = "over time, busy spells"
    for row in rows:
        for q in ("p50", "p95"):
            told = float(row[f"{q} told"].removesuffix(" %")) if row[q] != "–" else 0.0
            if int(row["n"]) >= CLAIMED and told >= 50 and row["quantile"] != spells:
                assert abs(_percent(row[q]) - 95) <= OFF + 1.3, row  # 2,000 repetitions
    alike = {row["n"]: row for row in rows if row["quantile"].endswith("correlate 0.9")}
    assert float(alike["128"]["p50 told"].removesuffix(" %")) < 15
    assert alike["512"]["p95 told"] == "0 %"


def _assert_latencies_cover(rows, least):
    for row in rows:
        told = {k: float(v) for k, v in row.items() if k.startswith("n = ") and v != "–"}
        if "mutant" not in row["interval"] and "as of any" not in row["interval"]:
            assert min(told.values(), default=100.0) >= least, row


def test_latency_intervals_cover_at_the_n_that_people_use_or_are_not_told():
    """600 repetitions; two mutants that fail: a bootstrap, and images taken for unrelated."""
    kinds = [name for name in KINDS if not name.startswith("compare")]
    rows = _rows(latency_table(SEED, kinds, (2, 4, 8, 16), 600))
    _assert_latencies_cover(rows, 92.0)
    shown = [row for row in rows if row["interval"].startswith(("p50, one start, of", "× eager"))]
    assert {row["n = 2"] for row in shown} == {"–"}
    worst = {row["interval"]: row for row in rows if row["neighbours"] == "0.6"}
    assert float(worst["least to largest (mutant: bootstrap)"]["n = 2"]) < 40
    assert float(worst["unrelated images of 2 starts (mutant)"]["n = 8"]) < 75


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_latency_intervals_cover_at_every_n():
    _assert_latencies_cover(_rows(latency_table(SEED)), 92.5)  # of `compare`: 500 repetitions


@pytest.mark.slow
def test_intervals_cover_nano_s_own_values_on_average_over_settings():
    """But for differences of CLIP-scores at 128 prompts, of which one prompt makes most."""
    for row in _claimed(_rows(population_table(SEED, 2000))):
        if (row["value"], row["prompts"]) != ("CLIP-score, difference", "128"):
            assert abs(_percent(row["on average"]) - 95) <= OFF, row


@pytest.mark.slow
def test_a_gate_s_false_alarms_are_as_stated():
    rows = _rows(alarm_table(SEED))
    for row in rows:
        # 2.6 standard errors of 1,000 comparisons; a drift is reported, and no verdict rests on it.
        slack = 1.3 if row["stated"] == "2.5 %" else OFF + 1.8
        stated = float(row["stated"].removesuffix(" %"))
        assert float(row["alarms with Holm"].removesuffix(" %")) <= stated + slack, row
    assert float(rows[2]["without"].removesuffix(" %")) > 20


@pytest.mark.slow
def test_a_million_records_are_compared_within_30_s_and_4_gb():
    found = measure(1_000_000)
    assert found["seconds"] < 30
    assert found["peak_bytes"] < 4e9


def test_the_page_has_every_table_once_as_its_command_writes_it():
    above, found, _ = split(PAGE.read_text("utf-8"))
    assert list(found) == list(tables(0))
    assert above.startswith("# How far")
    for name, text in found.items():
        head = next(iter(tables(0)[name]()))
        assert f"| {' | '.join(head)} |" in text, name


def test_a_page_is_split_and_its_marks_found():
    page = "# A\n\n" + "\n\n".join(f"{MARK.format(n, 3)}\n\n| {n} |" for n in ("a", "b"))
    above, found, below = split(f"{page}\n\n{END}\n\nrest\n")
    assert (above, below) == ("# A", "rest")
    assert found == {n: f"{MARK.format(n, 3)}\n\n| {n} |" for n in ("a", "b")}


def test_a_remark_follows_its_table():
    rows = [["of", "chosen"], ["x", f"99.0{SIGN}"], [f"{SIGN} x: why."]]
    text = "\n".join(markdown(rows))
    assert text == f"| of | chosen |\n| --- | ---: |\n| x | 99.0{SIGN} |\n\n{SIGN} x: why."


def test_a_cell_from_a_fresh_seed_covers_and_says_what_is_off():
    sources = {name: FAILURES[name] for name in ("0 → 0", "0 → 0.05")}
    rows = list(coverage_table("of", sources, {"chosen": chosen}, 11, repetitions=400))
    remarks = [row[0] for row in rows if len(row) == 1]
    assert [r.split(":")[0] for r in remarks] == [f"{SIGN} 0 → 0, {n} prompts" for n in (128, 512)]
    assert "no prompt tells anything" in remarks[0]
    assert abs(_percent(rows[5][2]) - 95) < 5  # 128 prompts, 400 repetitions


def test_nano_s_population_is_whole_and_known():
    kept = population()
    assert len(kept.values) == 25
    assert {len(x) for named in kept.values.values() for x in named.values()} == {256}
    assert len(kept.made["commit"]) == 40
    rows = _rows(population_table(5, repetitions=20))
    assert {row["value"] for row in rows} == set(MEASURES)
