"""The protocol over a real loopback server: the vendor page's flow, shapes, hostile requests."""

import asyncio
import io
import json
import random
import re
import socket
import uuid
from typing import Any

import httpx2
import pytest
from PIL import Image

from tests.server.live import MODEL, Live, live, make_settings

pytestmark = pytest.mark.usefixtures("served_here")

JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    bounds = {"requests_per_minute": None, "concurrency": None}
    folder = tmp_path_factory.mktemp("api")
    with live(make_settings(folder, **bounds, usd_per_image=0.035, allow_loopback=True)) as opened:
        yield opened


def opened_image(server: Live, found: dict) -> Image.Image:
    answer = server.client.get(found["output"])
    assert answer.status_code == 200
    return Image.open(io.BytesIO(answer.content))


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (250, 10, 10)).save(buffer, "PNG")
    return buffer.getvalue()


def test_vendor_page_flow(server):
    created = server.post(
        aspect_ratio="16:9",
        cfg="5",
        steps="40",
        prompt_strength="0.85",
        seed=None,
        output_format="webp",
        output_quality="90",
    )
    body = created.json()
    assert (body["status"], body["message"]) == ("success", "Prediction created successfully")
    found = server.ended(body["predictionID"])
    assert found["status"] == "success"
    assert found["metrics"]["predict_time"] > 0
    assert found["metrics"]["cost"] == 0.035
    assert (found["model"], found["made_by"]) == ("stable-diffusion-3.5-medium", "nano")
    assert isinstance(found["input"]["seed"], int)
    image = opened_image(server, found)
    assert (image.format, image.size) == ("WEBP", (88, 48))
    assert server.client.get(found["urls"]["get"]).json() == found
    assert found["created_at"] < found["started_at"] < found["completed_at"]


def test_same_seed_gives_the_same_bytes_and_another_prompt_others(server):
    def data(**inputs) -> bytes:
        return server.client.get(server.ended(server.create(**inputs))["output"]).content

    first = server.ended(server.create(seed=None))
    drawn = first["input"]["seed"]
    assert data(seed=drawn) == data(seed=f"{drawn}") == server.client.get(first["output"]).content
    assert data(seed=drawn, prompt="a dog") != data(seed=drawn)


@pytest.mark.parametrize(("word", "pillow"), [("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP")])
def test_format_is_the_one_asked_for(server, word, pillow):
    found = server.ended(server.create(output_format=word, aspect_ratio="9:16"))
    image = opened_image(server, found)
    assert (image.format, image.size) == (pillow, (48, 88))


def test_uploaded_image_and_strength(server):
    asked = server.client.post("/v1/upload/presign", json={"content_type": "image/png"}).json()
    put = httpx2.put(
        asked["presigned_url"], content=picture(), headers=asked["required_headers"], timeout=30
    )
    assert put.status_code == 200
    ids = [
        server.create(seed=1, output_format="png", **more)
        for more in ({}, {"image": asked["public_url"], "prompt_strength": "0.1"})
    ]
    plain, edited = (opened_image(server, server.ended(i)).convert("RGB") for i in ids)
    reds = [sum(p[0] for p in image.get_flattened_data()) / 64**2 for image in (plain, edited)]
    assert reds[1] > 200 > reds[0]  # a tenth noise, nine tenths the red upload
    assert not list((server.state.settings.state_dir / "inits").iterdir())
    refused = server.post(image=asked["public_url"], prompt_strength=0)
    assert refused.status_code == 400


@pytest.mark.parametrize(
    "url",
    ["http://10.0.0.1/x.png", "file:///etc/passwd", "ftp://x/y.png", "not a url", "{}/uploads/x"],
)
def test_image_that_cannot_be_had_is_a_400(server, url):
    answer = server.post(image=url.format(server.url))
    assert answer.status_code == 400
    assert answer.json()["error"].startswith("input.image: ")


def test_synchronous_run_waits_for_the_image(server):
    found = server.post("/v1/prediction/run/", seed=5, output_format="png").json()
    assert found["status"] == "success"
    assert opened_image(server, found).size == (64, 64)
    assert server.ended(found["predictionID"])["output"] == found["output"]


