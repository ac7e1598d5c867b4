"""Which timings count, from injected readings of the canary; every rule has a mutant that fails."""

from dataclasses import replace

import pytest

from sd35bench.analysis.summary import show_document
from sd35bench.analysis.table import read_table
from sd35bench.machine import canary, contention
from sd35bench.machine.canary import FRESH_S, Lookout
from sd35bench.machine.contention import (
    DISTURBED,
    SLOWER,
    Contention,
    between,
    choose,
    judge,
    judge_session,
    read_contention,
    relative,
    unlike,
)
from sd35bench.types import CanaryFacts, Session, Surroundings, Timings
from tests.studies.memory import MemoryStudy, record, session

FACTS = CanaryFacts(kind="avx2", threads=2, best=100.0, machine="here")


def seen(before=None, after=None, share=1.0, switches=0) -> Surroundings:
    return Surroundings(
        canary_before=before, canary_after=after, cpu_share=share, switches=switches
    )


def series(*pairs, name: str = "s", latency_s: float = 1.0):
    """One record for each (before, after), or whole `Surroundings`."""
    return [
        record(
            number,
            session_id=name,
            started_at=f"2026-01-01T00:00:{number:02}",
            timings=Timings(generate_s=latency_s, encode_s=0.0),
            surroundings=pair if isinstance(pair, Surroundings) else seen(*pair),
        )
        for number, pair in enumerate(pairs)
    ]


QUIET = (1.0, 0.98)


@pytest.mark.parametrize(
    ("odd", "bad"),
    [
        ((1.0, 0.95), False),
        ((1.0, 0.88), True),
        ((0.88, 1.0), True),
        ((0.85, 0.85), True),
        ((1.15, 1.15), True),
        ((0.93, 0.92), False),
        ((0.5, None), True),
        ((None, None), False),
    ],
    ids=["quiet", "slower", "faster", "all-slow", "all-fast", "near", "no-end", "unknown"],
)
def test_a_trial_is_disturbed_where_its_readings_differ_or_lie_off_the_median(odd, bad):
    assert judge(series(QUIET, QUIET, odd, QUIET, QUIET)) == [False, False, bad, False, False]


def test_trials_of_a_block_share_the_readings_at_its_ends():
    rows = series((1.0, None), (None, None), (None, 0.5), (1.0, None), (0.98, 1.0))
    assert between(rows) == [(1.0, 0.5)] * 3 + [(1.0, 0.98), (0.98, 1.0)]
    assert judge([*rows, *series(*[QUIET] * 6)])[:5] == [True] * 3 + [False] * 2


@pytest.mark.parametrize(
    ("share", "switches", "bad"),
    [(0.8, 9, True), (0.8, 0, False), (0.95, 9, False)],
    ids=["taken-off", "waited", "usual"],
)
def test_the_middle_of_a_long_trial_is_judged_by_its_cpu_time(share, switches, bad):
    usual = [seen(1.0, 1.0, 0.97, 3)] * 5
    assert judge(series(*usual, seen(1.0, 1.0, share, switches)))[-1] is bad


def test_cpu_time_is_not_judged_by_another_settings():
    long = series(*[seen(1.0, 1.0, 0.97, 3)] * 5)
    short = [replace_steps(row, 1) for row in series(*[seen(1.0, 1.0, 0.6, 3)] * 5)]
    assert judge([*long, *short]) == [False] * 10


def replace_steps(row, steps: int):
    return replace(row, trial=replace(row.trial, request=replace(row.trial.request, steps=steps)))


@pytest.mark.parametrize(
    ("mutant", "value"),
    [("TOLERANCE", 0.6), ("TOLERANCE", 0.01), ("_starved", lambda *_: False)],
    ids=["sees-nothing", "sees-noise", "no-cpu"],
)
def test_a_mutant_of_the_rule_is_seen(monkeypatch, mutant, value):
    rows = series(*[seen(1.0, 0.96)] * 6, seen(1.0, 0.7), seen(0.8, 0.8), seen(1.0, 1.0, 0.5, 40))
    assert judge(rows) == [False] * 6 + [True] * 3
    monkeypatch.setattr(contention, mutant, value)
    assert judge(rows) != [False] * 6 + [True] * 3


# What counts ------------------------------------------------------------------------------------


