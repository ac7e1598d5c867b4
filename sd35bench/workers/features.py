"""Feature extraction spread over workers: batches of images out, rows of features back.

The driver decides which images make a batch and in which order rows are kept, and alone writes
(docs/adr/0002); a worker decodes files and embeds them. Each worker has as many `threads` whatever
the number of workers, as sums are split by threads: so the rows of a batch are the same to the bit
wherever it is made. A worker that dies, or whose node does, has lost one batch; another makes it.

Started as ``python -m sd35bench.workers.features FD``. Messages are a pickled extractor, its name
and images; answers are rows, or the error that says why there are none. A worker loads an extractor
once. Extraction shares its cores with its like and waits for what is timed there (`leases`).
"""

import contextlib
import os
import pickle
import platform
import queue
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any, Protocol

import numpy as np

from sd35bench.errors import MetricError, SD35BenchError, WorkerDied
from sd35bench.metrics.base import Extractor
from sd35bench.pictures import decode_rgb
from sd35bench.workers.leases import Lease
from sd35bench.workers.process import start_child
from sd35bench.workers.seats import share_cores
from sd35bench.workers.waiting import result_of
from sd35bench.workers.worker import answer_parent

DEATHS = 3
"""Workers that one batch may lose before scoring ends with the last one's error."""
OUT_PER_WORKER = 2
"""Batches in the driver's memory for each worker: one that it makes, one that it takes next."""


class Host(Protocol):
    """Who makes rows of a batch."""

    def embed(self, key: bytes, name: str, images: Sequence[Any]) -> np.ndarray:
        """Rows [n, d]; `key` is the pickled extractor. Raises: WorkerDied, MetricError."""
        ...

    def kill(self) -> None:
        """End it now; safe to call twice."""
        ...


class Spread:
    """Workers for batches of any extractor; rows come back in the order of asking."""

    def __init__(self, hire: Callable[[int], Host], size: int) -> None:
        """`hire(seat)` starts the worker of one of `size` seats, when its first batch comes."""
        self.most_out = OUT_PER_WORKER * size
        self._hire, self._hosts = hire, dict[int, Host]()
        self._seats: queue.SimpleQueue[int] = queue.SimpleQueue()
        for seat in range(size):
            self._seats.put(seat)
        self._threads = ThreadPoolExecutor(size, thread_name_prefix="features")
        self._is_closed = False

    def ask(self, extractor: Extractor, images: Sequence[Any]) -> Future[np.ndarray]:
        """Have a batch embedded: files as bytes, or uint8 RGB arrays."""
        return self._threads.submit(self._make, pickle.dumps(extractor), extractor.name, images)

    def embed_all(
        self, extractor: Extractor, batches: Iterable[Sequence[Any]]
    ) -> Iterator[np.ndarray]:
        """Rows of each batch in order; at most `most_out` batches are read ahead."""
        out: deque[Future[np.ndarray]] = deque()
        for images in batches:
            out.append(self.ask(extractor, images))
            if len(out) > self.most_out:
                yield result_of(out.popleft())
        while out:
            yield result_of(out.popleft())

    def close(self) -> None:
        """End all workers; what was asked and not made is dropped."""
        self._is_closed = True
        for host in [*self._hosts.values()]:
            host.kill()
        self._threads.shutdown(cancel_futures=True)
        for host in self._hosts.values():  # one that was being started meanwhile
            host.kill()

    def _make(self, key: bytes, name: str, images: Sequence[Any]) -> np.ndarray:
        seat = self._seats.get()
        try:
            for left in reversed(range(DEATHS)):
                try:
                    if self._is_closed:
                        raise WorkerDied("scoring has ended")
                    if seat not in self._hosts:
                        self._hosts[seat] = self._hire(seat)
                    return self._hosts[seat].embed(key, name, images)
                except WorkerDied:
                    host = self._hosts.pop(seat, None)
                    if host is not None:
                        host.kill()
                    if left == 0 or self._is_closed:
                        raise
            raise AssertionError("unreachable")
        finally:
            self._seats.put(seat)


class FeatureProcess:
    """A worker process of this machine, on cores of its own where they are given."""

    def __init__(self, threads: int, cores: tuple[int, ...] | None = None) -> None:
        """Start it; networks are loaded when they are first needed."""
        self._lease = Lease(tuple(f"core-{number}" for number in cores or ()))
        self._process, self._connection = start_child("sd35bench.workers.features", threads, cores)

    @property
    def pid(self) -> int:
        """The operating system's number of the process."""
        return self._process.pid

    def embed(self, key: bytes, name: str, images: Sequence[Any]) -> np.ndarray:
        """Rows [n, d] of one batch. Raises: WorkerDied, MetricError."""
        try:
            with self._lease.hold(alone=False):
                self._connection.send((key, name, images))
                answer = self._connection.recv()
        except (EOFError, OSError) as exc:
            self.kill()
            code = self._process.returncode
            how = f"signal {-code}" if code < 0 else f"exit code {code}; stderr says more"
            raise WorkerDied(f"the process that embeds images ended with {how}") from exc
        if isinstance(answer, Exception):
            raise answer
        return answer

    def kill(self) -> None:
        """End it now; safe to call twice."""
        self._process.kill()
        self._process.wait()
        self._connection.close()
        self._lease.close()


@contextlib.contextmanager
def local_spread(workers: int | str, threads: int | None) -> Iterator[Spread]:
    """Workers of this machine, each on `threads` cores of its own; "auto": as many as fit.

    Raises: ConfigError for more than fit.
    """
    each = len(os.sched_getaffinity(0)) if threads is None else threads
    parts = share_cores(workers, each, "scoring")
    with contextlib.closing(
        Spread(lambda seat: FeatureProcess(each, parts[seat]), len(parts))
    ) as spread:
        yield spread


# The process's own end --------------------------------------------------------------------------


def serve(connection: Connection) -> None:
    """Answer batches until the other end says stop or goes away."""
    loaded: dict[bytes, Any] = {}
    while (message := connection.recv()) is not None:
        key, name, images = message
        try:
            if key not in loaded:
                loaded[key] = _load(key, name)
            pixels = [decode_rgb(i) if isinstance(i, bytes) else i for i in images]
            connection.send(loaded[key].embed(pixels))
        except (SD35BenchError, OSError, MemoryError) as exc:
            connection.send(MetricError(f"{name} on {platform.node()}: {exc}"))


def _load(key: bytes, name: str) -> Any:
    """The extractor, if its weights here are those of the driver. Raises: MetricError."""
    extractor = pickle.loads(key)
    if extractor.name != name:
        raise MetricError(f"the weights here are others ({extractor.name}); copy the same there")
    return extractor


if __name__ == "__main__":
    answer_parent(serve, int(sys.argv[1]), *sys.argv[2:])
    os._exit(0)
