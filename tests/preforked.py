"""Python commands as forks of a process that has imported their modules: 0.1 s of CPU, not 2.

A test that kills, stops or restarts commands needs processes of its own, not their imports. With
`forks_of_python`, `subprocess` starts `python -m MODULE` and `python -c CODE` so; all else, and all
where there is no prctl(2), as ever. A fork is the test's own child: it was made by a child that
ended, while the test's process took orphans in. That Python starts our commands from nothing is
tested where this fixture is not used.

`forks_of_workers` starts the workers of the suite so, with what all of them import of others: 4
workers take 73 s of CPU until the first test, not 108.
"""

import atexit
import contextlib
import ctypes
import fcntl
import functools
import gc
import importlib
import io
import os
import pickle
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

ROOT = Path(__file__).parents[1]
PRELOADED = (
    *(f"sd35bench.cli.{name}" for name in ("run", "tune", "study", "compare", "serve")),
    *(f"sd35bench.workers.{name}" for name in ("worker", "process")),
    *("sd35bench.backends.fake", "sd35bench.server.serving", "sd35bench.remote.drive"),
    *("tests.studies.fakes", "tests.studies.in_process", "tests.remote.fault_server"),
    *("sd35bench.nano.prompts", "PIL.JpegImagePlugin", "PIL.PngImagePlugin", "pynvml"),
)
"""None of them loads torch; modules of their own commands run anew in each fork."""
COLLECTED = (
    *("numpy", "torch", "torch._dynamo", "scipy.stats", "omegaconf", "PIL.Image", "open_clip"),
    "schemathesis",
    "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3_img2img",
)
"""What of other packages a worker of the suite imports to collect its tests: 17 s of CPU."""
LARGEST = 1 << 18
ABOVE = 200
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER
POPEN = subprocess.Popen
started: list[int] = []
"""Every fork's number."""


class Fork(subprocess.Popen):
    """A `Popen` of a Python command that is forked where it can be."""

    @staticmethod
    def server() -> socket.socket:
        return _server("serve_commands")

    def _execute_child(self, args: Any, *rest: Any) -> None:
        if not _can_be_forked(args):
            super()._execute_child(args, *rest)  # type: ignore[misc]
            return
        _, _, _, pass_fds, cwd, env, _, _, _, *pipes = rest[:15]
        p2cread, _, _, c2pwrite, _, errwrite = pipes
        standard = [own if fd == -1 else fd for own, fd in enumerate((p2cread, c2pwrite, errwrite))]
        handles = tuple(map(int, pass_fds))
        ask = {
            "words": [os.fspath(word) for word in args[1:]],
            "cwd": os.getcwd() if cwd is None else os.fspath(cwd),
            "environment": dict(os.environ if env is None else env),
            "places": [0, 1, 2, *handles],
            "parent": os.getpid(),
        }
        self.pid = _ask(self.server(), pickle.dumps(ask), [*standard, *handles])
        started.append(self.pid)
        self._child_created = True
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]


def _can_be_forked(args: Any) -> bool:
    if sys.platform != "linux" or not isinstance(args, Sequence) or args[0] != sys.executable:
        return False
    words = [word for word in args[1:3] if word not in ("-P", "-u")]
    return bool(words) and words[0] in ("-m", "-c")


_asking = threading.Lock()


def _ask(wire: socket.socket, message: bytes, fds: Sequence[int]) -> int:
    """Have a fork made; it is a child of this process when this returns its number."""
    prctl = ctypes.CDLL(None).prctl
    with _asking:
        prctl(SUBREAPER, 1, 0, 0, 0)
        try:
            socket.send_fds(wire, [message], list(fds))
            return int(wire.recv(64))
        finally:
            prctl(SUBREAPER, 0, 0, 0, 0)


