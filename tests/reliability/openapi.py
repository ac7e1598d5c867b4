"""Schemathesis over the server's own OpenAPI document: each operation, valid and invalid input."""

import copy
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.generation import GenerationMode

from sd35bench.server.auth import make_key
from tests.reliability.experiment import Experiment, Figure
from tests.server.live import Live, live, make_settings

__all__ = ["OPENAPI", "Found", "askable"]

EXAMPLES = 300
CREATES = ("/v1/prediction", "/v1/prediction/run")


def run(scale: float, folder: Path) -> tuple[Sequence[Figure], Sequence[str]]:
    """Ask every operation in both modes, with a key and without."""
    wanted = max(1, round(EXAMPLES * scale))
    key = make_key("a", folder / "keys.txt")
    free: dict[str, Any] = {"requests_per_minute": None, "concurrency": None}
    found = Found()
    with live(make_settings(folder / "keyed", key_file=folder / "keys.txt", **free)) as server:
        found.ask(server, {"X-API-Key": key}, wanted, "with a key")
    with live(make_settings(folder / "open", **free)) as server:
        found.ask(server, {}, wanted, "no_auth")
    return found.figures(wanted), found.failures


class Found:
    """How often each operation was asked, what it answered, and what was wrong with that."""

    def __init__(self) -> None:
        self.cases: Counter[tuple[str, str]] = Counter()
        self.statuses: Counter[int] = Counter()
        self.operations: set[str] = set()
        self.failures: list[str] = []

    def ask(self, server: Live, headers: dict[str, str], examples: int, access: str) -> None:
        """Ask all operations of one server; a finding ends that operation's turn, no other's."""
        document = askable(server.client.get("/openapi.json").json())
        schema = schemathesis.openapi.from_dict(document)
        for operation in (each.ok() for each in schema.get_all_operations()):
            name = f"{operation.method.upper()} {operation.path}"
            self.operations.add(name)
            for mode in GenerationMode:
                if mode is GenerationMode.NEGATIVE and not _can_be_wrong(operation):
                    continue
                check = self._check(operation, mode, server.url, headers, examples)
                try:
                    check()
                except (Exception, BaseExceptionGroup) as exc:  # its failures come in groups
                    self.failures.append(f"{name}, {mode.value}, {access}: {exc}")

    def _check(
        self, operation: Any, mode: Any, url: str, headers: dict[str, str], examples: int
    ) -> Any:
        name = f"{operation.method.upper()} {operation.path}"

        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def check(case):
            answer = case.call(base_url=url, headers=headers)
            self.cases[name, mode.value] += 1
            self.statuses[answer.status_code] += 1
            case.validate_response(answer, headers=headers)

        return check

    def figures(self, wanted: int) -> list[Figure]:
        """Totals, and the fewest of any operation whose input has room for as many."""
        asked = Counter[str]()
        for (name, _), count in self.cases.items():
            asked[name] += count
        creates = min(count for name, count in asked.items() if name.endswith(CREATES))
        invalid = sum(count for (_, mode), count in self.cases.items() if mode == "negative")
        answers = [
            Figure(name=f"answers with status {status}", value=count)
            for status, count in sorted(self.statuses.items())
            if status != 500
        ]
        each = [
            Figure(name=f"cases of {name}", value=count) for name, count in sorted(asked.items())
        ]
        return [
            Figure(name="operations", value=len(self.operations), least=11),
            Figure(name="cases", value=asked.total(), least=wanted),
            Figure(name="of them with invalid input", value=invalid),
            Figure(name="fewest cases of a create", value=creates, least=wanted),
            Figure(
                name="answers with status 500",
                value=self.statuses[500],
                most=0,
                out_of="cases",
            ),
            Figure(name="operations with a failure", value=len(self.failures), most=0),
            *answers,
            *each,
        ]


def askable(document: dict[str, Any]) -> dict[str, Any]:
    """The document without init images: whether an address leads to one is beyond a schema."""
    asked = copy.deepcopy(document)
    for path in CREATES:
        body = asked["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        body["properties"]["input"]["properties"]["image"] = {"enum": [None, ""]}
    return asked


def _can_be_wrong(operation: Any) -> bool:
    return bool(operation.body or operation.query)


OPENAPI = Experiment(
    name="openapi",
    title="The server against its own OpenAPI document",
    did=(
        "Schemathesis generates requests for every operation of /openapi.json, valid ones and, for"
        " those with a body or a query, invalid ones, and checks each answer with all its checks"
        " (no server error, status, content type, headers and body as documented, invalid input"
        " refused, valid input accepted, authentication enforced). One server asks for a key, one"
        " does not; both on the fake backend, limits lifted."
    ),
    fails_if="any check fails on any answer.",
    shows_not=(
        "Sequences of requests (each case stands alone), init images by address, and uploads with"
        " a valid ticket: these have tests of their own. Operations with little input have few"
        " distinct cases, and Hypothesis does not repeat them."
    ),
    run=run,
)
