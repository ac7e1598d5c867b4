"""When to stop buying: what was paid for cannot be used, or costs more than was agreed.

A service that moves its outputs to another host, makes another size, or fails and bills all the
same would take a whole budget for no image. So:

- Until the service has made one usable image in this study, and after a run that ended here, it is
  on probation: one purchase at a time, and the first that cannot be used ends the run.
- Else `MOST_UNUSABLE` in a row end it, or more than `SHARE` of the budget (three images at least)
  for nothing.
- A charge above `CHARGE_FACTOR` times the listed price ends it at once; the ledger refuses what
  would pass the agreed total.

What may have been made counts as paid for: a prediction that never ends, or that nobody lists.
What is in flight is collected; nothing that was paid for is thrown away.
"""

from collections.abc import Container

from sd35bench.errors import Paused
from sd35bench.remote.ledger import Intent, Ledger
from sd35bench.words import digits, in_usd

MOST_UNUSABLE = 3
SHARE = 0.05
CHARGE_FACTOR = 1.5


class Brake:
    """The purchases of one run that gave nothing, and whether the service is on probation."""

    def __init__(self, ledger: Ledger, done: Container[str], price_usd: float, budget_usd: float):
        """`done`: keys of the study's trials that have an image; `budget_usd`: of this run."""
        self._price_usd, self._budget_usd = price_usd, budget_usd
        usable = [intent.trial in done for intent in ledger.intents() if intent.charge_usd > 0]
        self.probation = not any(usable[-MOST_UNUSABLE:])
        self._row, self._wasted_usd = 0, 0.0

    def count(self, intent: Intent, usable: bool, why: str) -> Paused | None:
        """Count a purchase of this run; says why no more should be bought."""
        if intent.charge_usd > CHARGE_FACTOR * self._price_usd:
            return Paused(
                f"the service charged {in_usd(intent.charge_usd)} for an image that is listed"
                f" at {self._price_usd:g}; to agree, give"
                f" remote.usd_per_image={digits(intent.charge_usd, 4)}"
            )
        if usable:
            self.probation, self._row = False, 0
            return None
        if intent.charge_usd == 0:
            return None
        self._row += 1
        self._wasted_usd += intent.charge_usd
        limit_usd = max(MOST_UNUSABLE * self._price_usd, SHARE * self._budget_usd)
        most = 1 if self.probation else MOST_UNUSABLE
        if self._row < most and self._wasted_usd <= limit_usd:
            return None
        return Paused(
            f"{in_usd(self._wasted_usd)} were paid for what cannot be used, {self._row} in a"
            f" row, so nothing more is bought; the last: {why}"
        )
