"""Init images for predictions: from our own uploads, or fetched from where a client points.

A client names an address and the server goes there, so every fetch is vetted (`remote.download`).
Addresses of this server are read from the store, never over HTTP: a Host header that lies reaches
files of ours and nothing else. What the backend gets are pixels encoded anew, so that no byte that
a stranger chose reaches its decoder.
"""

import asyncio
import io

import httpx2
from PIL import Image

from sd35bench.errors import RemoteError
from sd35bench.remote.download import download
from sd35bench.remote.images import decode_image
from sd35bench.server.file_store import FileStore

__all__ = ["init_image"]

_DEADLINE_S = 30.0
_PNG_LEVEL = 1
"""Level 6 takes 4 times as long for a tenth of the size of a file that lives for one prediction."""


async def init_image(value: str, *, store: FileStore, own_host: str, allow_loopback: bool) -> bytes:
    """Return an init image as PNG bytes of 8-bit RGB.

    `value` is an http(s) URL, or a `data:` URI of an image. `own_host` is this server's host, with
    the port where it is not the scheme's, as the client addressed it.

    Raises: UnsafeAddress for an address that nothing may be fetched from; RemoteError where
    fetching fails, an own address has no image, or the bytes are no image within the limits.
    """
    data = await _own(value, store, own_host)
    if data is None:
        fetched = await download(
            value,
            hosts=None,
            allow_loopback=allow_loopback,
            max_bytes=store.max_upload_bytes,
            deadline_s=_DEADLINE_S,
        )
        data = fetched.data
    return await asyncio.to_thread(_as_png, data)


async def _own(value: str, store: FileStore, own_host: str) -> bytes | None:
    """The image behind an address of this server; ``None`` for other addresses."""
    if value[:5].lower() == "data:" or not _is_own(value, own_host):
        return None
    data = await asyncio.to_thread(store.read_upload, httpx2.URL(value).path)
    if data is None:
        raise RemoteError(f"image {value[:200]!r} is unknown here or expired: upload it again")
    return data


def _is_own(value: str, own_host: str) -> bool:
    """Whether a URL is on this server; one that cannot be read is left to the vetting."""
    try:
        url = httpx2.URL(value)
        own = httpx2.URL(f"{url.scheme}://{own_host}")
    except httpx2.InvalidURL:
        return False
    known = url.scheme in ("http", "https") and url.host != ""
    return known and (url.host, url.port) == (own.host, own.port)


def _as_png(data: bytes) -> bytes:
    pixels = decode_image(data)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=_PNG_LEVEL)
    return buffer.getvalue()