@pytest.mark.parametrize("slug", MODEL.slugs)
def test_every_name_of_the_model_is_served(server, slug):
    body = {"model": slug, "input": {"prompt": "x"}}
    assert server.client.post("/v1/prediction", json=body).status_code == 200
    schema = server.client.get("/v1/model", params={"slug": slug}).json()
    assert set(schema["request_schema"]["properties"]) >= {"prompt", "seed", "image"}


def test_other_models_are_not_found(server):
    body = {"model": "sana", "input": {"prompt": "x"}}
    answer = server.client.post("/v1/prediction", json=body)
    assert (answer.status_code, "nano" in answer.json()["error"]) == (404, True)
    assert server.client.get("/v1/model", params={"slug": "sana"}).status_code == 404


def test_listing_finds_a_create_by_its_input(server):
    made = server.create(prompt="find me", seed=99)
    server.ended(made)
    page = server.client.get("/v1/executions/", params={"limit": 5, "status": "success"}).json()
    assert set(page) == {"executions", "total_count", "offset", "limit"}
    row = next(row for row in page["executions"] if row["id"] == made)
    assert row["input"]["prompt"] == "find me"
    assert row["execution_cost"] == 0.035
    at = {"from": row["created_at"], "to": row["created_at"]}
    only = server.client.get("/v1/executions", params=at).json()
    assert [row["id"] for row in only["executions"]] == [made]
    assert server.client.get("/v1/executions", params={"model": "sana"}).json()["total_count"] == 0
    one = server.client.get("/v1/executions", params={"limit": 1, "offset": 1}).json()
    assert (len(one["executions"]), one["offset"], one["limit"]) == (1, 1, 1)


@pytest.mark.parametrize(
    "query",
    ["limit=0", "limit=101", "limit=x", "limit=", "offset=-1", "status=done", "from=x", "to=1"],
)
def test_wrong_filters_are_named(server, query):
    answer = server.client.get(f"/v1/executions?{query}")
    assert answer.status_code == 400
    assert answer.json()["error"].startswith(query.partition("=")[0])


def test_cancel_of_what_is_over_is_refused(server):
    made = server.create()
    server.ended(made)
    answer = server.client.post(f"/v1/prediction/{made}/cancel/")
    assert (answer.status_code, answer.json()) == (
        409,
        {"error": "Prediction is over already: success"},
    )


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", f"/v1/prediction/{uuid.UUID(int=0)}", 404),
        ("POST", f"/v1/prediction/{uuid.UUID(int=0)}/cancel", 404),
        ("GET", "/nothing", 404),
        ("PATCH", "/v1/prediction", 405),
        ("GET", "/outputs/..%2f..%2fpredictions.sqlite", 404),
        ("GET", "/v1/prediction/a%00b", 404),
    ],
)
def test_every_error_is_json_with_an_id(server, method, path, status):
    answer = server.client.request(method, path)
    assert answer.status_code == status
    assert set(answer.json()) == {"error"}
    assert answer.headers["content-type"] == "application/json"
    assert re.fullmatch(r"[0-9a-f]{32}", answer.headers["x-request-id"])


def test_unknown_prediction_is_said_as_the_vendor_says_it(server):
    answer = server.client.get("/v1/prediction/nope/")
    assert answer.json() == {"error": "Prediction not found"}


def test_request_id_is_echoed_if_it_is_one(server):
    for name, echoed in (("abc-123", True), ("two words", False), ("x" * 129, False)):
        answer = server.client.get("/healthz", headers={"X-Request-Id": name})
        assert (answer.headers["x-request-id"] == name) == echoed


@pytest.mark.parametrize(
    ("data", "headers", "status"),
    [
        (b"{}", {}, 415),
        (b"{}", {"Content-Type": "text/plain"}, 415),
        (b"[" * 200_000, JSON, 400),
        (b" " * (2**20 + 1), JSON, 413),
        (b"\xff\xfe", JSON, 400),
        (b"", JSON, 400),
    ],
)
def test_hostile_bodies_are_refused(server, data, headers, status):
    answer = server.client.post("/v1/prediction", content=data, headers=headers)
    assert (answer.status_code, set(answer.json())) == (status, {"error"})


def test_chunked_body_is_bounded_too(server):
    parts = (b" " * 2**16 for _ in range(40))
    answer = server.client.post("/v1/prediction", content=parts, headers=JSON)
    assert answer.status_code == 413


