"""Limits shared by processes: windows and slots against a fake clock, then for real."""

import asyncio
import multiprocessing
import os
import signal
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import sd35bench.remote.limiter as limiter
from sd35bench.errors import StoreError
from sd35bench.remote.limiter import Limiter, SharedCount, boot_clock, limiter_path

FORK = multiprocessing.get_context("fork")
PATIENCE_S = 60.0
"""For what a busy machine may be slow at; nothing waits that long where it works."""
FEW = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


class Clock:
    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def count(path: Path, *, per_minute: int = 1000, in_flight: int = 2, lease_s: float = 50.0):
    return SharedCount(path, per_minute, in_flight, lease_s, 61.0)


def most_in(times: list[float], window_s: float) -> int:
    return max((sum(t <= u < t + window_s for u in times) for t in times), default=0)


# Requests ---------------------------------------------------------------------------------------


@FEW
@example(per_minute=1, gaps=[1.8874532213849986, 0.0, 0.0])  # due to the last digit: still counted
@given(
    per_minute=st.integers(1, 8),
    gaps=st.lists(st.floats(0, 40, allow_nan=False), min_size=1, max_size=40),
)
def test_no_window_of_the_fake_clock_has_too_many(tmp_path_factory, per_minute, gaps):
    """Whenever one asks, and however soon again, 61 s never hold more than the limit."""
    clock = Clock()
    shared = count(tmp_path_factory.mktemp("l") / "l.sqlite", per_minute=per_minute)
    times: list[float] = []
    for gap in gaps:
        clock.now += gap
        while (wait_s := shared.take(clock)) > 0:
            assert wait_s <= 61.0 + 1e-9
            clock.now += wait_s
        times.append(clock.now)
    # 1e-6: the sum now + (at + 61 - now) rounds.
    assert most_in(times, 61.0 - 1e-6) <= per_minute


def test_a_burst_may_leave_at_once_and_the_next_waits_for_a_window_and_the_margin(tmp_path):
    clock, shared = Clock(), count(tmp_path / "l", per_minute=3)
    assert [shared.take(clock) for _ in range(3)] == [0, 0, 0]
    assert shared.take(clock) == pytest.approx(61.0)
    clock.now += 60.9
    assert shared.take(clock) == pytest.approx(0.1)
    clock.now += 0.11
    assert shared.take(clock) == 0


def test_each_process_keeps_its_own_lower_limit(tmp_path):
    clock = Clock()
    loose, tight = count(tmp_path / "l", per_minute=10), count(tmp_path / "l", per_minute=2)
    assert loose.take(clock) == loose.take(clock) == 0
    assert tight.take(clock) > 0
    assert loose.take(clock) == 0


def test_after_a_reboot_earlier_requests_count_as_made_when_it_booted(tmp_path):
    clock, shared = Clock(5000.0), count(tmp_path / "l", per_minute=1)
    assert shared.take(clock) == 0
    clock.now = 10.0
    assert shared.take(clock) == pytest.approx(51.0)
    clock.now = 61.5
    assert shared.take(clock) == 0


def test_the_clock_is_one_that_nobody_can_set():
    before = boot_clock()
    assert before > 0
    assert boot_clock() >= before


# Flights ----------------------------------------------------------------------------------------


@FEW
@given(limit=st.integers(1, 3), steps=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2))))
def test_never_more_in_flight_and_nobody_overtakes(tmp_path_factory, limit, steps):
    clock = Clock()
    shared = count(tmp_path_factory.mktemp("l") / "l.sqlite", in_flight=limit, lease_s=1e6)
    rows: dict[int, int] = {}
    held: list[int] = []
    for who, what in steps:
        if what == 2 and who in rows:
            shared.leave(clock, rows.pop(who))
            held = [other for other in held if other != who]
        elif what < 2:
            rows[who], granted = shared.enter(clock, rows.get(who), None)
            if granted and who not in held:
                held.append(who)
            assert len(held) <= limit
            assert granted == (sorted(rows.values()).index(rows[who]) < limit)


def test_a_dead_process_slot_is_free_when_its_prediction_must_have_ended(tmp_path):
    clock, shared = Clock(), count(tmp_path / "l", in_flight=1, lease_s=50.0)
    assert shared.enter(clock, None, "dead")[1]
    row, granted = shared.enter(clock, None, None)
    assert not granted
    for _ in range(49):  # it keeps looking, or it would count as dead itself
        clock.now += 1.0
        assert not shared.enter(clock, row, None)[1]
    clock.now += 1.5
    assert shared.enter(clock, row, None) == (row, True)


def test_a_dead_process_that_waited_holds_nobody_up_for_long(tmp_path):
    clock, shared = Clock(), count(tmp_path / "l", in_flight=1, lease_s=500.0)
    first, _ = shared.enter(clock, None, None)
    shared.enter(clock, None, "waits, and dies")
    row, _ = shared.enter(clock, None, None)
    shared.leave(clock, first)
    assert not shared.enter(clock, row, None)[1]
    clock.now += limiter.WAITING_S + 1
    assert shared.enter(clock, row, None)[1]


