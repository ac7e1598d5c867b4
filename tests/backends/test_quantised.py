"""What the int8 backends must prove, and that they refuse what they cannot."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sd35_kernels import W8A8Linear
from sd35_kernels.w8a8.cpu import EXACT
from sd35bench.backends import int8 as int8_module
from sd35bench.backends.base import backend_class
from sd35bench.backends.eager import EagerBackend
from sd35bench.backends.int8 import Int8Backend
from sd35bench.backends.quantised import EXCLUDED, choose_layers
from sd35bench.backends.w8a8 import W8A8Backend
from sd35bench.errors import BackendError, OptimizationNotApplied
from tests.backends.conftest import make_load, make_request, untraced

pytestmark = pytest.mark.skipif(not EXACT, reason="this CPU's int8 products saturate: no VNNI")
AOT = {"compiler": "aot_eager", "vae": False}
Load = Callable[..., Any]


def load_w8a8(path: Path, **options: Any) -> W8A8Backend:
    return W8A8Backend(make_load(path, "w8a8", **{**AOT, **options}))


def load_int8(path: Path, **options: Any) -> Int8Backend:
    return Int8Backend(make_load(path, "int8", **options))


LOADERS = {"w8a8": load_w8a8, "int8": load_int8}


@pytest.fixture(params=LOADERS.values(), ids=LOADERS)
def loader(request: pytest.FixtureRequest) -> Load:
    return request.param


def image(backend: Any) -> np.ndarray:
    return backend.generate([make_request()], [None]).images[0].astype(int)


def test_images_are_close_to_eagers_and_not_the_same(
    loader: Load, tiny_path: Path, eager: EagerBackend
) -> None:
    with untraced():
        backend = loader(tiny_path)
        moved = np.abs(image(backend) - image(eager))
        backend.close()
    assert moved.max() > 0
    assert moved.mean() < 4


def test_what_is_quantised_is_said(loader: Load, tiny_path: Path, eager: EagerBackend) -> None:
    backend = loader(tiny_path)
    said = backend.in_force["quantised"]
    transformer = eager.family.pipe.transformer
    linears = [n for n, m in transformer.named_modules() if isinstance(m, nn.Linear)]
    assert said["layers"] + said["excluded_layers"] == len(linears)
    assert said["layers"] > 30
    assert "proj_out" in said["excluded"]
    assert said["float_bytes"] == sum(t.nbytes for t in transformer.state_dict().values())
    assert said["weight_bytes"] < said["float_bytes"] / 2
    assert 0 < said["layer_error_mean"] <= said["layer_error_max"] < 0.05
    assert "int_mm" in said["kernel"] or "widened" in said["kernel"]
    backend.close()


def test_excluded_layers_stay_float(loader: Load, tiny_path: Path) -> None:
    backend = loader(tiny_path, exclude=f"{EXCLUDED},*ff*,transformer_blocks.0.attn.to_q")
    transformer = backend.family.pipe.transformer
    assert type(transformer.get_submodule("transformer_blocks.0.attn.to_q")) is nn.Linear
    assert type(transformer.get_submodule("transformer_blocks.1.ff.net.2")) is nn.Linear
    assert type(transformer.get_submodule("transformer_blocks.1.attn.to_q")) is not nn.Linear
    backend.close()


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"exclude": "*"}, OptimizationNotApplied, "no linear layer"),
        ({"exclude": "no_such_layer"}, BackendError, "no_such_layer"),
        ({"exclude": 3}, BackendError, "exclude=3"),
    ],
    ids=["everything", "unknown", "number"],
)
def test_wrong_exclusions_are_refused(
    loader: Load, tiny_path: Path, options: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says.replace("*", ".")):
        loader(tiny_path, **options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"activations": "int4"}, "activations='int4'"),
        ({"calibration_prompts": 0}, "calibration_prompts=0"),
        ({"calibration_prompts": 9}, "from 1 to 8"),
        ({"calibration_steps": 1.5}, "calibration_steps=1.5"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_wrong_options_are_refused(tiny_path: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(BackendError, match=says):
        load_int8(tiny_path, **options)


def test_fp8_on_a_cpu_is_refused_not_replaced(tiny_path: Path) -> None:
    with pytest.raises(OptimizationNotApplied, match="needs int8"):
        load_w8a8(tiny_path, weights="fp8", device="cpu")
    with pytest.raises(BackendError, match="int3"):
        load_w8a8(tiny_path, weights="int3")


class Pretender(W8A8Linear):
    """Looks quantised and computes in floating point."""

    @classmethod
    def from_linear(cls, linear: nn.Linear, dtype: torch.dtype = torch.int8) -> W8A8Linear:
        made = super().from_linear(linear, dtype)
        made.float_weight = linear.weight.detach()
        return made

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.float_weight, self.bias)


class WrongScale(W8A8Linear):
    """Loses the scales of the output channels."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 1.3


