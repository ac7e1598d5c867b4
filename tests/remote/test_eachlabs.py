"""Every dialect of Eachlabs' protocol, as the page and the documentation describe it."""

from datetime import UTC, datetime, timedelta, timezone

import pytest

from sd35bench.errors import LostAnswer, RemoteError
from sd35bench.remote.providers.base import Phase
from tests.remote.contract import make_provider, make_request

URL = "https://cdn.eachlabs.ai/a.png"


def prediction(**fields):
    return {"id": "p-1", "input": {}, "status": "success", "output": URL, "logs": "", **fields}


def read(**fields):
    return make_provider("eachlabs").read_prediction(prediction(**fields))


@pytest.mark.parametrize("slug", ["stable-diffusion-3.5-medium", "stable-diffusion-3-5-medium"])
@pytest.mark.parametrize(
    ("auth", "header", "path"),
    [
        ("x-api-key", {"X-API-Key": "k"}, "/v1/prediction/"),
        ("bearer", {"Authorization": "Bearer k"}, "/v1/prediction"),
    ],
)
def test_the_create_is_what_the_page_or_the_documentation_shows(slug, auth, header, path):
    provider = make_provider("eachlabs", slug=slug, auth=auth)
    assert provider.headers("k") == header
    call = provider.create(provider.input(make_request(), None))
    assert (call.method, call.path) == ("POST", path)
    assert call.json == {
        "model": slug,
        "version": "0.0.1",
        "webhook_url": "",
        "input": {
            "prompt": "a red circle",
            "aspect_ratio": "16:9",
            "cfg": 5.0,
            "steps": 4,
            "seed": 7,
            "output_format": "png",
            "output_quality": 90,
        },
    }


@pytest.mark.parametrize("name", ["predictionID", "prediction_id", "id"])
@pytest.mark.parametrize("status", ["success", "created", "starting", "something new", None])
def test_a_creates_success_means_accepted_only(name, status):
    created = make_provider("eachlabs").read_created({"status": status, name: "p-1"})
    assert (created.id, created.phase) == ("p-1", Phase.WAITING)


def test_a_create_without_an_id_is_a_lost_answer_with_its_reason():
    with pytest.raises(LostAnswer, match="balance too low"):
        make_provider("eachlabs").read_created({"status": "error", "error": "balance too low"})


@pytest.mark.parametrize("bad", ["../x", "a/b", "a?b", "", ".", "x" * 200, 7, ["p"], "p\n"])
def test_an_id_that_would_change_the_polls_path_is_refused(bad):
    with pytest.raises(LostAnswer, match="id"):
        make_provider("eachlabs").read_created({"predictionID": bad})


@pytest.mark.parametrize(
    ("word", "phase"),
    [
        ("created", Phase.WAITING),
        ("starting", Phase.WAITING),
        ("processing", Phase.RUNNING),
        ("success", Phase.SUCCEEDED),
        ("succeeded", Phase.SUCCEEDED),
        ("Success", Phase.SUCCEEDED),
        ("error", Phase.FAILED),
        ("failed", Phase.FAILED),
        ("cancelled", Phase.CANCELLED),
        ("canceled", Phase.CANCELLED),
        ("aborted", Phase.CANCELLED),
    ],
)
def test_every_status_word_is_known(word, phase):
    assert read(status=word).phase is phase


@pytest.mark.parametrize(
    ("said", "found"),
    [("nano", "nano"), (None, None), ("", None), (7, None), ("a b", None), ("x" * 81, None)],
)
def test_the_model_that_stood_in_is_read_where_it_can_be_one(said, found):
    assert read(made_by=said).made_by == found
    assert read().made_by is None  # the vendor's own answer


@pytest.mark.parametrize("status", ["reticulating", "", None, 200, ["success"]])
def test_an_unknown_status_is_named(status):
    with pytest.raises(RemoteError, match=r"status .*(reticulating|''|None|200|success)"):
        read(status=status)


