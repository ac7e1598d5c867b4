"""The process that holds one loaded backend and answers batches, timed between synchronisations.

Started as ``python -m sd35bench.workers.worker FD`` by `process.py`; its parent talks to it
over a socket pair and alone writes to the store. The worker dies with its parent. Messages to it
are a `Load`, then `BatchJob`s with one `Settle` after those that warm up, and ``None`` to end; it
answers with `Ready`, an `Answer` per job, `Settled`, or `Failed` where the backend cannot be used.
Every time is wall time with the device synchronised before and after; reading init images, encoding
files, counting FLOPs and the canary's readings lie outside `generate_s`, and encoding is timed by
itself.
"""

import contextlib
import ctypes
import faulthandler
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sd35bench import plugins
from sd35bench.backends.base import Backend, Generation, load_backend
from sd35bench.errors import (
    BackendError,
    ConfigError,
    InvalidImage,
    OutOfMemory,
    UnsupportedRequest,
)
from sd35bench.machine.canary import Lookout, start_lookout
from sd35bench.machine.measure import (
    Stopwatch,
    device_of,
    environment,
    environment_id,
    gpu_state,
    memory,
    place,
)
from sd35bench.pictures import decode_rgb
from sd35bench.types import (
    NO_WEIGHTS,
    Flops,
    GpuState,
    Load,
    Memory,
    Request,
    Scalar,
    Status,
    Surroundings,
    Timings,
)

