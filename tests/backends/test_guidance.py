"""Skip-layer guidance: when it acts, how it is written, and what reaches the denoiser."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sd35bench.backends.eager import EagerBackend
from sd35bench.evaluations import (
    SAMPLERS,
    acting_steps,
    evaluations,
    parse_skip_layers,
    skip_layer_text,
    work,
)
from sd35bench.types import SkipLayerGuidance, Task
from tests.backends.conftest import make_request

STABILITY = SkipLayerGuidance(layers=(7, 8, 9), scale=2.5, start=0.01, stop=0.2)
fractions = st.floats(0, 1, allow_nan=False)


@given(
    st.builds(
        SkipLayerGuidance,
        layers=st.lists(st.integers(0, 40), min_size=1, max_size=5).map(tuple),
        scale=st.floats(1e-6, 100, allow_nan=False),
        start=fractions,
        stop=fractions,
    )
)
def test_what_is_written_is_read_back(skipping: SkipLayerGuidance) -> None:
    assert parse_skip_layers(skip_layer_text(skipping)) == skipping


def test_it_is_written_as_one_would() -> None:
    assert skip_layer_text(STABILITY) == "7-8-9@2.5:0.01-0.2"
    for text in ("none", "stability", "7@2.5", "7@2.5:0.1", "-7@1:0-1", "7@x:0-1"):
        assert parse_skip_layers(text) is None


@pytest.mark.parametrize(
    ("steps", "acting"),
    [(40, range(1, 8)), (28, range(1, 6)), (8, [1]), (6, [1]), (5, []), (1, [])],
)
def test_acting_steps_of_stabilitys_preset(steps: int, acting: Any) -> None:
    assert acting_steps(STABILITY, steps) == tuple(acting)


def watch_denoiser(backend: EagerBackend, monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """(timestep, layers left out or None, batch) of every call of the denoiser."""
    calls: list[tuple] = []
    transformer = backend._pipes[Task.TEXT_TO_IMAGE].transformer
    inner = transformer.forward

    def forward(**kwargs: Any) -> Any:
        skipped = kwargs.get("skip_layers")
        calls.append((float(kwargs["timestep"][0]), skipped, len(kwargs["hidden_states"])))
        return inner(**kwargs)

    monkeypatch.setattr(transformer, "forward", forward)
    return calls


WINDOWS = ((0.3, 0.7), (0.01, 0.2), (0.0, 1.0))


@pytest.mark.parametrize(
    ("sampler", "window"),
    [
        # Samplers of one evaluation a step differ in nothing here; the slow suite has all.
        pytest.param(s, w, marks=[pytest.mark.slow] if s in ("dpmpp_2m", "unipc") and i else [])
        for s in SAMPLERS
        for i, w in enumerate(WINDOWS)
    ],
)
def test_layers_are_left_out_at_the_steps_that_the_fractions_name(
    eager: EagerBackend,
    monkeypatch: pytest.MonkeyPatch,
    sampler: str,
    window: tuple[float, float],
) -> None:
    skipping = SkipLayerGuidance(layers=(1,), scale=2.0, start=window[0], stop=window[1])
    request = make_request(steps=10, sampler=sampler, skip_layer_guidance=skipping)
    calls = watch_denoiser(eager, monkeypatch)
    made = eager.generate([request], [None])
    plain = [c for c in calls if c[1] is None]
    order = 2 if sampler == "heun" else 1
    expected = []
    for step in acting_steps(skipping, 10):
        expected += [t for t, _, _ in plain[order * step : order * step + order]]
    skipped = [c for c in calls if c[1] is not None]
    assert [t for t, _, _ in skipped] == expected
    assert all(layers == [1] and batch == 1 for _, layers, batch in skipped)
    assert all(batch == 2 for _, _, batch in plain)
    assert made.evaluations == len(calls) == evaluations(request)
    assert len(skipped) == work(request).skipped


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": (0,)},
        {"layers": (1, 2)},
        {"scale": 3.0},
        {"start": 0.5},
        {"stop": 0.3},
    ],
    ids=str,
)
def test_every_part_of_it_acts(eager: EagerBackend, changes: dict[str, Any]) -> None:
    parts: dict[str, Any] = {"layers": (1,), "scale": 2.0, "start": 0.01, "stop": 0.8}
    images = [
        eager.generate([make_request(skip_layer_guidance=guidance)], [None]).images[0]
        for guidance in (
            None,
            SkipLayerGuidance(**parts),
            SkipLayerGuidance(**{**parts, **changes}),
        )
    ]
    assert all(not np.array_equal(images[i], images[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