@pytest.mark.parametrize(
    "output",
    [
        URL,
        [URL],
        [URL, "https://cdn.eachlabs.ai/b.png"],
        {"url": URL},
        {"image": URL},
        {"images": [URL]},
        {"images": [{"url": URL}]},
        {"output": URL},
        {"output": {"images": [{"url": URL}]}},
        {"seed": 7, "image": {"url": URL, "width": 64}},
    ],
)
def test_the_first_image_is_found_in_every_shape_of_output(output):
    found = read(output=output)
    assert found.phase is Phase.SUCCEEDED
    assert found.outputs[0] == URL


@pytest.mark.parametrize(
    "output", ["", [], {}, None, "no image today", [""], {"url": None}, 7, {"text": URL}]
)
def test_a_success_without_an_image_is_a_failure_that_keeps_its_cost(output):
    found = read(output=output, metrics={"cost": 0.035})
    assert found.phase is Phase.FAILED
    assert "no image's URL" in str(found.error)
    assert found.cost_usd == 0.035


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"output": {"error_code": "E1", "error_message": "out of memory"}}, "E1: out of memory"),
        ({"output": {"error_code": 500, "message": "broke"}}, "500: broke"),
        ({"output": None, "error": "bad prompt"}, "bad prompt"),
        ({"output": "", "logs": ["loading", "CUDA error"]}, "loading: CUDA error"),
        ({"output": "", "logs": "line\n\x1b[31mred"}, "line [31mred"),
        ({"output": None, "logs": ""}, "it gave no reason"),
    ],
)
@pytest.mark.parametrize("status", ["error", "failed"])
def test_the_reason_of_a_failure_is_found(fields, said, status):
    found = read(status=status, **fields)
    assert found.phase is Phase.FAILED
    assert found.error == said


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (8, 8.0),
        (8.25, 8.25),
        ("8.25", 8.25),
        (0, 0.0),
        (-1, None),
        ("-1", None),
        ("nan", None),
        (float("nan"), None),
        (float("inf"), None),
        (1e9, None),
        (10**400, None),
        ("9" * 5000, None),
        (True, None),
        (None, None),
        ([8], None),
        ("8 s", None),
    ],
    ids=repr,
)
def test_numbers_may_be_text_and_what_cannot_be_is_unknown(value, number):
    found = read(metrics={"predict_time": value, "cost": value})
    assert found.predict_s == number
    assert found.cost_usd == number


@pytest.mark.parametrize(
    ("text", "time"),
    [
        ("2026-08-01T10:00:00Z", datetime(2026, 8, 1, 10, tzinfo=UTC)),
        ("2026-08-01T10:00:00.123456789Z", datetime(2026, 8, 1, 10, 0, 0, 123456, tzinfo=UTC)),
        (
            "2026-08-01T12:00:00+02:00",
            datetime(2026, 8, 1, 12, tzinfo=timezone(timedelta(hours=2))),
        ),
        ("2026-08-01 10:00:00", datetime(2026, 8, 1, 10, tzinfo=UTC)),
        ("0001-01-01T00:00:00Z", None),
        ("yesterday...", None),
        (1785578400, None),
        (None, None),
    ],
)
def test_dates_are_read_with_tolerance(text, time):
    assert read(created_at=text).created_at == time


def test_the_queue_is_the_services_own_two_times_however_its_clock_is_set():
    times = {"created_at": "2031-01-01T00:00:00Z", "started_at": "2031-01-01T00:00:02.5Z"}
    assert read(**times).queue_s == 2.5
    assert read(created_at=times["started_at"], started_at=times["created_at"]).queue_s is None
    assert read(created_at=times["created_at"]).queue_s is None


def test_a_prediction_without_an_id_is_an_error():
    with pytest.raises(RemoteError, match="no exec_id or id"):
        make_provider("eachlabs").read_prediction({"status": "success", "output": URL})