PR_SET_PDEATHSIG = 1
# Below this spread of 8-bit levels over the whole image nothing is shown: a constant image.
CONSTANT_SPREAD = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchJob:
    """One batch: requests of one setting and size, and their init images, by path or as bytes.

    `watched`: the canary is read around it; `closes`: no such job follows, so that its block ends.
    `expected_s`: how long it will take about.
    """

    requests: tuple[Request, ...]
    inits: tuple[str | bytes | None, ...]
    keep_latents: bool = False
    timed: bool = True
    watched: bool = False
    closes: bool = False
    expected_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Settle:
    """The warm-up is over: prove what only it could show."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """The backend is loaded; what it proved and where it runs."""

    load_s: float
    in_force: dict[str, Any]
    environment: dict[str, Scalar]
    environment_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """What the backend has proven by now.

    `canary`: its kind, and the best of its readings so far in 1e9 operations a second.
    """

    in_force: dict[str, Any]
    canary: tuple[str, float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The backend could not be loaded, or warm-up showed that it is not what was asked for."""

    status: Status
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """One image of a batch: its file, or why there is none.

    `latents`: float32 [C, h, w] after the first and after the last step, where they were kept.
    """

    status: Status
    data: bytes = b""
    suffix: str = ".png"
    error: str | None = None
    encode_s: float | None = None
    truncated_tokens: int | None = None
    latents: tuple[np.ndarray, np.ndarray] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What became of a job; `phase` is where a failure happened.

    `flops` is of one image; `gpu` was read right after the last of them; `wall_s` is the whole
    job's, files included. `surroundings`, of a watched job, has the canary's speeds in 1e9
    operations a second. `started_at` is when the work began, in UTC by the worker's own clock.
    """

    made: tuple[Made, ...]
    phase: str | None = None
    timings: Timings | None = None
    memory: Memory | None = None
    effective_steps: int | None = None
    evaluations: int | None = None
    flops: Flops | None = None
    gpu: GpuState | None = None
    wall_s: float
    surroundings: Surroundings | None = None
    started_at: str | None = None


def main(handle: int, dump: int, plugin_dir: str | None = None) -> None:
    """Serve one parent until it says stop or goes away; a fatal signal's stack goes to `dump`.

    `plugin_dir`: the folder of the command's `--plugin-dir`.
    """
    faulthandler.enable(dump)
    answer_parent(_serve, handle, plugin_dir)


def answer_parent(
    serve: Callable[[Connection], None], handle: int, plugin_dir: str | None = None
) -> None:
    """Serve the process that started this one, and end with it."""
    die_with_parent()
    plugins.use_folder(plugin_dir)
    for number in (signal.SIGINT, signal.SIGTERM):  # the parent decides what they mean
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(EOFError, ConnectionError), Connection(handle) as connection:
        serve(connection)


def _serve(connection: Connection) -> None:
    load: Load = connection.recv()
    started = time.perf_counter()
    try:
        backend = load_backend(load)
    except (BackendError, MemoryError, ConfigError) as exc:  # a plug-in that this node lacks
        connection.send(_failed(exc))
        return
    backend.synchronize()
    load_s = time.perf_counter() - started
    where = environment(threads=load.threads) | place(device_of(backend.in_force))
    if load.model.weights_digest == NO_WEIGHTS:
        where["occupies"] = None
    connection.send(
        Ready(
            load_s=load_s,
            in_force=backend.in_force,
            environment=where,
            environment_id=environment_id(where),
        )
    )
    with contextlib.closing(backend):
        lookout: Lookout | None = None
        while (message := connection.recv()) is not None:
            if isinstance(message, Settle):
                connection.send(settle(backend, lookout))
                continue
            if message.watched and lookout is None:
                lookout = start_lookout(backend.in_force, load.threads)
            connection.send(answer(backend, message, lookout))


def settle(backend: Backend, lookout: Lookout | None = None) -> Settled | Failed:
    """Have the backend prove what its warm-up showed, and read what is in force again."""
    try:
        backend.settle()
    except (BackendError, MemoryError) as exc:
        return _failed(exc)
    return Settled(in_force=backend.in_force, canary=None if lookout is None else lookout.settle())


def answer(backend: Backend, job: BatchJob, lookout: Lookout | None = None) -> Answer:
    """Run one batch; failures become statuses, programming errors propagate.

    `lookout` reads the canary around what is timed.
    """
    began = time.perf_counter()
    files = (Path(i).read_bytes() if isinstance(i, str) else i for i in job.inits)
    inits = [None if data is None else decode_rgb(data) for data in files]
    backend.keep_latents, backend.timed = job.keep_latents, job.timed
    watching = lookout if job.watched else None
    worked = (0.0, 0)
    try:
        if watching is not None:
            watching.before(job.expected_s)
        started_at = datetime.now(UTC).isoformat(timespec="milliseconds")
        with Stopwatch(backend.synchronize) as watch:
            generation = backend.generate(job.requests, inits)
        if watching is not None:
            worked = watching.worked()
    except (BackendError, MemoryError) as exc:
        failed = _failed(exc)
        made = (Made(status=failed.status, error=failed.error),) * len(job.requests)
        return Answer(made=made, phase="generate", wall_s=time.perf_counter() - began)
    gpu = gpu_state()  # at once: clocks fall within milliseconds
    made = _encode_all(job.requests, generation)
    seen = None if watching is None else watching.after(worked, job.closes)
    wall_s = time.perf_counter() - began
    return Answer(
        made=made,
        phase=None if all(m.status is Status.OK for m in made) else "guard",
        timings=Timings(
            generate_s=watch.elapsed_s,
            encode_s=sum(m.encode_s for m in made if m.encode_s is not None),
            text_s=generation.text_s,
            denoise_s=generation.denoise_s,
            decode_s=generation.decode_s,
            step_s=generation.step_s,
        ),
        memory=memory(),
        effective_steps=generation.effective_steps,
        evaluations=generation.evaluations,
        flops=backend.flops(job.requests[0], generation.evaluations),
        gpu=gpu,
        wall_s=wall_s,
        surroundings=seen,
        started_at=started_at,
    )


def check_image(image: np.ndarray, request: Request) -> None:
    """Refuse what no metric should see.

    Raises: InvalidImage for a wrong type or size, a black or a constant image.
    """
    wanted = (request.height, request.width, 3)
    if image.dtype != np.uint8 or image.shape != wanted:
        raise InvalidImage(f"image is {image.dtype} {image.shape}, wanted uint8 {wanted}")
    low, high = int(image.min()), int(image.max())
    if high < CONSTANT_SPREAD:
        raise InvalidImage(f"image is black (highest level {high})")
    spread = int((image.max(axis=(0, 1)).astype(int) - image.min(axis=(0, 1))).max())
    if spread < CONSTANT_SPREAD:
        raise InvalidImage(f"image is constant (levels {low} to {high})")


def encode_image(image: np.ndarray, output_format: str, quality: int) -> bytes:
    """Encode uint8 RGB [H, W, 3] as png, jpg or webp (`quality` 0–100 for the last two)."""
    buffer = io.BytesIO()
    picture = Image.fromarray(image)
    if output_format == "png":  # level 6 takes 4 times as long for a tenth of the size
        picture.save(buffer, "PNG", compress_level=1)
    elif output_format == "jpg":
        picture.save(buffer, "JPEG", quality=quality)
    else:
        picture.save(buffer, "WEBP", quality=quality)
    return buffer.getvalue()


def _encode_all(requests: Sequence[Request], generation: Generation) -> tuple[Made, ...]:
    truncated = generation.truncated_tokens or (None,) * len(requests)
    made = []
    rows = zip(requests, generation.images, truncated, strict=True)
    for number, (request, image, tokens) in enumerate(rows):
        try:
            check_image(image, request)
        except InvalidImage as exc:
            made.append(Made(status=Status.INVALID_IMAGE, error=str(exc)))
            continue
        started = time.perf_counter()
        data = encode_image(image, request.output_format, request.output_quality)
        encode_s = time.perf_counter() - started
        made.append(
            Made(
                status=Status.OK,
                data=data,
                suffix=f".{request.output_format}",
                encode_s=encode_s,
                truncated_tokens=tokens,
                latents=_latents(generation, number),
            )
        )
    return tuple(made)


def _latents(generation: Generation, number: int) -> tuple[np.ndarray, np.ndarray] | None:
    """One image's latents after the first and the last step, if the backend kept them."""
    if generation.latents_first is None or generation.latents_last is None:
        return None
    return generation.latents_first[number], generation.latents_last[number]


def _failed(exc: BaseException) -> Failed:
    return Failed(status=_status_of(exc), error=f"{type(exc).__name__}: {exc}")


def _status_of(exc: BaseException) -> Status:
    kinds = {
        UnsupportedRequest: Status.UNSUPPORTED,
        OutOfMemory: Status.OUT_OF_MEMORY,
        MemoryError: Status.OUT_OF_MEMORY,
        InvalidImage: Status.INVALID_IMAGE,
    }
    return next((status for kind, status in kinds.items() if isinstance(exc, kind)), Status.ERROR)


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, however it ends."""
    if sys.platform == "linux":
        parent = int(os.environ["SD35BENCH_PARENT"])
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the line above
            os._exit(1)
    else:
        threading.Thread(target=_watch_parent, args=(os.getppid(),), daemon=True).start()


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


if __name__ == "__main__":
    # Pickled messages name classes of the module, not of __main__.
    from sd35bench.workers.worker import main as serve

    serve(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
    # The backend is closed and nothing is left to write: taking torch apart module by module would
    # hold the next worker up for another two seconds.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
