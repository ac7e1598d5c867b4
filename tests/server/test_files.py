"""Files: unguessable names, lives that end, tickets good for one image, bodies that lie."""

import asyncio
import io
import json
import os
import re
from pathlib import Path

import httpx2
import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from PIL import Image

from sd35bench.server.file_store import (
    BadUpload,
    FileStore,
    TicketRefused,
    files_router,
    presign_router,
)
from sd35bench.server.settings import Refusal

LIMIT = 50_000
JSON = {"Content-Type": "application/json"}


class Clock:
    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


def picture(kind: str = "PNG", color: tuple[int, int, int] = (200, 30, 60)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (24, 16), color).save(buffer, kind)
    return buffer.getvalue()


def make_store(folder: Path, clock: Clock) -> FileStore:
    return FileStore(
        folder, output_lifetime_s=3600, upload_lifetime_s=7200, max_upload_bytes=LIMIT, now=clock
    )


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> FileStore:
    return make_store(tmp_path / "files", clock)


async def answer(request, refusal: Refusal) -> JSONResponse:
    return JSONResponse({"error": str(refusal)}, refusal.status, refusal.headers)


def ask(store: FileStore, *calls: tuple[str, str, dict]) -> list[httpx2.Response]:
    """Send requests, in order, to an application with nothing but the files' routes."""
    app = FastAPI()
    app.include_router(files_router(store))
    app.include_router(presign_router(store))
    app.add_exception_handler(Refusal, answer)

    async def send() -> list[httpx2.Response]:
        transport = httpx2.ASGITransport(app=app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://host:8000") as client:
            return [await client.request(method, url, **more) for method, url, more in calls]

    return asyncio.run(send())


def put(store: FileStore, ticket, data: bytes, **changes) -> httpx2.Response:
    """PUT to a ticket's path; `path` and `content_type` may lie."""
    path = changes.get("path", ticket.put_path)
    headers = {"Content-Type": changes.get("content_type", ticket.headers["Content-Type"])}
    return ask(store, ("PUT", path, {"content": data, "headers": headers}))[0]


# Outputs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "suffix", "content_type"),
    [
        ("PNG", "png", "image/png"),
        ("JPEG", ".jpg", "image/jpeg"),
        ("WEBP", "webp", "image/webp"),
    ],
)
def test_outputs_come_back_as_they_were_stored(store, kind, suffix, content_type):
    data = picture(kind)
    path = store.put_output("abc-123", data, suffix)
    reply, head = ask(store, ("GET", path, {}), ("HEAD", path, {}))
    assert reply.status_code == head.status_code == 200
    assert reply.content == data
    for answer in (reply, head):
        assert answer.headers["content-type"] == content_type
        assert answer.headers["content-length"] == str(len(data))
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "private, max-age=3600, immutable"
        assert answer.headers["content-disposition"].startswith('inline; filename="abc-123-')
        assert answer.headers["content-security-policy"] == "default-src 'none'; sandbox"


def test_outputs_have_names_that_cannot_be_guessed(store):
    names = {store.put_output("same", b"x", "png") for _ in range(50)}
    assert len(names) == 50
    assert all(re.fullmatch(r"/outputs/same-[A-Za-z0-9_-]{22}\.png", name) for name in names)


@pytest.mark.parametrize(
    ("prediction", "suffix"), [("../up", "png"), ("a/b", "png"), ("", "png"), ("ok", "svg")]
)
def test_outputs_refuse_names_that_no_prediction_has(store, prediction, suffix):
    with pytest.raises(ValueError, match="no output is named"):
        store.put_output(prediction, b"x", suffix)


def test_outputs_expire_and_a_restart_forgets_no_age(store, tmp_path, clock):
    path = store.put_output("p1", picture(), "png")
    clock.now += 3599
    again = make_store(tmp_path / "files", clock)
    assert (
        ask(again, ("GET", path, {}))[0].headers["cache-control"].startswith("private, max-age=1,")
    )
    clock.now += 1
    for reader in (store, again):
        gone = ask(reader, ("GET", path, {}))[0]
        assert gone.status_code == 404
        assert "expired" in gone.json()["error"]
    assert len(list((tmp_path / "files" / "outputs").iterdir())) == 1
    assert again.sweep() == 1
    assert list((tmp_path / "files" / "outputs").iterdir()) == []


def test_sweep_keeps_the_young_and_removes_what_a_kill_left(store, tmp_path, clock):
    store.put_output("young", picture(), "png")
    store.presign("image/png")
    torn = tmp_path / "files" / "outputs" / "x.png.77.tmp"
    torn.write_bytes(b"half")

    os.utime(torn, (clock.now, clock.now))
    assert store.sweep() == 0
    clock.now += 901
    assert store.sweep() == 1  # the ticket
    clock.now += 2700
    assert store.sweep() == 2  # the output and what was torn


