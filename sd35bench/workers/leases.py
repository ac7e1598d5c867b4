"""Exclusive use of a GPU or of cores while a trial is timed, across all our processes of one user.

Kernel locks on files of a per-user folder of this machine: they end with their process, so none can
be stale. What is timed holds its resources alone; what is not (loading, quality batches) shares
them with its like, so that nothing of ours computes where something is timed. Each resource has two
files: who wants it takes the gate first, so that a stream of sharers cannot keep a timed trial
waiting, nor one run another. Resources are taken in one order, so that two runs cannot wait for
each other. A trial takes and gives back for 3 µs a resource.

Another user, another container or another host has another folder, and is not kept out: trials that
overlapped all the same are found in the records (`sd35bench.machine.contention`).
"""

import contextlib
import fcntl
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from sd35bench.disk import open_lock, try_flock
from sd35bench.errors import StoreError

VARIABLE = "SD35BENCH_LEASES"
"""The folder of the locks, or "off"."""
SAY_S = 10.0


def lease_folder() -> Path | None:
    """The folder of this user's locks, made if need be; ``None`` where there can be none.

    The variable's, else /run/user/UID, else one in /tmp: fixed places, as TMPDIR differs between
    the shells of one user. A folder that belongs to somebody else is not trusted.
    """
    given, uid = os.environ.get(VARIABLE), os.getuid()
    if given == "off":
        return None
    runtime = Path(f"/run/user/{uid}")
    usual = runtime / "sd35bench" if os.access(runtime, os.W_OK) else Path(f"/tmp/sd35bench-{uid}")
    folder = usual if given is None else Path(given)
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, parents=given is not None, exist_ok=True)
        found = folder.lstat()
        if found.st_uid == uid and folder.is_dir() and not folder.is_symlink():
            return folder
    return None


class Lease:
    """One worker's resources, by name; the files stay open as long as it lives."""

    def __init__(self, names: Sequence[str] = ()) -> None:
        """No name, no folder: nothing is held, and `is_honoured` is False where there are names."""
        self.names = tuple(sorted(names))
        self._stack = contextlib.ExitStack()
        self._pairs: list[tuple[int, int]] = []
        folder = lease_folder() if names else None
        if folder is None:
            return
        with contextlib.suppress(StoreError):
            for name in self.names:
                paths = (folder / f"{name}.gate", folder / f"{name}.lock")
                gate, lock = (self._stack.enter_context(open_lock(path)) for path in paths)
                self._pairs.append((gate, lock))

    @property
    def is_honoured(self) -> bool:
        """Whether every resource has a lock."""
        return len(self._pairs) == len(self.names)

    @contextlib.contextmanager
    def hold(self, *, alone: bool) -> Iterator[None]:
        """Hold all resources, alone or with others that do not time; waits until they are free."""
        mode = fcntl.LOCK_EX if alone else fcntl.LOCK_SH
        taken: list[int] = []
        try:
            for name, (gate, lock) in zip(self.names, self._pairs, strict=False):
                _take(gate, fcntl.LOCK_EX, name)
                try:
                    _take(lock, mode, name)
                    taken.append(lock)
                finally:
                    fcntl.flock(gate, fcntl.LOCK_UN)
            yield
        finally:
            for lock in reversed(taken):
                fcntl.flock(lock, fcntl.LOCK_UN)

    def close(self) -> None:
        """Give the files back; safe to call twice."""
        self._pairs = []
        self.names = ()
        self._stack.close()


@contextlib.contextmanager
def claim_cores(count: int) -> Iterator[tuple[int, ...] | None]:
    """Keep `count` cores for a worker's life, none that another claim of this user has.

    ``None``, so that it is not pinned, where so many are not free or cannot be claimed.
    """
    folder = lease_folder()
    with contextlib.ExitStack() as stack:
        mine: list[int] = []
        for core in sorted(os.sched_getaffinity(0)):
            if folder is None or len(mine) == count:
                break
            with contextlib.suppress(StoreError):
                handle = stack.enter_context(open_lock(folder / f"core-{core}.claim"))
                if try_flock(handle, fcntl.LOCK_EX):
                    mine.append(core)
        yield tuple(mine) if len(mine) == count else None


def _take(handle: int, mode: int, name: str) -> None:
    """Take a lock, and say on stderr what a long wait is for."""
    if try_flock(handle, mode):
        return
    timer = threading.Timer(SAY_S, _say, (name,))
    timer.daemon = True
    timer.start()
    try:
        fcntl.flock(handle, mode)
    finally:
        timer.cancel()


def _say(name: str) -> None:
    print(f"waiting for {name}: another run of yours works there", file=sys.stderr, flush=True)
