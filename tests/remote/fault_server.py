"""A hosted service that can do every wrong thing, on a raw socket of this machine.

By default it is a good one: Eachlabs' routes in both dialects and Replicate's, predictions that end
after `seconds`, images that are valid, of the size asked for, and the same for the same input.

    async with FaultServer() as server:                   # inside a running loop
        server.script("create", "lost-answer")            # the next create; then good ones again
        server.script("poll", None, "html-502", None)     # the second of the next three polls
        server.always("image", "image-bomb")              # every image from now on
        ... base_url=server.url ...
        assert server.created(inputs) == 1                # creates accepted, by input
    with serving(seconds=0.1) as server: ...              # the same in a thread, for processes

Routes: create, poll, list, presign, put, upload (GET of what was put), image, other. A fault is a
name out of `faults.FAULTS`, or a `faults.Fault`. What concerns more than one answer are attributes,
to be set at any time: `never_ends`, `same_id`, `strangers`, `skew`, `fails`, `in_flight_limit`,
`keys`, `output_shape`, `numbers_as_text`, `replies` (has the last word on a good answer's JSON).

Counted: `seen` (every request: when, which route, method, path, headers, body), `created(input)`,
`most_in(window_s)` requests in any window, `most_in_flight` predictions open at once.
"""

import asyncio
import contextlib
import json
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

from tests.remote.faults import FAULTS, Answer, Fault, picture

__all__ = ["SIZES", "FaultServer", "Made", "Seen", "serving"]

