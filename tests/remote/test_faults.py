"""Every wrong thing that a service can do, to the whole client: typed, in time, paid for once."""

import asyncio
import time
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sd35bench.remote.drive as drive
from sd35bench.errors import ConfigError, RemoteError
from sd35bench.fields import make_trial
from sd35bench.plan import Batch, Plan
from sd35bench.remote.download import download
from sd35bench.remote.retry import RetryPolicy
from sd35bench.remote.transport import Transport
from sd35bench.study.store import Study, decode_rgb
from sd35bench.trials import RunSummary
from sd35bench.types import BackendSpec, Load, ModelSpec, PromptRef, Record, Status
from tests.remote.contract import check_reader, make_provider, make_request, remote_settings
from tests.remote.fault_server import FaultServer, serving
from tests.remote.faults import FAULTS, Fault
from tests.remote.mutations import BODIES, damaged

QUICK = RetryPolicy(
    backoff_s=0.01,
    backoff_limit_s=0.02,
    listing_waits_s=(0.0, 0.02),
    unsent=2,
    malformed=2,
    missing=2,
    downloads=2,
)
TIMEOUT_S, REQUEST_S = 20.0, 10.0
"""A trial's budget and a request's. Nothing may take longer than a trial's, a request and a
download; a busy machine may take long over what is answered at once."""
SHORT_S = 1.0
"""The budget where only its end ends the trial."""
HANGS_S = 0.4
"""A request's, where a fault never answers."""
HANGING = ("silence", "slow-headers", "slow-body")
OK, ERROR, TIMED_OUT = Status.OK, Status.ERROR, Status.TIMED_OUT
INVALID, UNSUPPORTED, AMBIGUOUS = Status.INVALID_IMAGE, Status.UNSUPPORTED, Status.AMBIGUOUS
MODEL = ModelSpec(name="nano", path="", weights_digest="none", max_sequence_length=16)


def make_plan(provider: str, url: str, count: int = 1) -> Plan:
    backend = BackendSpec(name=provider, kind=provider, options={"base_url": url, "slug": "nano"})
    load = Load(model=MODEL, backend=backend, threads=1)
    trials = [
        make_trial(
            load=load,
            request=make_request(prompt=f"prompt {i}"),
            batch_size=1,
            prompt=PromptRef(id=f"{i}", set="test"),
        )
        for i in range(count)
    ]
    return Plan(load=load, batches=tuple(Batch(trials=(t,)) for t in trials), inits={}, notes=())


class Client:
    """Runs plans of a study against a fault server, as `sd35bench run` does."""

    def __init__(self, folder: Path, server: FaultServer, provider: str, **changes: Any) -> None:
        values = {"timeout_s": TIMEOUT_S, "expected_latency_s": 0.02, "usd_per_image": 0.035}
        values |= {"requests_per_minute": 100_000, "slug": "nano"}
        self.settings = remote_settings(provider, server.url, **values | changes)
        self.study = Study.open(folder, "faults", create=True)
        self.server = server

    def run(self, count: int = 1, **changes: Any) -> RunSummary:
        plan = make_plan(self.settings.provider, self.settings.base_url, count)
        asked = replace(self.settings, **changes)
        return drive.HostedService(settings=asked, policy=QUICK).run(plan, self.study)

    @property
    def records(self) -> list[Record]:
        return list(self.study.records())

    @property
    def most_paid(self) -> int:
        return max(self.server.creates.values(), default=0)


@pytest.fixture(autouse=True)
def quick(request, monkeypatch, tmp_path):
    """Deadlines as short as the fault allows, limits of this test's own, and no key."""
    called = getattr(request.node, "callspec", None)
    hangs = called is not None and called.params.get("fault") in HANGING
    request_s = HANGS_S if hangs else REQUEST_S
    monkeypatch.setattr(drive, "Transport", partial(Transport, timeout_s=request_s))
    monkeypatch.setattr("sd35bench.remote.prediction.DEADLINE_S", request_s)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for variable in ("EACHLABS_API_KEY", "REPLICATE_API_TOKEN"):
        monkeypatch.delenv(variable, raising=False)


