"""Data-parallel training on the cores of one CPU: one single-threaded process per core.

Two processes of one thread beat one process of two threads here: a small network's operators
are short, every one of them ends in a thread barrier, and on a busy machine each barrier waits for
whichever thread was descheduled. Processes meet once a step, to average gradients (4 bytes a
parameter through loopback).
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import parent_process
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn


def run_team(workers: int, work: Callable[..., None], *args: Any) -> None:
    """Call `work(*args)` in `workers` processes that can average and share; in this one if 1."""
    if workers == 1:
        work(*args)
        return
    with TemporaryDirectory() as folder:
        spawn(_member, (workers, Path(folder) / "meeting", work, args), nprocs=workers)


def _member(
    rank: int, workers: int, meeting: Path, work: Callable[..., None], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    Thread(target=_end_with_parent, daemon=True).start()
    dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=workers)
    try:
        work(*args)
    finally:
        dist.destroy_process_group()


def _end_with_parent() -> None:
    """Leave no orphan that goes on training: a killed parent takes its team with it."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def rank() -> int:
    """Return this process's number in the team, 0 where there is none."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def in_turn() -> Iterator[None]:
    """Run a `with` body on one member after the other, so that the first one's files are found."""
    for turn in range(size()):
        if turn == rank():
            yield
        if size() > 1:
            dist.barrier()


def average_gradients(parameters: list[Tensor]) -> None:
    """Replace each gradient by its mean over the team."""
    if size() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat)
    flat /= size()
    _scatter(flat, gradients)


def share(shards: list[list[Tensor]]) -> None:
    """Give everyone each member's values of the shard that it owns: `shards[rank]`."""
    if size() == 1:
        return
    for owner, tensors in enumerate(shards):
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
        dist.broadcast(flat, owner)
        if owner != rank():
            _scatter(flat, tensors)


def gather(value: Any) -> list[Any] | None:
    """Everyone's value, in order, on rank 0; None elsewhere."""
    if size() == 1:
        return [value]
    gathered: list[Any] | None = [None] * size() if rank() == 0 else None
    dist.gather_object(value, gathered)
    return gathered


@torch.no_grad()
def _scatter(flat: Tensor, tensors: list[Tensor]) -> None:
    parts = flat.split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))