def test_the_same_name_takes_over_the_slot_that_its_dead_process_holds(tmp_path):
    clock, shared = Clock(), count(tmp_path / "l", in_flight=1, lease_s=500.0)
    row, _ = shared.enter(clock, None, "study trial")
    assert not shared.enter(clock, None, "another")[1]
    assert shared.enter(clock, None, "study trial") == (row, True)


def test_a_lease_from_before_a_reboot_ends(tmp_path):
    clock, shared = Clock(5000.0), count(tmp_path / "l", in_flight=1, lease_s=50.0)
    shared.enter(clock, None, None)
    clock.now = 10.0
    row, granted = shared.enter(clock, None, None)
    assert not granted
    for _ in range(10):
        clock.now += 5.1
        row, granted = shared.enter(clock, row, None)
    assert granted


async def until(true: Callable[[], bool]) -> None:
    """Wait as long as a busy machine takes."""
    async with asyncio.timeout(PATIENCE_S):
        while not true():
            await asyncio.sleep(0.01)


def rows(path: Path) -> list[float]:
    """When each flight's lease ends, in their order."""
    if not path.exists():
        return []
    with sqlite3.connect(path) as file:
        return [end for (end,) in file.execute("SELECT until FROM flights ORDER BY id")]


def test_a_live_flight_outlasts_its_lease(tmp_path):
    """It is renewed every half a lease; the clock says when the lease would have ended."""
    path, clock = tmp_path / "l", Clock()

    async def main() -> None:
        mine = Limiter(path, per_minute=10, in_flight=1, lease_s=0.2, clock=clock)
        async with mine.flight():
            for _ in range(3):
                clock.now += 0.15
                await until(lambda: rows(path)[0] == clock.now + 0.2)
                assert not count(path, in_flight=1).enter(clock, None, None)[1]

    asyncio.run(main())


def test_an_abandoned_flight_counts_until_its_lease_ends(tmp_path):
    async def main() -> None:
        mine = Limiter(tmp_path / "l", per_minute=10, in_flight=1, lease_s=0.25)
        start = time.monotonic()
        async with mine.flight() as flight:
            flight.abandon()
        async with mine.flight():
            assert 0.2 < time.monotonic() - start < PATIENCE_S

    asyncio.run(main())


@pytest.mark.parametrize("at", ["waiting", "entering", "flying"])
def test_a_cancelled_task_leaves_its_slot(tmp_path, at):
    async def main() -> None:
        mine = Limiter(tmp_path / "l", per_minute=10, in_flight=1)
        flying, release = asyncio.Event(), asyncio.Event()

        async def fly() -> None:
            async with mine.flight():
                flying.set()
                await release.wait()

        first = asyncio.create_task(fly())
        await flying.wait()
        cancelled = first if at == "flying" else asyncio.create_task(fly())
        if at == "waiting":
            await until(lambda: len(rows(tmp_path / "l")) == 2)
        await asyncio.sleep(0)
        cancelled.cancel()
        await asyncio.gather(cancelled, return_exceptions=True)
        release.set()
        async with asyncio.timeout(PATIENCE_S):
            async with mine.flight():
                pass
        await asyncio.gather(first, return_exceptions=True)
        with sqlite3.connect(tmp_path / "l") as file:
            assert file.execute("SELECT count(*) FROM flights").fetchone() == (0,)

    asyncio.run(main())


def test_waiting_costs_no_busy_loop(tmp_path, monkeypatch):
    """1 s of waiting for a request and for a slot asks the file a handful of times."""
    asked = []
    do = SharedCount._do
    monkeypatch.setattr(SharedCount, "_do", lambda *args: asked.append(1) or do(*args))

    async def main() -> None:
        mine = Limiter(tmp_path / "l", per_minute=1, in_flight=1, window_s=60.0, margin_s=0.0)
        async with mine.flight():
            await mine.request()
            waiting = [mine.request(), mine.flight().__aenter__()]
            tasks = [asyncio.ensure_future(one) for one in waiting]
            done, _ = await asyncio.wait(tasks, timeout=0.9)
            assert not done
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(main())
    assert len(asked) < 20


# The file ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", [b"no database at all" * 100, b"\0" * 5000, "header", "pages"])
def test_a_broken_file_counts_as_every_limit_used_up(tmp_path, broken):
    path, clock = tmp_path / "l.sqlite", Clock()
    shared = count(path, per_minute=2, in_flight=1, lease_s=50.0)
    shared.take(clock)
    if isinstance(broken, bytes):
        path.write_bytes(broken)
    else:
        data = bytearray(path.read_bytes())
        start = 20 if broken == "header" else 4096
        data[start:] = b"\xff" * (len(data) - start)
        path.write_bytes(data)
    assert shared.take(clock) == pytest.approx(61.0)
    assert not shared.enter(clock, None, None)[1]
    clock.now += 61.5
    assert shared.take(clock) == 0
    assert shared.enter(clock, None, None)[1]


def test_an_empty_file_is_a_new_one(tmp_path):
    path = tmp_path / "l.sqlite"
    path.touch()
    assert count(path).take(Clock()) == 0


