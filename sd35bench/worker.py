"""The process that holds one loaded backend and answers batches, timed between synchronisations.

Started as ``python -m sd35bench.worker FD`` by `run.py`, which talks to it over a socket pair and
alone writes to the store. The worker dies with its parent. Messages to it are `Job`s (or ``None``
to end); it answers with `Ready` once, then an `Answer` per job. Every time is wall time with the
device synchronised before and after; reading init images and encoding files lie outside
`generate_s`, and encoding is timed by itself.
"""

import contextlib
import ctypes
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sd35bench.backends.base import Backend, Generation, load_backend
from sd35bench.errors import BackendError, InvalidImage, OutOfMemory, UnsupportedRequest
from sd35bench.measure import Stopwatch, environment, environment_id, memory
from sd35bench.store import decode_rgb
from sd35bench.types import Load, Memory, Request, Scalar, Status, Timings

__all__ = ["Answer", "Job", "LoadFailed", "Made", "Ready", "encode_image"]

PR_SET_PDEATHSIG = 1
SUFFIXES = {"png": ".png", "jpg": ".jpg", "webp": ".webp"}
# Below this spread of 8-bit levels over the whole image nothing is shown: a constant image.
CONSTANT_SPREAD = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One batch: requests of one setting and size, and the paths of their init images."""

    requests: tuple[Request, ...]
    inits: tuple[str | None, ...]
    keep: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """The backend is loaded; what it proved and where it runs."""

    load_s: float
    in_force: dict[str, Any]
    environment: dict[str, Scalar]
    environment_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadFailed:
    """The backend could not be loaded."""

    status: Status
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """One image of a batch: its file, or why there is none."""

    status: Status
    data: bytes = b""
    suffix: str = ".png"
    error: str | None = None
    encode_s: float | None = None
    truncated_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What became of a job; `phase` is where a failure happened."""

    made: tuple[Made, ...]
    phase: str | None = None
    timings: Timings | None = None
    memory: Memory | None = None
    effective_steps: int | None = None
    evaluations: int | None = None
    wall_s: float = field(default=0.0)


def main(handle: int) -> None:
    """Serve one parent until it says stop or goes away."""
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    with Connection(handle) as connection:
        load: Load = connection.recv()
        started = time.perf_counter()
        try:
            backend = load_backend(load)
        except (BackendError, MemoryError) as exc:
            connection.send(LoadFailed(status=_status_of(exc), error=_text(exc)))
            return
        backend.synchronize()
        load_s = time.perf_counter() - started
        where = environment(threads=load.threads)
        connection.send(
            Ready(
                load_s=load_s,
                in_force=backend.in_force,
                environment=where,
                environment_id=environment_id(where),
            )
        )
        with contextlib.suppress(EOFError), contextlib.closing(backend):
            while (job := connection.recv()) is not None:
                connection.send(answer(backend, job))


def answer(backend: Backend, job: Job) -> Answer:
    """Run one batch; failures become statuses, programming errors propagate."""
    began = time.perf_counter()
    inits = [None if path is None else decode_rgb(Path(path).read_bytes()) for path in job.inits]
    try:
        with Stopwatch(backend.synchronize) as watch:
            generation = backend.generate(job.requests, inits)
    except (BackendError, MemoryError) as exc:
        failed = Made(status=_status_of(exc), error=_text(exc))
        return Answer(made=(failed,) * len(job.requests), phase="generate")
    made = _encode_all(job.requests, generation)
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
        wall_s=time.perf_counter() - began,
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
    if output_format == "png":
        picture.save(buffer, "PNG", compress_level=1)
    elif output_format == "jpg":
        picture.save(buffer, "JPEG", quality=quality)
    else:
        picture.save(buffer, "WEBP", quality=quality)
    return buffer.getvalue()


def _encode_all(requests: Sequence[Request], generation: Generation) -> tuple[Made, ...]:
    truncated = generation.truncated_tokens or (None,) * len(requests)
    made = []
    for request, image, tokens in zip(requests, generation.images, truncated, strict=True):
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
                suffix=SUFFIXES[request.output_format],
                encode_s=encode_s,
                truncated_tokens=tokens,
            )
        )
    return tuple(made)


def _status_of(exc: BaseException) -> Status:
    kinds = {
        UnsupportedRequest: Status.UNSUPPORTED,
        OutOfMemory: Status.OUT_OF_MEMORY,
        MemoryError: Status.OUT_OF_MEMORY,
        InvalidImage: Status.INVALID_IMAGE,
    }
    return next((status for kind, status in kinds.items() if isinstance(exc, kind)), Status.ERROR)


def _text(exc: BaseException) -> str:
    return f"{type(exc).__name__}: {exc}"


def _die_with_parent() -> None:
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
    from sd35bench.worker import main as serve

    serve(int(sys.argv[1]))
