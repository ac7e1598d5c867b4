"""Run one server: bind, load, warm up, say so, answer until a signal, leave nothing torn.

The port is taken first and listened on last: who connects before the backend is warm is refused,
and a port that is in use is found out before minutes of loading.
"""

import asyncio
import contextlib
import fcntl
import functools
import ipaddress
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from sd35bench.disk import disk_errors, open_lock, try_flock
from sd35bench.errors import ConfigError
from sd35bench.server.app import create_app
from sd35bench.server.auth import KeyRing
from sd35bench.server.connection import BACKLOG, QUEUE, Connection, ConnectionLimit
from sd35bench.server.envelope import configure_logs, log
from sd35bench.server.file_store import FileStore
from sd35bench.server.generation import Generator, InitFiles
from sd35bench.server.predictions import PredictionStore
from sd35bench.server.settings import ServerSettings
from sd35bench.server.state import RequestLimit, ServerState

UPLOAD_LIFETIME_S = 3600.0
MOST_UPLOAD_BYTES = 16 * 2**20
FINISH_S = 10.0
"""How long an image that is being made may hold up the end."""
CONNECTIONS_S = 5
KEEP_ALIVE_S = 75
"""Longer than clients keep an idle connection: uvicorn's own 5 s is httpx's as well, and a request
that is sent in the moment in which the server hangs up has no answer."""
ENDS = (signal.SIGINT, signal.SIGTERM)


def serve(settings: ServerSettings, on_ready: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM; calls `on_ready(url)` once requests are answered.

    Raises: ConfigError for a port, key file or folder that cannot be used; BackendError, WorkerDied
    where the backend cannot be had; StoreError.
    """
    configure_logs()
    with _interruptible(), contextlib.closing(bind(settings)) as bound, open_state(settings) as s:
        log("loading", model=settings.model.name, backend=settings.load.backend.name)
        s.generator.start()
        url = _url(settings.host, bound.getsockname()[1])
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # past the last one's TIME_WAIT
        Server(s, lambda: on_ready(url)).run(sockets=[bound])
        log("stopped taking requests")


@contextlib.contextmanager
def open_state(settings: ServerSettings) -> Iterator[ServerState]:
    """Open what a server keeps, recover what a dead one left; close it all at the end.

    Raises: ConfigError where another process serves from the same folder, StoreError.
    """
    keys = None if settings.key_file is None else KeyRing(settings.key_file)
    folder = settings.state_dir
    _make_private(folder)
    with open_lock(folder / "lock") as lock:
        if not try_flock(lock, fcntl.LOCK_EX):
            raise ConfigError(
                f"state_dir={folder}: another server uses it; end that one, or give another folder"
            )
        store = PredictionStore(folder / "predictions.sqlite", settings.load.key)
        inits = InitFiles(folder / "inits")
        still_open = store.recover()
        inits.sweep(still_open)
        files = FileStore(
            folder,
            output_lifetime_s=settings.output_lifetime_s,
            upload_lifetime_s=UPLOAD_LIFETIME_S,
            max_upload_bytes=MOST_UPLOAD_BYTES,
        )
        generator = Generator(settings, store, files, inits)
        try:
            yield ServerState(
                settings=settings,
                keys=keys,
                store=store,
                files=files,
                inits=inits,
                generator=generator,
                requests=RequestLimit(settings.requests_per_minute),
            )
        finally:
            generator.stop(FINISH_S)
            store.close()


def _make_private(folder: Path) -> None:
    """Make the folder for this user alone, and so what an older version left in it.

    Prompts are in the predictions' file, and names of outputs are the permission to fetch them.
    SQLite gives its -wal and -shm the mode of the file itself, so that one is made here.

    Raises: DiskFull, StoreError.
    """
    with disk_errors(folder / "lock"):
        for each in (folder, folder / "inits"):
            each.mkdir(parents=True, exist_ok=True, mode=0o700)
        for name in ("lock", "predictions.sqlite"):
            os.close(os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        for path in (folder, *folder.rglob("*")):
            if not path.is_symlink():
                path.chmod(0o700 if path.is_dir() else 0o600)


class Server(uvicorn.Server):
    """uvicorn, which says when it is ready, and which ends normally after a signal."""

    def __init__(self, state: ServerState, on_ready: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(
                create_app(state),
                http=functools.partial(Connection, limit=ConnectionLimit()),  # type: ignore[arg-type]
                backlog=BACKLOG,
                access_log=False,
                log_config=None,
                lifespan="on",
                proxy_headers=True,  # from this machine only: https in URLs behind a TLS proxy
                server_header=False,
                timeout_graceful_shutdown=CONNECTIONS_S,
                timeout_keep_alive=KEEP_ALIVE_S,
                ws="none",
            )
        )
        self._state, self._on_ready = state, on_ready
        self._signals = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then say so. Raises: ConfigError where another took the port meanwhile."""
        try:
            await super().startup(sockets=sockets)
        except OSError as exc:
            raise ConfigError(f"the port cannot be listened on: {exc.strerror}") from exc
        for each in sockets or []:
            each.listen(QUEUE)
        self._loop = asyncio.get_running_loop()
        self._on_ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals meanwhile; uvicorn's own would raise them again at the end."""
        with _handling({**dict.fromkeys(ENDS, self.handle_exit), signal.SIGHUP: self._reload}):
            yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop: nothing is taken from the queue, waiting requests are answered.

        A second signal ends the connections, too. It is not passed on: uvicorn would leave without
        ending its own tasks, and log each as a CancelledError.
        """
        self._signals += 1
        self._state.is_stopping = True
        self._state.generator.wind_down()
        self._loop.call_soon_threadsafe(self._state.ended.tell_all)
        if self._signals == 1:
            super().handle_exit(sig, frame)
        else:
            self._loop.call_soon_threadsafe(self._drop_all)

    def _drop_all(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        for task in self.server_state.tasks:
            task.cancel()

    def _reload(self, _: int, __: FrameType | None) -> None:
        """Read the key file again."""
        if self._state.keys is not None:
            self._loop.call_soon_threadsafe(self._state.keys.reload)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """End quietly where a signal comes before the server is ready, or a second one after it."""
    handlers = dict.fromkeys(ENDS, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt), _handling({**handlers, signal.SIGHUP: _ignore}):
        yield


def _ignore(_: int, __: FrameType | None) -> None:
    """Keys are read at the start anyway."""


@contextlib.contextmanager
def _handling(handlers: Mapping[signal.Signals, Any]) -> Iterator[None]:
    """Have signals handled; only the main thread may, and only it gets them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def bind(settings: ServerSettings) -> socket.socket:
    """Take the port without listening on it. Raises: ConfigError."""
    host, port = settings.host, settings.port
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
            # Linux lets two that both reuse addresses share one until either listens: the second
            # would find out after it had loaded.
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        except BaseException:
            bound.close()
            raise
    except OSError as exc:
        raise ConfigError(
            f"host={host} port={port}: cannot be served on: {exc.strerror}; give another port, or"
            " port=0 for a free one"
        ) from exc
    return bound


def _url(host: str, port: int) -> str:
    try:
        is_v6 = ipaddress.ip_address(host).version == 6
    except ValueError:
        is_v6 = False
    return f"http://[{host}]:{port}" if is_v6 else f"http://{host}:{port}"
