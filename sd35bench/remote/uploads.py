"""Init images at the service: uploaded once a run each, or where the user says they are."""

import asyncio
import base64
import time

from sd35bench import words
from sd35bench.errors import LostAnswer, RemoteError, UnsupportedRequest
from sd35bench.remote.images import sniff
from sd35bench.remote.retry import Client, Deadline, ask, forget_frames
from sd35bench.remote.transport import NotSent
from sd35bench.study.store import Study

FRESH_S = 600.0
"""An upload that is older is made again: services delete them, and seldom say when."""


def content_type(data: bytes) -> str:
    """The media type of a PNG, JPEG or WEBP file. Raises: UnsupportedRequest for another."""
    found = sniff(data)
    if found is None:
        raise UnsupportedRequest("an init image is neither PNG, JPEG nor WEBP: convert it first")
    return f"image/{found}".replace("jpg", "jpeg")


def data_uri(data: bytes, most_bytes: int) -> str:
    """The file inside a URI, for a service that has no place to upload to.

    Raises: UnsupportedRequest for more than the service takes.
    """
    if len(data) > most_bytes:
        raise UnsupportedRequest(
            f"an init image has {words.count(len(data))} bytes, and this service takes at most"
            f" {words.count(most_bytes)} without an upload: make it smaller, or give"
            " remote.init_image_url=URL"
        )
    return f"data:{content_type(data)};base64,{base64.b64encode(data).decode()}"


class Uploads:
    """The URLs under which the service finds this run's init images."""

    def __init__(self, client: Client, study: Study) -> None:
        """Nothing is uploaded until a URL is asked for."""
        self._client, self._study = client, study
        self._urls: dict[str, tuple[str, float]] = {}
        self._turns: dict[str, asyncio.Lock] = {}

    async def url(self, digest: str | None) -> str | None:
        """The URL of the init image with this digest, uploaded if it must be; None for none.

        Raises: RemoteError, PredictionFailed.
        """
        given = self._client.settings.init_image_url
        if digest is None or given is not None:
            return None if digest is None else given
        return await self.uploaded(digest)

    async def uploaded(self, digest: str) -> str:
        """The URL of an image of the study's, uploaded if it must be.

        Raises: RemoteError, PredictionFailed.
        """
        async with self._turns.setdefault(digest, asyncio.Lock()):
            url, at = self._urls.get(digest, ("", 0.0))
            if not url or time.monotonic() - at > FRESH_S:
                url = await self._upload(self._study.read_init_file(digest))
                self._urls[digest] = url, time.monotonic()
        return url

    async def _upload(self, data: bytes) -> str:
        client, deadline = self._client, Deadline(self._client.settings.timeout_s)
        call = client.provider.presign(content_type(data))
        if call is None:
            return data_uri(data, client.provider.data_uri_bytes)
        failures = 0
        while True:
            _, ticket = await ask(client, call, client.provider.read_presigned, deadline)
            try:
                await client.transport.put(ticket.put_url, data, ticket.headers)
            except (NotSent, LostAnswer) as exc:  # twice uploaded is no harm
                forget_frames(exc)
                failures += 1
                if failures >= client.policy.downloads:
                    raise RemoteError(f"the init image could not be uploaded: {exc}") from exc
                await deadline.wait(client.policy.wait_s(failures - 1, None), str(exc))
            else:
                return ticket.public_url
