"""The command line: verbs, flags, exit codes; no logic of its own.

`main` parses, calls one verb and turns errors into exit codes. With ``--json`` exactly one JSON
document goes to stdout and everything else to stderr.
"""

import contextlib
import json
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from sd35bench.cli.output import Answer
from sd35bench.errors import (
    ConfigError,
    DiskFull,
    MetricError,
    Paused,
    SD35BenchError,
    StudyLocked,
)

__all__ = ["main"]

DONE, WRONG_INPUT, RESUMABLE, OTHER = 0, 2, 3, 4

USAGE = """sd35bench: which settings of Stable Diffusion 3.5, at what latency and quality

Usage: sd35bench VERB ...

  run         make images: one point, a grid (-m), or a stored experiment
  score       compute metrics for a study's images
  show        a study's settings as a table
  recommend   steps, cfg and prompt_strength per profile, with the evidence
  tune        adaptive search instead of a grid
  claims      what the vendor's page says, each with a verdict on a study
  compare     a candidate against a baseline: the gate
  baseline    the small file that a gate is held against
  report      one self-contained HTML file
  reference   what set metrics are held against, computed once
  serve       the hosted prediction protocol over a local backend
  export      the denoiser as an ONNX graph, kept for the onnx and openvino backends
  doctor      what works on this machine, and what to install

`sd35bench VERB --help` explains each with examples. Every verb takes --json.

To start:
  sd35bench run -m steps=4,16,28 cfg=1,4 prompts.limit=8 study=first
  sd35bench show first
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code: 0 done, 2 wrong input, 3 resumable, 4 other."""
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = [text for text in given if text != "--json"]
    as_json = len(arguments) < len(given)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
        return DONE if arguments else WRONG_INPUT
    if arguments[0] == "--version":
        print(_version())
        return DONE
    try:
        with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
            answer = _verb(arguments[0])(arguments[1:], as_json)
    except SD35BenchError as exc:
        return _failed(exc, _exit_code(exc), as_json)
    except KeyboardInterrupt as exc:
        return _failed(exc, RESUMABLE, as_json)
    except SystemExit as exc:  # argparse's --help
        return exc.code if isinstance(exc.code, int) else DONE
    except BrokenPipeError:
        return OTHER
    except Exception as exc:
        traceback.print_exc()
        return _failed(exc, OTHER, as_json)
    if as_json and answer.document is not None:
        print(json.dumps(answer.document, allow_nan=False))
    return answer.exit_code


def _verb(name: str) -> Callable[[list[str], bool], Answer]:
    """Find a verb; its module is imported only now, so that --help and refusals are quick."""
    if name == "run":
        from sd35bench.cli.run import run

        return run
    if name == "doctor":
        from sd35bench.cli.doctor import doctor

        return doctor
    if name == "export":
        from sd35bench.cli.export import export

        return export
    if name == "serve":
        from sd35bench.cli.serve import serve

        return serve
    if name == "tune":
        from sd35bench.cli.tune import tune

        return tune
    if name == "compare":
        from sd35bench.cli.compare import compare

        return compare
    if name == "baseline":
        from sd35bench.cli.baseline import baseline

        return baseline
    if name == "reference":
        from sd35bench.cli.reference import reference

        return reference
    from sd35bench.cli.study import VERBS

    if name not in VERBS:
        from sd35bench.config.fields import nearest

        known = ["run", *VERBS, "tune", "compare", "baseline", "serve", "export", "doctor"]
        raise ConfigError(f"unknown verb {name!r}{nearest(name, known)}; see sd35bench --help")
    return VERBS[name]


def _exit_code(exc: SD35BenchError) -> int:
    if isinstance(exc, StudyLocked | DiskFull | Paused):
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
        print(json.dumps(document))
    return code


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"sd35bench {version('sd35bench')}"
    except PackageNotFoundError:
        return "sd35bench (not installed)"
