"""The `int8` backend: the denoiser's linear layers on optimum-quanto's int8 weights, eager.

With `activations=none` only the weights are int8: they are widened in every call, so this saves
memory, not time (on a CPU in fp32 it is slower than eager, and says so by being measured). With
`activations=int8` inputs are quantised too, by one static scale per layer that a few calibration
images set, and products run on `torch._int_mm`. Which kernel really runs is watched, not assumed.
Tier: measured-lossy.
"""

import contextlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from sd35_kernels import KernelUnavailable, check_available
from sd35bench.backends.base import Probe
from sd35bench.backends.pipeline import DiffusersBackend, choice
from sd35bench.backends.probes import silence_cuda_remark
from sd35bench.backends.quantised import EXCLUDED, quantise
from sd35bench.errors import BackendError, OptimizationNotApplied
from sd35bench.types import Load, Request, Scalar

ACTIVATIONS = ("none", "int8")
CALIBRATION_PROMPTS = (
    "a red circle on a blue background",
    "a photograph of an astronaut riding a horse",
    "two green squares and a yellow star",
    "a bowl of fruit on a wooden table, oil painting",
    "a city street at night in the rain",
    "a small purple triangle left of a large white circle",
    "a portrait of an old fisherman, dramatic light",
    "an aerial view of mountains and a lake",
)
LARGEST_SIDE_PX = 512
KERNELS = {
    "aten::_int_mm": "torch._int_mm",
    "aten::_weight_int8pack_mm": "torch._weight_int8pack_mm",
    "aten::mm": "weights widened, then a float product",
    "aten::matmul": "weights widened, then a float product",
}


