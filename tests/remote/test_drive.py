"""A plan against a service that can do every wrong thing: what is paid, kept, found again."""

import json
from dataclasses import replace

import pytest

import sd35bench.remote.prediction as prediction
import sd35bench.remote.uploads as uploads_module
from sd35bench.errors import ConfigError
from sd35bench.remote.drive import HostedService
from sd35bench.remote.ledger import Ledger
from sd35bench.study.store import Study
from sd35bench.trials import Progress
from sd35bench.types import Status
from tests.remote.fault_server import FaultServer
from tests.remote.faults import FAULTS, Fault, picture
from tests.remote.hosted import (
    HASTY,
    PRICE_USD,
    by_prompt,
    hosted_plan,
    hosted_settings,
    ledger_lines,
    run,
)

pytestmark = pytest.mark.usefixtures("apart")


def test_a_plan_is_made_once_and_recorded(server: FaultServer, study: Study):
    plan = hosted_plan(server.url, 6)
    standings: list[Progress] = []
    settings = hosted_settings(server.url, single_stream=2, concurrency=3)
    summary = HostedService(settings=settings, policy=HASTY).run(plan, study, standings.append)
    assert (summary.done, summary.failed, summary.paused) == (6, 0, None)
    assert summary.cost_usd == pytest.approx(6 * PRICE_USD)
    assert sorted(server.creates.values()) == [1] * 6
    records = study.records()
    for record in records:
        call = record.remote
        assert call is not None
        assert record.timings is not None
        assert record.image is not None
        made = server.made[call.prediction_id or ""]
        seed = json.dumps(made.input, sort_keys=True)
        assert study.image_path(record.image).read_bytes() == picture(seed, (64, 64), "png")
        assert call.request_id == "request-1"
        assert call.cost_reported
        assert not call.resumed
        assert 0 < (call.submit_s or 0) < record.timings.generate_s
        assert 0 < (call.poll_bound_s or 0) < record.timings.generate_s
        assert record.effective_steps == 4
    in_flight = [r.remote.in_flight for r in records if r.remote]
    assert in_flight[:2] == [1, 1]
    assert server.most_in_flight <= max(in_flight) == 3
    (session,) = study.sessions().values()
    assert session.in_force["base_url"] == server.url
    assert session.environment["torch"] is None
    assert session.environment["service"] == server.url.removeprefix("http://")
    assert standings[-1].done == 6
    assert max(s.in_flight for s in standings) <= 3
    assert run(study, plan, server.url).skipped == 6
    assert sum(server.creates.values()) == 6


def test_the_ledger_says_what_is_done_before_it_is_done(server: FaultServer, study: Study):
    run(study, hosted_plan(server.url, 1), server.url)
    assert [line["kind"] for line in ledger_lines(study)] == ["intent", "created", "finished"]


# Lost answers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["lost-answer", "truncated-json", "html-502", "missing-fields"])
def test_a_lost_answer_is_found_in_the_list_and_not_paid_twice(
    server: FaultServer, study: Study, fault: str
):
    server.strangers = 3
    server.script("create", None, fault)
    run(study, hosted_plan(server.url, 3), server.url)
    assert sorted(server.creates.values()) == [1, 1, 1]
    records = by_prompt(study)
    assert {r.status for r in records.values()} == {Status.OK}
    resumed = [r for r in records.values() if r.remote and r.remote.resumed]
    assert len(resumed) == 1
    assert resumed[0].timings is None  # its latency is no measurement
    assert "lost" in [line["kind"] for line in ledger_lines(study)]


