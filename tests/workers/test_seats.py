"""Who sits where on one machine, and who is refused."""

import os
from dataclasses import replace

import pytest

from sd35bench.errors import ConfigError
from sd35bench.types import NO_WEIGHTS
from sd35bench.workers import seats
from sd35bench.workers.seats import AUTO, Seat, seats_of
from tests.studies.fakes import MODEL, fake_load


def load(threads: int = 1, **options):
    return replace(fake_load(**options), threads=threads)


@pytest.fixture
def machine(monkeypatch):
    """A machine with eight cores and as many GPUs as are given."""

    def have(gpus: int = 0, cores: int = 8) -> None:
        names = [f"GPU-{i}" for i in range(gpus)]
        monkeypatch.setattr(seats, "visible_gpus", lambda: names)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(10, 10 + cores)))

    have()
    return have


@pytest.mark.usefixtures("machine")
def test_cpu_workers_get_disjoint_cores_and_know_who_is_beside():
    assert seats_of(load(threads=3), 2) == (
        Seat(cores=(10, 11, 12), beside=1),
        Seat(cores=(13, 14, 15), beside=1),
    )
    assert len(seats_of(load(threads=2), AUTO)) == 4
    assert seats_of(load(threads=8), AUTO) == (Seat(),)


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(
    ("threads", "workers", "remedy"), [(8, 2, "give threads=4"), (1, 9, "at most workers=8")]
)
def test_more_cpu_workers_than_cores_are_refused_by_name(threads, workers, remedy):
    with pytest.raises(ConfigError, match=f"workers={workers}.*backend=fake.*{remedy}"):
        seats_of(load(threads=threads), workers)


def test_gpu_workers_see_one_device_each(machine):
    machine(gpus=2)
    assert seats_of(load(), AUTO) == (Seat(gpu="GPU-0"), Seat(gpu="GPU-1"))
    with pytest.raises(ConfigError, match=r"workers=3.*one GPU a worker, and 2 are visible"):
        seats_of(load(), 3)
    assert seats_of(load(device="cpu"), 2)[0].cores == (10,)


def test_what_reads_no_weights_occupies_nothing(machine):
    machine(gpus=1)
    free = replace(load(threads=8), model=replace(MODEL, weights_digest=NO_WEIGHTS))
    assert seats_of(free, 50) == (Seat(),) * 50
