"""Who gets in, how often, how much at once, and for how much money."""

import sqlite3
import time

import pytest

from sd35bench.server.auth import make_key
from tests.server.live import live, make_settings

pytestmark = pytest.mark.usefixtures("served_here")

PRICE = 0.035


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    path = tmp_path_factory.mktemp("keys") / "keys.txt"
    return path, {name: make_key(name, path) for name in ("alice", "bob", "carol", "dora")}


@pytest.fixture(scope="module")
def server(tmp_path_factory, keys):
    settings = make_settings(
        tmp_path_factory.mktemp("access"),
        backend={"delay_s": 0.15},
        key_file=keys[0],
        requests_per_minute=12,
        concurrency=2,
        usd_per_image=PRICE,
        balance_usd=3 * PRICE,
    )
    with live(settings) as opened:
        yield opened


def key(keys, name: str) -> dict[str, str]:
    return {"X-API-Key": keys[1][name]}


KEYLESS = (
    {},
    {"X-API-Key": ""},
    {"X-API-Key": "wrong"},
    {"Authorization": "Bearer wrong"},
    {"Authorization": "Basic eDp5"},
    {"X-API-Key": "\xff\xfe"},
)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/prediction/"),
        ("POST", "/v1/prediction/run"),
        ("GET", "/v1/prediction/x"),
        ("POST", "/v1/prediction/x/cancel"),
        ("GET", "/v1/executions"),
        ("GET", "/v1/model"),
        ("POST", "/v1/upload/presign"),
    ],
)
def test_without_a_key_nothing_is_told(server, method, path):
    for headers in KEYLESS:
        raw = {name: value.encode("latin-1") for name, value in headers.items()}
        answer = server.client.request(method, path, headers=raw)
        assert answer.status_code == 401, headers
        assert set(answer.json()) == {"error"}, headers
        assert answer.headers["www-authenticate"] == "Bearer"


def test_both_headers_carry_a_key(server, keys):
    secret = keys[1]["alice"]
    for headers in ({"X-API-Key": secret}, {"Authorization": f"Bearer {secret}"}):
        assert server.client.get("/v1/model", headers=headers).status_code == 200


def test_what_needs_no_key_needs_none(server):
    assert server.client.get("/healthz").json()["auth"] is True
    for path in ("/", "/docs", "/openapi.json"):
        assert server.client.get(path).status_code == 200


def test_keys_do_not_see_each_others_predictions(server, keys):
    alice, bob = key(keys, "alice"), key(keys, "bob")
    made = server.post(headers=alice).json()["predictionID"]
    assert server.client.get(f"/v1/prediction/{made}", headers=bob).status_code == 404
    assert server.client.post(f"/v1/prediction/{made}/cancel", headers=bob).status_code == 404
    assert server.client.get("/v1/executions", headers=bob).json()["total_count"] == 0
    assert server.client.get("/v1/executions", headers=alice).json()["total_count"] == 1


def test_concurrency_rate_and_balance_are_each_keys_own(server, keys):
    carol = key(keys, "carol")
    made = [server.post(headers=carol) for _ in range(2)]
    assert [answer.status_code for answer in made] == [200, 200]
    third = server.post(headers=carol)
    assert third.status_code == 429
    assert "concurrent" in third.json()["error"]
    assert int(third.headers["retry-after"]) >= 1
    ids = [answer.json()["predictionID"] for answer in made]
    while server.state.store.queue_length():
        time.sleep(0.02)
    assert server.post(headers=carol).status_code == 200  # the third of three that are paid for
    assert server.client.post(f"/v1/prediction/{ids[0]}/cancel", headers=carol).status_code == 409
    broke = server.post(headers=carol)
    assert (broke.status_code, "balance" in broke.json()["error"]) == (402, True)
    for _ in range(6):
        assert server.client.get("/v1/model", headers=carol).status_code == 200
    often = server.client.get("/v1/model", headers=carol)
    assert (often.status_code, "requests per minute" in often.json()["error"]) == (429, True)
    assert 1 <= int(often.headers["retry-after"]) <= 61
    assert server.client.get("/v1/model", headers=key(keys, "dora")).status_code == 200
    listed = server.state.store.queue_length()
    assert listed <= 1  # what was refused was not created


def test_cancel_before_and_while_it_is_made(server, keys):
    dora = key(keys, "dora")
    first, second = (server.post(headers=dora).json()["predictionID"] for _ in range(2))
    with sqlite3.connect(server.state.settings.state_dir / "predictions.sqlite") as db:
        query = "SELECT status FROM predictions WHERE id=?"
        while db.execute(query, (first,)).fetchone()[0] == "created":
            time.sleep(0.02)  # asking the server would use up the key's rate
    for made in (second, first):
        answer = server.client.post(f"/v1/prediction/{made}/cancel", headers=dora)
        assert answer.json()["status"] == "cancelled"
        assert answer.json()["predictionID"] == made
    while server.state.store.queue_length():
        time.sleep(0.02)
    listed = server.client.get("/v1/executions", headers=dora).json()["executions"]
    assert {row["status"] for row in listed} == {"cancelled"}
    assert [row["output"] for row in listed] == [None, None]
    assert [row["execution_cost"] for row in listed] == [0.0, 0.0]
