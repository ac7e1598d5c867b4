"""fal, Stability and DeepInfra to the whole client: paid once, kept, or refused by name."""

import asyncio
import functools
import hashlib
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import sd35bench.remote.drive as drive
from sd35bench.config import compose, freeze
from sd35bench.errors import ConfigError, LostAnswer
from sd35bench.plan import expand
from sd35bench.remote.providers import provider_class
from sd35bench.remote.providers.base import Phase
from sd35bench.remote.providers.stability import form_of
from sd35bench.remote.transport import Transport
from sd35bench.study.store import Study
from sd35bench.trials import Run, RunSummary
from sd35bench.types import Record, Status
from sd35bench.verify import verify_study
from tests.remote.contract import KEY, make_provider, make_request
from tests.remote.fault_server import FaultServer, serving
from tests.remote.faults import Answer, Fault, picture
from tests.remote.hosted import (
    HASTY,
    PRICE_USD,
    by_prompt,
    hosted_plan,
    hosted_settings,
    ledger_lines,
    run,
)
from tests.remote.other_hosts import SERVERS

NAMES = tuple(SERVERS)
SYNCHRONOUS = ("deepinfra", "stability")

pytestmark = pytest.mark.usefixtures("apart")


def make(
    study: Study, server: FaultServer, name: str, count: int = 1, **changes: Any
) -> RunSummary:
    plan = hosted_plan(server.url, count, seed=7)
    return run(study, plan, server.url, provider=name, default_steps=4, **changes)


def only(study: Study) -> Record:
    return list(study.records())[-1]


@pytest.mark.parametrize("name", NAMES)
def test_images_come_and_the_record_says_what_was_not_sent(study: Study, name: str):
    with serving(SERVERS[name]) as server:
        summary = make(study, server, name, 3)
        assert (summary.done, summary.failed, summary.paused) == (3, 0, None)
        assert sorted(server.creates.values()) == [1, 1, 1]
        asked = [seen for seen in server.seen if seen.route == "create"]
    reported = name == "deepinfra"
    for record in by_prompt(study).values():
        call = record.remote
        assert call is not None
        assert call.unsent == make_provider(name).unsent
        assert (call.cost_usd, call.cost_reported) == (PRICE_USD, reported)
        assert record.timings is not None
        assert record.timings.latency_s > 0
        if name in SYNCHRONOUS:
            parts = (call.prediction_id, call.submit_s, call.queue_s, call.download_s)
            assert parts == (None, None, None, None)
            assert (call.polls, call.poll_bound_s) == (0, 0.0)
        else:
            assert call.prediction_id
            assert call.predict_s is not None
        assert record.effective_steps == (None if name == "stability" else 4)
    retries = {seen.headers.get("x-fal-no-retry") for seen in asked}
    assert retries == ({"1"} if name == "fal" else {None})
    assert not list((study.path / "refused").glob("*"))
    assert not verify_study(study.path).problems


@pytest.mark.parametrize("fault", ["lost-answer", "500", "truncated-json", "null"])
@pytest.mark.parametrize("name", NAMES)
def test_a_lost_answer_is_bought_again_only_when_the_user_says_so(
    study: Study, name: str, fault: str
):
    with serving(SERVERS[name]) as server:
        server.script("create", fault)
        before = (
            0 if fault == "500" else 1
        )  # the fault server's 500 created nothing: we cannot know
        assert make(study, server, name).ambiguous == 1
        assert "the service has no list" in f"{only(study).error}"
        assert "looks for it again" not in f"{only(study).error}"
        assert make(study, server, name).ambiguous == 1
        assert sum(server.creates.values()) == before
        assert make(study, server, name, on_ambiguous="resubmit").done == 1
        assert sum(server.creates.values()) == before + 1


@pytest.mark.parametrize("name", NAMES)
def test_what_was_answered_before_a_crash_is_not_bought_again(study: Study, monkeypatch, name: str):
    """The run dies between the service's answer and the record of the image."""
    with serving(SERVERS[name]) as server:
        with monkeypatch.context() as patched:
            patched.setattr(drive._Rounds, "_keep", _die)
            with pytest.raises(RuntimeError, match="killed"):
                make(study, server, name)
        assert list(study.records()) == []
        again = make(study, server, name)
        assert (again.done, again.cost_usd) == (1, 0)
        assert sum(server.creates.values()) == 1
    call = only(study).remote
    assert call is not None
    assert call.resumed
    assert only(study).timings is None  # nobody watched it


@pytest.mark.parametrize("name", SYNCHRONOUS)
def test_an_answer_that_never_comes_is_ambiguous_after_the_timeout(study: Study, name: str):
    with serving(SERVERS[name]) as server:
        server.script("create", "silence")
        assert make(study, server, name, timeout_s=0.5).ambiguous == 1
        assert make(study, server, name).ambiguous == 1
        assert sum(server.creates.values()) == 1


