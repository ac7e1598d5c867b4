"""`sd35bench run` with a hosted backend: bills, consent, pauses, what is printed."""

import json

import pytest

import sd35bench.remote.prediction as prediction
from sd35bench.cli import main
from sd35bench.cli.output import RunProgress
from sd35bench.study.store import decode_rgb
from sd35bench.trials import Progress
from tests.remote.fault_server import FaultServer, serving


@pytest.fixture(autouse=True)
def apart(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("EACHLABS_API_KEY", raising=False)
    monkeypatch.setattr(prediction, "decode_image", decode_rgb)


@pytest.fixture
def server():
    with serving(cost_usd=None) as found:
        yield found


def command(server: FaultServer, *more: str, usd: float = 0.5) -> list[str]:
    return [
        *("run", "--json", "backend=eachlabs", f"remote.base_url={server.url}", "steps=4"),
        *("remote.allow_loopback=true", "remote.requests_per_minute=100000", "prompts.limit=3"),
        *("remote.expected_latency_s=0.02", f"remote.usd_per_image={usd}", *more),
    ]


def document(capsys) -> dict:
    return json.loads(capsys.readouterr().out)


def test_a_bill_above_the_limit_asks_first(server, capsys, tmp_path):
    assert main(command(server)) == 2
    said = document(capsys)["error"]["message"]
    assert said.startswith("remote.confirm_above_usd=1: this would cost up to 1.50 USD; add --yes")
    assert server.seen == []
    assert not (tmp_path / "results").exists()
    assert main(command(server, "--yes")) == 0
    found = document(capsys)
    assert (found["done"], found["ambiguous"], found["paused"]) == (3, 0, None)
    assert found["cost_usd"] == pytest.approx(1.5)
    assert main(command(server)) == 0  # all there: nothing to agree to
    assert document(capsys)["skipped"] == 3


def test_a_dry_run_shows_the_bill_without_a_key_and_sends_nothing(server, capsys, tmp_path):
    assert main(command(server, "--dry-run")) == 0
    found = document(capsys)
    assert (found["to_do"], found["loads"]) == (3, 0)
    assert found["usd"] == pytest.approx(1.5)
    assert server.seen == []
    assert not (tmp_path / "results").exists()


def test_the_bill_leaves_out_what_was_asked_for_before(server, capsys):
    server.never_ends = True
    assert main(command(server, "prompts.limit=1", "remote.timeout_s=0.1")) == 3
    capsys.readouterr()
    assert main(command(server, "--dry-run")) == 0
    found = document(capsys)
    assert (found["to_do"], found["created"]) == (3, 1)
    assert found["usd"] == pytest.approx(1.0)
    assert found["spent_usd"] == pytest.approx(0.5)


def test_a_budget_pauses_with_exit_code_3_and_goes_on(server, capsys):
    budget = "remote.max_cost_usd=1"
    assert main(command(server, budget, "--yes")) == 3
    found = document(capsys)
    assert found["done"] == sum(server.creates.values()) == 2
    assert "1 trials are left" in found["paused"]
    assert "at 0.5 USD each" in found["paused"]
    assert main(command(server, "remote.max_cost_usd=1.5")) == 0
    assert sorted(server.creates.values()) == [1, 1, 1]


def test_no_key_for_the_hosted_service_is_said_before_anything(capsys, tmp_path):
    assert main(["run", "model=sd35-medium", "backend=eachlabs", "prompts.limit=1"]) == 2
    assert "EACHLABS_API_KEY is not set" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


@pytest.mark.usefixtures("two_cores")
def test_threads_make_no_second_bill(server, capsys):
    """Two jobs that differ in what acts on this machine only plan the very same images."""
    sweep = ("-m", "backend=fake,eachlabs", "threads=1,2")
    assert main(command(server, *sweep, "--dry-run")) == 0
    assert document(capsys)["usd"] == pytest.approx(1.5)
    assert main(command(server, *sweep, "--yes")) == 0
    assert sum(server.creates.values()) == 3


def test_the_bar_says_what_is_in_flight_how_fast_and_what_it_cost():
    class Bar:
        shown: dict = {}  # noqa: RUF012

        def add_task(self, title, total):
            return 7

        def update(self, task, **shown):
            self.shown = shown

    bar = Bar()
    standing = Progress(done=5, failed=1, total=40, in_flight=10, cost_usd=0.175, minutes=0.5)
    RunProgress(bar, "nano on eachlabs")(standing)  # pyright: ignore
    assert bar.shown == {
        "completed": 6,
        "total": 40,
        "description": "nano on eachlabs, 10 in flight, 12.0/min, 0.17 USD, 1 failed",
    }
