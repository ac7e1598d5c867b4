"""Texts that only some encoders read, and words with weights, on the tiny checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sd35bench.backends.eager import EagerBackend
from sd35bench.backends.families import _PipeText, text_of
from sd35bench.core.text import SD3Text
from sd35bench.errors import UnsupportedRequest
from sd35bench.types import Request
from tests.backends.bare import bare_images, batch, differs, make_inits
from tests.backends.conftest import make_load, make_request
from tests.studies.tiny import TOKENS, build_tiny_sd3

PROMPT = "a red cube"
RED = {"clip": slice(2, 5), "t5": slice(TOKENS + 2, TOKENS + 6)}
"""Where "red" stands: a character is a token; CLIP begins with one more, T5 has one a space."""


def _images(backend: EagerBackend, requests: list[Request]) -> Any:
    return backend.generate(requests, make_inits(requests)).images


def test_texts_by_encoder_are_diffusers_own(eager: EagerBackend, tiny_path: Path) -> None:
    requests = batch(2, prompt_2="blue", prompt_3="")
    images = _images(eager, requests)
    assert not differs(images, bare_images(tiny_path, requests))
    swapped = batch(2, prompt_2="", prompt_3="blue")  # a mutant
    assert differs(images, bare_images(tiny_path, swapped))
    assert differs(images, _images(eager, batch(2)))


def test_a_weight_of_one_changes_no_bit_and_others_do(eager: EagerBackend) -> None:
    plain = _images(eager, batch(1))
    assert not differs(plain, _images(eager, batch(1, prompt_weights="red:1")))
    assert differs(plain, _images(eager, batch(1, prompt_weights="red:1.5")))


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.7])
def test_weights_move_the_words_embeddings_from_the_empty_texts(weight: float) -> None:
    pipe: Any = build_tiny_sd3()
    embeds, _, pooled, _ = pipe.encode_prompt(PROMPT, None, None, max_sequence_length=TOKENS)
    empty, *_ = pipe.encode_prompt("", None, None, max_sequence_length=TOKENS)
    asked = make_request(prompt=PROMPT, prompt_weights=f"red:{weight}")
    found, found_pooled = _PipeText(pipe).encode([text_of(asked)], TOKENS)
    wanted = embeds.clone()
    for place in RED.values():
        wanted[:, place] = empty[:, place] + weight * (embeds[:, place] - empty[:, place])
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(found_pooled, pooled)


def test_mutant_that_forgets_clips_first_token_weighs_other_words(monkeypatch) -> None:
    pipe: Any = build_tiny_sd3()
    asked = [text_of(make_request(prompt=PROMPT, prompt_weights="red:2"))]
    right, _ = _PipeText(pipe).encode(asked, TOKENS)
    count = SD3Text._count
    monkeypatch.setattr(SD3Text, "_count", lambda s, n, t: count(s, n, t) - (n < 2))
    wrong, _ = _PipeText(pipe).encode(asked, TOKENS)
    assert not torch.allclose(right, wrong)


def test_a_load_without_t5_refuses_a_text_for_it(tiny_path: Path) -> None:
    backend = EagerBackend(make_load(tiny_path, t5=False))
    with pytest.raises(UnsupportedRequest, match="prompt_3: T5 is not loaded"):
        _images(backend, batch(1, prompt_3="blue"))
    backend.close()
