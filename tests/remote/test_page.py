"""`experiment=page`: every model of the vendor's page in one study, against servers of our own."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from sd35bench.cli import main
from sd35bench.store import Study
from sd35bench.types import Status
from tests.remote.fault_server import serving
from tests.remote.faults import picture
from tests.server.live import live, make_settings
from tests.server.test_own_inputs import served
from tests.studies.page import OWN


@pytest.fixture
def _alone(monkeypatch, tmp_path, apart):
    """A working folder with two pictures, own rate limits, no key of the developer's."""
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        Path(f"{name}.png").write_bytes(picture(name, (64, 64), "png"))


def called(url: str, limit: int) -> list[str]:
    return [
        *("run", "experiment=page", "prompts=nano", f"prompts.limit={limit}", "timed_limit=1"),
        *(f"remote.base_url={url}", "remote.allow_loopback=true", "remote.accept_size=64x64"),
        *("remote.requests_per_minute=1000000", "remote.timeout_s=120", "--json"),
    ]


FACES = ["images.identity_1=one.png", "images.identity_2=two.png"]


@pytest.mark.usefixtures("_alone")
def test_every_model_is_called_in_its_own_words_in_one_study(capsys):
    """The smallest form: one prompt, the fault server, nothing loaded."""
    with serving() as server:
        assert main([*called(server.url, 1), "remote.usd_per_image=0.035", *FACES]) == 0
        asked = {s.json["model"]: s.json["input"] for s in server.seen if s.route == "create"}
    document = json.loads(capsys.readouterr().out)
    assert (document["planned"], document["done"], document["failed"]) == (5, 5, 0)
    assert document["cost_usd"] == pytest.approx(5 * 0.035)
    assert set(asked) == {"sd35-medium", *OWN}
    assert len({inputs["prompt"] for inputs in asked.values()}) == 1
    assert asked["ideogram-v2-turbo"]["magic_prompt_option"] == "Off"
    assert asked["omni-zero-couples"]["identity_image_1"].startswith(server.url)
    study = Study.open(Path("results"), "page")
    assert {r.trial.load.model.name for r in study.records()} == set(asked)
    assert main(["show", "page", "--json"]) == 0
    rows = {r["model"]: r for r in json.loads(capsys.readouterr().out)["settings"]}
    assert rows["omni-zero-couples"]["images"].keys() == {"identity_1", "identity_2"}
    assert main(["show", "page"]) == 0
    (line,) = [t for t in capsys.readouterr().out.splitlines() if t.strip().startswith("–     –")]
    assert "ideogram-v2-turbo" in line  # it has neither steps nor cfg


@pytest.mark.slow
@pytest.mark.usefixtures("_alone")
def test_a_model_that_stands_in_makes_and_shows_the_whole_page(tmp_path, capsys):
    """A minute: nano behind `serve`, latencies, dollars, and a report with the images."""
    from sd35bench.config import compose, freeze

    load = freeze(compose(["backend=eager"])).sweep.load
    settings = make_settings(
        tmp_path / "served",
        load=load,
        model=replace(served("nano", "page", "eager"), steps=4),
        requests_per_minute=None,
        concurrency=100,
        usd_per_image=0.02,
        allow_loopback=True,
    )
    with live(settings) as server:
        assert main([*called(server.url, 2), "remote.usd_per_image=0.02", "steps=4", *FACES]) == 0
    assert json.loads(capsys.readouterr().out)["cost_usd"] == pytest.approx(10 * 0.02)
    study = Study.open(Path("results"), "page")
    assert [r.status for r in study.records()] == [Status.OK] * 10
    assert main(["show", "page", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["settings"]
    assert len(rows) == 5
    for row in rows:
        assert row["n"] == 2
        assert row["latency_s"]["p50"] > 0
        assert row["usd_per_image"]["value"] == pytest.approx(0.02)
    assert main(["report", "page", "--json"]) == 0
    page = Path(json.loads(capsys.readouterr().out)["paths"]["html"]).read_text()
    assert all(name in page for name in OWN)
