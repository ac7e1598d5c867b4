"""Every experiment at the size of its page, slow; and the harness itself, small, with planted
faults: what cannot fail measures nothing."""

import json
import math
import sqlite3
import time
from collections import Counter
from dataclasses import replace

import httpx2
import pytest

import tests.reliability.client_kills as client_kills
import tests.reliability.services as services
from sd35bench.machine.measure import environment
from sd35bench.study.store import Study, decode_rgb
from tests.reliability.__main__ import main
from tests.reliability.answers import body_of, is_own_image
from tests.reliability.client import STUDY
from tests.reliability.client_kills import Losses, losses_of
from tests.reliability.experiment import PACKAGES, Experiment, Figure, Result, measure
from tests.reliability.experiments import EXPERIMENTS
from tests.reliability.limits import figures_of
from tests.reliability.load import slope_of
from tests.reliability.malformed import MALFORMED_REPLIES
from tests.reliability.openapi import Found
from tests.reliability.page import page
from tests.reliability.server_kills import Fates, Told, fates_of, listed
from tests.reliability.ssrf import SSRF
from tests.remote.fault_server import FaultServer, Seen, serving
from tests.remote.hosted import hosted_plan, run
from tests.remote.ssrf_corpus import CORPUS, GOOD
from tests.server.live import MODEL, live, make_settings

pytestmark = pytest.mark.model  # processes


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda each: each.name)
def test_experiment_holds(experiment: Experiment, tmp_path):
    result = measure(experiment, 1.0, tmp_path)
    assert result.holds, result.broken
    assert result.seen == ()


# The harness, with planted faults ----------------------------------------------------------------


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A study that a fault server made without any trouble."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("EACHLABS_API_KEY", raising=False)
    monkeypatch.setattr("sd35bench.remote.prediction.decode_image", decode_rgb)
    with serving() as server:
        study = Study.open(tmp_path, STUDY, create=True)
        run(study, hosted_plan(server.url, client_kills.TRIALS, seed=3), server.url)
        yield server, study


def losses(made) -> Losses:
    found = Losses()
    losses_of(*made, 3, found)
    return found


def test_a_study_in_order_has_no_losses(made):
    found = losses(made)
    assert (found.predictions, found.never_made) == (client_kills.TRIALS, 0)
    assert (found.paid_twice, found.lost, found.seen) == (0, 0, [])


def test_a_planted_second_payment_is_counted(made):
    server, _ = made
    body = {"model": "nano", "input": dict(server.made["prediction-4"].input)}
    httpx2.post(f"{server.url}/v1/prediction", json=body, trust_env=False)
    assert losses(made).paid_twice == 2  # both predictions of that input


def test_a_planted_loss_is_counted(made):
    server, study = made
    first, second = study.records()[:2]
    study.image_path(first.image).unlink()
    study.image_path(second.image).write_bytes(b"somebody else's")
    assert losses(made).lost == 2
    assert losses(made).never_made == 0
    server.made.popitem()
    assert losses(made).never_made == 1


def test_a_client_is_killed_and_its_leftovers_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    kills = client_kills.Kills()
    with serving(never_ends=True) as server:
        with client_kills.started(tmp_path, server, 0):
            until = time.monotonic() + 120
            while server.count("poll") == 0:
                assert time.monotonic() < until
                time.sleep(0.01)
        client_kills.note(kills, Study.open(tmp_path, STUDY, create=False), server)
        assert server.count("create") == 1  # the first ones run alone
    assert kills.left == {"an id on disk, no end": 1}


