"""A real server on a loopback port, over the fake backend's real worker process."""

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from sd35bench.server.serving import Server, bind, open_state
from sd35bench.server.settings import ServedModel, ServerSettings
from sd35bench.server.state import ServerState
from tests.studies.fakes import fake_load

MODEL = ServedModel(
    name="nano",
    slugs=("nano", "stable-diffusion-3.5-medium", "stable-diffusion-3-5-medium"),
    sizes={"1:1": (64, 64), "16:9": (88, 48), "9:16": (48, 88)},
    sampler="euler",
    steps=4,
    cfg=5.0,
    takes_images=True,
)
START_S = 60.0


def make_settings(folder: Path, *, backend: dict[str, Any] | None = None, **fields: Any):
    """Settings for a free port; `backend` are the fake one's options."""
    load = fake_load(**({} if backend is None else backend))
    return ServerSettings(
        **{"load": load, "model": MODEL, "state_dir": folder, "port": 0, **fields}
    )


@dataclass
class Live:
    url: str
    state: ServerState
    client: httpx2.Client

    def create(self, **inputs: Any) -> str:
        """Create a prediction that must be accepted."""
        answer = self.post(**inputs)
        assert answer.status_code == 200, answer.text
        return answer.json()["predictionID"]

    def post(self, path: str = "/v1/prediction/", headers: Any = None, **inputs: Any):
        body = {"model": MODEL.slugs[1], "version": "0.0.1", "input": {"prompt": "a cat", **inputs}}
        return self.client.post(path, json=body, headers=headers)

    def ended(self, prediction_id: str, headers: Any = None) -> dict[str, Any]:
        """Poll until it is over."""
        until = time.monotonic() + START_S
        while time.monotonic() < until:
            found = self.client.get(f"/v1/prediction/{prediction_id}", headers=headers).json()
            if found["status"] in ("success", "error", "cancelled"):
                return found
            time.sleep(0.01)
        raise AssertionError(f"{prediction_id} is not over: {found}")


@contextlib.contextmanager
def live(settings: ServerSettings, *, makes_images: bool = True) -> Iterator[Live]:
    """Serve until the end of the block; without a worker, which takes 0.5 s, if none is needed."""
    ready = threading.Event()
    with contextlib.closing(bind(settings)) as bound, open_state(settings) as state:
        if makes_images:
            state.generator.start()
        server = Server(state, ready.set)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        thread.start()
        try:
            assert ready.wait(START_S)
            with httpx2.Client(base_url=url, timeout=START_S, trust_env=False) as client:
                yield Live(url=url, state=state, client=client)
        finally:
            server.should_exit = True
            thread.join()