def test_the_listing_asks_for_a_window_of_all_models():
    start = datetime(2026, 8, 1, 12, tzinfo=timezone(timedelta(hours=2)))
    call = make_provider("eachlabs").listing(start, start + timedelta(minutes=5), "100")
    assert call.path == "/v1/executions"
    assert call.query == {
        "from": "2026-08-01T10:00:00.000Z",
        "to": "2026-08-01T10:05:00.000Z",
        "limit": "100",
        "offset": "100",
    }


def listed(count, **fields):
    entry = {"id": "p", "status": "success", "execution_cost": "0.035", "run_time": 8.1}
    entries = [{**entry, "id": f"p-{i}"} for i in range(count)]
    return make_provider("eachlabs").read_listing({"executions": entries, **fields})


def test_a_listing_tells_times_costs_and_the_next_page():
    found, page = listed(3, total_count=10, offset=4, limit=3)
    assert page == "7"
    assert (found[0].predict_s, found[0].cost_usd, found[0].input) == (8.1, 0.035, None)
    assert listed(3, total_count=7, offset="4")[1] is None
    assert listed(3)[1] is None
    assert listed(0, total_count=10, offset=0)[1] is None


def test_a_full_page_that_does_not_say_how_many_there_are_is_an_error():
    with pytest.raises(RemoteError, match="full"):
        listed(100)


def test_a_listed_prediction_of_unknown_status_is_kept_to_be_polled():
    body = {"executions": [{"id": "p-1", "status": "something new"}]}
    found, _ = make_provider("eachlabs").read_listing(body)
    assert [(one.id, one.phase) for one in found] == [("p-1", Phase.WAITING)]


@pytest.mark.parametrize("entry", [None, "p-1", {}, {"id": "a/b"}])
def test_a_listing_with_an_entry_that_cannot_be_read_is_not_trusted(entry):
    with pytest.raises(RemoteError):
        make_provider("eachlabs").read_listing({"executions": [entry]})


def test_what_was_sent_is_recognised_when_numbers_come_back_as_text():
    provider = make_provider("eachlabs")
    sent = provider.input(make_request(cfg=7.5), None)
    back = {name: str(value) for name, value in sent.items()} | {"prompt_strength": "0.85"}
    assert provider.same_input(back, sent)
    assert not provider.same_input({**back, "seed": "8"}, sent)
    assert not provider.same_input({"prompt": sent["prompt"]}, sent)


def test_a_presign_gives_the_url_to_put_to_and_the_headers():
    provider = make_provider("eachlabs")
    call = provider.presign("image/png")
    assert call is not None
    assert (call.method, call.path) == ("POST", "/v1/upload/presign")
    assert call.json == {"content_type": "image/png", "file_type": "image"}
    upload = provider.read_presigned(
        {
            "id": "u",
            "presigned_url": "https://storage.example/u?sig=1",
            "public_url": "https://cdn.eachlabs.ai/u.png",
            "required_headers": {"Content-Type": "image/png"},
        }
    )
    assert upload.put_url == "https://storage.example/u?sig=1"
    assert upload.headers == {"Content-Type": "image/png"}


@pytest.mark.parametrize(
    "headers",
    [{"A": "b\r\nX: y"}, {"A b": "c"}, {"A": 7}, [], {"A": "é"}, {f"A{i}": "b" for i in range(99)}],
)
def test_headers_that_cannot_be_sent_are_refused(headers):
    body = {"presigned_url": "https://a.b/c", "public_url": "https://a.b/c"}
    with pytest.raises(RemoteError, match="required_headers"):
        make_provider("eachlabs").read_presigned({**body, "required_headers": headers})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": 51}, "1 to 50"),
        ({"cfg": 20.5}, "0 to 20"),
        ({"width": 64, "height": 56}, "aspect_ratio"),
        ({"init_image": "0" * 64, "prompt_strength": 0.0}, "nothing is left"),
    ],
)
def test_what_is_out_of_range_is_refused_with_the_range(changes, said):
    assert said in str(make_provider("eachlabs").refusal(make_request(**changes)))
