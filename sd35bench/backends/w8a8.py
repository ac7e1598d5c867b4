"""The `w8a8` backend: the denoiser's linear layers on `sd35_kernels.w8a8_linear`, compiled.

Weights are int8 with a scale per output channel, activations are quantised per row in every call;
attention, norms and the excluded layers stay in the dtype asked for. The layers are replaced, and
each proven, before the compiler sees the denoiser, which on a CPU fuses the quantisation with its
neighbours. Tier: measured-lossy.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from sd35_kernels import KernelUnavailable, W8A8Linear, check_available
from sd35bench.backends.base import Probe
from sd35bench.backends.compile import CompileBackend
from sd35bench.backends.pipeline import choice
from sd35bench.backends.quantised import EXCLUDED, quantise
from sd35bench.errors import OptimizationNotApplied
from sd35bench.types import Scalar

WEIGHTS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


class W8A8Backend(CompileBackend):
    """The compile backend on a denoiser with 8-bit weights and activations.

    Options beside those of `compile`: `weights` (int8; fp8 on GPUs that have it) and `exclude`,
    comma-separated patterns of layer names that stay in floating point.
    """

    options = MappingProxyType({**CompileBackend.options, "weights": "int8", "exclude": EXCLUDED})

    @classmethod
    def probe(cls, options: Mapping[str, Scalar]) -> Probe:
        """Look for the device, the compiler, and a kernel for the weights."""
        base = super().probe(options)
        if base.ok is not True:
            return base
        asked = {**cls.options, **options}
        on_gpu = asked["device"] != "cpu" and torch.cuda.is_available()
        try:
            kernel = check_available(torch.device("cuda" if on_gpu else "cpu"), _weights(asked))
        except KernelUnavailable as exc:
            return Probe(
                ok=None, detail=str(exc), remedy="use backend.weights=int8, or backend=int8"
            )
        return Probe(ok=True, detail=f"{base.detail}; {kernel}")

    def prepare(self, pipe: Any) -> None:
        """Replace the linear layers, prove each, then compile.

        Raises: OptimizationNotApplied where there is no kernel or a layer cannot be proven;
        BackendError for an option's wrong value.
        """
        dtype, denoiser = _weights(self.asked), pipe.transformer
        self._kernel = ""

        def replace(names: list[str]) -> None:
            try:
                self._kernel = check_available(self.device, dtype)
                for name in names:
                    layer = denoiser.get_submodule(name)
                    denoiser.set_submodule(name, W8A8Linear.from_linear(layer, dtype))
            except (KernelUnavailable, ValueError) as exc:
                raise OptimizationNotApplied(f"w8a8 cannot be applied: {exc}") from exc

        self._proof = quantise(denoiser, self.asked["exclude"], replace, _is_quantised)
        super().prepare(pipe)

    def prove(self, pipe: Any) -> dict[str, Any]:
        """Add which layers are quantised, on which kernel, and what that saves."""
        for name in self._proof.names:
            layer = pipe.transformer.get_submodule(name)
            if not _is_quantised(layer) or layer.weight_q.device != self.device:
                raise OptimizationNotApplied(f"{name} is not an 8-bit layer on {self.device}")
        weights = self.asked["weights"]
        facts = {"weights": weights, "activations": f"{weights}, per row", "kernel": self._kernel}
        return {**super().prove(pipe), "quantised": {**self._proof.facts(), **facts}}


def _weights(asked: Mapping[str, Scalar]) -> torch.dtype:
    return WEIGHTS[choice("weights", asked["weights"], WEIGHTS)]


def _is_quantised(layer: torch.nn.Module) -> bool:
    return isinstance(layer, W8A8Linear)
