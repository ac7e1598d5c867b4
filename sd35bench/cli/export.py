"""`sd35bench export`: make an exported denoiser, prove it, and say where it is."""

from pathlib import Path
from typing import Any

from sd35bench import words
from sd35bench.cli.output import Answer, console
from sd35bench.cli.parser import Command, Given
from sd35bench.config import check_overrides, compose, freeze
from sd35bench.config.overrides import written
from sd35bench.disk import copy_atomic, is_full
from sd35bench.errors import BackendError, ConfigError, DiskFull, StoreError, nearest
from sd35bench.types import Load

KINDS = ("onnx", "openvino")


def export(given: Given) -> Answer:
    """Export, or find what was exported; prints where it is, how big, and its parity.

    Raises: ConfigError for wrong input, BackendError where the export fails.
    """
    output = _output(given)
    document = _made(_load(given))
    folder = Path(document["folder"])
    document["output"] = None if output is None else _copy(folder, output)
    console(given.as_json).say(*_lines(document))
    return Answer(document=document)


def _output(given: Given) -> Path | None:
    """The folder of ``output=FOLDER``. Raises: ConfigError for one that has something in it."""
    named = [text for text in given.settings if text.startswith("output=")]
    if not named:
        return None
    value = named[-1].partition("=")[2]
    output = Path(value).expanduser()
    if not value or (output.exists() and (not output.is_dir() or any(output.iterdir()))):
        raise ConfigError(f"{named[-1]}: give a folder that is new or empty")
    return output


def _load(given: Given) -> Load:
    """Compose and validate what `run` would load. Raises: ConfigError."""
    overrides = [text for text in given.settings if not text.startswith("output=")]
    if not any(text.startswith("backend=") for text in overrides):
        overrides = ["backend=onnx", *overrides]
    check_overrides(overrides, False, given.config_dir)
    load = freeze(compose(written(overrides), given.config_dir)).sweep.load
    if load.backend.kind not in KINDS:
        raise ConfigError(
            f"backend={load.backend.name}: it exports nothing; give onnx, onnx-int8, openvino or"
            f" openvino-int8{nearest(load.backend.name, KINDS)}"
        )
    return load


def _made(load: Load) -> dict[str, Any]:
    """Load the backend, which exports and proves; return what it says of the artifact."""
    from sd35bench.backends.base import load_backend

    try:
        backend = load_backend(load)
    except BackendError as exc:
        if is_full(exc.__cause__):
            raise DiskFull(str(exc)) from exc
        raise
    try:
        proven = backend.in_force
    finally:
        backend.close()
    artifact = proven["artifact"]
    folder = Path(artifact["folder"])
    files = {path.name: path.stat().st_size for path in sorted(folder.glob("model.*"))}
    return {
        "model": load.model.name,
        "backend": load.backend.name,
        **{key: artifact[key] for key in ("folder", "digest", "opset", "cached", "made_s")},
        "files": files,
        "bytes": sum(files.values()),
        "parity": proven["parity"],
        "quantised_layers": proven.get("quantised", {}).get("layers"),
        "versions": artifact["versions"],
    }


def _copy(folder: Path, output: Path) -> str:
    """Copy the model's files, the weights beside the graph that names them.

    Raises: DiskFull; ConfigError where the folder cannot be written.
    """
    try:
        for path in sorted(folder.glob("model.*")):
            copy_atomic(path, output / path.name)
    except DiskFull:
        raise
    except StoreError as exc:
        raise ConfigError(f"output={output}: {exc}") from exc
    return str(output)


def _lines(document: dict[str, Any]) -> list[str]:
    took = "found" if document["cached"] else f"exported in {words.number(document['made_s'], 1)} s"
    layers = document["quantised_layers"]
    lines = [
        f"{document['model']} for {document['backend']}: {took}, opset {document['opset']}",
        *(f"  {name}: {words.size_in(size, 'MB')}" for name, size in document["files"].items()),
        f"  in {document['folder']}",
    ]
    if layers is not None:
        lines.append(f"  {layers} layers in int8")
    lines.append(
        "  largest relative difference from PyTorch:"
        f" {words.scientific(document['parity']['relative_max'])}"
    )
    if document["output"] is not None:
        lines.append(f"  copied to {document['output']}")
    return lines


COMMANDS = {
    "export": Command(
        call=export,
        settings="[NAME=VALUE ...] [output=FOLDER]",
        about="""The graph is kept under ~/.cache/sd35bench/export (or $XDG_CACHE_HOME), by a digest
of weights, code and library versions; `run` finds it there, and makes it where it is missing.
Batch, image size and text length stay free. Patches and their position embeddings are its inputs.

Takes what `run` takes for the model and the backend, of which it must be an exporting one
(default backend=onnx). What was exported is loaded and held against PyTorch before it is
reported.""",
        examples="""
sd35bench export
    the embedded model for ONNX Runtime
sd35bench export model=nano backend=onnx-int8 output=nano-int8
    with int8 weights; a copy of model.onnx and its data goes to nano-int8/
sd35bench export model=sd35-medium model.path=models/sd35-medium backend=openvino
    a real checkpoint; fp32 takes 9 GB of disk
sd35bench export --json | jq .parity
""",
    )
}