UNREADABLE = [
    "truncated-json", "invalid-json", "nan-json", "deep-json", "not-utf8", "empty-body",
    "html-200", "short-body", "wrong-types", "missing-fields", "a-list", "null",
    "reset-mid-head", "reset-mid-body", "lost-answer", "no-http", "endless-head", "huge-body",
    "gzip-bomb", "silence", "slow-headers", "slow-body",
]  # fmt: skip
RETRIED = ("429", "429-soon", "429-negative", "429-nonsense", "429-skewed")
ASKED_AGAIN = ("html-502", "404", "429", "500", "503", "unknown-status")
BAD_IMAGES = ("bomb", "truncated", "wrong-size", "black")
CASES = [
    # A create whose answer is lost was made, and is found: never made, or paid for, twice.
    *(("create", name, {OK}, 1) for name in UNREADABLE),
    ("create", "html-502", {OK}, 1),
    ("create", "redirect-loop", {OK}, 1),
    ("create", "unknown-status", {OK}, 1),
    ("create", "wrong-content-type", {OK}, 1),
    # What was refused was not made, and is asked for again only where that is the point of it.
    *(("create", name, {OK}, 1) for name in RETRIED),
    *(("create", f"429-{kind}", {TIMED_OUT}, 0) for kind in ("absurd", "far-date")),
    ("create", "400", {UNSUPPORTED}, 0),
    ("create", "404", {ERROR}, 0),
    # A 5xx does not say that nothing was made, and nothing is listed.
    ("create", "500", {AMBIGUOUS}, 0),
    ("create", "503", {AMBIGUOUS}, 0),
    # Asking again costs nothing. (Read by the same transport as a create: every second will do.)
    *(("poll", name, {OK}, 1) for name in UNREADABLE[::2]),
    *(("poll", name, {OK}, 1) for name in ASKED_AGAIN),
    # An image is checked before anything believes in it.
    *(("image", f"image-{what}", {INVALID}, 1) for what in BAD_IMAGES),
    *(("image", name, {ERROR}, 1) for name in ("html-200", "gzip-bomb", "huge-body", "slow-body")),
    *(("image", name, {ERROR}, 1) for name in ("wrong-content-type", "reset-mid-body", "silence")),
    *(("image", f"redirect-{to}", {ERROR}, 1) for to in ("loop", "private", "file")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("route", "fault", "statuses", "paid"), CASES, ids=[f"{c[0]}-{c[1]}" for c in CASES]
)
def test_one_fault_is_survived_or_becomes_a_status(
    tmp_path, monkeypatch, route, fault, statuses, paid
):
    if route != "image":  # a sound one needs no process of its own
        monkeypatch.setattr("sd35bench.remote.prediction.decode_image", decode_rgb)
    with serving() as server:
        timeout_s = SHORT_S if statuses == {TIMED_OUT} else TIMEOUT_S
        client = Client(tmp_path, server, "eachlabs", timeout_s=timeout_s)
        if route == "image":
            server.always(route, fault)
        else:
            server.script(route, fault)
        start = time.monotonic()
        client.run()
        assert time.monotonic() - start < timeout_s + 2 * REQUEST_S + 60  # decoding is a process
        assert [record.status in statuses for record in client.records] == [True], client.records
        assert client.most_paid == paid


@pytest.mark.parametrize("provider", ["eachlabs", "replicate"])
@pytest.mark.parametrize("fault", ["silence", "html-502", "unknown-status", "429-absurd", "a-list"])
def test_a_service_that_never_says_how_it_stands_ends_in_time_and_is_not_paid_again(
    tmp_path, provider, fault
):
    with serving() as server:
        client = Client(tmp_path, server, provider, timeout_s=SHORT_S)
        server.always("poll", fault)
        client.run()
        assert client.records[0].status in (TIMED_OUT, ERROR)
        server.always("poll", None)
        client.run(timeout_s=TIMEOUT_S)
        assert client.records[-1].status is OK
        assert client.most_paid == 1


def test_endless_processing_times_out_and_is_found_when_it_ends(tmp_path):
    with serving(never_ends=True) as server:
        client = Client(tmp_path, server, "eachlabs", timeout_s=SHORT_S)
        client.run()
        assert client.records[0].status is TIMED_OUT
        server.never_ends = False
        client.run(timeout_s=TIMEOUT_S)
        assert client.records[-1].status is OK
        assert client.records[-1].remote is not None
        assert client.records[-1].remote.resumed
        assert client.most_paid == 1


def test_one_id_for_two_predictions_never_gives_one_image_to_two_trials(tmp_path):
    with serving(same_id=True) as server:
        client = Client(tmp_path, server, "eachlabs", concurrency=1)
        client.run(2)
        found = Counter(record.status for record in client.records)
        assert found[OK] == 1
        assert found[OK] + found[ERROR] + found[AMBIGUOUS] == 2
        assert client.most_paid == 1


@pytest.mark.parametrize("provider", ["eachlabs", "replicate"])
def test_a_lost_create_is_found_among_strangers(tmp_path, provider):
    with serving(strangers=7) as server:
        client = Client(tmp_path, server, provider)
        server.script("create", "lost-answer")
        client.run()
        assert client.records[0].status is OK
        assert client.most_paid == 1


@pytest.mark.parametrize("days", [-4000, -1, 1, 4000])
def test_a_service_with_a_wrong_clock_changes_no_measurement(tmp_path, days):
    with serving(skew=timedelta(days=days)) as server:
        client = Client(tmp_path, server, "replicate")
        client.run()
        call = client.records[0].remote
        assert client.records[0].status is OK
        assert call is not None
        assert call.queue_s is not None
        assert 0 <= call.queue_s < 60


def test_402_pauses_and_the_same_command_goes_on(tmp_path):
    with serving() as server:
        client = Client(tmp_path, server, "eachlabs")
        server.script("create", "402")
        assert "402" in str(client.run().paused)
        assert client.records == []
        assert client.run().done == 1
        assert client.most_paid == 1


@pytest.mark.parametrize("route", ["create", "poll"])
def test_a_wrong_key_ends_the_run_at_once(tmp_path, route):
    with serving() as server:
        client = Client(tmp_path, server, "eachlabs")
        server.always(route, "401")
        with pytest.raises(ConfigError):
            client.run(3)
        assert server.count(route) <= client.settings.concurrency
        assert client.most_paid <= 1


def test_a_storm_of_429s_creates_each_prediction_once(tmp_path):
    with serving(in_flight_limit=2, seconds=0.05) as server:
        client = Client(tmp_path, server, "eachlabs", timeout_s=120.0, single_stream=0)
        for _ in range(6):
            server.script("create", "429-soon", None, "429")
        assert client.run(8).done == 8
        assert client.most_paid == 1
        assert len(server.creates) == 8
        assert server.most_in_flight <= 2


@pytest.mark.parametrize("fails", ["failed", "empty-output"])
def test_what_the_service_failed_at_is_an_error_with_its_reason(tmp_path, fails):
    with serving(fails=fails == "failed") as server:
        client = Client(tmp_path, server, "eachlabs")
        if fails == "empty-output":
            server.always("poll", fails)
        client.run()
        assert client.records[0].status is ERROR
        assert ("the model failed" if fails == "failed" else "no image") in str(
            client.records[0].error
        )
        assert client.most_paid == 1


def test_numbers_as_text_and_an_object_as_output_are_read_as_usual(tmp_path):
    with serving(
        numbers_as_text=True, output_shape=lambda url: {"images": [{"url": url}]}
    ) as server:
        client = Client(tmp_path, server, "eachlabs")
        client.run()
        call = client.records[0].remote
        assert client.records[0].status is OK
        assert call is not None
        assert (call.cost_usd, call.cost_reported) == (0.035, True)
        assert call.predict_s == server.seconds


# Generated replies ------------------------------------------------------------------------------


class AnyPath(FaultServer):
    """Takes every request for one of the route that is being tried, whichever wire it is in."""

    expected = "other"

    def route(self, method: str, path: str) -> str:
        return self.expected


class Loop:
    """One event loop and one server for many replies; counts what they came to."""

    DEADLINE_S = 0.25
    PATIENCE_S = 10.0  # the machine may be busy with other tests; what hangs, hangs longer

    def __init__(self) -> None:
        self.runner = asyncio.Runner()
        self.server = AnyPath()
        self.runner.run(self.server.__aenter__())
        self.came_to: Counter[str] = Counter()
        self.replies: set[bytes] = set()
        self.slowest_s = 0.0

    def close(self) -> None:
        self.runner.run(self.server.__aexit__())
        self.runner.close()

    def meet(self, route: str, provider: str, raw: bytes, hang: bool) -> None:
        """Let the client meet one reply; only typed errors, in time."""
        self.replies.add(route.encode() + raw)
        self.server.expected = route
        change = lambda answer: replace(answer, raw=raw, hang=hang)  # noqa: E731
        self.server.script(route, Fault(change, refuses=True))
        requests = len(self.server.seen)
        started = time.perf_counter()
        result = self.runner.run(self._result(route, provider))
        self.slowest_s = max(self.slowest_s, time.perf_counter() - started)
        self.came_to[result] += 1
        # What is said not to have been sent may be sent again: the server must not have seen it.
        assert result != "NotSent" or len(self.server.seen) == requests
        self.server.forget(route)
        assert self.slowest_s < self.PATIENCE_S

    async def _result(self, route: str, provider_name: str) -> str:
        provider = make_provider(provider_name, self.server.url)
        try:
            async with asyncio.timeout(self.PATIENCE_S):
                if route == "image":
                    await download(
                        f"{self.server.url}/outputs/p-1.png",
                        hosts=None,
                        allow_loopback=True,
                        deadline_s=self.DEADLINE_S,
                    )
                    return "read"
                call, reader = _question(provider, route)
                transport = Transport(
                    self.server.url,
                    allow_loopback=True,
                    headers=dict,
                    timeout_s=self.DEADLINE_S,
                )
                reply = await transport.send(call)
        except RemoteError as exc:
            return type(exc).__name__
        check_reader(provider, reader, reply.body)
        return "read"


def _question(provider: Any, route: str) -> tuple[Any, str]:
    now = datetime.now(UTC)
    if route == "create":
        return provider.create(provider.input(make_request(), None)), "read_created"
    if route == "poll":
        return provider.poll("p-1"), "read_prediction"
    if route == "presign":
        return make_provider("eachlabs").presign("image/png"), "read_presigned"
    return provider.listing(now, now, None), "read_listing"


@pytest.fixture(scope="module")
def loop():
    found = Loop()
    yield found
    found.close()


ASKED = st.sampled_from([*BODIES, ("presign", "eachlabs"), ("image", "eachlabs")])


def meet(loop: Loop, asked: tuple[str, str], data: st.DataObject) -> None:
    route, provider = asked
    raw, hang = data.draw(damaged(route, provider))
    loop.meet(route, provider, raw, hang)


MALFORMED = settings(deadline=None, suppress_health_check=list(HealthCheck), database=None)


@settings(MALFORMED, max_examples=100)
@given(asked=ASKED, data=st.data())
def test_any_reply_is_read_or_a_typed_error_in_time(loop, asked, data):
    meet(loop, asked, data)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_five_thousand_malformed_replies_hang_nothing_and_raise_nothing_else(loop):
    @settings(MALFORMED, max_examples=8000)
    @given(asked=ASKED, data=st.data())
    def many(asked, data):
        meet(loop, asked, data)

    loop.came_to.clear()
    loop.replies.clear()
    many()
    print(
        f"\n{sum(loop.came_to.values())} malformed replies, {len(loop.replies)} of them distinct:"
        f" {dict(loop.came_to)}, slowest {loop.slowest_s:.2f} s"
    )
    assert len(loop.replies) >= 5000


def test_every_named_fault_meets_the_client():
    """A fault that no case has is not covered."""
    done = {fault for _, fault, _, _ in CASES}
    elsewhere = {"402", "401", "empty-output"}
    assert set(FAULTS) - done == elsewhere
