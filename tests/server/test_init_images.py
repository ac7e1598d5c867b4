"""Init images: from our own store without HTTP, or fetched with suspicion; always plain PNG."""

import asyncio
import base64
import http.server
import io
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from sd35bench.errors import RemoteError, UnsafeAddress
from sd35bench.pictures import decode_rgb
from sd35bench.server import routes
from sd35bench.server.file_store import FileStore
from sd35bench.server.routes import init_image

HOST = "bench.example:8000"


def picture(kind: str = "PNG", mode: str = "RGB", **options) -> bytes:
    gradient = np.linspace(0, 255, 20 * 12 * 3).reshape(12, 20, 3).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(gradient).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(
        tmp_path, output_lifetime_s=3600, upload_lifetime_s=3600, max_upload_bytes=100_000
    )


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    async def download(*_, **__):
        raise AssertionError("an own address is not fetched")

    monkeypatch.setattr(routes, "download", download)


@pytest.fixture
def elsewhere() -> Iterator[tuple[str, list[str]]]:
    """Another server on this machine that answers with a WebP; its URL and the paths asked for."""
    asked: list[str] = []
    data = picture("WEBP", lossless=True)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Type", "image/webp")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.02))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    thread.join()
    server.server_close()


def get(store: FileStore, value: str, host: str = HOST, allow_loopback: bool = False) -> np.ndarray:
    """The init image's pixels, from a file that must be PNG in 8-bit RGB."""
    made = init_image(value, store=store, own_host=host, allow_loopback=allow_loopback)
    with Image.open(io.BytesIO(asyncio.run(made))) as image:
        assert (image.format, image.mode) == ("PNG", "RGB")
        assert image.info == {}
        return np.asarray(image)


def upload(store: FileStore, data: bytes, content_type: str = "image/png") -> str:
    ticket = store.presign(content_type)
    name = ticket.public_path.rpartition("/")[2]
    store.put_upload(name, ticket.put_path.partition("token=")[2], data)
    return ticket.public_path


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_own_upload_is_read_from_the_store(store, no_network, scheme):
    path = upload(store, picture())
    pixels = get(store, f"{scheme}://BENCH.example:8000{path}?x=1#y")
    assert np.array_equal(pixels, np.asarray(Image.open(io.BytesIO(picture()))))


def test_own_output_can_be_the_next_init_image(store, no_network):
    path = store.put_output("p1", picture("WEBP", lossless=True), "webp")
    assert get(store, f"http://{HOST}{path}").shape == (12, 20, 3)


def test_own_host_without_port_means_the_port_of_the_scheme(store, no_network):
    path = upload(store, picture())
    assert get(store, f"http://bench.example:80{path}", host="bench.example").shape == (12, 20, 3)


@pytest.mark.parametrize(
    "path",
    ["/uploads/aaaaaaaaaaaaaaaaaaaaaa.png", "/", "/v1/executions", "/uploads/%2e%2e/tickets/x.png"],
)
def test_own_address_without_an_image_is_refused_and_never_fetched(store, no_network, path):
    with pytest.raises(RemoteError, match="unknown here or expired: upload it again"):
        get(store, f"http://{HOST}{path}")


def test_what_hides_in_a_file_does_not_reach_the_backend(store, no_network):
    """Text chunks and trailing bytes are gone; the pixels are the same."""
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("payload", "<script>" * 50)
    data = picture(pnginfo=chunks) + b"PK\x03\x04 more"
    ticket = upload(store, data)
    made = asyncio.run(
        init_image(f"http://{HOST}{ticket}", store=store, own_host=HOST, allow_loopback=False)
    )
    assert b"script" in data
    assert b"script" not in made
    assert b"PK\x03\x04" not in made


@pytest.mark.parametrize(
    ("kind", "mode", "content_type"),
    [("PNG", "L", "image/png"), ("JPEG", "L", "image/jpeg"), ("WEBP", "RGBA", "image/webp")],
)
def test_every_kind_of_image_becomes_rgb(store, no_network, kind, mode, content_type):
    path = upload(store, picture(kind, mode), content_type)
    assert get(store, f"http://{HOST}{path}").shape == (12, 20, 3)


def test_a_phone_photo_is_upright_and_a_clear_pixel_white(store, no_network):
    """The pixels that `run init_image=` has of the same files."""
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = picture("JPEG", exif=exif)
    path = upload(store, photo, "image/jpeg")
    pixels = get(store, f"http://{HOST}{path}")
    assert pixels.shape == (20, 12, 3)
    assert np.array_equal(pixels, decode_rgb(photo))
    buffer = io.BytesIO()
    Image.new("RGBA", (1, 1), (200, 0, 0, 0)).save(buffer, "PNG")
    path = upload(store, buffer.getvalue())
    assert get(store, f"http://{HOST}{path}").tolist() == [[[255, 255, 255]]]


def test_other_hosts_are_fetched_where_that_is_allowed(store, elsewhere):
    url, asked = elsewhere
    pixels = get(store, f"{url}/init.webp", allow_loopback=True)
    assert asked == ["/init.webp"]
    assert np.array_equal(pixels, np.asarray(Image.open(io.BytesIO(picture()))))


def test_loopback_is_refused_unless_allowed(store, elsewhere):
    url, asked = elsewhere
    with pytest.raises(UnsafeAddress):
        get(store, f"{url}/init.webp")
    assert asked == []


@pytest.mark.parametrize(
    "value",
    [
        "http://169.254.169.254/latest/meta-data",
        "http://10.0.0.1/a.png",
        "https://[::ffff:127.0.0.1]/a.png",
        "https://2130706433/a.png",
        "file:///etc/passwd",
        "ftp://example.org/a.png",
        "gopher://127.0.0.1:70/",
        "//bench.example:8000/uploads/x.png",
        "not a url",
        "http://",
        "",
    ],
)
def test_addresses_that_nothing_may_be_fetched_from_are_refused(store, value):
    with pytest.raises(UnsafeAddress):
        get(store, value)


def test_a_host_header_that_lies_reaches_our_files_only(store, no_network):
    """Whoever says that 10.0.0.1 is this server is answered from the store."""
    with pytest.raises(RemoteError, match="unknown here"):
        get(store, "http://10.0.0.1/admin", host="10.0.0.1")


def test_a_data_uri_is_decoded(store):
    data = base64.b64encode(picture("JPEG")).decode()
    assert get(store, f"data:image/jpeg;base64,{data}").shape == (12, 20, 3)


@pytest.mark.parametrize("data", [b"no image", picture()[:60]], ids=["text", "truncated"])
def test_what_is_no_image_is_refused(store, data):
    value = "data:image/png;base64," + base64.b64encode(data).decode()
    with pytest.raises(RemoteError):
        get(store, value)
