"""Weight files of every kind as plain tensors: safetensors, GGUF, pickles, and fp8 with scales.

fp8 files as ComfyUI writes them keep, beside a weight, the factor that it was divided by; they are
widened to value * factor, which is what ComfyUI's own kernels compute with. GGUF's blocks are
widened likewise. So such files cost here what their weights cost in the dtype that is asked for.

Source of the names: ComfyUI, `comfy/ops.py` and QUANTIZATION.md.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import safe_open

from sd35bench.core.model import Weights
from sd35bench.core.weights import read_file
from sd35bench.loading.checkpoint import PICKLED

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
FP8_FORMATS = ("float8_e4m3fn", "float8_e5m2")
SCALES = (".scale_weight", ".weight_scale")
INPUT_SCALES = (".scale_input", ".input_scale")
"""Factors for inputs in fp8; ours are not."""
QUANT, MARKER = ".comfy_quant", "scaled_fp8"


def read_tensors(path: Path, prefixes: Sequence[str] = ("",), first: Sequence[str] = ()) -> Weights:
    """Read a file's tensors, with the prefix cut off under which one of `first` begins a name.

    `prefixes` are tried in turn; without `first` everything is read as it is.

    Raises: OSError, ValueError for a file that cannot be read, or holds nothing of that kind.
    """
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
        return read_file(path, _prefix(names, prefixes, first))
    weights = _read_gguf(path) if path.suffix == ".gguf" else _read_pickle(path)
    prefix = _prefix(list(weights), prefixes, first)
    return {n.removeprefix(prefix): v for n, v in weights.items() if n.startswith(prefix)}


def _prefix(names: Sequence[str], prefixes: Sequence[str], first: Sequence[str]) -> str:
    if not first:
        return ""
    for prefix in prefixes:
        if any(name.startswith(tuple(prefix + f for f in first)) for name in names):
            return prefix
    raise ValueError(f"none of its {len(names)} tensors begins with {' or '.join(first)}")


def metadata_of(path: Path) -> dict[str, str]:
    """The texts in a safetensors file's header; none of other files."""
    if path.suffix != ".safetensors":
        return {}
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def _read_pickle(path: Path) -> Weights:
    """Read tensors and nothing else: torch's restricted unpickler runs no code."""
    if path.suffix not in PICKLED:
        raise ValueError(f"{path.suffix or 'no suffix'} is no kind of weight file")
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as exc:
        raise ValueError("its pickle holds more than tensors and is not read") from exc
    content = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(torch.is_tensor(v) for v in content.values()):
        raise ValueError("its pickle holds no mapping of names to tensors")
    return content


def _read_gguf(path: Path) -> Weights:
    """Read and widen a GGUF file's blocks, to float32."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    reader = GGUFReader(path)
    weights: Weights = {}
    for tensor in reader.tensors:
        value = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        shape = reader.get_field(f"comfy.gguf.orig_shape.{tensor.name}")
        sides = [int(n) for n in tensor.shape[::-1]] if shape is None else shape.contents()
        weights[tensor.name] = value.reshape(sides)
    return weights


def gguf_types(path: Path) -> str:
    """Say how a GGUF file's tensors are stored, the commonest first: ``Q8_0 x 40, F32 x 12``."""
    from gguf import GGUFReader

    counts = Counter(t.tensor_type.name for t in GGUFReader(path).tensors)
    return ", ".join(f"{name} x {n}" for name, n in counts.most_common())


def widen(weights: Weights, dtype_of: Callable[[str], torch.dtype]) -> str:
    """Widen fp8 in place, times its scale, and drop the scales; returns what was done, in words.

    `dtype_of` gives each weight's dtype by name. A scale of what is no fp8 is left where it is.

    Raises: ValueError for a format other than fp8 with one factor a tensor or a row.
    """
    scaled = plain = 0
    for name in [name for name in weights if name.endswith(QUANT)]:
        found = json.loads(bytes(weights.pop(name).tolist())).get("format")
        if found not in FP8_FORMATS:
            raise ValueError(f"{name.removesuffix(QUANT)} is stored as {found}, not as fp8")
    for name in [name for name, value in weights.items() if value.dtype in FP8]:
        if name.rpartition(".")[2] == MARKER:
            del weights[name]
            continue
        stem = name.removesuffix(".weight")
        for suffix in INPUT_SCALES:
            weights.pop(stem + suffix, None)
        scale = next((weights.pop(stem + s) for s in SCALES if stem + s in weights), None)
        value = weights[name].float()
        if scale is not None:
            value = value * _shaped(scale.float(), value, name)
        scaled, plain = scaled + (scale is not None), plain + (scale is None)
        weights[name] = value.to(dtype_of(name))
    parts = {"fp8 times its scale": scaled, "plain fp8": plain}
    return ", ".join(f"{n} weights from {how}" for how, n in parts.items() if n)


def _shaped(scale: torch.Tensor, value: torch.Tensor, name: str) -> torch.Tensor:
    if scale.numel() == 1:
        return scale.reshape(())
    if scale.numel() != value.shape[0]:
        raise ValueError(f"{name} has {scale.numel()} scales for {value.shape[0]} rows")
    return scale.reshape(-1, *(1,) * (value.ndim - 1))