def test_a_folder_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="XDG_STATE_HOME"):
        count(tmp_path / "file" / "l.sqlite").take(Clock())


def test_the_path_shows_neither_key_nor_service(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    path = limiter_path("https://api.example.com", "canary-key")
    assert path.parent == tmp_path / "sd35bench"
    assert "canary" not in str(path)
    assert "example" not in str(path)
    assert path == limiter_path("https://api.example.com/", "canary-key")
    assert path != limiter_path("https://api.example.com", "other-key")
    assert path != limiter_path("https://api.example.org", "canary-key")
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    assert limiter_path("https://api.example.com", "k").is_relative_to(Path.home())


def test_limits_below_one_are_refused(tmp_path):
    with pytest.raises(ValueError, match="in flight"):
        Limiter(tmp_path / "l", per_minute=60, in_flight=0)


# Processes --------------------------------------------------------------------------------------

WINDOW_S, MARGIN_S, PER_WINDOW, IN_FLIGHT, EACH = 0.5, 0.1, 12, 3, 14


def hammer(path: str, out, ready) -> None:
    """As many requests and flights as the limits let through; says when each was."""

    times: list[float] = []
    take = SharedCount.take

    def kept(self: SharedCount, clock: Clock) -> float:
        """What the file was told, however much later this process comes to run again."""
        seen: list[float] = []
        wait_s = take(self, lambda: seen.append(clock()) or seen[-1])
        if wait_s <= 0:
            times.append(seen[-1])
        return wait_s

    SharedCount.take = kept

    async def one(mine: Limiter, spans: list[tuple[float, float]]) -> None:
        async with mine.flight():
            start = time.monotonic()
            await mine.request()
            await asyncio.sleep(0.01)
            spans.append((start, time.monotonic()))

    async def main() -> tuple[list[float], list[tuple[float, float]]]:
        mine = Limiter(
            Path(path),
            per_minute=PER_WINDOW,
            in_flight=IN_FLIGHT,
            window_s=WINDOW_S,
            margin_s=MARGIN_S,
        )
        spans: list[tuple[float, float]] = []
        await asyncio.gather(*(one(mine, spans) for _ in range(EACH)))
        return times, spans

    ready.wait()
    out.put(asyncio.run(main()))


def test_three_processes_together_keep_both_limits_and_use_them(tmp_path):
    out, ready = FORK.Queue(), FORK.Barrier(3)
    workers = [
        FORK.Process(target=hammer, args=(str(tmp_path / "l.sqlite"), out, ready)) for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    results = [out.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(10)
    times = sorted(time for found, _ in results for time in found)
    spans = [span for _, found in results for span in found]
    assert len(times) == 3 * EACH
    assert most_in(times, WINDOW_S + MARGIN_S - 1e-6) <= PER_WINDOW
    assert max(sum(a <= start < b for a, b in spans) for start, _ in spans) <= IN_FLIGHT
    # 42 requests need 3 full windows and some; one a window would take 42.
    assert times[-1] - times[0] < 30 * (WINDOW_S + MARGIN_S)


LEASE_S = 600.0


def hold(path: str, entered) -> None:
    async def main() -> None:
        async with Limiter(Path(path), per_minute=9, in_flight=1, lease_s=LEASE_S).flight("held"):
            entered.set()
            await asyncio.sleep(3600)

    asyncio.run(main())


def test_the_slot_of_a_killed_process_comes_back_by_name_at_once_and_else_with_its_lease(tmp_path):
    path, entered = tmp_path / "l.sqlite", FORK.Event()
    worker = FORK.Process(target=hold, args=(str(path), entered))
    worker.start()
    assert entered.wait(PATIENCE_S)
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    worker.join(10)

    later = 0.0

    async def main() -> None:
        nonlocal later
        clock = lambda: boot_clock() + later  # noqa: E731
        mine = Limiter(path, per_minute=9, in_flight=1, lease_s=LEASE_S, clock=clock)
        waiting = asyncio.create_task(mine.flight().__aenter__())
        await until(lambda: len(rows(path)) == 2)
        # Who waits by another name was first, and must see the lease end; the name need not.
        async with asyncio.timeout(PATIENCE_S), mine.flight("held") as flight:
            assert not waiting.done()
            flight.abandon()
        assert not waiting.done()
        later = LEASE_S
        async with asyncio.timeout(PATIENCE_S):
            await waiting

    asyncio.run(main())


def test_a_name_takes_its_slot_up_before_the_lease_of_its_killed_process_ends(tmp_path):
    """Without the name nobody gets in: the clock, not this machine, says when the lease ends."""
    path, now = tmp_path / "l.sqlite", 100.0
    count = SharedCount(path, per_minute=9, in_flight=1, lease_s=10.0, span_s=60.0)
    killed, granted = count.enter(lambda: now, None, "held")
    assert granted
    assert count.enter(lambda: now + 9, None, None)[1] is False
    assert count.enter(lambda: now + 9, None, "held") == (killed, True)
    other, granted = count.enter(lambda: now + 18, None, None)
    assert not granted  # taken up at 9: its lease is its own from then on
    assert count.enter(lambda: now + 19.1, other, None) == (other, True)
