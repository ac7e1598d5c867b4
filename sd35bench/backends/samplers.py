"""Samplers by name: diffusers' schedulers, built from the loaded model's own noise schedule.

The flow models (SD3, Sana) walk sigma from 1 to 0 along ``x = (1 - sigma) image + sigma noise``;
the shift moves a uniform grid t to ``sigma = shift t / (1 + (shift - 1) t)`` (Esser et al. 2024,
eq. 23). A step costs one evaluation, Heun's two, and its last one.

| name | scheduler | evaluations of N steps | grid of t |
| --- | --- | --- | --- |
| euler | `FlowMatchEulerDiscreteScheduler` | N | N points from 1 to the training's last sigma |
| heun | `FlowMatchHeunDiscreteScheduler` | 2N - 1 | Euler's |
| dpmpp_2m | `DPMSolverMultistepScheduler`, order 2 | N | N points from 0.999, even, 0 left out |
| unipc | `UniPCMultistepScheduler`, order 2 | N | N points from 1, even, 0.001 left out |

The last two tell the model a timestep cut to an integer (at most 1/1000 below their sigma), so
with many steps or a large shift two timesteps can be equal; `_FlowStart` keeps diffusers from
looking a position up by timestep, and adds what image-to-image needs.
"""

from typing import Any, Protocol

import torch
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.schedulers.scheduling_flow_match_heun_discrete import FlowMatchHeunDiscreteScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

from sd35bench.errors import BackendError, UnsupportedRequest
from sd35bench.evaluations import EVALUATIONS_PER_STEP, plugin_sampler


class _Multistep(Protocol):
    """What `_FlowStart` asks of the scheduler that it is mixed into."""

    sigmas: torch.Tensor
    begin_index: int | None
    step_index: int | None

    def set_begin_index(self, begin_index: int = 0) -> None: ...


class _FlowStart:
    """What diffusers 0.42.1's multistep schedulers lack for flow models."""

    def set_timesteps(self: Any, num_inference_steps: int, device: Any = None, **more: Any) -> None:
        """Set the grid and start at its beginning, unless the pipeline says otherwise later.

        Looked up by an integer timestep that occurs twice, diffusers takes the second, leaves a
        sigma out and then runs past the last one.
        """
        super().set_timesteps(num_inference_steps, device=device, **more)  # type: ignore[misc]
        self.set_begin_index(0)

    def scale_noise(
        self: _Multistep, sample: torch.Tensor, timestep: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        """Mix `sample` and `noise`, [B, C, h, w], at the sigma where the denoising starts.

        Source: diffusers `FlowMatchEulerDiscreteScheduler.scale_noise`, the case of a pipeline
        that has called `set_begin_index`; `timestep` decides nothing there either.
        """
        index = self.begin_index if self.step_index is None else self.step_index
        sigma = self.sigmas[index].to(device=sample.device, dtype=sample.dtype)
        return sigma * noise + (1.0 - sigma) * sample


class FlowDPMSolver(_FlowStart, DPMSolverMultistepScheduler):
    """DPM-Solver++ for flow models that can start from an image.

    Source: Lu et al. 2022 (arXiv 2211.01095), algorithm 2, as diffusers implements it.
    """


class FlowUniPC(_FlowStart, UniPCMultistepScheduler):
    """UniPC for flow models that can start from an image.

    Source: Zhao et al. 2023 (arXiv 2302.04867), as diffusers implements it.
    """


def own_shift(scheduler: Any) -> float | None:
    """Return the shift of a model's own scheduler; ``None`` where it has none or it is dynamic."""
    config = scheduler.config
    if config.get("use_dynamic_shifting"):
        return None
    if isinstance(scheduler, DPMSolverMultistepScheduler | UniPCMultistepScheduler):
        return float(config.flow_shift) if config.use_flow_sigmas else None
    return float(config.shift) if "shift" in config else None


def flow_scheduler(own: Any, sampler: str, shift: float | None) -> Any:
    """Build a flow model's scheduler with the model's shift or another.

    `own`: the scheduler that the checkpoint came with. It is kept as it is where it is the one
    that is asked for.

    Raises: UnsupportedRequest where the model's shift follows the image's size and another
    sampler or shift is asked for.
    """
    name = type(own).__name__
    if sampler == "euler" and shift is None and isinstance(own, FlowMatchEulerDiscreteScheduler):
        return own
    chosen = own_shift(own) if shift is None else shift
    if chosen is None or own_shift(own) is None:
        raise UnsupportedRequest(
            f"sampler={sampler}, shift={shift}: this checkpoint's {name} has no fixed shift to"
            " build it from; use its own: leave sampler and shift out"
        )
    if sampler not in EVALUATIONS_PER_STEP:
        return plugin_sampler(sampler)().scheduler(own, chosen)
    steps = own.config.num_train_timesteps
    if sampler == "euler":
        if isinstance(own, FlowMatchEulerDiscreteScheduler):
            return FlowMatchEulerDiscreteScheduler.from_config(own.config, shift=chosen)
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=steps, shift=chosen)
    if sampler == "heun":
        return FlowMatchHeunDiscreteScheduler(num_train_timesteps=steps, shift=chosen)
    multistep = {"dpmpp_2m": FlowDPMSolver, "unipc": FlowUniPC}[sampler]
    if issubclass(multistep, type(own)):
        return multistep.from_config(own.config, flow_shift=chosen)
    return multistep(
        num_train_timesteps=steps,
        solver_order=2,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=chosen,
    )


def noise_scheduler(own: Any, shift: float | None) -> Any:
    """Return the scheduler of a model that predicts noise: its own DPM-Solver++, as loaded.

    Raises: BackendError for another scheduler; UnsupportedRequest for a shift.
    """
    config: Any = getattr(own, "config", None)
    fits = isinstance(own, DPMSolverMultistepScheduler) and config.solver_order == 2
    if not fits or config.use_flow_sigmas:
        raise BackendError(
            f"model.path: its scheduler is a {type(own).__name__}, dpmpp_2m needs a"
            " DPMSolverMultistepScheduler of order 2; use a checkpoint that comes with one"
        )
    if shift is not None:
        raise UnsupportedRequest(f"shift={shift}: only flow models have one; leave it out")
    return own
