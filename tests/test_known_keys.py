"""Keys of today's trials, computed by the code before any move: they must never change.

A key that changes makes every study anew: what a journal holds is found by it. A field that is
added has a value at which the key stays as it is here.
"""

import json
import shutil
from dataclasses import fields, replace
from pathlib import Path

import pytest

from sd35bench.cli import main
from sd35bench.fields import completed, make_trial
from sd35bench.study.store import Study
from sd35bench.types import (
    BackendSpec,
    Load,
    ModelSpec,
    PromptRef,
    Request,
    SkipLayerGuidance,
    Status,
)

PLAIN = Request(prompt="a red circle", steps=28, cfg=4.0, seed=0, width=512, height=512)
MODEL = ModelSpec(name="nano", path="", weights_digest="ab" * 32, max_sequence_length=24)
EAGER = Load(
    model=MODEL,
    backend=BackendSpec(name="eager", kind="eager", options={"dtype": "fp32", "t5": True}),
    threads=2,
)
HOSTED = replace(
    EAGER,
    model=replace(MODEL, name="sd35-medium", weights_digest="none"),
    backend=BackendSpec(
        name="eachlabs",
        kind="eachlabs",
        options={"base_url": "https://api.eachlabs.ai", "slug": "stable-diffusion-3.5-medium"},
    ),
)
EDIT = replace(PLAIN, init_image="cd" * 32, prompt_strength=0.6)
SKIPPING = SkipLayerGuidance(layers=(7, 8, 9), scale=2.8, start=0.01, stop=0.2)
OTHER = {
    "prompt": "un carré bleu",
    "steps": 50,
    "cfg": 5.5,
    "seed": 4294967295,
    "width": 1024,
    "height": 640,
    "negative_prompt": "blurry",
    "sampler": "dpmpp-2m",
    "shift": 1.0,
    "skip_layer_guidance": SKIPPING,
    "max_sequence_length": 256,
    "output_format": "webp",
    "output_quality": 50,
    "init_image": "cd" * 32,
    "prompt_strength": 0.6,
}
"""Each of today's request fields away from its default."""

TRIALS = {
    "plain": (EAGER, PLAIN, 1),
    **{name: (EAGER, replace(PLAIN, **{name: value}), 1) for name, value in OTHER.items()},
    "everything": (EAGER, replace(PLAIN, **OTHER), 1),
    "edit": (EAGER, EDIT, 1),
    "whole numbers": (EAGER, replace(PLAIN, cfg=4, shift=3), 1),
    "batch of 8": (EAGER, PLAIN, 8),
    "one thread": (replace(EAGER, threads=1), PLAIN, 1),
    "other backend": (
        replace(EAGER, backend=BackendSpec(name="compile-bf16", kind="compiled")),
        PLAIN,
        1,
    ),
    "other weights": (replace(EAGER, model=replace(MODEL, weights_digest="0" * 64)), PLAIN, 1),
    "hosted": (HOSTED, PLAIN, 1),
}
KEYS = {
    "plain": "10f9f132dcb5faaed36e",
    "prompt": "4b9f0d79249a2510266e",
    "steps": "05ddc5d26752c0cfa0b5",
    "cfg": "9a30c896f4f079bec6f4",
    "seed": "d76723dae9704854f7e5",
    "width": "7b06e2f30e78eff365b3",
    "height": "20aeb9debc8b7efb62d7",
    "negative_prompt": "64effc7ca4f0c68cc192",
    "sampler": "692ff9e2f33625fe4b01",
    "shift": "c444f242b2779379cbb5",
    "skip_layer_guidance": "5fd57b3e58a4b1ec2e65",
    "max_sequence_length": "8b6dd2e85b30d4f4fce3",
    "output_format": "0af683590c3e5346e705",
    "output_quality": "d4769c59d6d457dd08b8",
    "init_image": "fefc2c3fe067df7fcf6b",
    "prompt_strength": "799a4389952e8f4bf784",
    "everything": "9cca27ac91dc4d4f1e47",
    "edit": "ea72271a0afaf1f23db4",
    "whole numbers": "6464b3dcffd17845c6e2",
    "batch of 8": "a7df395de92f1eb076b8",
    "one thread": "ef1682af160243deab29",
    "other backend": "ab358ee0ab692c6538c0",
    "other weights": "350c36ac6b4b178e2608",
    "hosted": "2e1588fad0197601f386",
}
LOAD_KEYS = {
    "04a4878afe9ead28361307514bbad464ae85af5cce04b6538e59f89c6e642633": "eager",
    "9b7a025287c4d193362e101b93cb2de0717b40d5a9c14fe55e0c07aea623f6a0": "hosted",
}
OLD = Path(__file__).parent / "studies" / "old_study"
"""A study of two fake settings as the code before any move wrote it."""


def test_every_field_of_today_is_pinned():
    assert set(OTHER) <= {f.name for f in fields(Request)}
    for name, value in OTHER.items():
        assert value != getattr(PLAIN, name)


def test_known_trials_keep_their_keys():
    prompt = PromptRef(id="0", set="nano")
    made = {
        name: make_trial(load=load, request=request, batch_size=size, prompt=prompt).key
        for name, (load, request, size) in TRIALS.items()
    }
    assert made == KEYS


def test_known_loads_keep_their_keys():
    assert {EAGER.key: "eager", HOSTED.key: "hosted"} == LOAD_KEYS


@pytest.mark.usefixtures("two_cores", "fakes_here")
def test_a_journal_of_the_old_code_is_read_and_gone_on_with(tmp_path, monkeypatch, capsys):
    """Six trials: five done, one failed; the run that asks for them makes that one only."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(OLD, "results/old")
    study = Study.open(Path("results"), "old")
    before = study.records()
    assert [r.status for r in before].count(Status.OK) == 5
    for trial in (r.trial for r in before):
        same = {"load": trial.load, "request": trial.request, "prompt": trial.prompt}
        assert make_trial(**same, batch_size=trial.batch_size) == trial
    shown = json.loads((OLD / "show.json").read_text())
    later = {"device_spread": None, "host_spread": None, "chosen_for": []}
    later |= {"front": True, "weights": "nano"}
    shown["settings"] = [completed(row) | later for row in shown["settings"]]
    capsys.readouterr()
    assert main(["show", "old", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == shown | {"recommended": None}
    words = "backend=fake study=old prompts.limit=1 seed=0,1,2 steps=2,4 cfg=4 threads=2"
    assert main(["run", "-m", *words.split(), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["skipped"], document["done"]) == (5, 1)
    assert {r.trial.key for r in study.records()} == {r.trial.key for r in before}
