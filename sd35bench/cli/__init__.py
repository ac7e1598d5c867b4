"""The command line: verbs, flags, exit codes; no logic of its own.

`main` parses, calls one verb and turns errors into exit codes. With ``--json`` exactly one JSON
document goes to stdout and everything else to stderr.
"""

import contextlib
import json
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from importlib import import_module
from types import FrameType
from typing import Any

from sd35bench import plugins
from sd35bench.cli.output import (
    DONE,
    OTHER,
    RESUMABLE,
    WRONG_INPUT,
    Answer,
    console,
    loudness,
    write_line,
    write_plainly,
)
from sd35bench.cli.parser import Command, help_text, parse
from sd35bench.errors import (
    ConfigError,
    DiskFull,
    MetricError,
    Paused,
    SD35BenchError,
    StudyGone,
    StudyLocked,
    nearest,
)

VERBS = {
    "run": ("run", "make images: one setting, a grid (-m), or a stored experiment"),
    "score": ("study", "compute the metrics of a study's images"),
    "show": ("study", "print a study's settings: latency, quality, memory"),
    "recommend": ("study", "name the setting to use, for previews, every day and finals"),
    "tune": ("tune", "search for a setting with fewer images than a grid takes"),
    "claims": ("study", "test what the vendor's page says of its model on a study"),
    "compare": ("compare", "hold a study against a baseline: did anything get worse?"),
    "baseline": ("compare", "write the small file that compare takes as its baseline"),
    "report": ("study", "write a study as one HTML file: charts, images, the choice"),
    "data": ("data", "write settings, images and pairs as CSV, Parquet or a folder of images"),
    "reference": ("reference", "compute once what FID, KID and CMMD compare images with"),
    "serve": ("serve", "serve a local model over the hosted prediction API"),
    "export": ("export", "export the denoiser for the onnx and openvino backends"),
    "list": ("studies", "list the studies of a results folder: images, failures, size, cost"),
    "rm": ("studies", "remove studies with all their files"),
    "merge": ("studies", "unite studies of several machines in one"),
    "clean": ("studies", "find image files that no record names, or move them away"),
    "verify": ("studies", "check that a study's files are there and whole; exit code 1 if not"),
    "contract": ("contract", "check on your own backend what every backend must do"),
    "completion": ("completion", "print the script with which bash, zsh or fish complete"),
    "doctor": ("doctor", "say what works on this machine, and what to install"),
}
"""All verbs: the module of this package that has its `Command` in `COMMANDS`, and its meaning."""

USAGE = """sd35bench: which settings of Stable Diffusion 3.5, at what latency and quality

Usage: sd35bench VERB ...

{verbs}

A study is a named folder of images and what was measured, results/NAME: `run study=NAME` fills it,
the other verbs read it. A setting is steps, cfg, backend and all else that a request asks for.

`sd35bench VERB --help` explains each with examples. Every verb takes --json.

To start:
  sd35bench run -m steps=4,16,28 cfg=1,4 prompts.limit=8 study=first
  sd35bench show first
  sd35bench recommend first
  sd35bench report first
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code: 0 done, 2 wrong input, 3 resumable, 4 other."""
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = [text for text in given if text != "--json"]
    as_json = len(arguments) < len(given)
    for stream in (sys.stdout, sys.stderr):
        write_plainly(stream)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        write_line(USAGE.format(verbs="\n".join(f"  {v:<11} {m}" for v, (_, m) in VERBS.items())))
        return DONE if arguments else WRONG_INPUT
    if arguments[0] == "--version":
        write_line(_version())
        return DONE
    try:
        quiet = contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()
        with quiet, _ended_as_by_ctrl_c():
            found = answer(arguments[0], arguments[1:], as_json)
    except SD35BenchError as exc:
        return _failed(exc, _exit_code(exc), as_json)
    except KeyboardInterrupt as exc:
        return _failed(exc, RESUMABLE, as_json)
    except Exception as exc:
        traceback.print_exc()
        return _failed(exc, OTHER, as_json)
    if as_json and found.document is not None:
        write_line(json.dumps(found.document, allow_nan=False))
    return found.exit_code


@contextlib.contextmanager
def _ended_as_by_ctrl_c() -> Iterator[None]:
    """Let SIGTERM end a verb as Ctrl-C does: Slurm, Docker and `timeout` send it.

    It is turned into SIGINT, whose handler may be asyncio's; where SIGINT is ignored, as in a
    shell's background jobs, it is raised here.
    """

    def end(_: int, __: FrameType | None) -> None:
        if not callable(signal.getsignal(signal.SIGINT)):
            raise KeyboardInterrupt
        signal.raise_signal(signal.SIGINT)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def answer(verb: str, arguments: Sequence[str], as_json: bool = True) -> Answer:
    """Run one verb and return what it found; errors are raised. Raises: SD35BenchError."""
    command = _command(verb)
    given = parse(verb, command, arguments, as_json)
    plugins.use_folder(given.text("--plugin-dir"))
    plugins.keep_flags(given.text("--config-dir"), given.text("--plugin-dir"))
    extra = given.config_dir
    if given.has("--help"):
        text = help_text(verb, VERBS[verb][1], command, extra)
        console().say(text)
        return Answer()
    with loudness(given):
        if not given.has("--sink"):
            return command.call(given)
        from sd35bench.cli import sinks

        names = sinks.named(given)  # a wrong one is refused before the verb begins
        return sinks.sent(given, command.call(given), names)


def _command(verb: str) -> Command:
    """Find a verb; its module is imported only now, so that help and refusals are fast."""
    if verb not in VERBS:
        raise ConfigError(
            f"unknown verb {verb!r}{nearest(verb, list(VERBS))}; see sd35bench --help"
        )
    return import_module(f"sd35bench.cli.{VERBS[verb][0]}").COMMANDS[verb]


def _exit_code(exc: SD35BenchError) -> int:
    if isinstance(exc, StudyLocked | StudyGone | DiskFull | Paused):
        return RESUMABLE
    if isinstance(exc, ConfigError | MetricError):
        return WRONG_INPUT
    return OTHER


def _failed(exc: BaseException, code: int, as_json: bool) -> int:
    message = str(exc)
    if isinstance(exc, KeyboardInterrupt):
        message = "interrupted; what was finished is kept, the same command goes on"
    print(f"sd35bench: {message}", file=sys.stderr)
    if as_json:
        document: dict[str, Any] = {"error": {"type": type(exc).__name__, "message": message}}
        write_line(json.dumps(document))
    return code


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"sd35bench {version('sd35bench')}"
    except PackageNotFoundError:
        return "sd35bench (not installed)"
