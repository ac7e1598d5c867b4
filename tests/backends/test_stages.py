"""The stage meter on a clock that ticks once per stamp, so that every figure is exact."""

from typing import Any

import pytest

from sd35bench.backends.stages import DECODE, DENOISER, TEXT, StageMeter
from sd35bench.machine.measure import DeviceClock


class Ticking(DeviceClock):
    """Counts stamps instead of seconds."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.now = 0

    def stamp(self) -> int:
        self.now += 1
        return self.now


class Parts:
    """Something with the three methods of a pipeline that are watched."""

    def encode(self, prompt: str) -> str:
        """Encode."""
        return prompt.upper()

    def denoise(self, x: int, *, by: int) -> int:
        return x - by

    def decode(self, x: int) -> int:
        if x < 0:
            raise ValueError("negative")
        return x * 2


@pytest.fixture
def parts() -> Parts:
    return Parts()


@pytest.fixture
def meter(parts: Parts) -> StageMeter:
    meter = StageMeter(Ticking())
    meter.watch(parts, "encode", TEXT)
    meter.watch(parts, "denoise", DENOISER)
    meter.watch(parts, "decode", DECODE)
    return meter


def test_meter_times_every_stage(meter: StageMeter, parts: Parts) -> None:
    meter.begin()
    assert parts.encode("a") == "A"  # stamps 1, 2
    for _ in range(2):  # stamps 3, 4 and the step's end 5; then 6, 7, 8
        assert parts.denoise(5, by=2) == 3
        meter.step_ended()
    assert parts.decode(4) == 8  # stamps 9, 10
    times = meter.read()
    assert (times.text_s, times.denoise_s, times.decode_s) == (1, 5, 1)
    assert times.step_s == (2, 3)
    assert times.evaluations == 2


def test_meter_counts_two_calls_in_one_step(meter: StageMeter, parts: Parts) -> None:
    meter.begin()
    parts.denoise(5, by=2)
    parts.denoise(5, by=2)
    meter.step_ended()
    assert meter.read().evaluations == 2
    assert len(meter.read().step_s) == 1


def test_meter_joins_a_steps_evaluations(meter: StageMeter, parts: Parts) -> None:
    meter.begin()
    for _ in range(5):  # Heun's three steps: two, two, one
        parts.denoise(5, by=2)
        meter.step_ended()
    singles = meter.read().step_s
    times = meter.read(order=2)
    assert len(singles) == 5
    assert times.step_s == (sum(singles[:2]), sum(singles[2:4]), singles[4])
    assert times.denoise_s == sum(singles)
    assert times.evaluations == 5


def test_meter_knows_no_time_of_stages_that_did_not_run(meter: StageMeter) -> None:
    meter.begin()
    times = meter.read()
    assert (times.text_s, times.denoise_s, times.decode_s) == (None, None, None)
    assert (times.step_s, times.evaluations) == ((), 0)


def test_meter_forgets_the_call_before(meter: StageMeter, parts: Parts) -> None:
    parts.denoise(5, by=2)
    meter.step_ended()
    meter.begin()
    assert meter.read().evaluations == 0


def test_meter_lets_errors_through(meter: StageMeter, parts: Parts) -> None:
    with pytest.raises(ValueError, match="negative"):
        parts.decode(-1)
    assert meter.read().decode_s is None


def test_meter_shows_results(parts: Parts) -> None:
    seen: list[Any] = []
    meter = StageMeter(Ticking())
    meter.watch(parts, "decode", DECODE, seen.append)
    parts.decode(4)
    assert seen == [8]


def test_meter_keeps_name_and_docstring(meter: StageMeter, parts: Parts) -> None:
    assert (parts.encode.__name__, parts.encode.__doc__) == ("encode", "Encode.")


def test_release_restores_the_class_method(meter: StageMeter, parts: Parts) -> None:
    assert set(vars(parts)) == {"encode", "denoise", "decode"}
    meter.release()
    meter.release()
    assert vars(parts) == {}


def test_release_restores_an_instances_own_method(parts: Parts) -> None:
    def hooked(x: int) -> int:
        return x + 100

    parts.decode = hooked  # type: ignore[method-assign]
    meter = StageMeter(Ticking())
    meter.watch(parts, "decode", DECODE)
    assert parts.decode(1) == 101
    meter.release()
    assert parts.decode is hooked
