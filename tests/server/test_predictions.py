"""Predictions on disk: order, bounds, ends, and what a server that died gives back."""

import sqlite3
import threading

import pytest

from sd35bench.errors import StoreError
from sd35bench.server.predictions import (
    MOST_STARTS,
    Bounds,
    Phase,
    Prediction,
    PredictionStore,
    Query,
)
from sd35bench.server.settings import Refusal
from sd35bench.types import Request

FREE = Bounds(concurrency=None, balance_usd=None)
REQUEST = Request(prompt="x", steps=4, cfg=5.0, seed=0, width=64, height=48)


class Clock:
    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


def open_store(tmp_path, load_key="load") -> PredictionStore:
    return PredictionStore(tmp_path / "p.sqlite", load_key, Clock())


@pytest.fixture
def store(tmp_path):
    opened = open_store(tmp_path)
    yield opened
    opened.close()


def add(store, name, owner="me", bounds=FREE, price=0.0) -> None:
    store.accept(
        Prediction(
            id=name,
            owner=owner,
            model="nano",
            input={"prompt": name},
            status=Phase.CREATED,
            price=price,
            created_at=store._now(),
        ),
        REQUEST,
        bounds,
    )


def status(store, name) -> Phase:
    return store.get("me", name).status


def test_queue_is_in_order_of_acceptance(store):
    for name in "abc":
        add(store, name)
    taken = []
    while (work := store.take()) is not None:
        taken.append(work.id)
        assert work.request == REQUEST
        store.succeed(work.id, f"/outputs/{work.id}", 0.5)
    assert taken == ["a", "b", "c"]
    assert store.get("me", "b").output == "/outputs/b"


def test_owners_do_not_see_each_other(store):
    add(store, "a", owner="me")
    assert store.get("you", "a") is None
    assert store.cancel("you", "a") is None
    assert store.listing("you", Query()).total == 0
    assert status(store, "a") is Phase.CREATED


def test_concurrency_counts_what_is_open(store):
    two = Bounds(concurrency=2, balance_usd=None, retry_after_s=7)
    add(store, "a", bounds=two)
    add(store, "b", bounds=two)
    with pytest.raises(Refusal) as caught:
        add(store, "c", bounds=two)
    assert (caught.value.status, caught.value.headers) == (429, {"Retry-After": "7"})
    assert store.get("me", "c") is None
    add(store, "other", owner="you", bounds=two)
    store.take()
    store.fail("a", "error", "why")
    add(store, "c", bounds=two)


def test_balance_covers_what_was_made_and_what_is_open(store):
    bounds = Bounds(concurrency=None, balance_usd=0.07)
    add(store, "a", price=0.035, bounds=bounds)
    add(store, "b", price=0.035, bounds=bounds)
    with pytest.raises(Refusal) as caught:
        add(store, "c", price=0.035, bounds=bounds)
    assert caught.value.status == 402
    store.take()
    store.succeed("a", "/outputs/a", 0.1)
    store.cancel("me", "b")  # costs nothing
    add(store, "c", price=0.035, bounds=bounds)
    assert store.get("me", "a").cost_usd == 0.035
    assert store.get("me", "b").cost_usd == 0.0
    assert store.get("me", "c").cost_usd is None


def test_what_is_over_for_long_is_forgotten_but_not_what_it_cost(store):
    bounds = Bounds(concurrency=None, balance_usd=0.12)
    for name in ("made", "failed", "open"):
        add(store, name, price=0.035, bounds=bounds)
    store.take()
    store.succeed("made", "/outputs/a", 0.1)
    store.take()
    store.fail("failed", "error", "why")
    assert store.prune(3600) == 0
    store._now.now += 3600
    add(store, "new", price=0.035, bounds=bounds)
    assert store.prune(3600) == 2
    assert [p.id for p in store.listing("me", Query()).predictions] == ["new", "open"]
    with pytest.raises(Refusal) as caught:  # 0.035 are spent, 0.07 are open
        add(store, "more", price=0.035, bounds=bounds)
    assert caught.value.status == 402


