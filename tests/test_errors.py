"""Failures of one kind are counted as one, whatever ids stand in their messages."""

import pytest

from sd35bench.errors import count_error

SAME = [
    ("the service does not know prediction prediction-{}, which it had accepted", "1", "22"),
    (
        "asked after 3f2c8a10-1111-4222-8333-{}, answered: nothing",
        "0123456789ab",
        "ba9876543210",
    ),
    ("no result for gm3qorzdhgbfurvjtvhg6dck{}", "h1", "z9"),
    ("RuntimeError: storage at 0x7f31c{} was freed", "0a0", "4f8"),
    ("signal 11, SIGSEGV; its stack is in /tmp/sd35bench-crash-{}.txt", "k2_9x0ab", "zz81q_4t"),
]
UNLIKE = [
    ("asked for 64x64 px, got 8x8", "asked for 64x64 px, got 16x16"),
    ("not done after remote.timeout_s=300", "not done after remote.timeout_s=20"),
    ("HTTP 502", "HTTP 503"),
    ("the worker ended with exit code 7", "the worker ended with exit code 8"),
]


@pytest.mark.parametrize(("text", "one", "other"), SAME)
def test_equal_failures_with_unlike_ids_are_one_kind(text, one, other):
    counts = {}
    count_error(counts, text.format(one))
    count_error(counts, text.format(one))
    assert counts == {text.format(one): 2}, "one failure keeps its own words"
    count_error(counts, text.format(other), 3)
    count_error(counts, text.format(one))
    assert len(counts) == 1
    (kind,) = counts
    assert counts[kind] == 6
    assert "…" in kind
    assert one not in kind
    assert other not in kind


@pytest.mark.parametrize("texts", UNLIKE)
def test_unlike_failures_stay_apart(texts):
    counts = {}
    for text in texts:
        count_error(counts, text)
    assert counts == dict.fromkeys(texts, 1)


def test_mutant_that_compares_the_words_sees_many_kinds(monkeypatch):
    monkeypatch.setattr("sd35bench.errors.error_kind", lambda text: text)
    with pytest.raises(AssertionError):
        test_equal_failures_with_unlike_ids_are_one_kind(*SAME[0])
