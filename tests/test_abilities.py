"""Samplers, tasks and skip-layer guidance: what the plan refuses, collapses and says up front."""

from pathlib import Path

import pytest
import yaml

from sd35bench.config import choices, compose
from sd35bench.config.overrides import check_overrides
from sd35bench.errors import ConfigError
from sd35bench.evaluations import SAMPLERS
from sd35bench.plan import expand
from sd35bench.types import SkipLayerGuidance
from tests.test_config import job, request

STABILITY = SkipLayerGuidance(layers=(2,), scale=2.5, start=0.01, stop=0.2)


def narrow(tmp_path: Path, group: str, base: str, **fields: object) -> Path:
    """A YAML of the user's own that inherits `base` and can do less."""
    (tmp_path / group).mkdir(parents=True)
    text = yaml.safe_dump({"defaults": [base], "name": "narrow", **fields})
    (tmp_path / group / "narrow.yaml").write_text(text)
    return tmp_path


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_reaches_the_request(sampler):
    assert request(f"sampler={sampler}").sampler == sampler


def test_the_models_first_sampler_is_its_default(tmp_path):
    extra = narrow(tmp_path, "model", "nano", samplers=["dpmpp_2m", "euler"])
    found = job("model=narrow", "prompts.limit=1", extra=extra).sweep
    assert found.axes["sampler"] == ("dpmpp_2m",)
    assert request().sampler == "euler"


@pytest.mark.parametrize("group", ["model", "backend"])
def test_a_sampler_that_is_not_there_is_refused(tmp_path, group):
    base = {"model": "nano", "backend": "fake"}[group]
    extra = narrow(tmp_path, group, base, samplers=["euler"])
    with pytest.raises(ConfigError, match=r"sampler=heun: (backend )?narrow has euler"):
        job(f"{group}=narrow", "sampler=heun", extra=extra)


@pytest.mark.parametrize("group", ["model", "backend"])
def test_a_task_that_is_not_there_is_refused(tmp_path, group):
    base = {"model": "nano", "backend": "fake"}[group]
    extra = narrow(tmp_path, group, base, tasks=["text-to-image"])
    job(f"{group}=narrow", "prompts.limit=1", extra=extra)
    with pytest.raises(ConfigError, match=r"init_image: (backend )?narrow does text-to-image only"):
        job(f"{group}=narrow", "prompts.task=edit", "prompts.limit=1", extra=extra)


def test_skip_layers_that_are_not_there_are_refused(tmp_path):
    extra = narrow(tmp_path, "backend", "fake", skip_layers=False)
    with pytest.raises(ConfigError, match="backend narrow cannot leave layers out"):
        job("backend=narrow", "skip_layer_guidance=stability", extra=extra)
    assert job("backend=narrow", "prompts.limit=1", extra=extra)


def test_a_shift_is_refused_where_there_is_no_flow(tmp_path):
    extra = narrow(tmp_path, "model", "nano", family="pixart", samplers=["dpmpp_2m"])
    with pytest.raises(ConfigError, match=r"shift=2\.0: narrow is no flow model"):
        job("model=narrow", "shift=2", extra=extra)


@pytest.mark.parametrize("model", ["nano", "sd35-medium"])
def test_presets_are_stabilitys_and_diffusers(model):
    from inspect import signature

    from diffusers import StableDiffusion3Pipeline

    presets = compose([f"model={model}"]).model.skip_layer_guidance
    theirs = signature(StableDiffusion3Pipeline.__call__).parameters
    ours = presets.diffusers
    assert ours.scale == theirs["skip_layer_guidance_scale"].default
    assert (ours.start, ours.stop) == (
        theirs["skip_layer_guidance_start"].default,
        theirs["skip_layer_guidance_stop"].default,
    )
    assert presets.stability.scale == 2.5
    assert list(presets.stability.layers) == list(ours.layers)


@pytest.mark.parametrize("name", choices("model"))
def test_every_models_samplers_and_presets_are_known(name):
    model = compose([f"model={name}"]).model
    assert model.samplers
    assert set(model.samplers) <= set(SAMPLERS)
    for preset in model.skip_layer_guidance.values():
        assert preset.layers
        assert 0 <= preset.start < preset.stop <= 1


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], None),
        (["skip_layer_guidance=none"], None),
        (["skip_layer_guidance=stability"], STABILITY),
        (["skip_layer_guidance=stability", "skip_layer_scale=4"], (4.0, 0.2)),
        (["skip_layer_guidance=2-3@1.5:0-0.5"], (1.5, 0.5)),
    ],
    ids=["default", "none", "preset", "scale", "written"],
)
def test_skip_layer_guidance_reaches_the_request(overrides, expected):
    found = request(*overrides).skip_layer_guidance
    if isinstance(expected, tuple):
        assert found is not None
        assert (found.scale, found.stop) == expected
    else:
        assert found == expected


REFUSED = {
    "preset": (["skip_layer_guidance=stabilty"], "did you mean stability"),
    "scale-alone": (["skip_layer_scale=4"], "acts only with skip_layer_guidance"),
    "backwards": (["skip_layer_guidance=2@3:0.5-0.2"], "0 <= start < stop <= 1"),
    "no-scale": (["skip_layer_guidance=2@0:0-0.2"], "a scale above 0"),
    "unguided": (["skip_layer_guidance=stability", "cfg=1"], "no effect at cfg 1"),
    "few-steps": (["skip_layer_guidance=stability", "steps=5"], "no effect at 5 steps"),
    "edit": (["skip_layer_guidance=stability", "prompts.task=edit"], "no effect in image-to-image"),
}

