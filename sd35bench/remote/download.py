"""Image files fetched from addresses that somebody else chose: every byte of them is suspect.

Each hop is vetted as if it were the first (`addresses`), asked without key, cookie or any trace of
the last one, over a connection to the vetted address. What comes must say that it is an image, or
not say what it is; must not be compressed; must stay under the byte cap while it streams; must
begin like a PNG, JPEG or WEBP; and all hops together have one deadline. Whether it can be decoded
is `images`' question.

A public address never leads to loopback, whatever `allow_loopback` says: only loopback itself may
redirect there.
"""

import asyncio
import base64
import binascii
import hashlib
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass

import httpx2

from sd35bench import words
from sd35bench.errors import RemoteError, UnsafeAddress
from sd35bench.remote.addresses import check_url, names_loopback
from sd35bench.remote.http import Answer, Head, Interrupted, Network, Outgoing, exchange
from sd35bench.remote.images import sniff

_IMAGE_TYPES = ("image/png", "image/jpeg", "image/jpg", "image/webp")
_UNSAID_TYPES = ("application/octet-stream", "binary/octet-stream", "")
"""What storage services call files that nobody told them the type of; the bytes decide."""
_REDIRECTS = (301, 302, 303, 307, 308)
_LATER = (408, 425, 429)
_DATA_URI = re.compile(r"data:(image/(?:png|jpeg|jpg|webp));base64,", re.IGNORECASE)


class Unavailable(Interrupted):
    """The file's host cannot give it now (408, 425, 429, 5xx); later it may."""


DEADLINE_S = 60.0
"""For one download, all its hops together; 64 MiB take 9 Mbit/s."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Downloaded:
    """A file: its bytes, their SHA-256 (hex), the type it was said to be, the seconds it took."""

    data: bytes
    content_type: str | None
    seconds: float
    sha256: str


async def download(
    url: str,
    *,
    hosts: Sequence[str] | None,
    allow_loopback: bool,
    max_bytes: int = 64 * 2**20,
    deadline_s: float = DEADLINE_S,
    max_redirects: int = 3,
    network: Network | None = None,
) -> Downloaded:
    """Fetch an image file; `hosts` holds for every hop (see `check_url`).

    A ``data:image/…;base64,`` URI is decoded under the same cap.

    Raises: UnsafeAddress for an address that must not be fetched, a chain of more than
    `max_redirects` included; RemoteError for any other failure, and of its kinds Interrupted
    (Unavailable among them) where trying again may help.
    """
    started = time.perf_counter()
    if url[:5].lower() == "data:":
        data, content_type = _from_data_uri(url, max_bytes)
    else:
        fetch = _Fetch(
            hosts=hosts,
            max_bytes=max_bytes,
            deadline=started + deadline_s,
            network=Network() if network is None else network,
        )
        answer = await fetch.follow(url, allow_loopback, max_redirects)
        data, content_type = answer.body, answer.head.headers.get("content-type")
    if sniff(data) is None:
        shown = ascii(data[:16])
        raise RemoteError(f"what was fetched is no PNG, JPEG or WEBP file: it begins with {shown}")
    return Downloaded(
        data=data,
        content_type=content_type,
        seconds=time.perf_counter() - started,
        sha256=await asyncio.to_thread(lambda: hashlib.sha256(data).hexdigest()),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fetch:
    """The limits of one download, all its hops together; `deadline` is `perf_counter`'s."""

    hosts: Sequence[str] | None
    max_bytes: int
    deadline: float
    network: Network

    async def follow(self, url: str, allow_loopback: bool, max_redirects: int) -> Answer:
        """Ask hop after hop until one has the file."""
        for _ in range(max_redirects + 1):
            vetted = check_url(url, hosts=self.hosts, allow_loopback=allow_loopback)
            answer = await self._ask(vetted, allow_loopback)
            if answer.head.status not in _REDIRECTS:
                return answer
            allow_loopback = allow_loopback and names_loopback(vetted.raw_host.decode("ascii"))
            url = _next(vetted, answer.head)
        raise UnsafeAddress(f"more than {max_redirects} redirects, the last one to {url[:200]!a}")

    async def _ask(self, url: httpx2.URL, allow_loopback: bool) -> Answer:
        return await exchange(
            Outgoing(method="GET", url=url, headers={"Accept": ", ".join(_IMAGE_TYPES)}),
            allow_loopback=allow_loopback,
            timeout_s=self.deadline - time.perf_counter(),
            max_bytes=self.max_bytes,
            network=self.network,
            wants_body=_is_image,
        )


def _is_image(head: Head) -> bool:
    """Whether a body is to be read: not a redirect's. Raises: RemoteError for no image."""
    if head.status in _REDIRECTS:
        return False
    if head.status != 200:
        text = f"the file cannot be fetched: its host answered HTTP {head.status}"
        if head.status in _LATER or head.status >= 500:
            raise Unavailable(text, sent=True)
        raise RemoteError(text)
    kind = head.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind not in (*_IMAGE_TYPES, *_UNSAID_TYPES):
        raise RemoteError(f"the file is said to be {kind[:80]!a}, which is no PNG, JPEG or WEBP")
    return True


def _next(url: httpx2.URL, head: Head) -> str:
    """Where a redirect leads, as text that is vetted like any other."""
    location = head.headers.get("location", "")
    if not location:
        raise RemoteError(f"the file cannot be fetched: HTTP {head.status} to nowhere")
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:", location):
        return location
    try:
        return str(url.join(location))
    except (httpx2.InvalidURL, ValueError) as exc:
        raise UnsafeAddress(f"a redirect leads to {location[:200]!a}, which is no URL") from exc


def _from_data_uri(uri: str, max_bytes: int) -> tuple[bytes, str]:
    start = _DATA_URI.match(uri)
    if start is None:
        raise UnsafeAddress(
            f"{uri[:40]!a}… is no data URI of an image (data:image/png;base64,… or jpeg, webp)"
        )
    if (len(uri) - start.end()) * 3 // 4 > max_bytes + 2:
        raise RemoteError(f"a data URI holds more than the {words.count(max_bytes)} bytes allowed")
    try:
        data = base64.b64decode(uri[start.end() :], validate=True)
    except (binascii.Error, ValueError) as exc:
        raise RemoteError(f"a data URI is not valid base64: {exc}") from exc
    if len(data) > max_bytes:
        raise RemoteError(f"a data URI holds more than the {words.count(max_bytes)} bytes allowed")
    return data, start[1].lower()