@functools.cache
def _server(kind: str) -> socket.socket:
    """The wire to the process that has imported everything; it ends when the wire is closed."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * LARGEST)
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tests import preforked; "
    with theirs:
        POPEN(
            [sys.executable, "-c", f"{code}preforked.{kind}({theirs.fileno()})"],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
        )
    return ours


@contextlib.contextmanager
def forks_of_python() -> Iterator[None]:
    """Have `subprocess` fork Python commands."""
    _server("serve_commands")
    with _started_by(Fork):
        yield


@contextlib.contextmanager
def _started_by(kind: type[subprocess.Popen]) -> Iterator[None]:
    own = subprocess.Popen
    subprocess.Popen = kind  # type: ignore[misc]
    try:
        yield
    finally:
        subprocess.Popen = own  # type: ignore[misc]


class WorkerFork(Fork):
    """A worker of the suite; the first imports by itself, while what forks the others does so."""

    first: ClassVar[list[int]] = []

    @staticmethod
    def server() -> socket.socket:
        return _server("serve_workers")

    def _execute_child(self, args: Any, *rest: Any) -> None:
        if self.first:
            super()._execute_child(args, *rest)
            return
        POPEN._execute_child(self, args, *rest)  # type: ignore[attr-defined]
        self.first.append(self.pid)
        self.server()


@contextlib.contextmanager
def forks_of_workers() -> Iterator[None]:
    """Have `subprocess` fork what pytest-xdist starts, with torch and diffusers imported."""
    if sys.platform != "linux":
        yield
        return
    with _started_by(WorkerFork):
        yield
    if WorkerFork.first:
        WorkerFork.server().close()


# In the process that forks -----------------------------------------------------------------------


def serve_commands(handle: int) -> None:
    """Import what our commands need, and fork them."""
    for name in PRELOADED:
        importlib.import_module(name)
    main = sys.modules["sd35bench.cli"].main
    with contextlib.redirect_stdout(io.StringIO()):  # what the configuration comes to is kept
        main(["run", "backend=fake", "study=none", "prompts.limit=1", "--dry-run"])
    os.fsync = lambda handle: None  # as in the tests' own process
    _serve(handle)


def serve_workers(handle: int) -> None:
    """Import what collecting the tests needs, and fork workers of pytest-xdist."""
    for name in COLLECTED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    if not sys.dont_write_bytecode:
        with contextlib.suppress(AttributeError, TypeError):  # of another version of pytest
            _compile_from_the_end()
    _serve(handle)


def _compile_from_the_end() -> None:
    """Write the bytecode that pytest makes of our modules, while the first worker is at the others.

    In a fresh clone every worker would take 20 s of CPU for it, all at the same time.
    """
    from _pytest.assertion import rewrite

    tests = [path for path in ROOT.glob("tests/**/*.py") if path.name[:5] in ("test_", "conft")]
    for path in [*sorted(tests, reverse=True), *ROOT.glob("sd35bench/**/*.py")]:
        bytecode = rewrite.get_cache_dir(path) / f"{path.stem}{rewrite.PYC_TAIL}"
        if not bytecode.exists():
            digest, code = rewrite._rewrite_test(path, None)  # type: ignore[arg-type]
            bytecode.parent.mkdir(exist_ok=True)
            rewrite._write_pyc(None, code, digest, bytecode)  # type: ignore[arg-type]


def _serve(handle: int) -> None:
    """Fork for every message on the wire, until it is closed."""
    gc.collect()
    gc.freeze()
    with socket.socket(fileno=handle) as wire:
        while True:
            message, fds, _, _ = socket.recv_fds(wire, LARGEST, 64)
            if not message:
                return
            wire.send(str(_forked(wire, pickle.loads(message), fds)).encode())
            for fd in fds:
                os.close(fd)


def _forked(wire: socket.socket, ask: Mapping[str, Any], fds: Sequence[int]) -> int:
    """Fork twice; the child of the child that ends is taken in by the process that asked."""
    out, back = os.pipe()
    child = os.fork()
    if not child:
        grandchild = os.fork()
        if not grandchild:
            wire.close()
            _become(ask, fds)
        os.write(back, str(grandchild).encode())
        os._exit(0)
    os.close(back)
    os.waitpid(child, 0)
    with open(out) as told:
        return int(told.read())


def _become(ask: Mapping[str, Any], fds: Sequence[int]) -> None:
    """Be the process that was asked for."""
    code = 1
    try:
        while os.getppid() != ask["parent"]:
            time.sleep(0.0005)
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, ABOVE) for fd in fds]
        os.closerange(3, ABOVE)
        for fd, place in zip(high, ask["places"], strict=True):
            os.dup2(fd, place)
            os.close(fd)
        os.chdir(ask["cwd"])
        os.environ.clear()
        os.environ.update(ask["environment"])
        tempfile.tempdir = None
        sys.stdin, sys.stdout = _stream(0, "r"), _stream(1, "w")
        sys.stderr = _stream(2, "w", buffering=1, errors="backslashreplace")
        code = _run(list(ask["words"]), ask["cwd"])
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _stream(handle: int, mode: str, **how: Any) -> Any:
    """A standard stream, as Python makes it at its start."""
    return open(handle, mode, closefd=False, **how)


def _run(words: list[str], cwd: str) -> int:
    """Run `[-P|-u] -m MODULE …` or `[-P|-u] -c CODE …`; returns the exit code."""
    own = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [cwd, *filter(None, own)]
    if words[0] == "-P":
        sys.path.pop(0)
    if words[0] in ("-P", "-u"):
        words = words[1:]
    kind, what, *rest = words
    sys.argv = [kind, *rest]
    try:
        if kind == "-m":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # "found in sys.modules": that is the point
                runpy._run_module_as_main(what)  # type: ignore[attr-defined]
        else:
            exec(compile(what, "<string>", "exec"), sys.modules["__main__"].__dict__)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