SIZES = {"1:1": (64, 64), "16:9": (88, 48), "9:16": (48, 88), "3:2": (72, 48), "2:3": (48, 72)}
TYPES = {"png": "image/png", "jpg": "image/jpeg", "webp": "image/webp"}
REPLICATE = {"success": "succeeded", "error": "failed", "cancelled": "canceled"}
LARGEST_HEAD = 65536


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One request as it came in; `at` is time.monotonic() when its head was complete."""

    at: float
    route: str
    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(slots=True, kw_only=True)
class Made:
    """One prediction."""

    id: str
    input: dict[str, Any]
    at: float
    created: datetime
    cancelled: bool = False


@dataclass(slots=True)
class FaultServer:
    """See the module. `seconds`: how long a prediction takes. `sizes`: px of each aspect ratio."""

    seconds: float = 0.02
    cost_usd: float | None = 0.035
    sizes: Mapping[str, tuple[int, int]] = field(default_factory=lambda: dict(SIZES))
    never_ends: bool = False
    same_id: bool = False
    strangers: int = 0
    skew: timedelta = timedelta(0)
    fails: bool = False
    in_flight_limit: int | None = None
    keys: tuple[str, ...] | None = None
    output_shape: Callable[[str], Any] = staticmethod(lambda url: url)  # noqa: RUF009
    numbers_as_text: bool = False
    replies: Callable[[str, Any], Any] | None = None
    seen: list[Seen] = field(default_factory=list)
    made: dict[str, Made] = field(default_factory=dict)
    creates: Counter[str] = field(default_factory=Counter)
    uploads: dict[str, bytes] = field(default_factory=dict)
    most_in_flight: int = 0
    host: str = "127.0.0.1"
    port: int = 0
    _scripts: dict[str, list[Fault | None]] = field(default_factory=lambda: defaultdict(list))
    _always: dict[str, Fault] = field(default_factory=dict)
    _server: asyncio.Server | None = None
    _open_connections: set[asyncio.Task[None]] = field(default_factory=set)

    # Control -----------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def script(self, route: str, *faults: str | Fault | None) -> None:
        """Do these to the next answers of a route, one each; None is a good one."""
        self._scripts[route] += [_fault(fault) for fault in faults]

    def always(self, route: str, fault: str | Fault | None) -> None:
        """Do this to every answer of a route that has no script left; None stops it."""
        found = _fault(fault)
        if found is None:
            self._always.pop(route, None)
        else:
            self._always[route] = found

    def forget(self, route: str) -> None:
        """Drop what is left of a route's script."""
        self._scripts[route].clear()

    def created(self, inputs: Mapping[str, Any]) -> int:
        """How many creates with this input were accepted: what would have been billed."""
        return self.creates[_canonical(inputs)]

    def count(self, route: str) -> int:
        """How many requests a route has had."""
        return sum(seen.route == route for seen in self.seen)

    def most_in(self, window_s: float, routes: tuple[str, ...] = ("create", "poll", "list")) -> int:
        """The most requests of `routes` that came in any `window_s` seconds."""
        times = [seen.at for seen in self.seen if seen.route in routes]
        return max((sum(t <= u < t + window_s for u in times) for t in times), default=0)

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, self.host, self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._server is not None
        self._server.close()
        for connection in self._open_connections:
            connection.cancel()
        await asyncio.gather(*self._open_connections, return_exceptions=True)

    # Wire --------------------------------------------------------------------------------------

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open_connections.add(task)
        task.add_done_callback(self._open_connections.discard)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            answer = await self._answer(reader)
            await answer.send(writer)
        with contextlib.suppress(OSError, asyncio.CancelledError):
            writer.close()
            await writer.wait_closed()

    async def _answer(self, reader: asyncio.StreamReader) -> Answer:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        at = time.monotonic()
        first, *lines = head.rstrip("\r\n").split("\r\n")
        method, target, _ = first.split(" ", 2)
        headers = {k.strip().lower(): v.strip() for k, _, v in (x.partition(":") for x in lines)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        route = self.route(method, urlsplit(target).path.rstrip("/"))
        self.seen.append(
            Seen(at=at, route=route, method=method, path=target, headers=headers, body=body)
        )
        script = self._scripts[route]
        fault = script.pop(0) if script else self._always.get(route)
        if fault is not None and fault.refuses:
            return fault.change(Answer.json(200, {}))
        good = self._good(self.seen[-1])
        return good if fault is None else fault.change(good)

    def route(self, method: str, path: str) -> str:
        """The name of a route; a subclass may know others."""
        if method == "POST" and (path == "/v1/prediction" or path.endswith("/predictions")):
            return "create"
        if method == "GET" and path in ("/v1/executions", "/v1/predictions"):
            return "list"
        if method == "GET" and path.startswith(("/v1/prediction/", "/v1/predictions/")):
            return "poll"
        routes = {
            ("POST", "/v1/upload"): "presign",
            ("PUT", "/uploads"): "put",
            ("GET", "/uploads"): "upload",
            ("GET", "/outputs"): "image",
        }
        return routes.get((method, path.rsplit("/", 1)[0]), "other")

    # A good service ----------------------------------------------------------------------------

    def _good(self, seen: Seen) -> Answer:
        path = urlsplit(seen.path).path
        replicate = path.startswith(("/v1/models/", "/v1/predictions"))
        if seen.path.startswith("/v1/") and self.keys is not None:
            given = {seen.headers.get("x-api-key"), seen.headers.get("authorization", "")[7:]}
            if not given & set(self.keys):
                return Answer.json(401, {"error": "Unauthorized"})
        last = path.rstrip("/").split("/")[-1]
        if seen.route == "create":
            return self._create(seen.json, replicate)
        if seen.route == "poll":
            if last not in self.made:
                return Answer.json(404, {"error": "Prediction not found"})
            return Answer.json(200, self._shown("poll", self.made[last], replicate))
        if seen.route == "list":
            return self._list(parse_qs(urlsplit(seen.path).query), replicate)
        if seen.route == "presign":
            return self._presign(seen.json)
        if seen.route == "put":
            self.uploads[last] = seen.body
            return Answer(status=200, headers={}, body=b"")
        if seen.route == "upload" and last in self.uploads:
            return Answer.of(self.uploads[last], "image/png")
        if seen.route == "image":
            return self._image(last.rsplit(".", 1)[0])
        return Answer.json(404, {"error": "Not found"})

    def _create(self, body: Any, replicate: bool) -> Answer:
        if self.in_flight_limit is not None and self._open() >= self.in_flight_limit:
            return Answer.json(429, {"error": "too many predictions in flight"})
        made = self.accept(body["input"])
        if replicate:
            return Answer.json(201, self._shown("create", made, replicate))
        said = {"status": "success", "message": "Prediction created successfully"}
        return Answer.json(200, self._replied("create", {**said, "predictionID": made.id}))

    def accept(self, inputs: dict[str, Any]) -> Made:
        """Create, and bill, a prediction."""
        self.creates[_canonical(inputs)] += 1
        number = 0 if self.same_id else len(self.made)
        made = Made(
            id=f"prediction-{number}",
            input=inputs,
            at=time.monotonic(),
            created=datetime.now(UTC) + self.skew,
        )
        self.made.setdefault(made.id, made)
        self.most_in_flight = max(self.most_in_flight, self._open())
        return made

    def _shown(self, route: str, made: Made, replicate: bool) -> Any:
        status = self._status(made)
        url = f"{self.url}/outputs/{made.id}.{made.input.get('output_format', 'webp')}"
        done = status == "success"
        output: Any = self.output_shape(url) if done else None
        reason = {"error_code": "E500", "error_message": "the model failed"}
        body: dict[str, Any] = {
            "id": made.id,
            "input": made.input,
            "status": REPLICATE.get(status, status) if replicate else status,
            "output": reason if status == "error" and not replicate else output,
            "logs": "",
            "metrics": {"predict_time": self._number(self.seconds)} if done else {},
            "created_at": _moment(made.created),
        }
        if status in ("success", "processing"):
            body["started_at"] = _moment(made.created + timedelta(seconds=self.seconds / 4))
        if replicate:
            body["error"] = reason["error_message"] if status == "error" else None
        elif done and self.cost_usd is not None:
            body["metrics"]["cost"] = self._number(self.cost_usd)
        return self._replied(route, body)

    def _list(self, query: Mapping[str, list[str]], replicate: bool) -> Answer:
        """Latest first. Strangers come before ours; Eachlabs' listing shows no input."""
        ours = sorted(self.made.values(), key=lambda made: made.created, reverse=True)
        offset = int(query.get("cursor" if replicate else "offset", ["0"])[0])
        now = datetime.now(UTC) + self.skew
        others = [
            Made(id=f"stranger-{i}", input={"prompt": "a stranger's"}, at=0.0, created=now)
            for i in range(self.strangers)
        ]
        for other in others:
            self.made.setdefault(other.id, other)
        known = {made.id for made in others}
        everything = [*others, *(made for made in ours if made.id not in known)]
        page = [self._shown("entry", made, replicate) for made in everything[offset : offset + 100]]
        following = offset + len(page)
        more = following < len(everything)
        if replicate:
            url = f"{self.url}/v1/predictions?cursor={following}"
            body = {"previous": None, "next": url if more else None, "results": page}
        else:
            for entry in page:
                if isinstance(entry, dict):
                    entry.pop("input", None)
            body = {"executions": page, "total_count": len(everything), "offset": offset}
        return Answer.json(200, self._replied("list", body))

    def _presign(self, body: Any) -> Answer:
        name = f"upload-{len(self.uploads)}-{self.count('presign')}"
        answer = {
            "id": name,
            "presigned_url": f"{self.url}/uploads/{name}?signature=abc",
            "public_url": f"{self.url}/uploads/{name}",
            "expires_at": _moment(datetime.now(UTC) + timedelta(hours=1)),
            "required_headers": {"Content-Type": body["content_type"]},
        }
        return Answer.json(200, self._replied("presign", answer))

    def _image(self, prediction_id: str) -> Answer:
        made = self.made.get(prediction_id)
        if made is None or self._status(made) != "success":
            return Answer.json(404, {"error": "Not found"})
        file_format = made.input.get("output_format", "webp")
        size = self._size(made.input)
        return Answer.of(picture(_canonical(made.input), size, file_format), TYPES[file_format])

    def _size(self, inputs: Mapping[str, Any]) -> tuple[int, int]:
        """What the model's own input says: a ratio, pixels (as text, too), or nothing."""
        if "width" in inputs and int(inputs["width"]) <= 256:
            return int(inputs["width"]), int(inputs["height"])  # more noise takes a second
        return self.sizes[inputs.get("aspect_ratio", "1:1")]

    def _status(self, made: Made) -> str:
        if made.cancelled:
            return "cancelled"
        age = time.monotonic() - made.at
        if self.never_ends or age < self.seconds:
            return "starting" if age < self.seconds / 4 else "processing"
        return "error" if self.fails else "success"

    def _open(self) -> int:
        return sum(self._status(m) in ("starting", "processing") for m in self.made.values())

    def _number(self, value: float) -> float | str:
        return f"{value}" if self.numbers_as_text else value

    def _replied(self, route: str, body: Any) -> Any:
        return body if self.replies is None else self.replies(route, body)


@contextlib.contextmanager
def serving(kind: type[FaultServer] = FaultServer, /, **settings: Any) -> Iterator[FaultServer]:
    """Run a server in a thread of its own."""
    server = kind(**settings)
    loop = asyncio.new_event_loop()
    ready = threading.Event()
    stop = asyncio.Event()

    async def run() -> None:
        async with server:
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(run()), daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()


def _fault(fault: str | Fault | None) -> Fault | None:
    return FAULTS[fault] if isinstance(fault, str) else fault


def _canonical(inputs: Mapping[str, Any]) -> str:
    return json.dumps(inputs, sort_keys=True)


def _moment(time: datetime) -> str:
    return time.isoformat().replace("+00:00", "Z")
