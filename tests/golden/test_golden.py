"""Every verb's outputs are what they were; meant changes: `python -m tests.golden --write`."""

import pytest

from tests.golden.cases import outputs
from tests.golden.compared import differences


@pytest.mark.timeout(900)  # 20 s on a quiet machine
def test_outputs_of_every_verb_are_as_they_were(tmp_path, fakes_here):
    text = differences(outputs(tmp_path.resolve()))
    if text:
        pytest.fail(f"{text}\n\nmeant? make them anew: python -m tests.golden --write", False)
