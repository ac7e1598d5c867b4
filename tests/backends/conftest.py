"""Checkpoints and requests that the backends' tests share."""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.backends.registry import lookup_backend

from sd35bench.backends import compile as compiled
from sd35bench.backends.eager import EagerBackend
from sd35bench.backends.onnx_runtime import OnnxBackend
from sd35bench.export import artifact, onnx_model
from sd35bench.export.artifact import Artifact
from sd35bench.loading.checkpoint import weights_digest
from sd35bench.types import BackendSpec, Load, ModelSpec, Request
from tests.kept_models import kept_models
from tests.studies.tiny import TOKENS, write_tiny_sd3

__all__ = ["kept_models"]
NANO = Path(__file__).parents[2] / "sd35bench" / "nano" / "weights"


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_sd3(tmp_path_factory.mktemp("tiny") / "sd3")


@contextmanager
def captured_only() -> Iterator[None]:
    """Run Dynamo's graphs as they were captured, where `aot_eager` is asked for.

    Tracing the tiny transformer once more for AOT takes three quarters of its compilation; the
    bookkeeping and the images are the same. The contract's `compile-traced` goes the whole way.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "lookup_backend", lambda _: lookup_backend("eager"))
        yield


@contextmanager
def untraced() -> Iterator[None]:
    """Give each region of a backend that is loaded in here its function as it is for a graph.

    There is one graph a signature, as with static shapes, but no Dynamo: capturing the tiny
    transformer and its VAE takes 3 s a shape on an idle machine. What the regions count and refuse
    is the same; that Dynamo can capture them is tested elsewhere.
    """

    def compile_nothing(function: Any, *, backend: Any, **_: Any) -> Callable[..., Any]:
        graphs: dict[Any, Callable[[], Any]] = {}
        given: list[Any] = []

        def call(*args: Any, **kwargs: Any) -> Any:
            given[:] = [args, kwargs]
            key = compiled._signature(args), compiled._signature(kwargs)
            if key not in graphs:
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(compiled, "lookup_backend", lambda _: lambda graph, _: graph)
                    graphs[key] = backend(lambda: function(*given[0], **given[1]), [])
            return graphs[key]()

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", compile_nothing)
        yield


@lru_cache
def _digest(path: Path) -> str:
    return weights_digest(path) if path.exists() else "none"


def make_load(path: Path, kind: str = "eager", tokens: int = TOKENS, **options: Any) -> Load:
    """A load of the checkpoint at `path` on one thread."""
    return Load(
        model=ModelSpec(
            name="tiny", path=str(path), weights_digest=_digest(path), max_sequence_length=tokens
        ),
        backend=BackendSpec(name=kind, kind=kind, options=options),
        threads=1,
    )


def make_request(**changes: Any) -> Request:
    """A small text-to-image request, or one with `changes`."""
    fields: dict[str, Any] = {
        "prompt": "red circle",
        "steps": 4,
        "cfg": 4.0,
        "seed": 0,
        "width": 64,
        "height": 32,
    }
    return Request(**{**fields, **changes})


@pytest.fixture(scope="module")
def eager(tiny_path: Path) -> Iterator[EagerBackend]:
    backend = EagerBackend(make_load(tiny_path))
    yield backend
    backend.close()


@pytest.fixture
def fresh(tiny_path: Path) -> Iterator[EagerBackend]:
    """A backend that a test may break."""
    backend = EagerBackend(make_load(tiny_path))
    yield backend
    backend.close()


Loads = Callable[..., Load]


@pytest.fixture(scope="session")
def load(tiny_path: Path) -> Loads:
    """Makes loads of the tiny checkpoint: `load("onnx", device="cpu")`."""
    return partial(make_load, tiny_path)


@pytest.fixture(scope="session")
def tiny_graph(load: Loads) -> Artifact:
    """The tiny denoiser's exported graph, made once for all workers.

    Exporting takes 15 s, so whoever needs a graph takes this one. What the exporter says on the
    terminal is in `told.txt` in the folder of all artifacts.
    """
    export_graph = onnx_model.export_graph

    def overheard(transformer: Any, path: Path) -> None:
        told = io.StringIO()
        with redirect_stdout(told), redirect_stderr(told):
            export_graph(transformer, path)
        (artifact.artifact_root() / "told.txt").write_text(told.getvalue())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_model, "export_graph", overheard)
        backend = OnnxBackend(load("onnx", device="cpu"))
    backend.close()
    return backend._artifact
