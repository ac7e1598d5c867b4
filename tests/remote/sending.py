"""One call through the transport to a server of the test's own."""

import asyncio
import traceback

import pytest

from sd35bench.errors import RemoteError
from sd35bench.remote.providers.base import Call
from sd35bench.remote.transport import (
    Reply,
    Transport,
)
from tests.remote.loopback import Handler, Served, serving

KEY = "canary-5f3c9e-key"
CREATE = Call(method="POST", path="/v1/prediction/", json={"prompt": "a cat", "seed": None})


def transport(base_url: str, **options) -> Transport:
    options = {"timeout_s": 30.0, "headers": lambda: {"X-API-Key": KEY}, **options}
    return Transport(base_url, allow_loopback=True, **options)


def send(handler: Handler, call: Call = CREATE, **options) -> tuple[Reply, Served]:
    async def run() -> tuple[Reply, Served]:
        async with serving(handler) as served:
            return await transport(served.url, **options).send(call), served

    return asyncio.run(run())


def failure(handler: Handler, **options) -> RemoteError:
    with pytest.raises(RemoteError) as caught:
        send(handler, **options)
    return caught.value


def told(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))
