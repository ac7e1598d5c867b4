"""Replicate's wire: its own routes, words, cursors and the text of its 429s."""

from datetime import UTC, datetime

import pytest

from sd35bench.errors import LostAnswer, RemoteError
from sd35bench.remote.providers.base import Phase
from tests.remote.contract import make_provider, make_request

URL = "https://replicate.delivery/xezq/abc/out-0.png"
SLUG = "stability-ai/stable-diffusion-3.5-medium"


def replicate():
    return make_provider("replicate", slug=SLUG)


def read(**fields):
    body = {"id": "p1", "status": "succeeded", "output": [URL], "input": {}, "logs": "", **fields}
    return replicate().read_prediction(body)


def test_the_create_names_the_model_and_never_waits():
    provider = replicate()
    call = provider.create(provider.input(make_request(), None))
    assert call.path == f"/v1/models/{SLUG}/predictions"
    assert set(call.json) == {"input"}
    assert "prefer" not in {name.lower() for name in {**call.headers, **provider.headers("k")}}
    assert provider.headers("k") == {"Authorization": "Bearer k"}
    assert "negative_prompt" not in call.json["input"]


def test_a_slug_stays_inside_its_path():
    call = make_provider("replicate", slug="a/b?c#d e").create({})
    assert call.path == "/v1/models/a/b%3Fc%23d%20e/predictions"


@pytest.mark.parametrize(
    ("word", "phase"),
    [
        ("starting", Phase.WAITING),
        ("processing", Phase.RUNNING),
        ("succeeded", Phase.SUCCEEDED),
        ("failed", Phase.FAILED),
        ("canceled", Phase.CANCELLED),
        ("aborted", Phase.CANCELLED),
    ],
)
def test_every_status_word_is_known(word, phase):
    assert read(status=word).phase is phase


def test_an_unknown_status_is_named():
    with pytest.raises(RemoteError, match="'dreaming' is unknown"):
        read(status="dreaming")


def test_a_prediction_tells_queue_and_inference_apart_and_no_cost():
    found = read(
        created_at="2026-08-01T10:00:00.000Z",
        started_at="2026-08-01T10:00:01.250Z",
        metrics={"predict_time": 7.5, "total_time": 8.9},
    )
    assert (found.queue_s, found.predict_s, found.cost_usd) == (1.25, 7.5, None)
    assert found.created_at == datetime(2026, 8, 1, 10, tzinfo=UTC)
    assert found.outputs == (URL,)


def test_outputs_that_were_deleted_are_said_to_be():
    found = read(output=None, data_removed=True)
    assert found.phase is Phase.FAILED
    assert "removed after an hour" in str(found.error)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"error": "NSFW content detected"}, "NSFW content detected"),
        ({"error": None, "logs": "CUDA error"}, "CUDA error"),
        ({"error": None}, "it gave no reason"),
    ],
)
def test_the_reason_of_a_failure_is_found(fields, said):
    assert read(status="failed", output=None, **fields).error == said


@pytest.mark.parametrize("body", [None, [], {}, {"id": 7}, {"id": "a/b"}, {"detail": "no"}])
def test_a_create_without_an_id_is_a_lost_answer(body):
    with pytest.raises(LostAnswer):
        replicate().read_created(body)


def test_the_listing_follows_the_cursor_and_never_the_url():
    entries = [{"id": "p1", "status": "starting", "input": {"prompt": "x"}}]
    following = "https://evil.example/v1/predictions?cursor=cD0yMDI2"
    found, page = replicate().read_listing({"next": following, "results": entries})
    assert found[0].input == {"prompt": "x"}
    now = datetime.now(UTC)
    call = replicate().listing(now, now, page)
    assert (call.path, call.query) == ("/v1/predictions", {"cursor": "cD0yMDI2"})
    assert replicate().listing(now, now, None).query == {}
    assert replicate().read_listing({"next": None, "results": []}) == ([], None)


@pytest.mark.parametrize(
    "following", [7, "", "https://a.b/c", "https://[x", {}, "?cursor=a&cursor=b"]
)
def test_a_next_page_without_a_cursor_is_an_error(following):
    with pytest.raises(RemoteError, match="cursor"):
        replicate().read_listing({"next": following, "results": []})


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("Request was throttled. Your rate limit resets in ~30s.", 30.0),
        ("resets in 2.5s", 2.5),
        ("resets in ~999999s", None),
        ("Request was throttled.", None),
        ("resets in " + "9" * 5000 + "s", None),
    ],
)
def test_the_reset_is_read_from_the_429s_text(text, seconds):
    assert replicate().reset_s(text) == seconds


def test_there_is_no_upload_route():
    assert replicate().presign("image/png") is None
    with pytest.raises(RemoteError, match="URL"):
        replicate().read_presigned({})
