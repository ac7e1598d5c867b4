"""Who runs a denoising step: our own C++ on a CPU, torch.compile elsewhere, PyTorch as reference.

A whole step is one call for each of them. A small model gains by the calls that are saved (nano's
step is about 250 calls of PyTorch for 0.2 GFLOP), a large one by what is fused between its products
and by 8-bit products. What was asked for runs, or `KernelUnavailable` says why it cannot.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sd35_kernels import KernelUnavailable, mmdit
from sd35bench.core.model import Config, Executor, TorchExecutor, Weights

EXECUTORS = ("auto", "cpp", "compile", "torch")
TIERS = ("exact", "bf16", "int8")
"""Float32 throughout; bf16 products; or 8-bit products with activations quantised per row."""

Compile = Callable[[Callable[..., torch.Tensor]], Callable[..., torch.Tensor]]


def pick(name: str, device: torch.device) -> str:
    """Return the executor that "auto" means on a device: C++ on a CPU, torch.compile elsewhere."""
    if name != "auto":
        return name
    return "cpp" if device.type == "cpu" else "compile"


def build(
    name: str,
    config: Config,
    weights: Weights | Path,
    *,
    tier: str,
    threads: int,
    compiled: Compile,
) -> Executor:
    """Build the executor called `name`; `weights` go to it, and C++ empties the mapping.

    A path is that of weights which a C++ executor packed and stored before. `tier`: one of `TIERS`.
    `threads`: of the C++ executor. `compiled` is torch.compile, or what stands in for it.

    Raises: KernelUnavailable where it cannot run here, or has no such tier.
    """
    if name == "cpp":
        source = mmdit.Stored(weights) if isinstance(weights, Path) else _float32(weights)
        executor: Any = mmdit.load(config.to_dict(), source, tier, threads)
        if executor.facts["tier"] != tier:
            raise KernelUnavailable(f"tier {tier} asked, {executor.facts['tier']} was loaded")
        return executor
    if tier != "exact":
        raise KernelUnavailable(f"tier {tier}: only the C++ executor has it")
    assert not isinstance(weights, Path), "only C++ packs weights"
    return TorchExecutor(config, weights, compiled=compiled if name == "compile" else None)


def _float32(weights: Weights) -> Weights:
    """Return the same mapping with float32 values, converted one by one."""
    for name, value in weights.items():
        weights[name] = value.float().contiguous()
    return weights
