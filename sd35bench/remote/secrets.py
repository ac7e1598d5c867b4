"""The key's value, to be kept out of everything that a service sends back."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

__all__ = ["Secrets"]

_BLOT = "[key]"
_SHORTEST = 8
"""Shorter words stand in ordinary answers (a key `local` in every URL of localhost), and no service
hands out such keys."""


@dataclass(frozen=True, slots=True)
class Secrets:
    """The words that must not be repeated; its repr does not show them."""

    _words: tuple[str, ...] = field(repr=False)

    @classmethod
    def of(cls, headers: Mapping[str, str]) -> Self:
        """Take the last word of each header's value: the key, after `Bearer` or the like."""
        last = {words[-1] for value in headers.values() if (words := value.split())}
        return cls(tuple(sorted((w for w in last if len(w) >= _SHORTEST), key=len, reverse=True)))

    def blot(self, text: str) -> str:
        """The text with every secret replaced."""
        for word in self._words:
            text = text.replace(word, _BLOT)
        return text

    def fit_cause(self, error: BaseException) -> BaseException | None:
        """The exception if nothing in its chain quotes a secret; nothing if something does."""
        link: BaseException | None = error
        while link is not None:
            text = str(link)
            if self.blot(text) != text:
                return None
            link = link.__cause__ or link.__context__
        return error
