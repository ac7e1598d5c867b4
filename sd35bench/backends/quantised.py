"""What int8 backends share: which linear layers, and the proof that each of them is quantised.

A layer is proven by its own outputs: seeded normal inputs go through it before and after. Outputs
that are exactly the same mean that nothing was rounded; outputs too far off mean a wrong scale or
layout. Both fail the load. Costs one product of 16 rows per layer and side, about 0.4 s per
billion parameters on a CPU.
"""

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sd35bench import words
from sd35bench.errors import BackendError, OptimizationNotApplied
from sd35bench.types import Scalar, content_hash

EXCLUDED = (
    "time_text_embed*,time_embed*,adaln_single*,context_embedder,caption_projection*,proj_out"
)
"""Layers left in floating point by default, as patterns: the embedders of time and text and the
last projection. They are under 2 % of the work, and their error reaches every block or every
pixel. adaLN's projections are quantised: they are a third of SD3.5-Medium's weights."""
PROBE_ROWS = 16
# Two roundings of normal values give 0.013 in int8 and 0.04 in fp8; a trained layer with a weight
# 30 standard deviations out, 0.07. A scale or a layout that is wrong gives more than 0.5.
LARGEST_ERROR = 0.15
NAMES_SHOWN = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """What was quantised: errors are of layers' outputs on the probe, bytes the denoiser's."""

    names: tuple[str, ...]
    excluded: tuple[str, ...]
    error_mean: float
    error_max: float
    worst: str
    bytes_before: int
    bytes_after: int

    def facts(self) -> dict[str, Any]:
        """Return it as JSON for `in_force`."""
        return {
            "layers": len(self.names),
            "names": list(self.names[:NAMES_SHOWN]),
            "names_digest": content_hash(list(self.names))[:16],
            "excluded": list(self.excluded[:NAMES_SHOWN]),
            "excluded_layers": len(self.excluded),
            "float_bytes": self.bytes_before,
            "weight_bytes": self.bytes_after,
            "checkpoint_bytes": self.bytes_after,
            "layer_error_mean": round(self.error_mean, 6),
            "layer_error_max": round(self.error_max, 6),
            "layer_error_worst": self.worst,
        }


def quantise(
    denoiser: nn.Module,
    exclude: Scalar,
    replace: Callable[[list[str]], None],
    is_quantised: Callable[[nn.Module], bool],
) -> Proof:
    """Have `replace` put quantised layers where those that it is given by name are; prove each.

    Raises: as `choose_layers` and `prove_layers`; OptimizationNotApplied where the weights did not
    become smaller.
    """
    names, excluded = choose_layers(denoiser, exclude)
    size, before = state_bytes(denoiser), outputs(denoiser, names)
    replace(names)
    errors = prove_layers(denoiser, names, before, is_quantised)
    after = state_bytes(denoiser)
    if after >= size:
        raise OptimizationNotApplied(
            f"int8 asked, but the denoiser holds {after} bytes after and {size} before"
        )
    worst = max(errors, key=lambda name: errors[name])
    return Proof(
        names=tuple(names),
        excluded=tuple(excluded),
        error_mean=sum(errors.values()) / len(errors),
        error_max=errors[worst],
        worst=worst,
        bytes_before=size,
        bytes_after=after,
    )


def choose_layers(denoiser: nn.Module, exclude: Scalar) -> tuple[list[str], list[str]]:
    """Return the names of the linear layers to quantise and of those to leave.

    `exclude`: comma-separated patterns with ``*``, matched against whole names. Those of
    `EXCLUDED` are for several model families and need not match.

    Raises: BackendError where it is no string or another pattern matches nothing;
    OptimizationNotApplied where nothing is left to quantise.
    """
    if not isinstance(exclude, str):
        raise BackendError(f"backend.exclude={exclude!r}: must be comma-separated patterns")
    patterns = [pattern.strip() for pattern in exclude.split(",") if pattern.strip()]
    linears = [name for name, m in denoiser.named_modules() if isinstance(m, nn.Linear)]
    known = EXCLUDED.split(",")
    idle = [p for p in patterns if p not in known and not fnmatch.filter(linears, p)]
    if idle:
        raise BackendError(
            f"backend.exclude: {idle[0]!r} matches none of the {len(linears)} linear layers, "
            f"such as {', '.join(linears[:3])}"
        )
    left = [n for n in linears if any(fnmatch.fnmatchcase(n, p) for p in patterns)]
    chosen = [name for name in linears if name not in set(left)]
    if not chosen:
        raise OptimizationNotApplied(
            f"int8 asked, but backend.exclude={exclude!r} leaves no linear layer to quantise"
        )
    return chosen, left


def outputs(denoiser: nn.Module, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Send the probe through each named layer; returns float32 [16, N] by name."""
    found = {}
    for number, name in enumerate(names):
        layer: Any = denoiser.get_submodule(name)
        device, dtype = _place(layer)
        g = torch.Generator().manual_seed(number)
        rows = torch.randn(PROBE_ROWS, layer.in_features, generator=g)
        with torch.inference_mode():
            found[name] = layer(rows.to(device, dtype)).float()
    return found


def prove_layers(
    denoiser: nn.Module,
    names: Sequence[str],
    before: Mapping[str, torch.Tensor],
    is_quantised: Callable[[nn.Module], bool],
) -> dict[str, float]:
    """Return each layer's relative error against its outputs `before` quantisation.

    Raises: OptimizationNotApplied where a layer is still floating point, or its outputs are
    unchanged, or further from the float ones than rounding can take them.
    """
    floats = [n for n in names if not is_quantised(denoiser.get_submodule(n))]
    if floats:
        raise OptimizationNotApplied(
            f"int8 asked, but {len(floats)} of {len(names)} layers are still floating point: "
            f"{', '.join(floats[:3])}"
        )
    errors = {}
    for name, after in outputs(denoiser, names).items():
        if torch.equal(after, before[name]):
            raise OptimizationNotApplied(f"{name}: outputs are exactly those of the float layer")
        reference = before[name] - before[name].mean(dim=0)  # what a bias adds is no signal
        errors[name] = float((after - before[name]).norm() / reference.norm().clamp_min(1e-30))
        if not errors[name] < LARGEST_ERROR:
            raise OptimizationNotApplied(
                f"{name}: int8 outputs are {words.number(100 * errors[name], 1)}% off the float"
                f" layer's, more than the {words.number(100 * LARGEST_ERROR, 0)}% that rounding"
                " explains; add it to backend.exclude"
            )
    return errors


def state_bytes(module: nn.Module) -> int:
    """Bytes of all tensors of a module as its state dict holds them: in memory, and on disk."""
    return sum(t.nbytes for t in module.state_dict().values() if isinstance(t, torch.Tensor))


def _place(layer: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Return where a layer's inputs must lie and their dtype: its bias's, or its weight's."""
    bias = getattr(layer, "bias", None)
    tensor = bias if isinstance(bias, torch.Tensor) else next(iter(layer.state_dict().values()))
    dtype = tensor.dtype if tensor.dtype.is_floating_point else torch.float32
    return tensor.device, dtype
