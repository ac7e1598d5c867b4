"""Purchases stop where what is paid for cannot be used, or costs more than was agreed."""

from functools import partial
from typing import Any

import pytest

import sd35bench.remote.ledger as ledger
from sd35bench import disk
from sd35bench.errors import StudyGone
from sd35bench.remote.ledger import Ledger
from sd35bench.study.store import Study
from sd35bench.trials import RunSummary
from tests.remote.fault_server import FaultServer
from tests.remote.faults import Answer, Fault, picture
from tests.remote.hosted import PRICE_USD, hosted_plan, run

COUNT = 12
WIDTH = 2

pytestmark = pytest.mark.usefixtures("apart")


def make(server: FaultServer, study: Study, **changes: Any) -> RunSummary:
    wanted = {"single_stream": 0, "concurrency": WIDTH, **changes}
    return run(study, hosted_plan(server.url, COUNT), server.url, **wanted)


def creates(server: FaultServer) -> int:
    return sum(server.creates.values())


def elsewhere(url: str) -> str:
    return "https://cdn.moved.example/image.png"


def mislead(server: FaultServer, how: str) -> None:
    """Make every image that is paid for unusable."""
    if how == "another host":
        server.output_shape = elsewhere
    elif how == "billed failure":
        server.fails = True
    elif how == "jpeg for png":
        jpeg = Answer.of(picture("x", (64, 64), "jpg"), "image/jpeg")
        server.always("image", Fault(lambda _: jpeg))
    else:
        server.always("image", how)


MODES = [
    *("another host", "billed failure", "jpeg for png"),
    *("image-wrong-size", "image-black", "html-200", "redirect-loop"),
]


@pytest.mark.parametrize("how", MODES)
def test_a_service_that_is_bad_from_the_start_sells_one_image(server, study, how):
    mislead(server, how)
    summary = make(server, study)
    assert creates(server) == 1
    assert summary.done == 0
    assert summary.paused is not None
    assert "cannot be used" in summary.paused


@pytest.mark.parametrize("how", ["another host", "image-wrong-size"])
def test_reruns_of_a_bad_service_buy_no_image_twice(server, study, how):
    mislead(server, how)
    for _ in range(4):
        make(server, study)
    assert creates(server) <= 4
    assert max(server.creates.values()) == 1


@pytest.mark.parametrize("how", MODES)
def test_a_service_that_turns_bad_sells_three_more_and_those_in_flight(server, study, how):
    server.script("image", *[None] * 4)
    make(server, study, max_cost_usd=4 * PRICE_USD)
    done = len(study.done_keys())
    assert done == creates(server) == 4
    mislead(server, how)
    assert make(server, study).paused is not None
    assert creates(server) <= done + ledger.MOST_UNUSABLE + WIDTH


def test_without_the_brake_all_would_be_bought(server, study, monkeypatch):
    """The mutant: a threshold that is never reached."""
    monkeypatch.setattr(ledger.CircuitBreaker, "count", lambda *_: None)
    mislead(server, "image-wrong-size")
    make(server, study)
    assert creates(server) == COUNT


def test_a_refused_size_is_kept_and_taken_without_a_purchase(server, study):
    mislead(server, "image-wrong-size")
    summary = make(server, study)
    assert any("remote.accept_size=8x8" in text for text in summary.errors)
    (kept,) = (study.path / "refused").iterdir()
    server.forget("image")
    server.always("image", "404")
    server.always("poll", "404")
    again = make(server, study, accept_size=(8, 8), max_cost_usd=PRICE_USD)
    assert (again.done, creates(server)) == (1, 1)
    assert study.image_path(kept.name).exists()


def test_an_output_host_can_be_named_and_then_costs_nothing_more(server, study):
    server.output_shape = lambda url: url.replace("127.0.0.1", "localhost")
    summary = make(server, study)
    assert any("remote.output_hosts=localhost" in text for text in summary.errors)
    again = make(server, study, output_hosts=("localhost",))
    assert again.done == COUNT
    assert creates(server) == COUNT


@pytest.mark.parametrize("charge_usd", [1000.0, PRICE_USD * 1.6])
def test_a_charge_far_above_the_listed_price_ends_the_run(server, study, charge_usd):
    server.cost_usd = charge_usd
    summary = make(server, study, single_stream=COUNT)
    assert creates(server) == 1
    assert "is listed at 0.035" in str(summary.paused)


def test_charges_a_little_above_the_price_end_at_the_agreed_total(server, study):
    server.cost_usd = PRICE_USD * 1.2
    summary = make(server, study, single_stream=COUNT)
    assert creates(server) == 10  # 12 x 0.035 were agreed to
    assert "agreed total of 0.42 USD" in str(summary.paused)


def test_a_study_folder_that_goes_away_ends_the_purchases(server, study):
    def move(answer: Answer) -> Answer:
        study.path.rename(study.path.with_name("away"))
        return answer

    server.script("image", None, Fault(move))
    with pytest.raises(StudyGone, match="was moved or deleted"):
        make(server, study, single_stream=COUNT)
    assert creates(server) == 2
    assert Ledger(study.path.with_name("away"), None).spent_usd == pytest.approx(2 * PRICE_USD)


def _charge_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "CHARGE_FACTOR", float("inf"))


def _any_total_is_agreed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "ROUNDING_USD", float("inf"))


def _a_file_is_always_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk.LineFile, "_require_linked", lambda *_: None)


@pytest.mark.parametrize(
    ("mutate", "test"),
    [
        (
            _charge_is_believed,
            partial(
                test_a_charge_far_above_the_listed_price_ends_the_run, charge_usd=PRICE_USD * 1.6
            ),
        ),
        (_any_total_is_agreed, test_charges_a_little_above_the_price_end_at_the_agreed_total),
        (_a_file_is_always_there, test_a_study_folder_that_goes_away_ends_the_purchases),
    ],
    ids=["charge", "agreed total", "folder gone"],
)
def test_mutants_buy_on(server, study, monkeypatch, mutate, test):
    mutate(monkeypatch)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        test(server, study)