@pytest.mark.parametrize("name", SYNCHRONOUS)
def test_ctrl_c_waits_for_the_answer_and_keeps_the_image(study: Study, name: str):
    async def main() -> None:
        task = asyncio.create_task(rounds.make(None, HASTY))
        while server.count("create") == 0:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with serving(SERVERS[name]) as server:
        server.script("create", Fault(lambda answer: replace(answer, delay_s=0.2)))
        plan = hosted_plan(server.url, 1, seed=7)
        settings = hosted_settings(server.url, provider=name, default_steps=4)
        rounds = drive._Rounds(Run(plan, study, None), settings, provider_class(name)(settings))
        with study.lock(plan.load.key):
            asyncio.run(main())
        assert [line["kind"] for line in ledger_lines(study)] == ["intent", "kept", "finished"]
        assert list(study.records()) == []
        assert make(study, server, name).done == 1
        assert sum(server.creates.values()) == 1


def _die(*_: object) -> None:
    raise RuntimeError("killed")


@pytest.mark.parametrize("name", SYNCHRONOUS)
def test_the_image_is_on_disk_before_the_journal_says_how_it_ended(study: Study, name: str):
    with serving(SERVERS[name]) as server:
        make(study, server, name)
    assert [line["kind"] for line in ledger_lines(study)] == ["intent", "kept", "finished"]


@pytest.mark.parametrize("name", SYNCHRONOUS)
def test_an_unusable_image_stops_the_purchases_and_is_taken_when_it_is_accepted(
    study: Study, name: str
):
    with serving(SERVERS[name], sizes={"1:1": (48, 48)}) as server:
        first = make(study, server, name, 3)
        assert "nothing more is bought" in f"{first.paused}"
        assert only(study).status is Status.INVALID_IMAGE
        assert sum(server.creates.values()) == 1
        assert not verify_study(study.path).problems
        assert make(study, server, name, 3, accept_size=(48, 48)).done == 3
        assert sorted(server.creates.values()) == [1, 1, 1]


@pytest.mark.parametrize("name", SYNCHRONOUS)
def test_a_kept_image_that_is_gone_is_an_error_not_a_purchase(study: Study, name: str):
    with serving(SERVERS[name], sizes={"1:1": (48, 48)}) as server:
        make(study, server, name)
        (kept,) = (study.path / "refused").iterdir()
        kept.unlink()
        make(study, server, name, accept_size=(48, 48))
        assert "is not in" in f"{only(study).error}"
        assert sum(server.creates.values()) == 1
        make(study, server, name, accept_size=(48, 48), on_ambiguous="resubmit")
        assert only(study).status is Status.OK


@pytest.mark.parametrize("name", NAMES)
def test_budgets_hold_and_the_first_purchase_runs_alone(study: Study, name: str):
    with serving(SERVERS[name]) as server:
        paused = make(study, server, name, 4, max_cost_usd=2 * PRICE_USD, single_stream=0)
        assert "max_cost_usd" in f"{paused.paused}"
        assert sum(server.creates.values()) == 2
        first, second = (seen.at for seen in server.seen if seen.route == "create")
        if name == "fal":  # its image had been fetched before the next was bought
            image = next(seen.at for seen in server.seen if seen.route == "image")
            assert first < image < second


def test_a_charge_above_the_listed_price_stops_the_purchases(study: Study):
    with serving(SERVERS["deepinfra"], cost_usd=0.2) as server:
        paused = make(study, server, "deepinfra", 3)
        assert "charged 0.2 USD" in f"{paused.paused}"
        assert sum(server.creates.values()) == 1


@pytest.mark.parametrize("name", NAMES)
def test_refusals_are_waited_for_paused_on_or_end_the_run(study: Study, name: str):
    with serving(SERVERS[name]) as server:
        server.script("create", "429-soon", "402")
        assert "402" in f"{make(study, server, name).paused}"
        server.script("create", "401")
        with pytest.raises(ConfigError, match=make_provider(name).key_variable):
            make(study, server, name)
        server.script("create", "400")
        make(study, server, name)
        assert only(study).status is Status.UNSUPPORTED
        assert sum(server.creates.values()) == 0


def test_a_flagged_prompt_at_stability_is_its_own_failure_and_not_the_keys(study: Study):
    flagged = Fault(lambda _: Answer.json(403, {"errors": ["flagged by moderation"]}), refuses=True)
    with serving(SERVERS["stability"]) as server:
        server.script("create", flagged)
        summary = make(study, server, "stability", 2)
    assert (summary.done, summary.failed) == (1, 1)
    assert "flagged by moderation" in "".join(f"{r.error}" for r in study.records())


