"""More weights than a protobuf can hold: the true width, seven blocks, 2.6 GB in fp32."""

from typing import Any

import pytest

from sd35bench.backends.eager import EagerBackend
from sd35bench.backends.onnx_runtime import OnnxBackend
from sd35bench.types import BackendSpec, Load, ModelSpec, Request
from tests.backends.exported import PARITY, latents_error, make

PROTOBUF_LIMIT_BYTES = 2**31
REQUEST = Request(prompt="a", steps=1, cfg=5.0, seed=0, width=256, height=128)


def load(kind: str, **options: Any) -> Load:
    model = ModelSpec(
        name="sd35-medium",
        path="",
        weights_digest="seven blocks of noise",
        max_sequence_length=77,
        weights="random",
        layers=7,
        text_encoders=False,
    )
    return Load(
        model=model,
        backend=BackendSpec(name=kind, kind=kind, options={"device": "cpu", **options}),
        threads=1,
    )


@pytest.mark.slow
def test_more_than_two_gigabytes_are_exported() -> None:
    eager = EagerBackend(load("eager"))
    wanted = make(eager, [REQUEST])
    eager.close()
    del eager
    for _ in ("exported", "found"):
        onnx = OnnxBackend(load("onnx"))
        folder = onnx._artifact.folder
        assert (folder / "model.onnx.data").stat().st_size > PROTOBUF_LIMIT_BYTES
        assert (folder / "model.onnx").stat().st_size < 5e6
        assert latents_error(make(onnx, [REQUEST]), wanted) <= PARITY
        onnx.close()
    assert onnx.in_force["artifact"]["cached"]
    int8 = OnnxBackend(load("onnx", quantisation="int8"))
    assert int8.in_force["quantised"]["layers"] > 50
    assert latents_error(make(int8, [REQUEST]), wanted) > PARITY
    int8.close()
