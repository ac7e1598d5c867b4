import numpy as np
import pytest

from sd35bench.backends.base import Backend, Generation
from sd35bench.errors import BackendError, InvalidImage, OptimizationNotApplied, OutOfMemory
from sd35bench.machine import measure
from sd35bench.types import Flops, GpuState, Request, Status
from sd35bench.workers import worker
from sd35bench.workers.worker import BatchJob, check_image


def request(prompt: str = "a", side: int = 8) -> Request:
    return Request(prompt=prompt, steps=1, cfg=1, seed=0, width=side, height=side)


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)


class Double(Backend):
    """Makes pictures, keeps latents when told to, counts FLOPs from what it is given."""

    def __init__(self, images=None, error=None, settles=None):
        self.in_force = {"step": "loaded"}
        self._images, self._error, self._settles = images, error, settles

    def generate(self, requests, inits):
        if self._error is not None:
            raise self._error
        images = (
            [picture(n) for n in range(len(requests))] if self._images is None else self._images
        )
        latents = np.arange(len(requests) * 4, dtype=np.float32).reshape(-1, 1, 2, 2)
        kept = (latents, latents + 100) if self.keep_latents else (None, None)
        return Generation(images=images, evaluations=3, latents_first=kept[0], latents_last=kept[1])

    def settle(self):
        if self._settles is not None:
            raise self._settles
        self.in_force = {"step": "settled"}

    def flops(self, request, evaluations):
        return Flops(text=1.0, denoise=10.0 * evaluations, decode=request.width)


def ask(backend: Backend, count: int = 2, **fields) -> worker.Answer:
    requests = tuple(request(f"prompt {n}") for n in range(count))
    return worker.answer(backend, BatchJob(requests=requests, inits=(None,) * count, **fields))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((8, 8, 3), np.uint8), "black"),
        (np.full((8, 8, 3), 90, np.uint8), "constant"),
        (np.full((8, 8, 3), (200, 10, 10), np.uint8), "constant"),
        (np.ones((8, 16, 3), np.uint8), "wanted uint8"),
        (np.random.default_rng(0).random((8, 8, 3)), "wanted uint8"),
    ],
    ids=["black", "grey", "one-colour", "size", "float"],
)
def test_guard_refuses_what_no_metric_should_see(image, message):
    with pytest.raises(InvalidImage, match=message):
        check_image(image, request())


def test_guard_lets_a_dark_picture_pass():
    image = np.zeros((8, 8, 3), np.uint8)
    image[2:4, 2:4] = 40
    check_image(image, request())


def test_worker_marks_one_bad_image_of_a_batch():
    answer = ask(Double(images=[picture(), np.zeros((8, 8, 3), np.uint8)]))
    assert [m.status for m in answer.made] == [Status.OK, Status.INVALID_IMAGE]
    assert answer.phase == "guard"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (OutOfMemory("full"), Status.OUT_OF_MEMORY),
        (MemoryError("full"), Status.OUT_OF_MEMORY),
        (BackendError("no"), Status.ERROR),
    ],
    ids=["backend's", "python's", "other"],
)
def test_worker_answers_a_failure_with_its_status_and_the_time_it_took(error, status):
    answer = ask(Double(error=error))
    assert {m.status for m in answer.made} == {status}
    assert (answer.phase, answer.timings, answer.flops) == ("generate", None, None)
    assert answer.wall_s > 0


def test_worker_lets_bugs_through():
    with pytest.raises(ZeroDivisionError):
        ask(Double(error=ZeroDivisionError()))


def test_worker_hands_each_image_its_own_latents_only_when_asked():
    assert all(m.latents is None for m in ask(Double()).made)
    made = ask(Double(), keep_latents=True).made
    for number, one in enumerate(made):
        first, last = one.latents
        assert first.shape == (1, 2, 2)
        assert first[0, 0, 0] == 4 * number
        assert np.array_equal(last, first + 100)


def test_worker_stops_keeping_latents_for_the_next_job():
    backend = Double()
    ask(backend, keep_latents=True)
    assert ask(backend).made[0].latents is None


def test_worker_counts_flops_from_the_evaluations_that_were_seen():
    assert ask(Double()).flops == Flops(text=1.0, denoise=30.0, decode=8.0)


def test_worker_reads_the_gpu_right_after_the_images(monkeypatch):
    state = GpuState(sm_clock_mhz=1, memory_clock_mhz=2, power_w=3.0, temperature_c=4)
    monkeypatch.setattr(worker, "gpu_state", lambda: state)
    assert ask(Double()).gpu == state


def test_worker_has_no_gpu_state_without_a_gpu(monkeypatch):
    monkeypatch.setattr(measure, "_nvml", lambda: None)
    assert ask(Double()).gpu is None


def test_worker_reads_in_force_again_after_settling():
    backend = Double()
    assert backend.in_force == {"step": "loaded"}
    assert worker.settle(backend) == worker.Settled(in_force={"step": "settled"})


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (OptimizationNotApplied("2 graph breaks"), Status.ERROR),
        (MemoryError("full"), Status.OUT_OF_MEMORY),
    ],
    ids=["not-applied", "memory"],
)
def test_worker_says_why_it_could_not_settle(error, status):
    failed = worker.settle(Double(settles=error))
    assert failed.status is status
    assert str(error) in failed.error
