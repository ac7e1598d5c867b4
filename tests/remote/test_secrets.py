"""Forms in which a service may say the key back; each must be gone from what is kept."""

import base64
import secrets
from urllib.parse import quote

import pytest

from sd35bench.remote.transport import Secrets

KEY = "sk-Live_9aB+/cD3eF5gH7iJ9kL1mN3oP5"
KEPT = Secrets.of({"authorization": f"Bearer {KEY}", "accept": "json"})
FORMS = {
    "as it is": KEY,
    "lower case": KEY.lower(),
    "upper case": KEY.upper(),
    "base64": base64.b64encode(KEY.encode()).decode(),
    "base64 for URLs": base64.urlsafe_b64encode(KEY.encode()).decode(),
    "base64 behind one byte": base64.b64encode(b":" + KEY.encode()).decode(),
    "base64 of basic auth": base64.b64encode(b"me:" + KEY.encode()).decode(),
    "base64 in lower case": base64.b64encode(KEY.encode()).decode().lower(),
    "hexadecimal": KEY.encode().hex(),
    "percent-encoded": quote(KEY, safe=""),
    "its first half": KEY[:17],
    "its end": KEY[-12:],
    "a cut of its base64": base64.b64encode(KEY.encode()).decode()[5:25],
}


def longest_shared(text: str, form: str) -> int:
    lengths = range(len(form), 0, -1)
    runs = ((n, i) for n in lengths for i in range(len(form) - n + 1))
    return next((n for n, i in runs if form[i : i + n] in text), 0)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_form_is_masked(form):
    text = f"refused: {form!r} is no key of 2026-11-30, see https://example.org/keys"
    masked = KEPT.mask(text)
    assert "[key]" in masked
    assert longest_shared(masked, form) < 8
    assert masked.startswith("refused: '")
    assert masked.endswith("is no key of 2026-11-30, see https://example.org/keys")


@pytest.mark.parametrize("form", [f for f in FORMS.values() if f != KEY])
def test_mutant_that_replaces_the_word_alone_lets_each_form_through(form):
    text = f"refused: {form}"
    assert text.replace(KEY, "[key]") == text


def test_ordinary_words_stay():
    text = "a prediction of model stable-diffusion-3.5-medium, status error, code 17" * 50
    assert KEPT.mask(text) == text
    assert Secrets.of({"x-api-key": "local"}).mask("http://localhost/x") == "http://localhost/x"


def test_a_short_key_is_masked_whole_only():
    short = Secrets.of({"x-api-key": "canary-key"})
    assert short.mask("a canary; CANARY-KEY") == "a canary; [key]"


def test_random_keys_are_found_wherever_they_stand():
    for _ in range(200):
        key = secrets.token_urlsafe(32)
        kept = Secrets.of({"authorization": f"Bearer {key}"})
        for before in (b"", b"x", b"xy", b"xyz"):
            said = base64.b64encode(before + key.encode() + b"!").decode()
            assert longest_shared(kept.mask(said), base64.b64encode(key.encode()).decode()) < 8


def test_a_cause_that_quotes_the_key_is_left_out():
    assert KEPT.safe_cause(ValueError(f"bad {KEY.lower()}")) is None
    fine = ValueError("bad")
    assert KEPT.safe_cause(fine) is fine
