"""One load's blocks among lanes: each once, to two lanes at least, smaller towards the end."""

import random
import threading
from collections import Counter
from types import SimpleNamespace

import pytest

from sd35bench.types import Status
from sd35bench.workers.limits import Limits
from sd35bench.workers.sharing import Failure, Work
from tests.studies.fakes import fake_load, fake_plan


def work(blocks: int, lanes: int, starts: int = 1, done=frozenset()) -> Work:
    plan = fake_plan(fake_load(), blocks)
    run = SimpleNamespace(plan=plan, done=done, lock=threading.RLock())
    return Work(run, Limits(starts=starts), lanes)


@pytest.mark.parametrize("lanes", [1, 2, 3, 8])
@pytest.mark.parametrize("starts", [1, 3])
@pytest.mark.parametrize("blocks", [1, 2, 7, 60])
def test_every_block_is_taken_once_by_two_lanes_at_least(blocks, starts, lanes):
    shared, rng = work(blocks, lanes, starts), random.Random(blocks)
    held: dict[int, int | None] = dict.fromkeys(range(lanes))
    taken: list[tuple[int, str]] = []
    idle = 0
    while shared.left and idle < 100:
        lane = rng.randrange(lanes)
        found = shared.take(lane, held[lane])
        held[lane] = None if found is None else found[0]
        idle = idle + 1 if found is None else 0
        taken += [(lane, b.trials[0].key) for b in ([] if found is None else found[1])]
    assert Counter(key for _, key in taken) == Counter(
        t.key for t in fake_plan(fake_load(), blocks).trials
    )
    assert len({lane for lane, _ in taken}) >= min(lanes, blocks, 2)


def test_one_lane_alone_takes_half_and_the_rest_waits_for_a_second():
    shared = work(10, 4)
    mine = []
    start = None
    while (found := shared.take(0, start)) is not None:
        start = found[0]
        mine += found[1]
    assert len(mine) == 5
    assert shared.room(0) == 0
    assert shared.room(1) == 5
    assert shared.take(1) is not None
    assert shared.room(0) == 4


def test_chunks_shrink_so_that_lanes_end_together():
    shared, sizes = work(80, 4), []
    for turn in range(1000):
        found = shared.take(turn % 4, turn % 4) if turn >= 4 else shared.take(turn)
        if found is None:
            break
        sizes.append(len(found[1]))
    assert sizes[0] >= 5
    assert sizes[-4:] == [1] * 4
    assert sizes[2:] == sorted(sizes[2:], reverse=True)


def test_a_start_is_over_after_its_part():
    shared = work(12, 2, starts=3)
    start, chunk = shared.take(0)
    count = len(chunk)
    while (found := shared.take(0, start)) is not None:
        count += len(found[1])
    assert (start, count) == (0, 4)
    assert shared.take(1)[0] == 1


def test_what_is_done_is_not_given_out_and_failure_ends_it():
    keys = [t.key for t in fake_plan(fake_load(), 5).trials]
    shared = work(5, 2, done=frozenset(keys[:3]))
    assert [b.trials[0].key for b in shared.waiting()] == keys[3:]
    gone = shared.waiting()[0]
    assert shared.drop(gone) == [gone]
    assert shared.drop(gone) == []
    shared.failure = Failure(status=Status.SKIPPED, error="no")
    assert shared.take(0) is None
    assert [b.trials[0].key for b in shared.drop()] == keys[4:]
    assert not shared.left