def test_a_service_in_order_sells_one_image_and_a_client_without_a_brake_buys_on(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr("sd35bench.remote.prediction.decode_image", services._decode)
    found = services.Sold()
    services.from_start("image: image-black", tmp_path / "braked", found)
    assert (found.most_from_start, found.twice, found.believed, found.seen) == (1, 0, 0, [])
    monkeypatch.setattr("sd35bench.remote.ledger.CircuitBreaker.count", lambda *_: None)
    services.from_start("image: image-black", tmp_path / "not", found)
    assert found.most_from_start > 1


@pytest.fixture
def served(tmp_path):
    with live(make_settings(tmp_path, requests_per_minute=None, concurrency=None)) as server:
        yield server


def test_a_server_in_order_keeps_its_word_and_planted_faults_are_counted(served, tmp_path):
    told = Told()
    for prompt in "abcdef":
        told.sent[prompt] = body_of(prompt, 1)
        answer = served.client.post("/v1/prediction", json=told.sent[prompt]).json()
        told.accepted[answer["predictionID"]] = prompt
    for prediction in told.accepted:
        served.ended(prediction)

    def fates() -> Fates:
        found = Fates()
        fates_of(told, listed(served.client), served.client, found)
        return found

    def plant(change: str, prompt: str) -> None:
        where = next(id for id, given in told.accepted.items() if given == prompt)
        with sqlite3.connect(tmp_path / "predictions.sqlite", isolation_level=None) as db:
            db.execute(f"{change} WHERE id=?", (where,))
        db.close()

    assert fates() == Fates(ended=Counter(success=6))
    told.accepted["never-stored"] = "a"
    plant("UPDATE predictions SET status='processing'", "b")
    plant("UPDATE predictions SET status='error', error=NULL", "c")
    one, other = (id for id, prompt in told.accepted.items() if prompt in "de")
    told.accepted[one], told.accepted[other] = told.accepted[other], told.accepted[one]
    served.client.post("/v1/prediction", json=told.sent["f"])
    found = fates()
    assert (found.lost, found.silent, found.wrong, found.not_once) == (2, 1, 2, 1)
    assert len(found.seen) == 6


def test_an_image_is_compared_by_its_pixels(served):
    body = body_of("a", 1)
    found = served.ended(served.create(**body["input"]))
    data = served.client.get(found["output"]).content
    assert is_own_image(data, body, MODEL)
    assert not is_own_image(data, body_of("a", 2), MODEL)
    assert not is_own_image(data[:100], body, MODEL)


@pytest.mark.parametrize(
    ("count", "in_flight", "holds"),
    [(60, 10, True), (61, 10, False), (60, 11, False), (9, 9, False)],
)
def test_limits_that_are_passed_or_never_reached_are_no_success(count, in_flight, holds):
    seen = [
        Seen(at=0.9 * i, route="poll", method="GET", path="/", headers={}, body=b"")
        for i in range(count)
    ]
    server = FaultServer(seen=seen, most_in_flight=in_flight, creates=Counter(a=1))
    assert all(figure.holds for figure in figures_of(server, 60.0, 0)) == holds


def test_slope_is_found_and_its_interval_holds_it():
    flat = [(0.5 * i, 1e8 + (-1) ** i * 1e5) for i in range(120)]
    rising = [(at, size + 3e5 * at) for at, size in flat]
    slope, low, high = slope_of(flat)
    assert low <= 0 <= high
    assert abs(slope) < 1e3
    slope, low, high = slope_of(rising)
    assert low <= 3e5 <= high
    assert math.isnan(slope_of(flat[:3])[0])


def test_an_untyped_exception_is_a_finding(monkeypatch, tmp_path):
    async def crash(*_) -> None:
        raise KeyError("planted")

    monkeypatch.setattr("tests.remote.test_faults.Loop._result", crash)
    figures, seen = MALFORMED_REPLIES.run(0.004, tmp_path)
    assert not all(figure.holds for figure in figures)
    assert "planted" in seen[0]


def test_a_url_that_gets_through_is_a_finding(monkeypatch, tmp_path):
    monkeypatch.setattr("tests.reliability.ssrf.CORPUS", (*CORPUS, GOOD[0]))
    figures, seen = SSRF.run(1.0, tmp_path)
    assert not all(figure.holds for figure in figures)
    assert seen == [f"not refused: {GOOD[0].name}"]


@pytest.mark.parametrize("lies", [False, True])
def test_an_answer_that_the_document_does_not_have_is_a_finding(monkeypatch, served, lies):
    def alone(document):
        operation = document["paths"]["/healthz"]["get"]
        if lies:
            del operation["responses"]["200"]
        return {**document, "paths": {"/healthz": {"get": operation}}}

    found = Found()
    monkeypatch.setattr("tests.reliability.openapi.askable", alone)
    found.ask(served, {}, 1, "no_auth")
    assert found.cases.total() >= 1
    assert len(found.failures) == lies


def make_result(experiment: Experiment, **changes) -> Result:
    zero = Figure(name="lost", value=0, most=0, out_of="tries")
    tries = Figure(name="tries", value=300, least=300)
    here = {**environment(), **dict.fromkeys(PACKAGES, "1")}
    made = Result(
        name=experiment.name, scale=1.0, at="2026-01-01T00:00:00+00:00", seconds=2.0,
        environment=here, figures=(tries, zero),
    )  # fmt: skip
    return replace(made, **changes)


def test_page_tells_what_holds_what_broke_and_what_did_not_run(tmp_path):
    good, bad, missing = EXPERIMENTS[:3]
    broken = (Figure(name="lost", value=1, most=0), Figure(name="p99", value=math.nan, most=1))
    for result in (make_result(good), make_result(bad, figures=broken, seen=("lost: x",))):
        result.write(tmp_path)
    results = {e.name: Result.read(tmp_path / f"{e.name}.json") for e in (good, bad)}
    assert [results[good.name].holds, results[bad.name].holds] == [True, False]
    assert len(results[bad.name].broken) == 3
    text = page(EXPERIMENTS[:3], results)
    assert "lost: 0 of 300, so below 1 % with 95 % confidence" in text
    assert text.count("| lost | 1 | **broken:** 0 at most |") == 1
    assert "Seen: lost: x" in text
    assert "It was not run." in text
    assert missing.title in text


def test_command_runs_an_experiment_and_writes_the_page(tmp_path):
    to = tmp_path / "page.md"
    there = ["--results", str(tmp_path), "--page", str(to)]
    assert main(["--one", "ssrf", *there]) == 0
    assert main(["--only", *there]) == 0
    assert json.loads((tmp_path / "ssrf.json").read_text())["name"] == "ssrf"
    assert "| hostile URLs that were not refused | 0 | 0 at most |" in to.read_text()
