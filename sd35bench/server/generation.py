"""The thread that makes what was accepted: one image at a time, in order, on one warm worker.

An image never shares a batch, so it does not depend on its neighbours, and it is what `sd35bench
run` makes of the same request: the same worker, the same job. A worker that dies, hangs or grows
too large takes the prediction that it held with it, which says why; the next one gets a new worker.
A server that has to stop finishes the image that it is making if that takes at most 10 s, and
else leaves the prediction on disk for the next start.
"""

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path

from sd35bench.disk import write_atomic
from sd35bench.errors import BackendError, ConfigError, SD35BenchError, StoreError, WorkerDied
from sd35bench.server.envelope import log
from sd35bench.server.file_store import FileStore
from sd35bench.server.predictions import PredictionStore, Work
from sd35bench.server.settings import ServerSettings
from sd35bench.types import Request, Status
from sd35bench.workers.limits import work_of
from sd35bench.workers.process import WorkerProcess
from sd35bench.workers.waiting import result_of
from sd35bench.workers.worker import Answer, BatchJob, Failed

RETRY_S = 1.0
"""Until a disk that failed is asked again."""
ENDING_S = 0.1
"""How often `stop` looks for a worker that is being started meanwhile."""


class InitFiles:
    """Init images of open predictions, one file each, until these are over."""

    def __init__(self, folder: Path) -> None:
        """Use `folder`, which exists."""
        self._folder = folder

    def path(self, prediction_id: str) -> Path:
        """Where a prediction's init image is."""
        return self._folder / f"{prediction_id}.png"

    def write(self, prediction_id: str, data: bytes) -> None:
        """Keep a prediction's init image. Raises: DiskFull, StoreError."""
        path = self.path(prediction_id)
        write_atomic(path, data)
        path.chmod(0o600)

    def sweep(self, still_open: Sequence[str]) -> None:
        """Remove what no open prediction needs: left by a server that was killed."""
        kept = {self.path(prediction_id).name for prediction_id in still_open}
        for path in self._folder.iterdir():
            if path.name not in kept:
                path.unlink(missing_ok=True)


