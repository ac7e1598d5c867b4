"""Looking again: a level for each look, so that all looks up to a planned number hold together.

Optional stopping (looking after every few prompts until an answer pleases) is wrong more often than
a single look is. Here the level of a look at n of N planned prompts is
``Phi(-z sqrt(N / n))`` with ``z = Phi^-1(1 - level / 2)``: the test statistic times sqrt(n / N) is
a Brownian motion on (0, 1], which by the reflection principle passes z with a probability of
`level`, however often and whenever one looks (O'Brien and Fleming 1979, in the continuous form of
Lan and DeMets 1983, "Discrete sequential boundaries for clinical trials"). The last look has half
of the level, which takes about a quarter more prompts than one look would. Only N has to be fixed
before the first look. A confidence sequence needs no N, and more prompts: docs/validity.md
(`python -m tests.validity looks`).
"""

from math import sqrt

from scipy import special

from sd35bench.stats.decision import LEVEL


def level_at(prompts: int, planned: int | None) -> float:
    """One-sided level of a look at so many of the planned prompts; beyond them nothing is shown.

    `planned` ``None``: one look was all that was wanted, and it has the whole level.
    """
    if planned is None:
        return LEVEL
    if not 0 < prompts <= planned:
        return 0.0
    z = -float(special.ndtri(LEVEL / 2.0))
    return float(special.ndtr(-z * sqrt(planned / prompts)))
