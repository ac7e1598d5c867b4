"""`experiment=page`: every model of the vendor's page in one study, against our own server."""

import json
import re
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from sd35bench.cli import main
from sd35bench.server.predictions import Query
from sd35bench.study.store import Study
from sd35bench.types import Status
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
        "remote.expected_latency_s=0.05",
    ]


DOCS = Path(__file__).parents[2] / "docs" / "providers.md"
FACES = ["images.identity_1=one.png", "images.identity_2=two.png"]


def standing_in(folder: Path, backend: str, steps: int = 4):
    """Settings of a server whose nano answers to every name of the page."""
    return make_settings(
        folder,
        model=replace(served("nano", "page", backend), steps=steps),
        requests_per_minute=None,
        concurrency=100,
        usd_per_image=0.02,
        allow_loopback=True,
    )


def scored(capsys) -> dict[str, dict]:
    """What `score` and `show` say of the study, by model."""
    assert main(["score", "page", "--metric", "clip_score"]) == 0
    capsys.readouterr()
    assert main(["show", "page", "--json"]) == 0
    return {row["model"]: row for row in json.loads(capsys.readouterr().out)["settings"]}


@pytest.mark.usefixtures("_alone")
def test_every_model_is_called_in_its_own_words_and_gets_a_clip_score(tmp_path, capsys):
    """The smallest form: one prompt, patterns instead of a model."""
    with live(standing_in(tmp_path / "served", "fake")) as server:
        assert main([*called(server.url, 1), "remote.usd_per_image=0.02", *FACES]) == 0
        made = server.state.store.listing("", Query()).predictions
    document = json.loads(capsys.readouterr().out)
    assert (document["planned"], document["done"], document["failed"]) == (5, 5, 0)
    assert document["cost_usd"] == pytest.approx(5 * 0.02)
    asked = {one.model: one.input for one in made}
    assert len(asked) == 5
    assert asked.keys() > set(OWN)
    assert len({inputs["prompt"] for inputs in asked.values()}) == 1
    assert asked["ideogram-v2-turbo"]["magic_prompt_option"] == "Off"
    assert asked["omni-zero-couples"]["identity_image_1"].startswith(server.url)
    rows = scored(capsys)
    assert rows.keys() == {"sd35-medium", *OWN}
    for row in rows.values():
        assert row["metrics"]["clip_score_nano"]["n"] == 1
        assert -100 < row["metrics"]["clip_score_nano"]["value"] < 100
        assert any("made by nano, which stood in" in text for text in row["warnings"])
    assert rows["omni-zero-couples"]["images"].keys() == {"identity_1", "identity_2"}
    assert main(["show", "page"]) == 0
    shown = capsys.readouterr().out.splitlines()
    (line, *_) = [text for text in shown if text.strip().startswith("ideogram-v2-turbo")]
    assert not re.search("steps|cfg", line), "it has neither"


def of_docs() -> dict[str, list[str]]:
    """The offline commands of docs/providers.md, by verb."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", DOCS.read_text(), re.DOTALL | re.MULTILINE)
    (block,) = [text for text in blocks if "stand_in_for=page" in text]
    lines = [shlex.split(line)[1:] for line in block.replace("\\\n", " ").splitlines()]
    return {words[0]: words for words in lines}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("_alone")
def test_a_model_that_stands_in_makes_scores_and_shows_the_whole_page(capsys):
    """The commands of docs/providers.md, on another port, with the two pictures: 60 images.

    On one thread, as threads that wait for a busy core take twice its time.
    """
    commands = of_docs()
    asked = [sys.executable, "-m", "sd35bench", *commands["serve"], "port=0", "threads=1", "--json"]
    started = time.monotonic()
    with subprocess.Popen(asked, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            url = json.loads(server.stdout.readline())["url"]
            words = [word.replace("http://127.0.0.1:8000", url) for word in commands["run"]]
            assert main([*words, *FACES, "--json"]) == 0
        finally:
            server.terminate()
    assert json.loads(capsys.readouterr().out)["done"] == 60
    study = Study.open(Path("results"), "page")
    assert [r.status for r in study.records()] == [Status.OK] * 60
    rows = scored(capsys)
    assert len(rows) == 5
    for row in rows.values():
        assert row["n"] == 12
        assert row["latency_s"]["p50"] > 0
        assert row["metrics"]["clip_score_nano"]["n"] == 12
        assert row["metrics"]["clip_score_nano"]["value"] > 80  # nano's own: 84 to 92
    assert main(["report", "page", "--json"]) == 0
    page = Path(json.loads(capsys.readouterr().out)["path"]).read_text()
    assert all(name in page for name in OWN)
    assert "CLIP-score" in page
    print(f"{time.monotonic() - started:.0f} s")
