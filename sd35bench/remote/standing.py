"""How far a run against a hosted service is."""

from dataclasses import dataclass

__all__ = ["Standing"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How far a run is, for whoever shows it. `cost_usd` is the run's own, `minutes` its age."""

    done: int
    failed: int
    total: int
    in_flight: int
    cost_usd: float
    minutes: float