# Paths ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "..%2fsecret-secret-secret.png",
        "%2e%2e%2fsecret-secret-secret.png",
        "..\\secret-secret-secret.png",
        "secret-secret-secret.png%00.png",
        "secret-secret-secret.png%0a",
        "short.png",
        "a" * 22 + ".txt",
        "a" * 22 + ".png.json",
        "a" * 200 + ".png",
        "é" * 22 + ".png",
    ],
)
def test_names_lead_nowhere_else(store, tmp_path, name):
    (tmp_path / "files" / "secret-secret-secret.png").write_bytes(b"secret")
    for kind in ("outputs", "uploads"):
        reply = ask(store, ("GET", f"/{kind}/{name}", {}))[0]
        assert reply.status_code == 404
        assert b"secret" not in reply.content


def test_links_are_not_followed(store, tmp_path):
    (tmp_path / "secret").write_bytes(b"secret")
    link = tmp_path / "files" / "outputs" / ("a" * 22 + ".png")
    link.symlink_to(tmp_path / "secret")
    assert ask(store, ("GET", f"/outputs/{link.name}", {}))[0].status_code == 404


def test_kinds_other_than_outputs_and_uploads_have_no_files(store, tmp_path):
    ticket = store.presign("image/png")
    assert store.read("tickets", f"{ticket.id}.png") is None
    assert store.read("..", f"{ticket.id}.png") is None
    assert store.read_upload(f"/tickets/{ticket.id}.png") is None
    assert store.read_upload(f"/uploads/../tickets/{ticket.id}.png.json") is None


# Uploads --------------------------------------------------------------------------------------


def test_upload_by_presigned_url_then_read(store, clock):
    body = {"content_type": "image/webp", "file_type": "image"}
    signed = ask(store, ("POST", "/v1/upload/presign", {"json": body}))[0].json()
    assert set(signed) == {"id", "presigned_url", "public_url", "expires_at", "required_headers"}
    assert signed["presigned_url"].startswith(signed["public_url"] + "?token=")
    assert signed["public_url"].startswith("http://host:8000/uploads/")
    assert signed["expires_at"] == "2027-01-15T08:15:00Z"
    data = picture("WEBP")
    sent, reply = ask(
        store,
        ("PUT", signed["presigned_url"], {"content": data, "headers": signed["required_headers"]}),
        ("GET", signed["public_url"], {}),
    )
    assert sent.status_code == 200
    assert reply.content == data
    assert reply.headers["content-type"] == "image/webp"
    assert store.read_upload(httpx2.URL(signed["public_url"]).path) == data
    clock.now += 7200
    assert store.read_upload(httpx2.URL(signed["public_url"]).path) is None


@pytest.mark.parametrize(
    "body",
    [
        b'{"content_type": "text/html"}',
        b'{"content_type": "image/svg+xml"}',
        b'{"content_type": ["image/png"]}',
        b'{"content_type": "image/png", "file_type": 5}',
        b'{"content_type": "image/png", "more": 5}',
        b'{"content_type": "image/png", "content_type": "image/jpeg"}',
        b"{}",
        b"[]",
        b"null",
        b"{",
        b"",
    ],
)
def test_presign_refuses_other_bodies_in_words(store, tmp_path, body):
    reply = ask(store, ("POST", "/v1/upload/presign", {"content": body, "headers": JSON}))[0]
    assert reply.status_code == 400
    assert reply.json()["error"]
    assert list((tmp_path / "files" / "tickets").iterdir()) == []


def test_presign_takes_images_only(store):
    with pytest.raises(ValueError, match=r"image/gif.*use one of image/jpeg"):
        store.presign("image/gif")


def test_presign_reads_no_endless_body_and_none_of_a_foreign_form(store):
    long = {"content": b" " * 5000, "headers": JSON}
    form = {"content": b'{"content_type": "image/png"}', "headers": {"Content-Type": "text/plain"}}
    calls = [("POST", "/v1/upload/presign", more) for more in (long, form)]
    assert [reply.status_code for reply in ask(store, *calls)] == [413, 415]


def test_ticket_secret_is_hashed_at_rest(store, tmp_path):
    ticket = store.presign("image/png")
    secret = ticket.put_path.partition("token=")[2]
    kept = (tmp_path / "files" / "tickets" / f"{ticket.id}.png.json").read_text()
    assert len(secret) == 22
    assert secret not in kept
    assert json.loads(kept)["content_type"] == "image/png"


