"""The demo has something to find: its three profiles name three settings, each of them right."""

import pytest

from sd35bench.cli import main
from sd35bench.cli.study import score_missing
from sd35bench.config import config_dir
from sd35bench.recommend.advice import recommend_document
from sd35bench.recommend.profiles import load_profiles
from sd35bench.study.store import Study

TRUTH = {
    (6, 2.0): 0.680,
    (12, 2.0): 0.719,
    (20, 2.0): 0.727,
    (6, 4.0): 0.664,
    (12, 4.0): 0.812,
    (20, 4.0): 0.852,
}
"""Prompt accuracy on 128 prompts of two objects, seed 0 (docs/log.md, 2026-11-30)."""


@pytest.mark.slow
def test_profiles_differ_on_the_demo_and_each_is_right_against_all_images(tmp_path):
    words = ["experiment=demo", "prompts.limit=64", "timed_limit=0", f"results_dir={tmp_path}"]
    assert main(["run", *words]) == 0
    study = Study.open(tmp_path, "demo")
    score_missing(study, ["prompt_accuracy"])
    profiles = load_profiles(config_dir() / "profile")
    entries = recommend_document(study, profiles)["profiles"]
    chosen = {}
    for name, entry in entries.items():
        setting = entry["text-to-image"]["setting"]
        chosen[name] = (setting["steps"], setting["cfg"])
    assert len(set(chosen.values())) == 3
    for name, setting in chosen.items():
        limit = profiles[name].evaluations_limit or float("inf")
        allowed = {key: value for key, value in TRUTH.items() if 2 * key[0] <= limit}
        lost = max(allowed.values()) - allowed[setting]
        assert lost <= profiles[name].margin("prompt_accuracy"), name
    work = [2 * chosen[name][0] for name in ("preview", "balanced", "final")]
    assert work == sorted(work), "and each takes longer than the one before"
