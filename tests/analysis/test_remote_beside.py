"""A hosted service beside backends of this machine: speed, drift, advice, commands."""

from dataclasses import replace
from typing import Any

import pytest

from sd35bench.analysis.commands import remote_overrides
from sd35bench.analysis.drift import drift_document
from sd35bench.analysis.summary import show_document
from sd35bench.analysis.table import read_table
from sd35bench.errors import ConfigError
from sd35bench.metrics.drift import Drift
from sd35bench.metrics.selection import select_metrics
from sd35bench.recommend.advice import recommend_document
from sd35bench.recommend.profiles import Profile
from sd35bench.recommend.reproduce import run_command, snippet
from sd35bench.types import (
    Load,
)
from tests.studies.hosted_calls import (
    HOSTED,
    TOTAL,
    call,
    lone,
    made_of,
)
from tests.studies.memory import LOAD, MemoryStudy, record, session


def _both(tmp_path, **local: Any) -> MemoryStudy:
    """Four prompts locally in 1 s and hosted, the same requests."""
    return made_of(tmp_path, *(record(i, **local) for i in range(4)), *lone())


def test_local_rows_have_no_dollars_and_no_remote(tmp_path):
    document = show_document(_both(tmp_path))
    rows = {r["backend"]: r for r in document["settings"]}
    assert (rows["eager"]["usd_per_image"], rows["eager"]["remote"]) == (None, None)
    assert rows["eager"]["threads"] == 2
    assert document["warnings"] == []  # a service is another environment by its nature


def test_hosted_is_held_against_eager_here_with_the_network_in_it(tmp_path):
    rows = {r["backend"]: r for r in show_document(_both(tmp_path))["settings"]}
    ratio = rows["eachlabs"]["speedup"]
    assert ratio["value"] == pytest.approx(1.0 / TOTAL)
    assert ratio["with_network"] is True
    assert ratio["reference"] == rows["eager"]["id"]
    assert rows["eager"]["speedup"] is None


def test_another_request_is_not_held_against_eager(tmp_path):
    rows = {r["backend"]: r for r in show_document(_both(tmp_path, steps=9))["settings"]}
    assert rows["eachlabs"]["speedup"] is None


@pytest.mark.parametrize("mse", [0.0, 4.0], ids=["identical", "drifted"])
def test_drift_pairs_a_hosted_image_with_eagers(tmp_path, mse):
    study = _both(tmp_path)
    metric = Drift()
    pairing = metric.pairing(study.records())
    hosted = [r for r in study.records() if r.remote is not None]
    assert len(hosted) == 4
    for one in hosted:
        best = pairing[one.trial.key][0]
        assert best.trial.load == LOAD
        assert best.trial.request == one.trial.request
        detail = {"max_abs": mse, "mean_abs": mse, "mse": mse, "psnr_db": None, "ssim": 1.0}
        study.score(one, "drift", mse, **detail, **metric.about(one, best))
    document = drift_document(study, read_table(study))
    (row,) = document["rows"]
    assert (row["backend"], row["n_pairs"]) == ("eachlabs", 4)
    assert row["identical"] == (4 if mse == 0 else 0)
    assert row["mean_abs"] == {"value": mse, "ci95": [mse, mse], "n": 4}
    assert bool(document["warnings"]) == (mse > 0)  # exact equality needs no noise floor


def test_a_services_thread_count_chooses_no_reference():
    """Seven records say 7 threads, which are the client's: eager's own majority decides."""
    other = [record(i, load=replace(LOAD, threads=7)) for i in range(2)]
    rows = [*(record(i) for i in range(3)), *other, *(call(i) for i in range(7))]
    pairing = Drift().pairing(rows)
    assert pairing[call(0).trial.key][0].trial.load.threads == LOAD.threads


def test_drift_takes_the_weights_that_most_images_were_made_with():
    """A service names its model and not its weights' digest."""
    other = replace(LOAD, model=replace(LOAD.model, weights_digest="e" * 64))
    rows = [record(0, load=other), *(record(i) for i in range(3)), call(0)]
    assert Drift().pairing(rows)[call(0).trial.key][0].trial.load == LOAD


def test_drift_from_a_service_is_possible_too():
    pairing = Drift(reference="eachlabs").pairing([record(0), call(0)])
    assert [r.trial.load for r in pairing[record(0).trial.key]] == [HOSTED]


def test_recommend_keeps_hosted_rows_apart(tmp_path):
    """In one environment too, a hosted latency decides nothing among local ones."""
    lives = {"s": session(), "h": session("h", session().environment_id, HOSTED)}
    local = [record(i, steps=steps) for i in range(8) for steps in (4, 8)]
    hosted = [call(i, steps=steps) for i in range(8) for steps in (4, 8, 16)]
    study = made_of(tmp_path, lives=lives)
    for one in (*local, *hosted):
        study.add(one, prompt_accuracy=float(one.trial.request.steps > 4))
    document = recommend_document(study.touch_images(), {"p": Profile(name="p", margins={})})
    chosen = document["profiles"]["p"]["text-to-image"]["setting"]
    assert chosen["backend"] == "eachlabs"  # three settings there, two here
    assert any("left out: 2 settings" in note for note in document["notes"])


def test_recommend_needs_two_settings_of_one_place(tmp_path):
    study = made_of(tmp_path)
    for one in (*(record(i) for i in range(4)), *lone()):
        study.add(one, prompt_accuracy=1.0)
    with pytest.raises(ConfigError, match="nothing to compare"):
        recommend_document(study.touch_images(), {"p": Profile(name="p", margins={})})


def test_commands_name_the_service_under_remote(tmp_path):
    command = run_command(lone(), "again")
    assert "backend=eachlabs remote.base_url=https://api.example.com" in command
    assert "remote.slug=sd-3-5-medium" in command
    assert "backend.base_url" not in command
    assert "threads" not in command
    assert "allow_loopback" not in command
    assert snippet(call(0), None) is None


def test_loopback_is_allowed_by_name_in_commands():
    served = replace(HOSTED.backend, options={"base_url": "http://127.0.0.1:8000", "slug": "nano"})
    assert remote_overrides([LOAD, Load(model=LOAD.model, backend=served, threads=1)]) == {
        "remote.base_url": "http://127.0.0.1:8000",
        "remote.slug": "nano",
        "remote.allow_loopback": "true",
    }


def test_drift_is_scored_unasked_where_a_service_stands_beside_eager(tmp_path):
    study = _both(tmp_path)
    assert "drift" in {m.name for m in select_metrics(None, study.records(), {}).metrics}
    alone = [r for r in study.records() if r.remote is not None]
    assert "drift" not in {m.name for m in select_metrics(None, alone, {}).metrics}
