"""The key's value, to be kept out of everything that a service sends back.

A service may say the key as it is, in another case, in base64, in hexadecimal or percent-encoded,
and it may cut it. So text is compared in runs: `_RUN` characters in a row of any of these forms,
whatever their case, are masked, together with what continues them. By chance a run of 8 characters
of a random key is in a text of 10^6 characters once in 10^7 texts; whoever uses a word of a
language for a key gets masked words.

Cost: one look-up per character of an answer, 0.1 µs.
"""

import base64
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Self
from urllib.parse import quote

_MASK = "[key]"
_SHORTEST = 8
"""Shorter words stand in ordinary answers (a key `local` in every URL of localhost), and no service
hands out such keys."""
_RUN = 8
_SHORT = 16
"""A key below this is masked whole only: half of it is a word (`canary-key` has `canary`)."""


@dataclass(frozen=True, slots=True)
class Secrets:
    """The words that must not be repeated; its repr does not show them."""

    _runs: Mapping[int, frozenset[str]] = field(repr=False)

    @classmethod
    def of(cls, headers: Mapping[str, str]) -> Self:
        """Take the last word of each header's value: the key, after `Bearer` or the like."""
        last = {words[-1] for value in headers.values() if (words := value.split())}
        runs: dict[int, set[str]] = {}
        for word in last:
            for form in _forms(word) if len(word) >= _SHORTEST else ():
                size = _RUN if len(word) >= _SHORT else len(form)
                found = runs.setdefault(size, set())
                found.update(form[i : i + size] for i in range(len(form) - size + 1))
        return cls({size: frozenset(found) for size, found in runs.items()})

    def mask(self, text: str) -> str:
        """The text with every secret replaced."""
        kept, end = [], 0
        for start, stop in self._found(text):
            if start > end or not kept:
                kept += [text[end:start], _MASK]
            end = max(end, stop)
        return "".join((*kept, text[end:]))

    def safe_cause(self, error: BaseException) -> BaseException | None:
        """The exception if nothing in its chain quotes a secret; nothing if something does."""
        link: BaseException | None = error
        while link is not None:
            text = str(link)
            if self.mask(text) != text:
                return None
            link = link.__cause__ or link.__context__
        return error

    def _found(self, text: str) -> Iterator[tuple[int, int]]:
        """Where secrets are, from left to right; the places may overlap."""
        lowered = "".join(c.lower() if len(c.lower()) == 1 else c for c in text)
        places = (
            (i, i + size)
            for size, runs in self._runs.items()
            for i in range(len(lowered) - size + 1)
            if lowered[i : i + size] in runs
        )
        yield from sorted(places)


def _forms(word: str) -> Iterator[str]:
    """Every form in which a word is looked for, in lower case."""
    data = word.encode()
    yield word.lower()
    yield data.hex()
    yield quote(word, safe="").lower()
    for before in range(3):  # base64 depends on what stands in front, modulo 3
        padded = b"\0" * before + data
        whole = len(padded) // 3 * 4
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            inner = encode(padded).decode()[-(-before * 4 // 3) : whole]
            if len(inner) >= _SHORTEST:
                yield inner.lower()
