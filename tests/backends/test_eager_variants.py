"""The reference backend's two ways to save memory: without T5, and with offloading."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sd35bench.backends import eager as module
from sd35bench.backends.eager import EagerBackend
from sd35bench.errors import BackendError, OptimizationNotApplied
from sd35bench.types import Task
from tests.backends.bare import IDENTICAL, bare_images, differs, make_inits
from tests.backends.conftest import make_load, make_request

KINDS = ("text-batch-3", "image-batch-2")


@pytest.mark.parametrize("kind", KINDS)
def test_without_t5_is_bit_identical_to_bare_diffusers_without_it(
    tiny_path: Path, kind: str
) -> None:
    backend = EagerBackend(make_load(tiny_path, t5=False))
    requests = IDENTICAL[kind]
    images = backend.generate(requests, make_inits(requests)).images
    assert backend.in_force["t5"] is False
    assert "text_encoder_3" not in backend.in_force["component_dtypes"]
    backend.close()
    bare = bare_images(tiny_path, requests, text_encoder_3=None, tokenizer_3=None)
    assert not differs(images, bare)
    assert differs(images, bare_images(tiny_path, requests))


def test_without_t5_reads_none_of_its_weights(tiny_path: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_path, tmp_path / "copy")
    for file in (copy / "text_encoder_3").glob("*.safetensors"):
        file.write_bytes(b"broken")
    with pytest.raises(BackendError):
        EagerBackend(make_load(copy))
    EagerBackend(make_load(copy, t5=False)).close()


def test_t5_is_left_out_only_where_there_is_one(tiny_path: Path) -> None:
    load = make_load(tiny_path, t5=False)
    for changes in ({"family": "sana"}, {"weights": "random"}, {"components": str(tiny_path)}):
        with pytest.raises(BackendError, match=r"backend\.t5=false: needs an SD3 model"):
            EagerBackend(replace(load, model=replace(load.model, **changes)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_offloading_needs_a_gpu(tiny_path: Path) -> None:
    with pytest.raises(OptimizationNotApplied, match=r"backend\.offload=model.*offload=none"):
        EagerBackend(make_load(tiny_path, offload="model"))
    with pytest.raises(BackendError, match=r"backend\.offload='disk' is unknown"):
        EagerBackend(make_load(tiny_path, offload="disk"))


@pytest.fixture
def offloaded(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[EagerBackend]:
    """Offloading from the CPU to the CPU: every hook is there, only the moves are empty."""

    class Device(str):
        type = "cuda"

    load = EagerBackend.load_pipe

    def pretend(self: EagerBackend, *args: object) -> object:
        device, self.device = self.device, Device()  # type: ignore[assignment]
        monkeypatch.setattr(module, "offload_parts", lambda pipe, _: offload(pipe, device))
        try:
            return load(self, *args)  # type: ignore[arg-type]
        finally:
            self.device = device

    offload = module.offload_parts
    monkeypatch.setattr(EagerBackend, "load_pipe", pretend)
    backend = EagerBackend(make_load(tiny_path, offload="model", device="cpu"))
    yield backend
    backend.close()


def test_offloaded_parts_are_counted_on_every_call(
    offloaded: EagerBackend, tiny_path: Path
) -> None:
    assert offloaded.in_force["offload"] == "model"
    for kind in (*KINDS, *KINDS):
        requests = IDENTICAL[kind]
        made = offloaded.generate(requests, make_inits(requests))
        assert made.evaluations == requests[0].effective_steps
        assert made.decode_s is not None
        assert not differs(made.images, bare_images(tiny_path, requests))
    pipe = offloaded._pipes[Task.TEXT_TO_IMAGE]
    del pipe.vae._hf_hook
    with pytest.raises(OptimizationNotApplied, match="vae would stay on the CPU"):
        offloaded.prove(pipe)


@pytest.mark.gpu
def test_offloading_on_cuda_makes_the_same_image_with_less_memory(tiny_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    images = []
    for offload in ("none", "model"):
        backend = EagerBackend(make_load(tiny_path, device="cuda", offload=offload))
        images.append(backend.generate([make_request()], [None]).images)
        transformer = backend._pipes[Task.TEXT_TO_IMAGE].transformer
        assert transformer.device.type == ("cuda" if offload == "none" else "cpu")
        assert json.dumps(backend.in_force)
        backend.close()
    assert not differs(images[0], images[1])
