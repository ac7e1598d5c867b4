"""The reference backend: diffusers' own pipeline, nothing changed, in fp32, bf16 or fp16.

Every other backend is held against this one, so it does nothing for speed. Its images are
bit-identical to a bare diffusers call with the same seed. Two options save memory: without T5
(9.5 GB of SD3.5 Medium's 16 in half precision) the prompt reaches the denoiser through CLIP
alone; with offloading only the part that is computing is on the GPU.
"""

from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from sd35bench.backends.pipeline import DiffusersBackend, choice
from sd35bench.errors import BackendError, OptimizationNotApplied
from sd35bench.loading.sources import load_model, prove_device
from sd35bench.types import Load

OFFLOADS = ("none", "model")
T5 = ("text_encoder_3", "tokenizer_3")


class EagerBackend(DiffusersBackend):
    """diffusers as it comes.

    Options: `dtype` (fp32, bf16, fp16), `device` (auto, cpu, cuda), `t5` (false: SD3 without its
    third text encoder), `offload` (model: parts wait on the CPU for their turn).
    """

    options = MappingProxyType({**DiffusersBackend.options, "t5": True, "offload": "none"})

    def load_pipe(self, load: Load, dtype: torch.dtype) -> Any:
        """Load the model, with or without T5, onto the device or into the CPU's waiting room.

        Raises: BackendError where there is no T5 to leave out; OptimizationNotApplied where there
        is no GPU to offload from.
        """
        offload = choice("offload", self.asked["offload"], OFFLOADS) == "model"
        if offload and self.device.type != "cuda":
            raise OptimizationNotApplied(
                "backend.offload=model asked, but there is no GPU to offload from; use"
                " backend.offload=none"
            )
        model = load.model
        folder = (model.family, model.weights, model.components) == ("sd3", "checkpoint", None)
        if not self.asked["t5"] and not folder:
            raise BackendError("backend.t5=false: needs an SD3 model in a diffusers folder")
        without = () if self.asked["t5"] else T5
        pipe = load_model(model, dtype, None if offload else self.device, without)
        return offload_parts(pipe, self.device) if offload else self.place(pipe)

    def prove(self, pipe: Any) -> dict[str, Any]:
        """Add which variant this is."""
        t5 = getattr(pipe, "text_encoder_3", None) is not None
        return {**super().prove(pipe), "t5": t5, "offload": self.asked["offload"]}

    def prove_place(self, pipe: Any) -> str:
        """Return the device that computes; with offloading, parts wait on the CPU.

        Raises: OptimizationNotApplied where a part is elsewhere, or would not be moved.
        """
        if self.asked["offload"] == "none":
            return super().prove_place(pipe)
        prove_device(pipe, torch.device("cpu"))
        for name, part in pipe.components.items():
            hook = getattr(part, "_hf_hook", None)
            if isinstance(part, nn.Module) and getattr(hook, "execution_device", None) is None:
                raise OptimizationNotApplied(f"offload=model asked, {name} would stay on the CPU")
        return str(self.device)


def offload_parts(pipe: Any, device: torch.device) -> Any:
    """Have each part move to `device` when it is called, and back when the next one is.

    diffusers would take its hooks off and put them on again after every call, and with them
    whatever wraps a part's `forward`; without its list of them it leaves them alone. Then the
    autoencoder, the last part, stays on the device between calls.
    """
    pipe.enable_model_cpu_offload(device=device)
    pipe._all_hooks = []
    return pipe