@pytest.mark.parametrize("name", NAMES)
def test_the_key_is_in_one_header_and_in_no_file(study: Study, monkeypatch, name: str):
    variable = make_provider(name).key_variable
    monkeypatch.setenv(variable, KEY)
    quoting = Fault(lambda _: Answer.json(400, {"error": f"no such model for {KEY}"}), refuses=True)
    with serving(SERVERS[name]) as server:
        server.script("create", quoting)
        make(study, server, name)
        assert make(study, server, name).done == 1
        for seen in server.seen:
            held = [KEY in value for value in seen.headers.values()]
            assert held.count(True) == (0 if seen.route == "image" else 1)
            assert KEY.encode() not in seen.body
    files = [path for path in study.path.rglob("*") if path.is_file()]
    assert len(files) > 3
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []


@pytest.mark.parametrize("name", SYNCHRONOUS)
def test_a_create_may_last_as_long_as_an_image(study: Study, monkeypatch, name: str):
    """An answer later than a request's usual limit, and larger than 4 MB; neither is lost."""
    monkeypatch.setattr(drive, "Transport", functools.partial(Transport, timeout_s=0.2))
    monkeypatch.setattr(Transport.__init__, "__kwdefaults__", _small_bodies())
    with serving(SERVERS[name]) as server:
        server.script("create", Fault(lambda answer: replace(answer, delay_s=0.6)))
        assert make(study, server, name).done == 1


def _small_bodies() -> dict[str, Any]:
    return {**(Transport.__init__.__kwdefaults__ or {}), "max_body_bytes": 1000}


@pytest.mark.parametrize("name", NAMES)
def test_an_image_of_another_seed_is_no_image_of_the_trial(study: Study, name: str):
    def reseeded(route: str, body: Any) -> Any:
        return {**body, "seed": 8} if "seed" in body else body

    with serving(SERVERS[name], replies=reseeded) as server:
        make(study, server, name)
    assert "asked for seed=7, the service used 8" in f"{only(study).error}"


# One wire each ----------------------------------------------------------------------------------


def test_fals_result_that_is_refused_is_a_failure_with_its_reason(study: Study):
    nsfw = Fault(lambda _: Answer.json(422, {"detail": [{"msg": "content policy"}]}), refuses=True)
    with serving(SERVERS["fal"]) as server:
        server.script("result", nsfw)
        make(study, server, "fal")
    assert "content policy" in f"{only(study).error}"
    assert [line["kind"] for line in ledger_lines(study)][-1] == "finished"


def test_fals_result_that_cannot_be_had_now_is_fetched_later_and_not_bought_again(study: Study):
    with serving(SERVERS["fal"]) as server:
        server.always("result", "500")
        make(study, server, "fal")
        assert "its result cannot be had" in f"{only(study).error}"
        server.always("result", None)
        assert make(study, server, "fal").done == 1
        assert sum(server.creates.values()) == 1


def test_fals_output_at_an_unknown_host_is_not_fetched(study: Study):
    def moved(route: str, body: Any) -> Any:
        elsewhere = {"images": [{"url": "https://files.example/a.png"}]}
        return {**body, **elsewhere} if route == "result" else body

    with serving(SERVERS["fal"], replies=moved) as server:
        make(study, server, "fal")
        assert server.count("image") == 0
    assert "remote.output_hosts=files.example" in f"{only(study).error}"


def test_fals_paths_are_ours_and_end_at_the_models_name():
    provider = make_provider("fal", slug="owner/model/variant")
    assert provider.create({}).path == "/owner/model/variant"
    assert provider.poll("r-1").path == "/owner/model/requests/r-1/status"
    assert provider.result("r-1").path == "/owner/model/requests/r-1"
    assert provider.headers("k") == {"Authorization": "Key k"}
    assert make_provider("fal").input(make_request(width=72, height=40), None)["image_size"] == {
        "width": 72,
        "height": 40,
    }


@pytest.mark.parametrize(
    ("body", "phase"),
    [
        ({"request_id": "r", "status": "IN_QUEUE", "queue_position": 3}, Phase.WAITING),
        ({"request_id": "r", "status": "IN_PROGRESS"}, Phase.RUNNING),
        ({"request_id": "r", "status": "COMPLETED"}, Phase.READY),
        ({"request_id": "r", "status": "COMPLETED", "error": "boom"}, Phase.FAILED),
    ],
    ids=["queued", "running", "ready", "failed"],
)
def test_fals_status_words(body: Any, phase: Phase):
    assert make_provider("fal").read_prediction(body).phase is phase


def test_stabilitys_bytes_are_read_like_its_json(study: Study):
    with serving(SERVERS["stability"]) as server:
        raw = picture("bytes", (64, 64), "png")
        server.script("create", Fault(lambda _: Answer.of(raw, "image/png")))
        assert make(study, server, "stability").done == 1
    assert only(study).image == hashlib.sha256(raw).hexdigest()


