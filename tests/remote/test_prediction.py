"""RetryPolicy, deadlines and what counts as an answer: the small parts of a prediction's life."""

import asyncio
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sd35bench.errors import InvalidImage
from sd35bench.remote.drive import download_hosts
from sd35bench.remote.prediction import Flights, check_file
from sd35bench.remote.providers.eachlabs import Eachlabs
from sd35bench.remote.providers.replicate import Replicate
from sd35bench.remote.retry import (
    RETRY_AFTER_LIMIT_S,
    Deadline,
    PredictionFailed,
    RetryPolicy,
    despite_cancel,
)
from sd35bench.remote.uploads import content_type, data_uri
from sd35bench.types import Request, Status
from tests.remote.faults import picture
from tests.remote.hosted import hosted_settings

RETRY_AFTER = st.none() | st.floats(0, 1e9)


@given(failures=st.integers(0, 1000), retry_after_s=RETRY_AFTER)
def test_waits_are_what_is_asked_and_bounded(failures, retry_after_s):
    policy = RetryPolicy()
    wait_s = policy.wait_s(failures, retry_after_s)
    ceiling = min(policy.backoff_limit_s, policy.backoff_s * 2.0 ** min(failures, 30))
    assert 0 <= wait_s <= max(ceiling, min(retry_after_s or 0.0, RETRY_AFTER_LIMIT_S))
    if retry_after_s is not None:
        assert wait_s >= min(retry_after_s, RETRY_AFTER_LIMIT_S)


def test_the_jitter_is_full():
    waits = [RetryPolicy().wait_s(3, None) for _ in range(400)]
    assert min(waits) < 0.5
    assert max(waits) > 3.5


def test_a_deadline_starts_late_and_ends():
    async def main() -> None:
        deadline = Deadline(0.05)
        await asyncio.sleep(0.06)  # waiting for a turn is no part of it
        started = time.perf_counter()
        await deadline.wait(1000.0, "first")  # cut to what is left
        assert time.perf_counter() - started < 60
        with pytest.raises(
            PredictionFailed, match=r"not done after remote\.timeout_s=0\.05: why"
        ) as caught:
            await deadline.wait(0.0, "why")
        assert caught.value.status is Status.TIMED_OUT

    asyncio.run(main())


def test_flights_know_the_most_that_were_open_with_them():
    flights = Flights()
    with flights.one() as first:
        assert first.now == first.most == 1
        with flights.one() as second:
            assert (first.most, second.most) == (2, 2)
        with flights.one() as third:
            assert third.most == 2
        assert first.now == 1
    with flights.one() as alone:
        assert alone.most == 1
    assert flights.busy_s > 0


def test_what_is_sent_is_finished_in_spite_of_a_cancel():
    done: list[int] = []

    async def send() -> int:
        await asyncio.sleep(0.05)
        done.append(1)
        return 1

    async def main() -> None:
        task = asyncio.create_task(despite_cancel(send()))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert done == [1]

    asyncio.run(main())


@pytest.mark.parametrize(
    ("size", "made", "message"),
    [((64, 64), "jpg", "got jpg"), ((64, 48), "png", "asked for 64x64 px, got 64x48")],
)
def test_a_file_is_judged_by_its_bytes(size, made, message):
    request = Request(prompt="p", steps=4, cfg=5.0, seed=0, width=64, height=64)
    with pytest.raises(InvalidImage, match=message):
        check_file(picture("x", size, made), request, hosted_settings("http://127.0.0.1"))


def test_another_base_url_may_serve_its_own_outputs():
    settings = hosted_settings("https://example.org/api")
    assert download_hosts(Eachlabs(settings), settings)[-1] == "example.org"
    own = hosted_settings(Eachlabs.base_url)
    assert download_hosts(Eachlabs(own), own) == Eachlabs.output_hosts


def test_files_inside_uris_are_bounded():
    data = picture("x", (8, 8), "png")
    most = Replicate.data_uri_bytes
    assert data_uri(data, most).startswith("data:image/png;base64,")
    with pytest.raises(Exception, match=r"give remote\.init_image_url=URL"):
        data_uri(data + b"\0" * most, most)
    with pytest.raises(Exception, match="neither PNG, JPEG nor WEBP"):
        content_type(b"GIF89a")