GUIDES_REFUSED = {
    "old-name": (["guidance=4"], "one of cfg, cfg-zero-star, apg"),
    "rule-unguided": (["guidance=apg", "cfg=1"], "no effect at cfg 1"),
    "other-rule": (["guidance=apg", "zero_init_steps=2"], "it is cfg-zero-star's"),
    "no-rule": (["apg_eta=0.5"], "it is apg's"),
    "nothing-moves": (["guidance=cfg-zero-star", "steps=1"], "nothing would ever move"),
    "interval": (["guidance_interval=0.7-0.1"], "LO-HI with 0 <= LO < HI <= 1"),
    "interval-word": (["guidance_interval=half"], "LO-HI"),
    "interval-unguided": (["guidance_interval=0-0.5", "cfg=1"], "no effect at cfg 1"),
    "interval-whole": (["guidance_interval=0-0.99", "steps=8"], "guidance acts at every one"),
    "cache-zero": (["step_cache=0"], "every N-th step"),
    "cache-few": (["step_cache=2", "steps=2"], "every one is evaluated"),
    "mask-long": (["step_cache=0-1-9", "steps=8"], "it names step 9"),
}


def _checked(*overrides):
    check_overrides(overrides, multirun=False)
    return job(*overrides)


@pytest.mark.parametrize("case", GUIDES_REFUSED)
def test_guidance_without_effect_is_refused(case):
    overrides, message = GUIDES_REFUSED[case]
    with pytest.raises(ConfigError, match=message) as caught:
        expand(_checked("prompts.limit=1", *overrides).sweep)
    assert "\n" not in str(caught.value)


def test_every_field_of_guidance_reaches_the_request_in_one_spelling():
    found = request("guidance=apg", "apg_eta=0.5", "guidance_interval=0.10-0.7", "step_cache=2")
    assert (found.guidance, found.apg_eta) == ("apg", 0.5)
    assert (found.guidance_interval, found.step_cache) == ("0.1-0.7", "2")
    assert request("step_cache=9-0-1-1").step_cache == "0-1-9"
    assert request("step_cache=1").step_cache == "none"


@pytest.mark.parametrize("field", ["guidance=apg", "guidance_interval=0-0.5", "step_cache=2"])
def test_guidance_that_is_not_there_is_refused_before_anything_is_loaded(tmp_path, field):
    extra = narrow(tmp_path, "model", "nano", family="sana")
    name = field.partition("=")[0]
    with pytest.raises(ConfigError, match=rf"{field}: narrow \(family sana\) cannot; use {name}="):
        job("model=narrow", field, extra=extra)
    with pytest.raises(ConfigError, match=f"{field}: backend eachlabs cannot; use {name}="):
        job("model=sd35-medium", "backend=eachlabs", field)


def test_a_sweep_over_rules_runs_idle_parameters_once():
    axes = ["axes.guidance=[cfg,apg,cfg-zero-star]", "axes.apg_eta=[0,0.5]", "axes.cfg=[1,4]"]
    plan = expand(job("prompts.limit=1", "steps=4", *axes).sweep)
    found = sorted((t.request.cfg, t.request.guidance, t.request.apg_eta) for t in plan.trials)
    assert found == [
        (1.0, "cfg", 0.0),
        (4.0, "apg", 0.0),
        (4.0, "apg", 0.5),
        (4.0, "cfg", 0.0),
        (4.0, "cfg-zero-star", 0.0),
    ]


@pytest.mark.parametrize("case", REFUSED)
def test_skip_layer_guidance_without_effect_is_refused(case):
    overrides, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message) as caught:
        expand(job("prompts.limit=1", *overrides).sweep)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("skip_layer_")


def test_a_mixed_sweep_runs_idle_settings_once_and_says_so():
    axes = ["axes.cfg=[1,4]", "axes.steps=[4,8]", "axes.skip_layer_scale=[null,4]"]
    sweep = job("prompts.limit=1", *axes, "axes.skip_layer_guidance=[none,stability]").sweep
    plan = expand(sweep)
    found = [
        (t.request.steps, t.request.cfg, s.scale if (s := t.request.skip_layer_guidance) else None)
        for t in plan.trials
    ]
    # At 8 steps and cfg 4 the preset acts, with its own scale and with the other.
    assert sorted(found, key=str) == sorted(
        [(4, 1, None), (8, 1, None), (4, 4, None), (8, 4, None), (8, 4, 2.5), (8, 4, 4.0)], key=str
    )
    said = [note for note in plan.notes if note.startswith("skip_layer_guidance")]
    assert len(said) == 2
    assert "cfg 1" in said[0] + said[1]
    assert "4 steps" in said[0] + said[1]


def test_the_presets_own_scale_is_the_same_trial():
    plain = expand(job("prompts.limit=1", "skip_layer_guidance=stability").sweep)
    spelled = expand(
        job("prompts.limit=1", "skip_layer_guidance=2@2.5:0.01-0.2", "skip_layer_scale=2.5").sweep
    )
    assert plain.trials[0].key == spelled.trials[0].key
    without = expand(job("prompts.limit=1").sweep)
    assert plain.trials[0].key != without.trials[0].key
