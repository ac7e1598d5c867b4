"""Requests per minute: never more in any 60 seconds, and who waits as told gets through."""

from hypothesis import example, given
from hypothesis import strategies as st

from sd35bench.server.state import RequestLimit


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_window_slides():
    clock = Clock()
    limit = RequestLimit(2, clock)
    assert limit.wait_s("a") == 0.0
    clock.now += 20
    assert limit.wait_s("a") == 0.0
    clock.now += 10
    assert limit.wait_s("a") == 30.0
    assert limit.wait_s("b") == 0.0
    clock.now += 30
    assert limit.wait_s("a") == 0.0
    assert limit.wait_s("a") == 20.0


def test_no_limit_lets_everything_pass():
    limit = RequestLimit(None)
    assert not any(limit.wait_s("a") for _ in range(1000))


@given(most=st.integers(1, 4), gaps=st.lists(st.floats(0, 40), max_size=40))
@example(most=2, gaps=[1.2633656315961783, 1e-09, 0.0, 0.0, 0.0])  # 60 s less the last digit
def test_no_window_holds_more(most, gaps):
    clock = Clock()
    limit, passed = RequestLimit(most, clock), []
    for gap in gaps:
        clock.now += gap
        wait_s = limit.wait_s("a")
        if wait_s == 0:
            passed.append(clock.now)
        else:
            assert 0 < wait_s <= 60 + 1e-6
            clock.now += wait_s + 1e-9
            assert limit.wait_s("a") == 0
            passed.append(clock.now)
    for first, beyond in zip(passed, passed[most:], strict=False):
        assert beyond - first >= 60 - 1e-6