class Generator:
    """Makes images out of accepted predictions; its thread calls `on_end(id)`."""

    def __init__(
        self, settings: ServerSettings, store: PredictionStore, files: FileStore, inits: InitFiles
    ) -> None:
        self._settings, self._store, self._files, self._inits = settings, store, files, inits
        self.on_end: Callable[[str], None] = lambda _: None
        self.expected_s = 0.0
        self._s_per_work = 0.0
        self._worker: WorkerProcess | None = None
        self._wake, self._stopping = threading.Event(), threading.Event()
        self._abandoned = False
        self._ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="generation", daemon=True)

    def start(self) -> None:
        """Load the backend, warm it up and begin with the queue.

        Raises: BackendError, WorkerDied where the backend cannot be had.
        """
        self._thread.start()
        result_of(self._ready)

    @property
    def is_warm(self) -> bool:
        """Whether a worker is there and has made its first image."""
        return self._worker is not None

    def wake(self) -> None:
        """Say that something was accepted."""
        self._wake.set()

    def wind_down(self) -> None:
        """Take nothing more; returns at once."""
        self._stopping.set()
        self._wake.set()

    def stop(self, wait_s: float) -> None:
        """Take nothing more; wait for what is being made, or give it back to the queue."""
        self.wind_down()
        if self._thread.ident is None:
            return  # never started
        self._thread.join(wait_s if self._ready.done() else 0.0)
        until, ended = time.monotonic() + wait_s, None
        while self._thread.is_alive() and time.monotonic() < until:
            self._abandoned = True
            worker = self._worker  # which the thread may be about to start
            if worker is not None and worker is not ended:
                # The thread waits on the worker and alone may close it: end the process only.
                ended = worker
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker.pid, signal.SIGKILL)
            self._thread.join(ENDING_S)

    def _run(self) -> None:
        try:
            self._begin()
        except BaseException as exc:
            self._ready.set_exception(exc)
            return
        self._ready.set_result(None)
        while not self._stopping.is_set():
            try:
                self._next()
            except StoreError:
                log("predictions cannot be kept", level=logging.ERROR, failed=True)
                self._stopping.wait(RETRY_S)
        if self._worker is not None:
            self._worker.close()

    def _next(self) -> None:
        """Make the oldest of the queue, or wait for one."""
        self._wake.clear()
        work = self._store.take()
        if work is None:
            self._wake.wait()
            return
        if self._stopping.is_set():
            self._store.put_back(work.id)
            return
        try:
            self._make(work)
        except (SD35BenchError, OSError) as exc:
            self._fail(work, _code(exc), f"{type(exc).__name__}: {exc}")
        except Exception:  # a bug must cost one prediction, not the queue
            log("prediction failed", level=logging.ERROR, failed=True, prediction=work.id)
            self._fail(work, "internal", "the server failed on this request; its log says more")

    def _make(self, work: Work) -> None:
        try:
            if self._worker is None or not self._worker.is_alive:  # it may have died while idle
                self._drop_worker()
                self._begin()
            self._store.processing(work.id)
            answer = self._ask(work)
        except WorkerDied:
            self._drop_worker()
            if self._abandoned:
                self._store.put_back(work.id)
                log("prediction left for the next start", prediction=work.id)
                return
            raise
        made = answer.made[0]
        if made.status is not Status.OK:
            self._fail(work, made.status.value, str(made.error))
            return
        assert answer.timings is not None
        self._succeed(work, made.data, made.suffix, answer.timings.latency_s)

    def _succeed(self, work: Work, data: bytes, suffix: str, predict_s: float) -> None:
        cancelled = self._store.is_to_cancel(work.id)
        output = "" if cancelled else self._files.put_output(work.id, data, suffix)
        self._insist(lambda: self._store.succeed(work.id, output, predict_s))
        log("prediction made", prediction=work.id, predict_s=round(predict_s, 6))
        self._over(work)

    def _fail(self, work: Work, code: str, reason: str) -> None:
        self._insist(lambda: self._store.fail(work.id, code, reason))
        log("prediction failed", level=logging.WARNING, prediction=work.id, error=reason)
        self._over(work)

    def _insist(self, end: Callable[[], None]) -> None:
        """Write a prediction's end, however long the disk refuses it."""
        while True:
            try:
                return end()
            except StoreError:
                log("an end cannot be written down", level=logging.ERROR, failed=True)
                if self._stopping.wait(RETRY_S):
                    raise  # the next start makes it again

    def _over(self, work: Work) -> None:
        self._inits.path(work.id).unlink(missing_ok=True)
        self.on_end(work.id)

    def _ask(self, work: Work) -> Answer:
        assert self._worker is not None
        amount = work_of(work.request, 1)
        deadline_s = self._settings.limits.batch_deadline_s(self._s_per_work * amount)
        init = None
        if work.request.init_image is not None:
            init = str(self._inits.path(work.id))
        # Not timed as a measurement: a compiling backend may meet a size that is new to it.
        job = BatchJob(requests=(work.request,), inits=(init,), timed=False)
        answer = self._worker.run(job, deadline_s)
        self.expected_s = answer.wall_s
        return answer

    def _begin(self) -> None:
        """Start a worker: load, warm up at the model's default size, settle.

        Raises: BackendError where the backend refuses, WorkerDied.
        """
        worker = WorkerProcess(self._settings.load, self._settings.limits)
        self._worker = worker  # from now on `stop` can end it
        try:
            _refuse_failed(worker.load())
            request = _warm_up_request(self._settings)
            job = BatchJob(requests=(request,), inits=(None,))
            answer = worker.run(job, self._settings.limits.start_deadline_s(work_of(request, 1)))
            made = answer.made[0]
            if made.status is not Status.OK:
                raise BackendError(f"warming up failed: {made.error}")
            _refuse_failed(worker.settle())
        except BaseException:
            self._drop_worker()
            raise
        self.expected_s = answer.wall_s
        self._s_per_work = answer.wall_s / work_of(request, 1)

    def _drop_worker(self) -> None:
        if self._worker is not None:
            self._worker.kill()
            self._worker = None


def _warm_up_request(settings: ServerSettings) -> Request:
    model = settings.model
    width, height = next(iter(model.sizes.values()))
    return Request(
        prompt="warming up",
        steps=model.steps,
        cfg=model.cfg,
        seed=0,
        width=width,
        height=height,
        sampler=model.sampler,
        output_format="webp",  # the protocol's default: its encoder is loaded now, too
    )


def _refuse_failed(answer: object) -> None:
    if isinstance(answer, Failed):
        kind = ConfigError if answer.status is Status.UNSUPPORTED else BackendError
        raise kind(answer.error)


def _code(exc: Exception) -> str:
    """The protocol's error code for what ended a prediction."""
    names = {"WorkerHung": Status.TIMED_OUT, "WorkerTooLarge": Status.OUT_OF_MEMORY}
    if isinstance(exc, WorkerDied):
        return names.get(type(exc).__name__, Status.CRASHED).value
    return "storage" if isinstance(exc, StoreError | OSError) else Status.ERROR.value
