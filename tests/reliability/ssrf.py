"""Offer the downloads every URL of the corpus: all refused, and the good ones not."""

from collections.abc import Sequence
from pathlib import Path

from tests.reliability.experiment import Experiment, Figure
from tests.remote.ssrf_corpus import CORPUS, GOOD, fetched, refused

__all__ = ["SSRF"]

LEAST = 60


def run(scale: float, folder: Path) -> tuple[Sequence[Figure], Sequence[str]]:
    """Try all of them; there are few enough for every scale."""
    passed = [entry.name for entry in CORPUS if not refused(entry)]
    failed = [entry.name for entry in GOOD if fetched(entry)[0] is not None]
    figures = [
        Figure(name="hostile URLs", value=len(CORPUS), least=LEAST),
        Figure(name="hostile URLs that were not refused", value=len(passed), most=0),
        Figure(name="harmless URLs (public, redirected, odd but valid)", value=len(GOOD), least=1),
        Figure(name="harmless URLs that were refused", value=len(failed), most=0),
    ]
    said = [f"not refused: {name}" for name in passed] + [f"refused: {name}" for name in failed]
    return figures, said


SSRF = Experiment(
    name="ssrf",
    title="URLs that must not be fetched",
    did=(
        "Each URL of a corpus goes through the code that downloads images, with a resolver and a"
        " socket of the test's own: schemes, loopback and private addresses in decimal, octal, hex,"
        " short, IPv4-mapped, NAT64, 6to4 and full-width spelling, userinfo, control characters,"
        " odd ports, names that resolve inwards, rebinding, redirect chains."
    ),
    fails_if=(
        "a URL does not end in UnsafeAddress, or any address but the corpus' public ones is"
        " connected to on the way; a harmless URL is refused."
    ),
    shows_not="What the corpus does not think of; it is a list, not a proof.",
    run=run,
)
