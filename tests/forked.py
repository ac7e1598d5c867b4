"""Work in a fork of the test's process, which has torch already: importing it takes 5 s of CPU."""

import multiprocessing
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

LOADS_TORCH = (
    *("torch", "torchvision", "torchmetrics", "diffusers", "transformers", "accelerate"),
    *("open_clip", "optimum", "safetensors.torch", "sd35_kernels"),
)


def in_fork(work: Callable[..., Any], *arguments: Any) -> Any:
    """What `work` returns in a fork; what it raises is printed there."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(theirs, work, arguments))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError as exc:
        raise AssertionError("the fork ended without an answer; stderr says why") from exc
    finally:
        process.join()


def _answer(wire: Connection, work: Callable[..., Any], arguments: tuple) -> None:
    wire.send(work(*arguments))


def forget(*packages: str) -> None:
    """Have these packages imported anew: only for a fork."""
    for name in [each for each in sys.modules if each.partition(".")[0] in packages]:
        del sys.modules[name]


def refuse_torch() -> None:
    """Import our modules anew, and raise where one imports torch or what loads it."""
    forget("sd35bench")
    for name in LOADS_TORCH:
        sys.modules[name] = None  # type: ignore[assignment]