def found(**starts) -> tuple[list, Contention, dict[str, Session]]:
    """Records, judgement and sessions of starts: name → (records, facts)."""
    sessions = {n: replace(session(n), canary=facts) for n, (_, facts) in starts.items()}
    rows = [row for rows, _ in starts.values() for row in rows]
    return rows, read_contention(rows, sessions), sessions


def test_disturbed_timings_are_left_out_while_most_are_quiet():
    rows, judged, _ = found(a=(series(*[QUIET] * 6, (0.5, 0.5), name="a"), FACTS))
    timed = choose(rows, judged)
    assert (timed.kept, timed.left, timed.disturbed) == (rows[:6], {DISTURBED: 1}, 1)
    assert not timed.marked
    assert timed.speed == pytest.approx(0.98)


def test_where_more_than_half_are_disturbed_all_count_and_that_is_said():
    pairs = [QUIET, (1.0, 0.4), (0.4, 1.0), QUIET, (1.0, 0.4)]
    rows, judged, _ = found(a=(series(*pairs, name="a"), FACTS))
    timed = choose(rows, judged)
    assert (len(timed.kept), timed.disturbed, timed.marked) == (5, 3, True)
    (text,) = contention.sentences([timed], judged.speed)
    assert "3 timed images (60%) were disturbed" in text
    assert "1 of 1 setting has more than half such and counts them" in text


def test_a_machine_that_was_slow_all_the_time_says_so():
    slow = replace(FACTS, best=100.0)
    rows, judged, _ = found(
        a=(series(*[(0.42, 0.42)] * 8, name="a"), slow),
    )
    assert not judged.disturbed
    assert judged.speed["a"] == pytest.approx(0.42)
    (text,) = contention.sentences([choose(rows, judged)], judged.speed)
    assert text.startswith("this machine ran at 0.42 of its best")
    assert all(map(judged.is_refused, rows))


@pytest.mark.parametrize("relearned", [False, True], ids=["best-known", "best-seen-later"])
def test_unlike_regimes_are_not_pooled(relearned):
    """A later start that saw a higher best makes the earlier one slow, too."""
    slow = series(*[(0.4, 0.4)] * 4, name="slow", latency_s=5.0)
    facts = FACTS
    if relearned:  # all that it knew was itself
        slow, facts = series(*[(1.0, 1.0)] * 4, name="slow", latency_s=5.0), replace(FACTS, best=40)
    rows, judged, _ = found(slow=(slow, facts), fast=(series(*[QUIET] * 4, name="fast"), FACTS))
    timed = choose(rows, judged)
    assert [r.session_id for r in timed.kept] == ["fast"] * 4
    assert timed.left == {SLOWER: 4}
    assert judged.speed["slow"] == pytest.approx(0.4)


def test_a_few_timings_of_a_faster_regime_do_not_replace_many():
    slow = series(*[(0.4, 0.4)] * 12, name="slow")
    rows, judged, _ = found(slow=(slow, FACTS), fast=(series(*[QUIET] * 2, name="fast"), FACTS))
    assert choose(rows, judged).kept == slow


def test_another_machine_or_canary_has_a_best_of_its_own():
    other = replace(FACTS, best=10.0, machine="there")
    rows, judged, _ = found(a=(series(QUIET, name="a"), FACTS), b=(series(QUIET, name="b"), other))
    assert choose(rows, judged).kept == rows


def test_a_journal_without_readings_is_read_as_before():
    rows = [record(n) for n in range(4)]
    judged = read_contention(rows, {"s": session()})
    timed = choose(rows, judged)
    assert (timed.kept, timed.document(), judged) == (rows, None, Contention())
    assert contention.clock_text([timed], judged.speed) is None


def test_speed_of_a_session_is_relative_to_what_held_through_a_trial():
    rows = series((0.9, 1.4), (1.2, 1.3), (1.2, 1.2))
    assert judge_session(rows).speed["s"] == pytest.approx(1.2 / 1.2)


def test_relative_divides_by_the_sessions_best():
    assert relative(seen(50.0, None), FACTS) == seen(0.5, None)
    assert relative(None, FACTS) is None


@pytest.mark.parametrize(
    ("one", "other", "apart"), [(1.0, 0.85, False), (0.4, 1.0, True), (None, 0.4, False)]
)
def test_unlike_regimes_are_a_fifth_apart(one, other, apart):
    assert unlike(one, other) is apart


