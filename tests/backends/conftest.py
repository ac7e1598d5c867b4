"""Checkpoints and requests that the backends' tests share."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch._dynamo.backends.registry import lookup_backend

from sd35bench.backends import compiled
from sd35bench.backends.eager import EagerBackend
from sd35bench.types import BackendSpec, Load, ModelSpec, Request
from tests.studies.tiny import TOKENS, write_tiny_sd3

NANO = Path(__file__).parents[2] / "sd35bench" / "nano" / "weights"


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_sd3(tmp_path_factory.mktemp("tiny") / "sd3")


@contextmanager
def captured_only() -> Iterator[None]:
    """Run Dynamo's graphs as they were captured, where `aot_eager` is asked for.

    Tracing the tiny transformer once more for AOT takes three quarters of its compilation; the
    bookkeeping and the images are the same. The contract's `compile` goes the whole way.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "lookup_backend", lambda _: lookup_backend("eager"))
        yield


def make_load(path: Path, kind: str = "eager", tokens: int = TOKENS, **options: Any) -> Load:
    """A load of the checkpoint at `path` on one thread."""
    return Load(
        model=ModelSpec(
            name="tiny", path=str(path), weights_digest="tests", max_sequence_length=tokens
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
