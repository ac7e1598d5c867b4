"""`run experiment=claims` and `claims` as commands: companions, bills, and what is printed."""

import json
import os
from pathlib import Path

import pytest

from sd35bench.cli import main
from sd35bench.config import compose, freeze
from sd35bench.config.compose import compose as composed
from sd35bench.config.sweeper import companion_overrides
from sd35bench.plan import expand

COMPANIONS = ["claims-steps", "claims-formats"]
NANO_COMPANIONS = ["claims-finals", "claims-levels", "claims-overlap", "claims-edit"]


def companions(*arguments: str) -> list[list[str]]:
    given = ["experiment=claims", *arguments]
    return companion_overrides(given, composed(given))


def test_companions_run_under_the_same_command_line():
    found = companions("prompts.limit=3", "backend=fake")
    names = [text.partition("=")[2] for job in found for text in job if "experiment=" in text]
    assert names == COMPANIONS + NANO_COMPANIONS
    assert all({"prompts.limit=3", "backend=fake"} <= set(job) for job in found)


def test_companions_that_need_nanos_prompts_stay_away_from_others():
    found = companions("model=sd35-medium", "prompts=starter")
    assert len(found) == len(COMPANIONS)


def test_an_experiment_without_companions_has_none():
    assert companion_overrides(["experiment=demo"], composed(["experiment=demo"])) == []


def test_every_part_writes_into_one_study_and_shares_its_main_setting():
    """The levels and overlaps are read off the setting that the cfg ladder has, too."""
    jobs = [
        freeze(compose([f"experiment={name}", "backend=fake", "prompts.limit=2"]))
        for name in ("claims", *COMPANIONS, *NANO_COMPANIONS)
    ]
    assert {job.study for job in jobs} == {"claims"}
    settings = [
        {(t.request.steps, t.request.cfg) for t in expand(job.sweep).trials} for job in jobs
    ]
    assert (20, 4.0) in settings[0]
    assert (20, 4.0) in settings[4]
    assert (20, 4.0) in settings[5]
    assert {batch for job in jobs for batch in job.sweep.batch_sizes} == {8}


def test_a_hosted_bill_counts_every_part(capsys, tmp_path):
    """Parts share a load, not their trials: 2 prompts x (5 cfgs x 2 seeds + 3 steps + 5 files)."""
    code = main(
        [
            *("run", "experiment=claims", "--dry-run", "--json", f"results_dir={tmp_path}"),
            *("model=sd35-medium", "backend=eachlabs", "prompts=starter", "prompts.split=all"),
            *("prompts.limit=2", "batch_size=1", "remote.max_cost_usd=2"),
        ]
    )
    document = json.loads(capsys.readouterr().out)
    assert code == 0
    assert document["trials"] == 36
    assert document["usd"] == pytest.approx(36 * 0.035)


@pytest.mark.slow  # it scores with the evaluator
def test_claims_of_a_study_that_is_not_one_name_what_to_run(capsys, tmp_path, monkeypatch):
    """On the fake backend, whose images follow no prompt: the chain runs, verdicts are honest."""
    monkeypatch.chdir(tmp_path)
    grid = ["cfg=1,4,7,15", "seed=0,1", "steps=20", "prompts.limit=4", "study=claims"]
    assert main(["run", "-m", "backend=fake", *grid]) == 0
    capsys.readouterr()
    assert main(["claims", "claims", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    found = {claim["name"]: claim for claim in document["claims"]}
    assert found["cfg-start"]["contrasts"]
    assert found["steps-previews"]["verdict"] == "not measured"
    assert found["latency"]["verdict"] == "not testable"
    assert "backend=fake" in found["steps-previews"]["command"]
    assert main(["claims", "claims"]) == 0
    assert "claims of the model page" in capsys.readouterr().out
    assert main(["claims", "claims", "--markdown"]) == 0
    assert capsys.readouterr().out.startswith(
        "# Claims of SD 3.5 Medium's model page, tested on nano: study claims\n"
    )
    assert os.listdir(tmp_path) == ["results"]
    assert Path("results/claims/scores").is_dir()


def test_claims_of_an_unknown_study_is_wrong_input(capsys, tmp_path):
    assert main(["claims", "nothing", "--results-dir", str(tmp_path)]) == 2
    assert "nothing" in capsys.readouterr().err