def skipping(cls: type[W8A8Linear]) -> Any:
    return classmethod(lambda _cls, linear, _dtype: linear)


def half_skipping() -> Any:
    count = iter(range(10_000))
    made = W8A8Linear.from_linear
    return classmethod(
        lambda _c, linear, dtype: linear if next(count) == 7 else made(linear, dtype)
    )


@pytest.mark.parametrize(
    ("mutant", "says"),
    [
        ("skips every layer", "still floating point"),
        ("skips one layer", "1 of"),
        ("computes in float", "exactly those of the float layer"),
        ("wrong scale", "rounding explains"),
    ],
)
def test_quantisation_that_did_not_happen_is_caught(
    mutant: str, says: str, tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if mutant == "skips every layer":
        monkeypatch.setattr(W8A8Linear, "from_linear", skipping(W8A8Linear))
    elif mutant == "skips one layer":
        monkeypatch.setattr(W8A8Linear, "from_linear", half_skipping())
    else:
        made = Pretender if mutant == "computes in float" else WrongScale
        monkeypatch.setattr("sd35bench.backends.w8a8.W8A8Linear", made)
    with pytest.raises(OptimizationNotApplied, match=says):
        load_w8a8(tiny_path)


def test_quanto_that_skipped_every_layer_is_caught(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8_module, "_quantize", lambda *_args, **_kwargs: None)
    with pytest.raises(OptimizationNotApplied, match="still floating point"):
        load_int8(tiny_path)


def test_layer_undone_after_the_proof_is_caught(tiny_path: Path) -> None:
    backend = load_w8a8(tiny_path)
    pipe = backend.family.pipe
    pipe.transformer.set_submodule("transformer_blocks.0.attn.to_q", nn.Linear(32, 32))
    with pytest.raises(OptimizationNotApplied, match="to_q"):
        backend.prove(pipe)
    backend.close()


def test_calibrated_activations_are_in_force(tiny_path: Path, eager: EagerBackend) -> None:
    options = {"activations": "int8", "calibration_prompts": 2, "calibration_steps": 1}
    backend = load_int8(tiny_path, **options)
    said = backend.in_force["quantised"]
    assert said["activations"] == "int8"
    assert said["kernel"] == "torch._int_mm"
    assert said["calibration"]["prompts"] == 2
    weight_only = load_int8(tiny_path)
    first, second, reference = image(backend), image(weight_only), image(eager)
    assert np.abs(first - second).max() > 0
    assert np.abs(first - reference).mean() < 16
    backend.close()
    weight_only.close()


def test_calibration_that_saw_nothing_is_caught(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Int8Backend, "generate", lambda *_args: None)
    with pytest.raises(OptimizationNotApplied, match="calibration set no scale"):
        load_int8(tiny_path, activations="int8")


def test_default_exclusions_are_matched_by_whole_names() -> None:
    net = nn.ModuleDict({"proj_out": nn.Linear(4, 4), "x_proj_out": nn.Linear(4, 4)})
    assert choose_layers(net, EXCLUDED) == (["x_proj_out"], ["proj_out"])


@pytest.mark.parametrize("kind", ["int8", "w8a8"])
def test_probe_says_what_would_run(kind: str) -> None:
    cls = backend_class(kind)
    assert cls.probe({"device": "cpu"}).ok is True
    if not torch.cuda.is_available():
        assert cls.probe({"device": "cuda"}).ok is None
        if kind == "w8a8":
            assert cls.probe({"weights": "fp8"}).ok is None