def test_what_was_never_made_stays_ambiguous_until_told_otherwise(
    server: FaultServer, study: Study
):
    plan = hosted_plan(server.url, 2)
    server.script("create", None, replace(FAULTS["lost-answer"], refuses=True))
    summary = run(study, plan, server.url, single_stream=2)
    assert (summary.done, summary.ambiguous) == (1, 1)
    record = by_prompt(study)["prompt 1"]
    assert record.status is Status.AMBIGUOUS
    assert record.remote is not None
    assert record.remote.prediction_id is None
    assert summary.cost_usd == pytest.approx(2 * PRICE_USD)  # not proven uncharged
    run(study, plan, server.url)
    assert by_prompt(study)["prompt 1"].status is Status.AMBIGUOUS
    assert sum(server.creates.values()) == 1  # looked for, not created
    again = run(study, plan, server.url, on_ambiguous="resubmit")
    assert (again.done, again.skipped) == (1, 1)
    assert sorted(server.creates.values()) == [1, 1]
    assert Ledger(study.path, None).spent_usd == pytest.approx(3 * PRICE_USD)


def test_an_ambiguous_one_that_shows_up_later_is_adopted(server: FaultServer, study: Study):
    plan = hosted_plan(server.url, 1)
    server.script("create", "lost-answer")
    server.always("list", "400")
    assert run(study, plan, server.url).ambiguous == 1
    server.always("list", None)
    assert run(study, plan, server.url).done == 1
    assert sum(server.creates.values()) == 1


def test_an_unreadable_list_is_no_licence_to_create_again(server: FaultServer, study: Study):
    server.script("create", "lost-answer")
    server.always("list", "a-list")
    summary = run(study, hosted_plan(server.url, 1), server.url, on_ambiguous="resubmit")
    assert summary.ambiguous == 1
    assert sum(server.creates.values()) == 1


def test_resubmitting_happens_once_in_a_run(server: FaultServer, study: Study):
    server.always("create", replace(FAULTS["lost-answer"], refuses=True))
    summary = run(study, hosted_plan(server.url, 1), server.url, on_ambiguous="resubmit")
    assert summary.ambiguous == 1
    assert server.count("create") == 2


def test_one_id_for_two_creates_is_an_error(server: FaultServer, study: Study):
    server.same_id = True
    run(study, hosted_plan(server.url, 2), server.url, single_stream=2)
    records = by_prompt(study)
    assert records["prompt 0"].status is Status.OK
    assert records["prompt 1"].status is Status.ERROR
    assert "another trial has" in (records["prompt 1"].error or "")
    assert Ledger(study.path, None).spent_usd == pytest.approx(2 * PRICE_USD)


# Refusals and money -----------------------------------------------------------------------------


def test_429_is_retried_with_an_intent_each_and_costs_nothing(server: FaultServer, study: Study):
    server.script("create", "429-soon", "429-skewed")
    summary = run(study, hosted_plan(server.url, 1), server.url)
    record = by_prompt(study)["prompt 0"]
    assert record.status is Status.OK
    assert record.remote is not None
    assert record.remote.attempts == 3
    assert summary.cost_usd == pytest.approx(PRICE_USD)
    kinds = [line["kind"] for line in ledger_lines(study)]
    assert kinds == ["intent", "refused"] * 2 + ["intent", "created", "finished"]


def test_an_empty_balance_pauses_after_those_in_flight(server: FaultServer, study: Study):
    plan = hosted_plan(server.url, 6)
    server.script("create", None, None, "402")
    summary = run(study, plan, server.url, concurrency=3)
    assert summary.paused is not None
    assert "balance" in summary.paused
    made = sum(server.creates.values())
    assert summary.done == made == len(study.done_keys())
    assert f"{6 - made} trials are left" in summary.paused
    again = run(study, plan, server.url)
    assert (again.done, again.paused) == (6 - made, None)
    assert sorted(server.creates.values()) == [1] * 6