def test_many_threads_cannot_pass_the_bound_together(store):
    bounds, refused = Bounds(concurrency=5, balance_usd=None), []

    def create(number: int) -> None:
        try:
            add(store, f"p{number}", bounds=bounds)
        except Refusal as exc:
            refused.append(exc)

    threads = [threading.Thread(target=create, args=(n,)) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (store.queue_length(), len(refused)) == (5, 15)


def test_cancel_ends_what_waits_and_marks_what_runs(store):
    add(store, "running")
    add(store, "waiting")
    store.take()
    assert store.cancel("me", "waiting").status is Phase.CANCELLED
    assert store.cancel("me", "running").status is Phase.STARTING
    assert store.is_to_cancel("running")
    store.processing("running")
    store.succeed("running", "/outputs/running", 0.1)
    ended = store.get("me", "running")
    assert (ended.status, ended.output, ended.cost_usd) == (Phase.CANCELLED, None, 0.0)
    assert store.take() is None


def test_an_end_is_final(store):
    add(store, "a")
    store.take()
    store.fail("a", "error", "why")
    store.succeed("a", "/outputs/a", 0.1)
    store.processing("a")
    store.put_back("a")
    assert store.cancel("me", "a").status is Phase.ERROR
    assert store.get("me", "a").output is None


def test_what_a_dead_server_was_making_is_made_again_at_its_place(tmp_path):
    dead = open_store(tmp_path)
    for name in "abc":
        add(dead, name)
    dead.take()
    dead.processing("a")
    dead.close()
    store = open_store(tmp_path)
    assert store.recover() == ["a", "b", "c"]
    assert store.take().id == "a"
    store.close()


def test_what_kills_the_server_again_and_again_is_reported(tmp_path):
    for _ in range(MOST_STARTS):
        store = open_store(tmp_path)
        if store.get("me", "a") is None:
            add(store, "a")
            add(store, "b")
        assert store.recover() == ["a", "b"]
        assert store.take().id == "a"
        store.close()
    store = open_store(tmp_path)
    assert store.recover() == ["b"]
    ended = store.get("me", "a")
    assert (ended.status, ended.error_code) == (Phase.ERROR, "crashed")
    assert f"{MOST_STARTS} times" in ended.error
    store.close()


def test_a_start_that_was_given_back_does_not_count(tmp_path):
    store = open_store(tmp_path)
    add(store, "a")
    for _ in range(2 * MOST_STARTS):
        assert store.take().id == "a"
        store.put_back("a")
    assert store.recover() == ["a"]
    store.close()


def test_what_was_to_be_cancelled_is_not_made_again(tmp_path):
    store = open_store(tmp_path)
    add(store, "a")
    store.take()
    store.cancel("me", "a")
    assert store.recover() == []
    assert status(store, "a") is Phase.CANCELLED
    store.close()


def test_what_was_accepted_for_another_model_is_reported(tmp_path):
    first = open_store(tmp_path, "nano")
    add(first, "a")
    first.close()
    store = open_store(tmp_path, "another")
    assert store.recover() == []
    assert store.get("me", "a").error_code == "not-served"
    assert (store.get("me", "a").load, store.load_key) == ("nano", "another")
    store.close()


def test_listing_filters_and_pages_the_newest_first(store):
    for name in "abcd":
        add(store, name)
    store.cancel("me", "b")
    assert [p.id for p in store.listing("me", Query()).predictions] == ["d", "c", "b", "a"]
    page = store.listing("me", Query(limit=2, offset=1))
    assert ([p.id for p in page.predictions], page.total) == (["c", "b"], 4)
    only = store.listing("me", Query(status=Phase.CANCELLED))
    assert ([p.id for p in only.predictions], only.total) == (["b"], 1)
    born = store.get("me", "b").created_at
    since = store.listing("me", Query(since=born))
    assert [p.id for p in since.predictions] == ["d", "c", "b"]
    until = store.listing("me", Query(until=born))
    assert [p.id for p in until.predictions] == ["b", "a"]


def test_a_commit_is_on_disk(store):
    assert store._db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
    assert store._db.execute("PRAGMA synchronous").fetchone()[0] == 2  # FULL


def test_a_file_that_is_no_database_is_ours_to_report(tmp_path):
    (tmp_path / "p.sqlite").write_bytes(b"no database" * 1000)
    with pytest.raises(StoreError, match="predictions' file") as caught:
        open_store(tmp_path)
    assert isinstance(caught.value.__cause__, sqlite3.Error)


def test_mutant_that_forgets_what_was_spent_lets_a_balance_be_passed(store, monkeypatch):
    prune = PredictionStore.prune

    def forget(self, older_than_s: float) -> int:
        count = prune(self, older_than_s)
        with self._change() as db:
            db.execute("DELETE FROM spent")
        return count

    monkeypatch.setattr(PredictionStore, "prune", forget)
    with pytest.raises(pytest.fail.Exception):
        test_what_is_over_for_long_is_forgotten_but_not_what_it_cost(store)
