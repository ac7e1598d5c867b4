"""The experiments, in the order of the page."""

from tests.reliability.client_kills import CLIENT_KILLS
from tests.reliability.clocks import CLOCKS
from tests.reliability.code import CODE
from tests.reliability.damage import DAMAGE
from tests.reliability.experiment import Experiment
from tests.reliability.limits import LIMITS
from tests.reliability.load import LOAD
from tests.reliability.malformed import MALFORMED_REPLIES
from tests.reliability.openapi import OPENAPI
from tests.reliability.server_kills import SERVER_KILLS
from tests.reliability.services import SERVICES
from tests.reliability.ssrf import SSRF
from tests.reliability.strangers import STRANGERS
from tests.reliability.verb_kills import VERB_KILLS

__all__ = ["EXPERIMENTS", "named"]

EXPERIMENTS = (
    *(CLIENT_KILLS, SERVICES, CLOCKS, MALFORMED_REPLIES, SSRF, LIMITS, OPENAPI, SERVER_KILLS),
    *(DAMAGE, CODE, VERB_KILLS, LOAD, STRANGERS),
)


def named(name: str) -> Experiment:
    return next(each for each in EXPERIMENTS if each.name == name)
