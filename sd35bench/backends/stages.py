"""Stage times of one diffusers call, taken without changing what it computes.

A `StageMeter` wraps bound methods of the loaded pipeline (`encode_prompt`, the transformer's
`forward`, the VAE's `decode`) so that each call leaves two stamps of the device's clock, and
counts the denoiser's calls on the way. It wraps `forward`, not the module: hooks, compiled
forwards and offloading stay as they were, inside. A stamp costs about a microsecond on the CPU.
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sd35bench.machine.measure import DeviceClock

TEXT = "text"
DENOISER = "denoiser"
DECODE = "decode"


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTimes:
    """Seconds of one batch by stage; ``None`` for a stage that did not run.

    `denoise_s` runs from the first call of the denoiser (or from `loop_began`) to the end of the
    last step and is the sum of `step_s`. `evaluations` are the denoiser's calls.
    """

    text_s: float | None
    denoise_s: float | None
    decode_s: float | None
    step_s: tuple[float, ...]
    evaluations: int


class StageMeter:
    """Stamps the stages of one call at a time; `begin`, run the call, `read`."""

    def __init__(self, clock: DeviceClock) -> None:
        """Start with nothing watched."""
        self._clock = clock
        self._watched: list[tuple[Any, str, Any]] = []
        self._spans: dict[str, list[tuple[Any, Any]]] = {}
        self._step_ends: list[Any] = []
        self._loop_start: Any = None

    def watch(
        self, owner: Any, method: str, stage: str, see: Callable[[Any], None] | None = None
    ) -> None:
        """Wrap the bound method `owner.method`, so that each call leaves a span of `stage`.

        `see` is shown every result, outside the span.
        """
        own = owner.__dict__.get(method)  # an instance's own, as accelerate's hooks leave it
        inner: Callable[..., Any] = getattr(owner, method)
        stamp = self._clock.stamp

        @functools.wraps(inner)
        def stamped(*args: Any, **kwargs: Any) -> Any:
            start = stamp()
            result = inner(*args, **kwargs)
            self._spans.setdefault(stage, []).append((start, stamp()))
            if see is not None:
                see(result)
            return result

        setattr(owner, method, stamped)
        self._watched.append((owner, method, own))

    def release(self) -> None:
        """Give every watched object its own method back; safe to call twice."""
        while self._watched:
            owner, method, own = self._watched.pop()
            if own is None:
                delattr(owner, method)
            else:
                setattr(owner, method, own)

    def begin(self) -> None:
        """Forget the last call."""
        self._spans = {}
        self._step_ends = []
        self._loop_start = None

    def loop_began(self) -> None:
        """Mark the loop's beginning, where the first step may not call the denoiser."""
        self._loop_start = self._clock.stamp()

    def step_ended(self) -> None:
        """Mark the end of a step's evaluation, the scheduler's part included."""
        self._step_ends.append(self._clock.stamp())

    def read(self, order: int = 1) -> StageTimes:
        """Return the last call's times; on CUDA waits for its last event.

        `order`: marks that make a step; the last step may have fewer, as Heun's has.
        """
        calls = self._spans.get(DENOISER, [])
        ends = [self._step_ends[i : i + order][-1] for i in range(0, len(self._step_ends), order)]
        start = calls[0][0] if calls and self._loop_start is None else self._loop_start
        marks = [] if start is None else [start, *ends]
        step_s = tuple(
            self._clock.seconds(start, stop) for start, stop in itertools.pairwise(marks)
        )
        return StageTimes(
            text_s=self._total(TEXT),
            denoise_s=sum(step_s) if step_s else None,
            decode_s=self._total(DECODE),
            step_s=step_s,
            evaluations=len(calls),
        )

    def _total(self, stage: str) -> float | None:
        spans = self._spans.get(stage)
        return sum(self._clock.seconds(*span) for span in spans) if spans else None
