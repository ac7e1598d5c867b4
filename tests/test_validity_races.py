import numpy as np
import pytest

from tests.validity.races import measure

pytestmark = pytest.mark.slow


def test_a_race_wrongly_says_shown_as_seldom_as_holm_promises():
    # 60 races of the worst case: 2.5 %, and what chance adds to it.
    found = measure("balanced", 64, True, 60)
    assert found.wrongly <= 0.025 + 2 * np.sqrt(0.025 * 0.975 / 60)


@pytest.mark.parametrize(("profile", "within"), [("balanced", 0.9), ("preview", 0.75)])
def test_a_race_is_within_the_margin_for_40_percent_of_the_images(profile, within):
    found = measure(profile, 64, False, 40)
    assert found.within >= within
    assert found.images <= 0.4