def test_stability_gets_an_init_image_as_a_file_and_no_ratio(study: Study):
    init = picture("init", (64, 64), "png")
    with serving(SERVERS["stability"]) as server:
        plan = hosted_plan(server.url, 1, (init,), seed=7)
        changes = {"provider": "stability", "default_steps": 4}
        assert run(study, plan, server.url, **changes).done == 1
        (made,) = server.made.values()
    assert made.input["image"] == init.hex()
    assert (made.input["mode"], made.input["strength"]) == ("image-to-image", "0.5")
    assert "aspect_ratio" not in made.input
    (intent,) = (line for line in ledger_lines(study) if line["kind"] == "intent")
    assert "image" not in intent["input"]  # a file is not written into the journal


def test_a_prompt_in_a_form_is_its_text_whatever_it_says():
    prompt = 'a "cat"\r\n--x\r\nContent-Disposition: form-data; name="seed"\r\n\r\n9'
    content, kind = form_of({"prompt": prompt, "seed": 7})
    boundary = kind.partition("boundary=")[2]
    parts = content.decode().split(f"--{boundary}")
    assert len(parts) == 4
    assert parts[1].endswith(f"\r\n\r\n{prompt}\r\n")
    data = form_of({"prompt": "data:image/png;base64,AAAA"})[0]
    assert b"filename" not in data


@pytest.mark.parametrize("name", SYNCHRONOUS)
@pytest.mark.parametrize("body", [None, [], {}, 7, {"errors": ["no"]}])
def test_an_answer_without_image_and_reason_is_lost(name: str, body: Any):
    with pytest.raises(LostAnswer):
        make_provider(name).read_created(body)


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("stability", {"steps": 5}, "steps=5: the service chooses their number; leave steps out"),
        ("stability", {"seed": 0}, "seed=0: the service takes it for a random one; use seed=1"),
        ("stability", {"cfg": 0.5}, "cfg=0.5: the service takes 1 to 10"),
        ("stability", {"cfg": 10.5}, "cfg=10.5: the service takes 1 to 10"),
        ("stability", {"output_format": "webp"}, "output_format=webp: the service makes jpg or"),
        ("stability", {"output_format": "jpg", "output_quality": 50}, "output_quality=50"),
        ("deepinfra", {"output_format": "jpg"}, "output_format=jpg: the service makes png; use"),
        ("deepinfra", {"steps": 51}, "steps=51: the service takes 1 to 50"),
        ("fal", {"cfg": 20.5}, "cfg=20.5: the service takes 0 to 20"),
        ("fal", {"output_format": "jpg", "output_quality": 50}, "output_quality=50"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_what_would_silently_be_another_setting_is_refused(name: str, changes: Any, said: str):
    assert f"{make_provider(name).refusal(make_request(**changes))}".startswith(said)


@pytest.mark.parametrize("name", SYNCHRONOUS)
def test_nine_ratios_are_taken_and_the_other_two_refused(name: str):
    provider = make_provider(name, aspect_ratios={(64, 80): "4:5", (60, 80): "3:4"})
    assert provider.refusal(make_request(width=64, height=80)) is None
    assert re.match(
        "width=60, height=80: .*9:21$", f"{provider.refusal(make_request(width=60, height=80))}"
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_command_line_knows_them_and_refuses_before_a_key_is_asked_for(name: str):
    job = freeze(compose(["model=sd35-medium", f"backend={name}", "seed=1", "prompts.limit=1"]))
    assert isinstance(job.engine, drive.HostedService)
    settings = job.engine.settings
    assert (settings.provider, settings.default_steps) == (name, 40)
    assert settings.usd_per_image > 0
    plan = expand(job.sweep)
    job.engine.prepare(plan, dry=True)
    with pytest.raises(ConfigError, match=make_provider(name).key_variable):
        job.engine.prepare(plan, dry=False)


def test_fal_takes_any_size_and_the_others_ratios_only():
    wide = ["model=sd35-medium", "width=1008", "height=1008", "prompts.limit=1"]
    freeze(compose([*wide, "backend=fal"]))
    with pytest.raises(ConfigError, match="knows aspect ratios only"):
        freeze(compose([*wide, "backend=deepinfra"]))


def test_the_page_says_what_each_cannot_be_sent():
    page = (Path(__file__).parents[2] / "docs" / "providers.md").read_text()
    for name in NAMES:
        (row,) = re.findall(rf"^\| `{name}` \| ([^|]*) \|", page, re.MULTILINE)
        assert tuple(re.findall("`([a-z_]+)`", row)) == make_provider(name).unsent