# In a study ---------------------------------------------------------------------------------------


def study_of(path, pairs, latencies) -> MemoryStudy:
    study = MemoryStudy(path, lives={"s": replace(session(), canary=FACTS)})
    for row, latency_s in zip(series(*pairs), latencies, strict=True):
        study.add(replace(row, timings=Timings(generate_s=latency_s, encode_s=0.0)))
    return study.touch_images()


def test_show_leaves_disturbed_times_out_and_counts_them(tmp_path):
    study = study_of(tmp_path, [QUIET] * 6 + [(0.5, 0.5)] * 2, [1.0] * 6 + [9.0] * 2)
    document = show_document(study)
    (row,) = document["settings"]
    assert (row["latency_s"]["p50"], row["latency_s"]["n"]) == (1.0, 6)
    assert row["contention"] == {
        "timed": 8,
        "disturbed": 2,
        "counted": False,
        "slower": 0,
        "canary": pytest.approx(0.98),
    }
    assert row["n"] == 8  # the images are as good as others
    assert f"2 timed images in no latency: {DISTURBED}" in row["warnings"]
    assert document["warnings"][0].startswith("2 timed images (25%) were disturbed")
    assert document["clock"] == (
        "clock: median canary at 0.98 of this machine's best; 2 of 8 timed images disturbed"
    )


def test_a_quiet_study_warns_of_nothing_and_says_how_quiet_it_was(tmp_path):
    table = read_table(study_of(tmp_path, [QUIET] * 8, [1.0] * 8))
    assert table.busy == []
    assert "0 of 8 timed images disturbed" in (table.clock or "")


# The lookout --------------------------------------------------------------------------------------


class Injected:
    """A canary with planted speeds; a reading takes 3 ms of the test's own clock."""

    kind = "injected"

    def __init__(self, *speeds: float) -> None:
        self.left, self.count, self.now_s = list(speeds), 0, 0.0

    def read(self) -> float:
        self.count += 1
        self.now_s += 0.003
        return self.left.pop(0) if self.left else 100.0

    def clock(self) -> float:
        return self.now_s


def trial(lookout: Lookout, source: Injected, seconds: float, *, closes: bool = False):
    lookout.before(seconds)
    source.now_s += seconds
    return lookout.after(lookout.worked(), closes)


def watch(*speeds: float) -> tuple[Lookout, Injected]:
    source = Injected(*speeds)
    return Lookout(source, 2, source.clock), source


def test_long_trials_have_a_reading_on_both_sides():
    lookout, source = watch(10, 20, 30)
    first, second = trial(lookout, source, 0.5), trial(lookout, source, 0.5)
    assert (first.canary_before, first.canary_after) == (10, 20)
    assert (second.canary_before, second.canary_after) == (20, 30)  # 20 was fresh
    source.now_s += FRESH_S + 0.01
    assert trial(lookout, source, 0.5).canary_before == 100
    assert lookout.settle() == ("injected", 100)


def test_short_trials_share_a_block():
    lookout, source = watch(10, 20)
    rows = [trial(lookout, source, 0.12) for _ in range(3)]
    assert [(r.canary_before, r.canary_after) for r in rows] == [
        (10, None),
        (None, None),
        (None, 20),
    ]
    assert rows[0].pressure is None
    assert rows[-1].load_1m is not None


def test_a_long_trial_after_short_ones_has_a_reading_of_its_own():
    lookout, source = watch(10, 20, 30)
    trial(lookout, source, 0.1)
    long = trial(lookout, source, 0.6)
    assert (long.canary_before, long.canary_after) == (20, 30)


def test_the_last_trial_closes_its_block():
    lookout, source = watch(10, 20)
    assert trial(lookout, source, 0.01, closes=True).canary_after == 20


@pytest.mark.parametrize("seconds", [0.005, 0.05, 0.29, 0.3, 1.0])
def test_the_canary_costs_at_most_two_percent(seconds):
    lookout, source = watch()
    for _ in range(200):
        trial(lookout, source, seconds)
        source.now_s += 0.002  # writing it down
    share = source.count * 0.003 / source.now_s
    assert share <= 0.02


def test_there_is_no_canary_where_it_is_off(monkeypatch):
    monkeypatch.setenv("SD35BENCH_CANARY", "off")
    assert canary.start_lookout({"device": "cpu"}, 1) is None
