"""The closed vocabulary of the captions, derived from the world so that it cannot drift."""

from sd35bench.nano.world import BACKGROUNDS, BESIDE, COLOURS, NUMBERS, PLACES, PLURALS, SHAPES

_PHRASES = (
    *("a", "and", "background", "on", "with", "small", "large", "in front of", "behind"),
    *COLOURS,
    *BACKGROUNDS,
    *SHAPES,
    *PLURALS.values(),
    *NUMBERS.values(),
    *PLACES.values(),
    *BESIDE,
)


def words() -> list[str]:
    """Every word that a caption can contain, sorted."""
    return sorted({word for phrase in _PHRASES for word in phrase.split()})