def test_half_a_body_leaves_no_trace(server):
    before = server.state.store.queue_length()
    address = (server.client.base_url.host, server.client.base_url.port)
    with socket.create_connection(address, timeout=30) as wire:
        wire.sendall(
            b"POST /v1/prediction HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{"
        )
    assert server.client.get("/healthz").status_code == 200
    assert server.state.store.queue_length() == before


def some_json(rng: random.Random, depth: int = 3) -> Any:
    """Any JSON value, strings with every plane of Unicode among them."""
    if depth and rng.random() < 0.4:
        inner = [some_json(rng, depth - 1) for _ in range(rng.randrange(4))]
        return inner if rng.random() < 0.5 else {some_text(rng): value for value in inner}
    integer, real = rng.randrange(-(10**20), 10**20), rng.uniform(-1e9, 1e9)
    return rng.choice([None, True, False, integer, real, 1e308, some_text(rng)])


def some_text(rng: random.Random) -> str:
    return "".join(chr(rng.randrange(0x110000)) for _ in range(rng.randrange(6)))


@pytest.mark.parametrize("where", ["body", "input", "field"])
def test_any_json_is_answered_in_json(server, where):
    rng = random.Random(where)
    for _ in range(60):
        body = some_json(rng)
        if where != "body":
            inputs = body if where == "input" else {"prompt": "x", "cfg": body}
            body = {"model": "nano", "input": inputs}
        text = json.dumps(body).encode()
        answer = server.client.post("/v1/prediction", content=text, headers=JSON)
        assert answer.status_code in (200, 400, 404), text
        assert ("error" in answer.json()) == (answer.status_code != 200)


def test_a_bug_is_a_500_with_its_id_and_no_detail(server, monkeypatch):
    def broken(*_):
        raise RuntimeError("secret detail")

    monkeypatch.setattr(server.state.store, "get", broken)
    answer = server.client.get("/v1/prediction/x")
    assert answer.status_code == 500
    assert "secret detail" not in answer.text
    assert answer.headers["x-request-id"] in answer.json()["error"]


def test_foreign_host_names_are_refused_without_keys(server):
    answer = server.client.get("/healthz", headers={"Host": "evil.example"})
    assert answer.status_code == 403
    for host in ("localhost:1", "127.0.0.1", "[::1]:80"):
        assert server.client.get("/healthz", headers={"Host": host}).status_code == 200
    assert server.client.get("/healthz", headers={"Host": "a b"}).status_code == 400


def test_urls_are_those_of_a_tls_proxy_on_this_machine(server):
    made = server.create()
    headers = {"X-Forwarded-Proto": "https", "Host": "localhost"}
    found = server.client.get(f"/v1/prediction/{made}", headers=headers).json()
    assert found["urls"]["get"] == f"https://localhost/v1/prediction/{made}"


def test_health_says_what_is_served(server):
    health = server.client.get("/healthz").json()
    assert (health["status"], health["model"], health["auth"]) == ("ready", "nano", False)


def test_pages_are_there_and_run_nothing_foreign(server):
    docs = server.client.get("/docs")
    assert "/v1/prediction/{prediction_id}" in docs.text
    assert "<script" not in docs.text
    assert "http" not in docs.text.replace(server.url, "")
    assert server.client.get("/").headers["content-type"].startswith("text/html")


def test_many_clients_each_get_their_own_image(server):
    async def all_of_them() -> list[tuple[bytes, bytes]]:
        async with httpx2.AsyncClient(base_url=server.url, timeout=60, trust_env=False) as client:

            async def one(number: int) -> tuple[bytes, bytes]:
                body = {
                    "model": "nano",
                    "input": {"prompt": f"client {number}", "seed": number, "output_format": "png"},
                }
                found = (await client.post("/v1/prediction/run", json=body)).json()
                assert found["input"]["seed"] == number
                return (await client.get(found["output"])).content, found["id"].encode()

            return await asyncio.gather(*(one(n % 10) for n in range(30)))

    images = asyncio.run(all_of_them())
    for number in range(10):
        same = {images[i][0] for i in range(number, 30, 10)}
        assert len(same) == 1
    assert len({data for data, _ in images}) == 10
    assert len({name for _, name in images}) == 30