def test_upload_needs_the_secret_of_its_own_ticket(store):
    ticket, other = store.presign("image/png"), store.presign("image/png")
    secret = other.put_path.partition("?")[2]
    for path in (
        ticket.public_path,
        f"{ticket.public_path}?token=",
        f"{ticket.public_path}?token=%C3%A9",
        f"{ticket.public_path}?{secret}",
        f"/uploads/{'a' * 22}.png?{secret}",
        f"{ticket.public_path.replace('.png', '.jpg')}?{ticket.put_path.partition('?')[2]}",
    ):
        refused = put(store, ticket, picture(), path=path)
        assert refused.status_code == 403, path
        assert "presign" in refused.json()["error"]
    assert store.read_upload(ticket.public_path) is None


def test_ticket_is_good_for_one_image(store):
    ticket = store.presign("image/png")
    first = picture()
    assert put(store, ticket, first).status_code == 200
    assert put(store, ticket, first).status_code == 200  # the answer was lost: sent once more
    assert put(store, ticket, picture(color=(0, 0, 0))).status_code == 403
    assert store.read_upload(ticket.public_path) == first


def test_ticket_expires(store, clock):
    ticket = store.presign("image/png")
    clock.now += 899
    assert store.ticket_content_type(f"{ticket.id}.png", ticket.put_path.partition("token=")[2])
    clock.now += 1
    assert put(store, ticket, picture()).status_code == 403


def test_ticket_ends_before_its_upload_does(tmp_path, clock):
    store = FileStore(
        tmp_path, output_lifetime_s=60, upload_lifetime_s=60, max_upload_bytes=LIMIT, now=clock
    )
    ticket = store.presign("image/png")
    assert ticket.expires_at == clock.now + 60
    clock.now += 30
    assert put(store, ticket, picture()).status_code == 200
    clock.now += 30  # the upload lives on, the ticket does not
    assert put(store, ticket, picture(color=(0, 0, 0))).status_code == 403
    assert store.read_upload(ticket.public_path) is not None


@pytest.mark.parametrize(
    "sent", ["image/jpeg", "text/html", "", "image/png2"], ids=["other", "html", "none", "longer"]
)
def test_upload_with_another_content_type_is_refused(store, sent):
    ticket = store.presign("image/png")
    refused = put(store, ticket, picture(), content_type=sent)
    assert refused.status_code == 415
    assert "'image/png'" in refused.json()["error"]


@pytest.mark.parametrize(
    "data",
    [b"", b"<html><script>alert(1)</script>", picture("JPEG"), picture()[:-20], picture("GIF")],
    ids=["empty", "html", "jpeg as png", "truncated", "gif"],
)
def test_upload_that_is_not_the_image_it_says_is_refused(store, data):
    ticket = store.presign("image/png")
    refused = put(store, ticket, data)
    assert refused.status_code == 400
    assert refused.json()["error"]
    assert store.read_upload(ticket.public_path) is None
    assert put(store, ticket, picture()).status_code == 200  # the ticket is still good


def test_upload_over_the_cap_is_refused_by_its_header_and_while_streaming(store):
    ticket = store.presign("image/png")
    taken = []

    async def endless():
        for _ in range(100):
            taken.append(1)
            yield b"\0" * 10_000

    assert put(store, ticket, b"\0" * (LIMIT + 1)).status_code == 413
    refused = put(store, ticket, endless())
    assert refused.status_code == 413
    assert str(LIMIT) in refused.json()["error"]
    assert len(list(store._folder.glob("uploads/*"))) == 0


def test_upload_commits_once_among_threads(store):
    ticket = store.presign("image/png")
    name, secret = f"{ticket.id}.png", ticket.put_path.partition("token=")[2]
    images = [picture(color=(i, i, i)) for i in range(8)]

    def commit(data: bytes) -> bool:
        try:
            store.put_upload(name, secret, data)
        except TicketRefused:
            return False
        return True

    async def race() -> list[bool]:
        return list(await asyncio.gather(*(asyncio.to_thread(commit, data) for data in images)))

    won = asyncio.run(race())
    assert sum(won) == 1
    assert store.read_upload(ticket.public_path) == images[won.index(True)]


def test_upload_of_another_format_names_both(store):
    ticket = store.presign("image/jpeg")
    secret = ticket.put_path.partition("token=")[2]
    with pytest.raises(BadUpload, match=r"is png, its content type says jpg"):
        store.put_upload(f"{ticket.id}.jpg", secret, picture())


def test_openapi_documents_the_routes(store):
    app = FastAPI()
    app.include_router(files_router(store))
    app.include_router(presign_router(store))
    paths = app.openapi()["paths"]
    assert set(paths) == {"/outputs/{name}", "/uploads/{name}", "/v1/upload/presign"}
    assert set(paths["/uploads/{name}"]) == {"get", "put"}
    assert "image/webp" in paths["/outputs/{name}"]["get"]["responses"]["200"]["content"]