def test_a_wrong_key_ends_the_run_and_is_not_shown(
    server: FaultServer, study: Study, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("EACHLABS_API_KEY", "canary-of-the-wrong-key")
    server.keys = ("another",)
    with pytest.raises(ConfigError, match="EACHLABS_API_KEY") as caught:
        run(study, hosted_plan(server.url, 4), server.url)
    assert "canary" not in str(caught.value)
    assert Ledger(study.path, None).spent_usd == 0
    assert study.records() == []


def test_the_budget_is_never_passed(server: FaultServer, study: Study):
    server.cost_usd = None
    plan = hosted_plan(server.url, 5)
    summary = run(study, plan, server.url, max_cost_usd=3 * PRICE_USD, concurrency=4)
    assert sum(server.creates.values()) == summary.done == 3
    assert summary.paused is not None
    assert "2 trials are left" in summary.paused
    assert run(study, plan, server.url, max_cost_usd=3 * PRICE_USD).done == 0
    assert sum(server.creates.values()) == 3
    assert run(study, plan, server.url, max_cost_usd=1.0).done == 2


def test_a_reported_cost_replaces_the_listed_price(server: FaultServer, study: Study):
    server.cost_usd = 0.01
    plan = hosted_plan(server.url, 3)
    summary = run(study, plan, server.url, max_cost_usd=0.06, single_stream=3)
    assert summary.done == 3
    assert summary.cost_usd == pytest.approx(0.03)


def test_400_is_unsupported_and_tried_again_by_the_next_run(server: FaultServer, study: Study):
    plan = hosted_plan(server.url, 1)
    server.script("create", "400")
    run(study, plan, server.url)
    record = by_prompt(study)["prompt 0"]
    assert record.status is Status.UNSUPPORTED
    assert "steps must be at most 50" in (record.error or "")
    assert Ledger(study.path, None).spent_usd == 0
    assert run(study, plan, server.url).done == 1


def test_a_failed_prediction_is_an_error_with_its_reason(server: FaultServer, study: Study):
    server.fails = True
    plan = hosted_plan(server.url, 1)
    run(study, plan, server.url)
    record = by_prompt(study)["prompt 0"]
    assert record.status is Status.ERROR
    assert "the model failed" in (record.error or "")
    server.fails = False
    assert run(study, plan, server.url).done == 1


def test_a_service_that_keeps_losing_answers_is_left_alone(server: FaultServer, study: Study):
    server.always("create", "500")
    summary = run(study, hosted_plan(server.url, 9), server.url, single_stream=9)
    assert summary.failed == server.count("create") == 1
    assert summary.paused is not None
    assert "cannot be used" in summary.paused  # it may have been made, and billed


def test_nobody_there_pauses_at_once(study: Study):
    url = "http://127.0.0.1:9"
    summary = run(study, hosted_plan(url, 3), url)
    assert summary.paused is not None
    assert "cannot be reached" in summary.paused
    assert Ledger(study.path, None).spent_usd == 0


# Polls and downloads ----------------------------------------------------------------------------


def test_polls_are_repeated_through_every_trouble(server: FaultServer, study: Study):
    server.script("poll", "500", "html-200", "429-soon", "lost-answer", "unknown-status")
    run(study, hosted_plan(server.url, 1), server.url)
    assert by_prompt(study)["prompt 0"].status is Status.OK
    assert sum(server.creates.values()) == 1


def test_what_never_ends_times_out_and_is_polled_again(server: FaultServer, study: Study):
    server.never_ends = True
    plan = hosted_plan(server.url, 1)
    run(study, plan, server.url, timeout_s=0.2)
    record = by_prompt(study)["prompt 0"]
    assert record.status is Status.TIMED_OUT
    assert record.remote is not None
    assert record.remote.prediction_id == "prediction-0"
    server.never_ends = False
    assert run(study, plan, server.url).done == 1
    assert sum(server.creates.values()) == 1


@pytest.mark.parametrize("fault", ["image-wrong-size", "image-black", "wrong-content-type"])
def test_a_bad_image_is_not_paid_for_again(server: FaultServer, study: Study, fault: str):
    plan = hosted_plan(server.url, 1)
    server.always("image", fault)
    run(study, plan, server.url)
    assert by_prompt(study)["prompt 0"].status in (Status.INVALID_IMAGE, Status.ERROR)
    server.always("image", None)
    assert run(study, plan, server.url).done == 1
    assert sum(server.creates.values()) == 1


def test_another_format_than_asked_for_is_invalid(server: FaultServer, study: Study):
    jpg = picture("x", (64, 64), "jpg")
    server.always("image", Fault(lambda answer: replace(answer, body=jpg)))
    run(study, hosted_plan(server.url, 1), server.url)
    record = by_prompt(study)["prompt 0"]
    assert record.status is Status.INVALID_IMAGE
    assert "asked for output_format=png, got jpg" in (record.error or "")


def test_a_prediction_that_the_service_forgot_is_an_error(server: FaultServer, study: Study):
    plan = hosted_plan(server.url, 1)
    server.never_ends = True
    run(study, plan, server.url, timeout_s=0.1)
    server.never_ends = False
    server.made["another's"] = server.made.pop("prediction-0")
    run(study, plan, server.url)
    record = by_prompt(study)["prompt 0"]
    assert record.status is Status.ERROR
    assert "does not know prediction prediction-0" in (record.error or "")
    assert sum(server.creates.values()) == 1
    assert run(study, plan, server.url, on_ambiguous="resubmit").done == 1
    assert sum(server.creates.values()) == 2


def test_images_in_the_real_decoder(
    server: FaultServer, study: Study, monkeypatch: pytest.MonkeyPatch
):
    from sd35bench.remote.images import decode_image

    monkeypatch.setattr(prediction, "decode_image", decode_image)
    run(study, hosted_plan(server.url, 1, output_format="webp", width=88, height=48), server.url)
    record = by_prompt(study)["prompt 0"]
    assert record.status is Status.OK
    assert study.read_image(record.image or "").shape == (48, 88, 3)


# Init images ------------------------------------------------------------------------------------


def test_init_images_go_up_once_each(server: FaultServer, study: Study):
    inits = (picture("a", (64, 64), "png"), picture("b", (64, 64), "jpg"))
    run(study, hosted_plan(server.url, 5, inits), server.url)
    assert len(study.done_keys()) == 5
    assert sorted(server.uploads.values()) == sorted(inits)
    assert server.count("put") == 2
    urls = {made.input["image"] for made in server.made.values()}
    assert urls == {f"{server.url}/uploads/{name}" for name in server.uploads}


def test_an_upload_that_is_old_is_made_again(
    server: FaultServer, study: Study, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(uploads_module, "FRESH_S", -1.0)
    run(study, hosted_plan(server.url, 2, (picture("a", (64, 64), "png"),)), server.url)
    assert server.count("put") == 2


def test_an_init_image_may_be_where_the_user_says(server: FaultServer, study: Study):
    plan = hosted_plan(server.url, 1, (picture("a", (64, 64), "png"),))
    run(study, plan, server.url, init_image_url="https://example.org/a.png")
    assert server.count("put") == 0
    assert server.made["prediction-0"].input["image"] == "https://example.org/a.png"


# Up front ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "changes", "message"),
    [
        ({"negative_prompt": "fog"}, {}, "negative"),
        ({"steps": 60}, {}, "50"),
        ({}, {"init_image_url": "https://example.org/a.png"}, "stands for one init image"),
        ({}, {"allow_loopback": False}, "EACHLABS_API_KEY is not set"),
        ({}, {"key_file": "/nowhere/key"}, "remote.key_file=/nowhere/key: cannot be read"),
    ],
)
def test_what_the_service_cannot_do_is_refused_up_front(fields, changes, message):
    url = "http://127.0.0.1:1"
    with pytest.raises(ConfigError, match=message):
        HostedService(settings=hosted_settings(url, **changes)).prepare(
            hosted_plan(url, 1, **fields), dry=False
        )
