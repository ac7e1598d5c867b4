"""The generator: a worker that dies or hangs costs its own prediction, and no other."""

import pytest

from sd35bench.errors import BackendError, StoreError, WorkerDied
from sd35bench.server import generation, serving
from sd35bench.types import content_hash, to_json
from sd35bench.workers.limits import Limits
from tests.server.live import MODEL, live, make_settings

pytestmark = pytest.mark.usefixtures("forked_python")
FREE = {"requests_per_minute": None, "concurrency": None}


def seeds(every: int) -> tuple[int, int]:
    """A seed whose request the fake backend's fault befalls, and one that it spares."""
    from sd35bench.server.schema import read_create, to_request

    found: dict[bool, int] = {}
    for seed in range(100):
        body = {"model": "nano", "input": {"prompt": "a cat", "seed": seed}}
        request = to_request(read_create(body, MODEL).input, MODEL, None)
        found.setdefault(int(content_hash(to_json(request))[:8], 16) % every == 0, seed)
    return found[True], found[False]


@pytest.mark.parametrize(
    ("fault", "code", "words"),
    [("kill", "crashed", "SIGKILL"), ("hang", "timed-out", "no answer in 2 s")],
)
def test_worker_that_dies_costs_one_prediction(tmp_path, fault, code, words):
    doomed, spared = seeds(2)
    backend = {"fault": fault, "fault_every": 2}
    limits = Limits(deadline_s=2.0 if fault == "hang" else None)
    with live(make_settings(tmp_path, backend=backend, limits=limits, **FREE)) as server:
        ids = [server.create(seed=seed) for seed in (doomed, spared)]
        first, second = (server.ended(made) for made in ids)
    assert first["status"] == "error"
    assert first["output"]["error_code"] == code
    assert words in first["output"]["error_message"]
    assert words in first["logs"]
    assert first["metrics"] == {"predict_time": None, "cost": 0.0}
    assert second["status"] == "success"


def test_failures_are_told_and_the_queue_goes_on(tmp_path, monkeypatch):
    doomed, spared = seeds(2)
    with live(make_settings(tmp_path, backend={"fail_every": 2}, **FREE)) as server:
        failed = server.ended(server.create(seed=doomed))
        assert (failed["status"], failed["output"]["error_code"]) == ("error", "error")
        assert server.post("/v1/prediction/run", seed=doomed).json()["status"] == "failed"

        # Once the disk is full, once there is a bug, once the worker died while it was idle.
        for error, code in ((StoreError("full"), "storage"), (RuntimeError("bug"), "internal")):
            with monkeypatch.context() as patch:
                patch.setattr(server.state.files, "put_output", raising(error))
                broken = server.ended(server.create(seed=spared))
            assert broken["output"]["error_code"] == code
        assert "bug" not in broken["logs"]
        server.state.generator._worker._process.kill()
        server.state.generator._worker._process.wait()
        assert server.ended(server.create(seed=spared))["status"] == "success"


def test_an_end_that_the_disk_refuses_is_written_later(tmp_path, monkeypatch):
    monkeypatch.setattr(generation, "RETRY_S", 0.02)
    with live(make_settings(tmp_path, **FREE)) as server:
        real, calls = server.state.store.succeed, []

        def flaky(*given):
            calls.append(given)
            if len(calls) < 3:
                raise StoreError("the disk is full")
            real(*given)

        monkeypatch.setattr(server.state.store, "succeed", flaky)
        assert server.ended(server.create())["status"] == "success"
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("backend", "error"),
    [
        ({"fault": "exit", "fault_phase": "load"}, WorkerDied),
        ({"fault": "memory-error", "fault_phase": "warm-up"}, BackendError),
        ({"unproven": True}, BackendError),
    ],
    ids=["load", "warm-up", "settle"],
)
def test_backend_that_cannot_be_had_is_said_before_serving(tmp_path, backend, error):
    with pytest.raises(error), live(make_settings(tmp_path, backend=backend)):
        pass


def test_stop_leaves_a_long_image_for_the_next_start(tmp_path, monkeypatch):
    monkeypatch.setattr(serving, "FINISH_S", 0.2)
    slow = make_settings(tmp_path, backend={"delay_s": 1.5}, **FREE)
    with live(slow) as server:
        made = server.create()
        while server.client.get(f"/v1/prediction/{made}").json()["status"] != "processing":
            pass
    with serving.open_state(slow) as state:
        assert state.store.get("", made).status == "created"
        work = state.store.take()
        assert (work.id, work.request.prompt) == (made, "a cat")


def raising(error: Exception):
    def call(*_):
        raise error

    return call
