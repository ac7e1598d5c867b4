"""Where workers sit: each on a GPU or on cores of its own, and refused where there is none left.

A backend occupies a GPU where its load asks for one, else as many cores as it has threads. One
that reads no weights (`needs_weights: false`, the fake backend) computes nothing worth timing: it
occupies nothing, and any number of its workers fit.
"""

import os
from dataclasses import dataclass

from sd35bench.errors import ConfigError
from sd35bench.machine.measure import asked_device, gpu_uuid, visible_gpus
from sd35bench.types import NO_WEIGHTS, Load

AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Seat:
    """What one worker sees of this machine; ``None`` leaves it all in sight.

    `gpu` is a value of CUDA_VISIBLE_DEVICES; `cores` are the numbers of cores that it may use.
    `beside` counts the workers that compute on other cores of this machine at the same time.
    """

    gpu: str | None = None
    cores: tuple[int, ...] | None = None
    beside: int = 0


def occupies(load: Load) -> bool:
    """Whether a load takes a GPU or cores for itself."""
    return load.model.weights_digest != NO_WEIGHTS


def resources(load: Load, seat: Seat) -> tuple[str, ...]:
    """Names (of `leases`) of the GPU or cores that a load is expected to occupy on a seat.

    What it occupies in fact its worker says once it is loaded (`environment`'s `occupies`).
    """
    if not occupies(load):
        return ()
    if asked_device(load, bool(visible_gpus())) == "cuda":
        return (f"gpu-{gpu_uuid(seat.gpu)}",)
    cores = os.sched_getaffinity(0) if seat.cores is None else seat.cores
    return tuple(f"core-{number}" for number in sorted(cores))


def seats_of(load: Load, workers: int | str) -> tuple[Seat, ...]:
    """A seat for each of `workers` on this machine; "auto" is as many as fit.

    Raises: ConfigError, before anything is loaded, for more workers than fit.
    """
    cores = sorted(os.sched_getaffinity(0))
    if not occupies(load):
        return (Seat(),) * (len(cores) if workers == AUTO else int(workers))
    gpus = visible_gpus()
    if asked_device(load, bool(gpus)) == "cuda":
        count = len(gpus) if workers == AUTO else int(workers)
        if count > len(gpus):
            raise ConfigError(
                f"workers={workers}: backend={load.backend.name} occupies one GPU a worker, and"
                f" {len(gpus)} are visible here; give workers={len(gpus)}, or workers=auto"
            )
        return tuple(Seat(gpu=gpu) for gpu in gpus[:count])
    fit = max(len(cores) // load.threads, 1)
    if (fit if workers == AUTO else int(workers)) == 1:
        return (Seat(),)
    parts = share_cores(workers, load.threads, f"backend={load.backend.name}")
    return tuple(Seat(cores=part, beside=len(parts) - 1) for part in parts)


def share_cores(workers: int | str, threads: int, who: str) -> list[tuple[int, ...]]:
    """`threads` cores for each of `workers`, none of them twice; "auto" is as many as fit.

    `who` occupies them, in the refusal's words. Raises: ConfigError for more than fit.
    """
    cores = sorted(os.sched_getaffinity(0))
    most = len(cores) // threads
    count = max(most, 1) if workers == AUTO else int(workers)
    if count > most:
        fewer = max(1, len(cores) // count)
        remedy = f"threads={fewer}" if count <= len(cores) else f"at most workers={len(cores)}"
        raise ConfigError(
            f"workers={workers}: {who} occupies threads={threads} cores a worker, and this process"
            f" may use {len(cores)}; give {remedy}"
        )
    return [tuple(cores[i * threads : (i + 1) * threads]) for i in range(count)]
