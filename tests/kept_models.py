"""Checkpoints that are loaded once in a process, of which everyone gets a copy of their own.

Loading the tiny checkpoint is 0.25 s of CPU in diffusers and transformers, and nano 0.4 s, some
hundreds of times in the suite; a copy is a tenth of that. The key is the state of all files of the
folder, so that a test that breaks one sees it. The tests of loading itself do not use this.
"""

import io
import pickle
import types
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from sd35bench.config.files import file_state
from sd35bench.loading import sources
from sd35bench.types import ModelSpec

KEPT = 6
"""Models that are kept, the last ones that were asked for."""
_SHARED = (PreTrainedTokenizerBase, types.FunctionType, types.ModuleType)
_kept: "OrderedDict[Any, tuple[bytes, list[Any]]]" = OrderedDict()
_load_folder = sources.load_folder


class _Pickler(pickle.Pickler):
    """Writes a pipeline without its tensors and tokenizers, which it puts into a list."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.beside: list[Any] = []
        self._places: dict[int, int] = {}

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, (torch.Tensor, *_SHARED)):
            return None
        if id(obj) not in self._places:
            self._places[id(obj)] = len(self.beside)
            self.beside.append(obj)
        return self._places[id(obj)]


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, beside: list[Any]) -> None:
        super().__init__(file)
        self._beside = beside
        self._copies: dict[int, Any] = {}

    def persistent_load(self, pid: int) -> Any:
        if pid not in self._copies:
            self._copies[pid] = _copy(self._beside[pid])
        return self._copies[pid]


def _copy(obj: Any) -> Any:
    if not isinstance(obj, torch.Tensor):
        return obj
    with torch.no_grad():
        own = obj.detach().clone(memory_format=torch.preserve_format)
    if isinstance(obj, nn.Parameter):
        return nn.Parameter(own, requires_grad=obj.requires_grad)
    return own


def load_folder(
    spec: ModelSpec,
    dtype: torch.dtype,
    without: Collection[str] = (),
    parts: Mapping[str, nn.Module] = types.MappingProxyType({}),
) -> Any:
    """`folders.load_folder`, once for a state of the folder's files; with parts it is as it is."""
    if parts:
        return _load_folder(spec, dtype, without, parts)
    files = sorted(path for path in Path(spec.path).rglob("*") if path.is_file())
    key = (spec.family, spec.variant, dtype, *sorted(without), *map(file_state, files))
    if key not in _kept:
        made = _load_folder(spec, dtype, without, parts)
        file = io.BytesIO()
        pickler = _Pickler(file)
        pickler.dump(made)
        _kept[key] = file.getvalue(), pickler.beside
        if len(_kept) > KEPT:
            _kept.popitem(last=False)
    _kept.move_to_end(key)
    found, beside = _kept[key]
    return _Unpickler(io.BytesIO(found), beside).load()


@pytest.fixture(scope="package", autouse=True)
def kept_models() -> Iterator[None]:
    """Have every backend of a package's tests load its checkpoint so."""
    with pytest.MonkeyPatch.context() as patch:
        keep_models(patch)
        yield


def keep_models(patch: pytest.MonkeyPatch) -> None:
    """Have every backend of this process load its checkpoint so."""
    patch.setattr(sources, "load_folder", load_folder)
