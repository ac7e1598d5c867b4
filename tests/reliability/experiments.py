"""The experiments, in the order of the page."""

from tests.reliability.client_kills import CLIENT_KILLS
from tests.reliability.code import CODE
from tests.reliability.experiment import Experiment
from tests.reliability.limits import LIMITS
from tests.reliability.load import LOAD
from tests.reliability.malformed import MALFORMED_REPLIES
from tests.reliability.openapi import OPENAPI
from tests.reliability.server_kills import SERVER_KILLS
from tests.reliability.ssrf import SSRF
from tests.reliability.strangers import STRANGERS

__all__ = ["EXPERIMENTS", "named"]

EXPERIMENTS = (
    *(CLIENT_KILLS, MALFORMED_REPLIES, SSRF, LIMITS, OPENAPI, SERVER_KILLS, CODE, LOAD, STRANGERS),
)


def named(name: str) -> Experiment:
    return next(each for each in EXPERIMENTS if each.name == name)
