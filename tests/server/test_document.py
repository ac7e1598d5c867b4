"""The OpenAPI document: complete, and true of what the server answers."""

import copy
import itertools
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.generation import GenerationMode

from sd35bench.server.auth import make_key
from sd35bench.server.schema import input_schema
from tests.server.live import MODEL, live, make_settings

ROUTES = {
    ("post", "/v1/prediction"),
    ("post", "/v1/prediction/run"),
    ("get", "/v1/prediction/{prediction_id}"),
    ("post", "/v1/prediction/{prediction_id}/cancel"),
    ("get", "/v1/executions"),
    ("get", "/v1/model"),
    ("post", "/v1/upload/presign"),
    ("get", "/outputs/{name}"),
    ("get", "/uploads/{name}"),
    ("put", "/uploads/{name}"),
    ("get", "/healthz"),
}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("document")
    key = make_key("a", folder / "keys.txt")
    free = {"requests_per_minute": None, "concurrency": None}
    with live(make_settings(folder, key_file=folder / "keys.txt", **free)) as opened:
        yield opened, key


@pytest.fixture(scope="module")
def document(served):
    return served[0].client.get("/openapi.json").json()


def _plain(found: Any) -> Any:
    """Bounds as floats: FastAPI writes 2^64 - 1 as 1.8446744073709552e+19, which is how JSON's
    readers in JavaScript see it anyway."""
    if isinstance(found, dict):
        return {name: _plain(value) for name, value in found.items()}
    if isinstance(found, list):
        return [_plain(value) for value in found]
    return float(found) if type(found) is int else found


def test_document_has_every_route_and_its_answers(document):
    found = {(method, path) for path, ops in document["paths"].items() for method in ops}
    assert found == ROUTES
    for path, operations in document["paths"].items():
        for operation in operations.values():
            statuses = set(operation["responses"])
            assert "422" not in statuses
            if path.startswith("/v1/"):
                assert {"200", "401", "429"} <= statuses
                assert operation["security"]
            assert operation["summary"]
    create = document["paths"]["/v1/prediction"]["post"]
    assert {"400", "402", "404", "413"} <= set(create["responses"])
    body = create["requestBody"]["content"]["application/json"]["schema"]
    properties, own = body["properties"]["input"]["properties"], input_schema(MODEL)["properties"]
    for name, field in own.items():  # FastAPI leaves out a default of null
        assert _plain({"default": None, **properties[name]}) == _plain({"default": None, **field})


def test_document_asks_for_no_key_where_the_server_does_not(tmp_path):
    with live(make_settings(tmp_path), makes_images=False) as opened:
        found = opened.client.get("/openapi.json").json()
    operations = itertools.chain(*(ops.values() for ops in found["paths"].values()))
    assert not any("security" in operation for operation in operations)


@pytest.mark.parametrize(
    "mode",
    [GenerationMode.POSITIVE, pytest.param(GenerationMode.NEGATIVE, marks=pytest.mark.slow)],
    ids=lambda mode: mode.value,
)
def test_answers_are_as_documented(served, document, mode):
    opened, key = served
    asked = copy.deepcopy(document)
    for path in ("/v1/prediction", "/v1/prediction/run"):
        body = asked["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        # Whether an address leads to an image is beyond a schema.
        body["properties"]["input"]["properties"]["image"] = {"enum": [None, ""]}
    schema = schemathesis.openapi.from_dict(asked)
    seen = 0
    for operation in (found.ok() for found in schema.get_all_operations()):
        if operation.method == "put":
            continue  # needs a ticket of its own
        if mode is GenerationMode.NEGATIVE and not (operation.body or operation.query):
            continue  # nothing that could be wrong

        @settings(
            max_examples=4,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def check(case):
            case.call_and_validate(base_url=opened.url, headers={"X-API-Key": key})

        check()
        seen += 1
    assert seen == (10 if mode is GenerationMode.POSITIVE else 5)


def test_allow_names_every_method(served):
    for path, methods in (("/uploads/x", {"GET", "PUT"}), ("/v1/model/", {"GET"})):
        answer = served[0].client.request("DELETE", path)
        assert answer.status_code == 405
        assert set(answer.headers["allow"].split(", ")) == methods
