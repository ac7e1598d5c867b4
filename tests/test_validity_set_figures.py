"""Set metrics' differences: the page says what was kept, and it holds from another seed."""

import pytest

from sd35bench.gate.set_figures import LEAST_PROMPTS
from tests.validity import set_figures as validity
from tests.validity_runs.kept import read

SEED = 7
OFF = 1.5
"""Points from 95 that are claimed from the least number of prompts on."""
AT_THE_TRUTH = "A/A, both at the truth"


def _cell(text: str) -> tuple[float, float, int]:
    held, rest = text.split(" (")
    above, often = rest.split(") of ")
    return float(held), float(above), int(often)


def _noise(percent: float, often: int) -> float:
    """2.6 standard errors of a share."""
    return 2.6 * (percent * (100 - percent) / often) ** 0.5


def _claimed():
    for name in validity.WORLDS:
        cells = {k: v for k, v in read(validity.TABLE)[name].items() if k != "made"}
        for key, text in cells.items():
            kind, prompts = key.split()
            least = LEAST_PROMPTS["frechet" if kind == "FID" else kind.lower()]
            if int(prompts) >= least:
                yield name, kind, int(prompts), _cell(text)


def test_page_is_what_was_kept():
    text = validity.PAGE.read_text("utf-8")
    between = text.partition(validity.BEGIN)[2].partition(validity.END)[0]
    assert between.strip() == validity.section()


def test_what_was_kept_supports_the_least_number_of_prompts():
    cells = list(_claimed())
    assert {kind for _, kind, _, _ in cells} == set(validity.KINDS)
    for name, kind, prompts, (held, above, often) in cells:
        where = f"{name}, {kind}, {prompts}: {held} ({above})"
        assert held >= 95 - OFF - _noise(95 - OFF, often), where
        careful = name == AT_THE_TRUTH and kind == "CMMD"
        assert careful or held <= 95 + OFF + _noise(95 + OFF, often), where
        assert above <= 2.5 + _noise(2.5, often), where


@pytest.mark.slow
@pytest.mark.parametrize("prompts", [128, 512])
@pytest.mark.parametrize("name", ["A/A, both off", "worse"])
def test_kid_s_interval_holds_from_another_seed(name, prompts):
    found = validity.measure("KID", validity.WORLDS[name], prompts, 1000, SEED)
    assert abs(found.held - 95) <= OFF + _noise(95, 1000)
    assert found.above <= 2.5 + _noise(2.5, 1000)