class Int8Backend(DiffusersBackend):
    """diffusers on a denoiser quantised by optimum-quanto.

    Options beside the eager backend's: `activations` (none, int8), `exclude` (comma-separated
    patterns of layer names that stay in floating point), and for calibrating int8 activations
    `calibration_prompts` (1 to 8 of `CALIBRATION_PROMPTS`) and `calibration_steps`.
    """

    options = MappingProxyType(
        {
            **DiffusersBackend.options,
            "activations": "none",
            "exclude": EXCLUDED,
            "calibration_prompts": 4,
            "calibration_steps": 4,
        }
    )

    @classmethod
    def probe(cls, options: Mapping[str, Scalar]) -> Probe:
        """Look for the device and for optimum-quanto, without importing it."""
        base = super().probe(options)
        if base.ok is not True:
            return base
        try:
            found = importlib.util.find_spec("optimum.quanto") is not None
        except ModuleNotFoundError:
            found = False
        if not found:
            return Probe(
                ok=False,
                detail="optimum-quanto is not installed",
                remedy="pip install optimum-quanto",
            )
        return Probe(ok=True, detail=f"{base.detail}; optimum-quanto {_version()}")

    def __init__(self, load: Load) -> None:
        """Load, quantise, calibrate where activations are quantised too, and prove it.

        Raises: as the base; OptimizationNotApplied where a layer was not quantised or calibrated.
        """
        super().__init__(load)
        if self._asked["activations"] == "int8":
            self._calibrate()
        self.in_force = {**self.in_force, "quantised": self._facts()}

    def prepare(self, pipe: Any) -> None:
        """Quantise the linear layers' weights and prove each.

        Raises: OptimizationNotApplied, BackendError for an option's wrong value.
        """
        super().prepare(pipe)
        silence_cuda_remark()
        self._asked = _checked(self.asked)
        denoiser = pipe.transformer
        self._denoiser: Any = denoiser
        self._proof = quantise(
            denoiser,
            self._asked["exclude"],
            lambda names: _quantize(denoiser, names),
            _is_quantised,
        )

    def close(self) -> None:
        """Drop the denoiser as well."""
        super().close()
        self._denoiser = None

    def _calibrate(self) -> None:
        """Set each layer's activation scale from a few images.

        Raises: OptimizationNotApplied where a layer saw none of them.
        """
        from optimum.quanto import Calibration, qint8

        self._refuse_wrong_products()
        layers = [self._denoiser.get_submodule(name) for name in self._proof.names]
        for layer in layers:
            _quantize_inputs(layer, qint8)
        side_px = self._calibration_side_px()
        with Calibration(streamline=False):
            for prompt in CALIBRATION_PROMPTS[: int(self._asked["calibration_prompts"])]:
                request = Request(
                    prompt=prompt,
                    steps=int(self._asked["calibration_steps"]),
                    cfg=4.0,
                    seed=0,
                    width=side_px,
                    height=side_px,
                    sampler=self.family.samplers[0],
                )
                self.generate([request], [None])
        idle = [
            name
            for name, layer in zip(self._proof.names, layers, strict=True)
            if not bool(torch.isfinite(layer.input_scale)) or float(layer.input_scale) == 1.0
        ]
        if idle:
            raise OptimizationNotApplied(
                f"activations=int8 asked, but calibration set no scale for {len(idle)} layers: "
                f"{', '.join(idle[:3])}; add them to backend.exclude"
            )

    def _refuse_wrong_products(self) -> None:
        """Refuse a CPU whose int8 products saturate: quanto would use them and not say so.

        Raises: OptimizationNotApplied.
        """
        if self.device.type != "cpu":
            return
        try:
            check_available(self.device)
        except KernelUnavailable as exc:
            raise OptimizationNotApplied(f"activations=int8 cannot be applied: {exc}") from exc

    def _calibration_side_px(self) -> int:
        """Return a square that the model makes: its own size, at most 512 px."""
        multiple, largest = self.family.sizes
        own = self._denoiser.config.get("sample_size") or LARGEST_SIDE_PX
        side = min(own * 8, LARGEST_SIDE_PX, largest or LARGEST_SIDE_PX)
        return max(multiple, side // multiple * multiple)

    def _facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = {
            **self._proof.facts(),
            "weights": "int8",
            "activations": self._asked["activations"],
            "library": f"optimum-quanto {_version()}",
            "kernel": _kernel(self._denoiser.get_submodule(self._proof.names[0]), self._dtype),
        }
        if self._asked["activations"] == "int8":
            facts["calibration"] = {
                "prompts": self._asked["calibration_prompts"],
                "steps": self._asked["calibration_steps"],
                "side_px": self._calibration_side_px(),
            }
        return facts


def _checked(asked: dict[str, Scalar]) -> dict[str, Any]:
    """Refuse wrong values. Raises: BackendError."""
    choice("activations", asked["activations"], ACTIVATIONS)
    limits = {"calibration_prompts": len(CALIBRATION_PROMPTS), "calibration_steps": 100}
    for name, most in limits.items():
        value = asked[name]
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise BackendError(f"backend.{name}={value!r}: must be a whole number from 1 to {most}")
    return dict(asked)


def _quantize(denoiser: nn.Module, names: list[str]) -> None:
    """Replace the named layers by quanto's, with frozen int8 weights."""
    from optimum.quanto import freeze, qint8, quantize

    quantize(denoiser, weights=qint8, include=names)
    freeze(denoiser)


def _quantize_inputs(layer: Any, qtype: Any) -> None:
    """Have a frozen quanto layer quantise its inputs; outputs stay as they are.

    What follows (norms, attention, gates) takes floating point, so a quantised output would be
    widened at once, at the price of another rounding.
    """
    layer.activation_qtype = qtype
    layer._quantize_hooks["input"] = layer.register_forward_pre_hook(layer.quantize_input)


def _is_quantised(layer: nn.Module) -> bool:
    from optimum.quanto import QLinear

    return isinstance(layer, QLinear) and layer.frozen


def _kernel(layer: Any, dtype: str) -> str:
    """Run a layer once under the profiler and name the product that it used."""
    tensor = next(iter(layer.state_dict().values()))
    floats = (layer.weight if layer.bias is None else layer.bias).dtype
    rows = torch.zeros(32, layer.in_features, device=tensor.device, dtype=floats)
    with _no_stderr(), torch.inference_mode(), torch.autograd.profiler.profile() as seen:
        layer(rows)
    profile: Any = seen
    names = [event.name for event in profile.function_events]
    found = [said for name, said in KERNELS.items() if name in names]
    return found[0] if found else f"unknown, {dtype}"


@contextlib.contextmanager
def _no_stderr() -> Iterator[None]:
    """Keep the profiler's C++ side from writing its start and stop on the terminal."""
    own = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(own, 2)
        os.close(own)


def _version() -> str:
    return importlib.metadata.version("optimum-quanto")
