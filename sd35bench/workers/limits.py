"""How long and how large a worker may become, and what is shared out and kept: bounds of a run.

They are no part of a trial's identity: the same trial under other limits is the same trial.

A deadline tells a hang from slowness. A batch may take `BATCH_FACTOR` times its own warm-up, which
contained compilation; no less than `BATCH_FLOOR_S`, so that a busy machine is no hang. Before
anything has run only the work is known: `START_FLOOR_S`, or `START_S_PER_MEGAPIXEL` seconds per
megapixel and denoiser evaluation, which is 20 times slower than eager float32 on a GPU (3 s) and
still below a full-size model on two CPU cores (about 240 s): there `deadline_s` has to be given.
"""

from dataclasses import dataclass

from sd35bench.evaluations import work
from sd35bench.types import Request

BATCH_FACTOR = 20
BATCH_FLOOR_S = 120.0
START_FACTOR = 10
START_FLOOR_S = 1800.0
START_S_PER_MEGAPIXEL = 60.0
LONGEST_WAIT_S = 2e6
"""poll(2) counts milliseconds in 31 bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of one run.

    `deadline_s`: seconds for a batch, ten times that for loading, each warm-up and settling;
    ``None`` derives both. `memory_limit_bytes`: resident set of the worker process, ``None`` for
    no limit. `max_failures`: deaths of workers on one load after which the rest is skipped.
    `starts`: worker processes that share the trials, one after the other. `keep_latents`: keep the
    latents after the first and the last step of every image. `contention`: what becomes of timed
    trials that other work disturbed: "retime" (up to half as many again), "warn", or "error" (they
    count as failed).
    """

    deadline_s: float | None = None
    memory_limit_bytes: int | None = None
    max_failures: int = 3
    starts: int = 1
    keep_latents: bool = False
    contention: str = "retime"

    def batch_deadline_s(self, expected_s: float) -> float:
        """Seconds for a timed batch whose warm-up took `expected_s`."""
        derived_s = max(BATCH_FLOOR_S, BATCH_FACTOR * expected_s)
        return _bounded(derived_s if self.deadline_s is None else self.deadline_s)

    def start_deadline_s(self, work: float = 0.0) -> float:
        """Seconds for loading, settling, or a warm-up of that much `work_of`."""
        derived_s = max(START_FLOOR_S, START_S_PER_MEGAPIXEL * work)
        return _bounded(derived_s if self.deadline_s is None else START_FACTOR * self.deadline_s)


def work_of(request: Request, images: int) -> float:
    """Megapixels times the sequences that a batch puts through the denoiser.

    Guidance's second half counts, Heun's second evaluation, and calls with layers left out.
    """
    return images * max(1, work(request).sequences) * request.width * request.height / 1e6


def _bounded(seconds: float) -> float:
    return min(seconds, LONGEST_WAIT_S)
