"""Guidance rules, the guidance interval and the step cache in diffusers' own loop.

diffusers' SD3 pipelines combine the two halves of a batch themselves: ``empty + cfg (text -
empty)``. For one call the transformer's `forward` is wrapped, outside of everything that a
backend put there (compiled graphs, hooks, stamps). The wrapper runs what `core.guidance` plans and
hands the guided velocity v back as both halves, of which the pipeline makes ``v + cfg (v - v)``: v,
to the bit. Schedulers, sizes and callbacks stay diffusers'; skip-layer guidance is done here too.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sd35bench.core.guidance import Guidance, Kind, guide
from sd35bench.evaluations import guidance_of, planned_calls
from sd35bench.fields import GUIDES
from sd35bench.types import Request


def is_plain(request: Request) -> bool:
    """Whether diffusers' own loop guides as it is asked for."""
    return all(getattr(request, name) == neutral for name, neutral in GUIDES.items())


@contextmanager
def guided(pipe: Any, request: Request, began: Callable[[], None]) -> Iterator[None]:
    """Guide the pipeline's next call as `request` asks; `began` is told when its loop begins."""
    transformer = pipe.transformer
    own = transformer.__dict__.get("forward")
    transformer.forward = _Forward(transformer.forward, pipe, request, began)
    try:
        yield
    finally:
        if own is None:
            del transformer.forward
        else:
            transformer.forward = own


class _Forward:
    """In place of the transformer's `forward` for one loop; `inner` is the denoiser itself."""

    def __init__(
        self, inner: Callable[..., Any], pipe: Any, request: Request, began: Callable[[], None]
    ) -> None:
        self._inner, self._pipe, self._began = inner, pipe, began
        self._how: Guidance = guidance_of(request)
        self._calls = planned_calls(request)
        self._velocity: Any = None
        self._given: dict[str, Any] = {}
        self._at = -1

    def __call__(self, **given: Any) -> tuple[torch.Tensor]:
        """Return the guided velocity, twice where diffusers guides."""
        if self._velocity is None:
            self._began()
            self._velocity = guide(self._how, self._calls, self._times(), self)
        self._at += 1
        self._given = given
        x = given["hidden_states"]
        if not self._how.guided:
            return (self._velocity(x, self._at),)
        v = self._velocity(x.chunk(2)[1], self._at)
        return (torch.cat([v, v]),)

    def both(self, x: torch.Tensor, e: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Run both prompts as diffusers would."""
        empty, text = self._inner(**self._given)[0].chunk(2)
        return empty, text

    def alone(self, x: torch.Tensor, e: int) -> torch.Tensor:
        """Run the prompt alone."""
        return self._inner(**self._prompted(x))[0]

    def without(self, x: torch.Tensor, e: int, layers: tuple[int, ...]) -> torch.Tensor:
        """Run the prompt alone, without `layers`."""
        return self._inner(**self._prompted(x), skip_layers=list(layers))[0]

    def _prompted(self, x: torch.Tensor) -> dict[str, Any]:
        """The arguments of the batch's second half, which is the prompts'."""
        n = len(x)
        halves = ("timestep", "encoder_hidden_states", "pooled_projections")
        return {**self._given, "hidden_states": x, **{k: self._given[k][-n:] for k in halves}}

    def _times(self) -> list[float]:
        """Each evaluation's time; only a prediction looks at it."""
        if not any(call.kind is Kind.PREDICTED for call in self._calls):
            return [0.0] * len(self._calls)
        return self._pipe.scheduler.timesteps[-len(self._calls) :].tolist()
