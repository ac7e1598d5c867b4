import copy
import math
import os
from functools import lru_cache
from pathlib import Path

import pytest
import yaml
from omegaconf import DictConfig, OmegaConf

from sd35bench.analysis.facts import METRICS
from sd35bench.config import check_overrides, choices, compose, config_dir, freeze
from sd35bench.config.compose import explained
from sd35bench.config.models import FIELDS, check_field
from sd35bench.config.overrides import (
    GROUP_NAMES,
    checked_options,
    metric_options,
    parse,
    written,
)
from sd35bench.config.sweeper import noise_overrides
from sd35bench.errors import ConfigError
from sd35bench.plan import expand
from sd35bench.stats.latency import LEAST_IMAGES
from sd35bench.workers.limits import Limits

ROOT = Path(__file__).parent.parent


@lru_cache
def composed(groups: tuple[str, ...], extra: Path | None = None) -> DictConfig:
    """A choice of files, composed once: Hydra takes 0.15 s, and ranges need it only once."""
    return compose(groups, extra)


def job(*overrides: str, extra: Path | None = None):
    """Check, compose and freeze one point, on a backend that needs no weights.

    Fields are set on a composition of the files that was made before; that Hydra itself takes them
    is what `test_limits_reach_the_job_and_are_no_part_of_a_trial` and the command line's tests see.
    """
    check_overrides(overrides, multirun=False, extra=extra)
    named = any(text.startswith("backend=") for text in overrides)
    words = written([*([] if named else ["backend=fake"]), *overrides])
    groups = [text for text in words if text.partition("=")[0] in GROUP_NAMES]
    config = copy.deepcopy(composed(tuple(groups), extra))
    with explained():
        for override in (parse(text) for text in words if text not in groups):
            OmegaConf.update(config, override.key_or_group, override.value())
    return freeze(config)


def request(*overrides: str):
    return expand(job("prompts.limit=1", *overrides).sweep).trials[0].request


# Defaults and the YAML files ---------------------------------------------------------------------


def test_more_threads_than_cores_in_sight_are_refused(monkeypatch):
    cores = len(os.sched_getaffinity(0))
    assert job(f"threads={cores}").sweep.load.threads == cores
    with pytest.raises(ConfigError, match=rf"threads={cores + 1}: .* {cores} CPU cores; give at"):
        job(f"threads={cores + 1}")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert not any(
        "threads" in text for job in noise_overrides([["steps=4"]], "fake") for text in job
    )


def test_defaults_are_the_models_own():
    found = job("prompts.limit=3")
    model = composed(()).model
    assert found.study == "default"
    assert found.results_dir == Path("results")
    assert found.sweep.axes["steps"] == (model.steps,)
    assert found.sweep.axes["cfg"] == (model.cfg,)
    assert found.sweep.sizes == ((model.width, model.height),)
    assert found.sweep.load.threads == len(os.sched_getaffinity(0))
    assert {i.ref.set for i in found.sweep.prompts} == {"nano"}
    assert "prompt_strength" not in found.sweep.axes


def test_vendor_defaults_of_sd35_medium():
    found = job("model=sd35-medium", "prompts.limit=1")
    model = found.sweep.load.model
    assert (found.sweep.axes["steps"], found.sweep.axes["cfg"]) == ((40,), (5.0,))
    assert found.sweep.sizes == ((1024, 1024),)
    assert model.target_latency_s == 8.0
    edit = composed(("model=sd35-medium",)).model
    assert edit.prompt_strength == 0.85
    assert len(edit.aspect_ratios) == 11


@pytest.mark.parametrize("group", ["model", "backend", "prompts"])
def test_every_yaml_composes(group):
    """Experiments do in `test_every_experiment_plans`."""
    for name in choices(group):
        conf = composed((f"{group}={name}",))
        assert group == "prompts" or conf[group].name == name


@pytest.mark.parametrize("name", choices("experiment"))
def test_every_experiment_plans(name):
    found = job(f"experiment={name}", "prompts.limit=4")
    assert len(expand(found.sweep).trials) > 1


def test_every_backend_yaml_has_checked_options_and_a_registered_kind():
    from sd35bench.backends.base import KINDS
    from sd35bench.remote.providers import PROVIDERS

    for name in choices("backend"):
        backend = composed((f"backend={name}",)).backend
        assert (backend.kind in KINDS) != (backend.kind in PROVIDERS), name
        checked = checked_options("backend", backend.options, backend.allowed)
        assert set(checked) == set(backend.allowed), name


@pytest.mark.parametrize("name", choices("model"))
def test_every_models_table_keeps_its_own_rules(name):
    model = composed((f"model={name}",)).model
    if model.hosted_only is not None:
        pytest.skip(f"{name} has no local pipeline, hence no table")
    sides = [side for size in model.aspect_ratios.values() for side in size]
    for side in (*sides, model.width, model.height):
        assert side % model.size_multiple == 0
        assert side <= model.max_side_px
    for ratio, (width, height) in model.aspect_ratios.items():
        wide, high = map(int, ratio.split(":"))
        # 8-px grains on a 48-px side move a ratio by up to a fifth.
        assert width / height == pytest.approx(wide / high, rel=0.2)
    assert next(iter(model.aspect_ratios.values())) == [model.width, model.height]


def test_nanos_aspect_ratios_are_those_of_its_world():
    from sd35bench.nano.world import ASPECT_RATIOS

    table = composed(("model=nano",)).model.aspect_ratios
    assert {k: tuple(v) for k, v in table.items()} == ASPECT_RATIOS


def test_every_profile_loads():
    from sd35bench.recommend.profiles import load_profiles

    assert set(load_profiles(config_dir() / "profile")) == {"preview", "balanced", "final"}


def test_every_metric_has_a_yaml():
    assert set(choices("metric")) == set(METRICS)
    assert metric_options([]) == {}


def test_configs_ship_with_the_package():
    import tomllib

    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert tool["package-dir"]["sd35bench.configs"] == "configs"
    folders = {
        ".".join(p.parent.relative_to(ROOT).parts)
        for p in (ROOT / "sd35bench").rglob("*.py")
        if "__pycache__" not in p.parts
    }
    assert folders <= set(tool["packages"])
    suffixes = {p.suffix for p in config_dir().rglob("*") if p.is_file()}
    assert suffixes <= {Path(p).suffix for p in tool["package-data"]["sd35bench.configs"]}


# Adding one's own --------------------------------------------------------------------------------


def test_a_new_model_is_one_yaml(tmp_path):
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "model_index.json").write_text('{"vae": ["diffusers", "AutoencoderKL"]}')
    (weights / "vae").mkdir()
    (weights / "vae" / "w.safetensors").write_bytes(b"1")
    conf = yaml.safe_load((config_dir() / "model" / "nano.yaml").read_text())
    conf |= {"name": "mine", "path": str(weights), "steps": 7}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text(yaml.safe_dump(conf))
    found = job("model=mine", "backend=eager", "prompts.limit=1", extra=tmp_path)
    assert found.sweep.axes["steps"] == (7,)
    assert found.sweep.load.model.name == "mine"
    assert len(found.sweep.load.model.weights_digest) == 64


def test_a_new_prompt_set_is_one_yaml(tmp_path):
    (tmp_path / "mine.txt").write_text("a heron\n")
    (tmp_path / "prompts").mkdir()
    text = f"defaults: [schema]\nkind: file\npath: {tmp_path / 'mine.txt'}\n"
    (tmp_path / "prompts" / "mine.yaml").write_text(text)
    found = job("prompts=mine", extra=tmp_path)
    assert [i.prompt for i in found.sweep.prompts] == ["a heron"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("stepz: 4", "stepz: unknown field; did you mean steps"),
        ("steps: four", "steps=four: must be an integer"),
        ("steps: 0", "steps=0: must be an integer from 1"),
        ("axes: {cfg: [1, x]}", "cfg=x: must be a number"),
        ("axes: {stepz: [1]}", "axes.stepz: unknown field"),
        ("axes: {seed: [-1]}", "seed=-1"),
        ("model: {steps: 0}", "model.steps=0"),
        ("axes: [", "not valid YAML"),
    ],
)
def test_a_wrong_experiment_yaml_is_refused_by_field(tmp_path, body, message):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "bad.yaml").write_text(f"# @package _global_\n{body}\n")
    with pytest.raises(ConfigError, match=message) as caught:
        job("experiment=bad", extra=tmp_path)
    assert "\n" not in str(caught.value)


# Values that reach the request -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("steps=1", "steps", 1),
        ("cfg=0", "cfg", 0.0),
        ("cfg=-0.0", "cfg", 0.0),
        ("cfg=7", "cfg", 7.0),
        ("seed=4294967295", "seed", 4294967295),
        ("shift=2.5", "shift", 2.5),
        ("max_sequence_length=8", "max_sequence_length", 8),
        ('negative_prompt="a, b: c"', "negative_prompt", "a, b: c"),
        ("output_format=webp", "output_format", "webp"),
        ("prompt_strength=null", "prompt_strength", None),
    ],
)
def test_a_value_reaches_the_request(override, field, value):
    found = getattr(request(override), field)
    assert found == value
    assert type(found) is type(value)
    if isinstance(found, float):
        assert math.copysign(1, found) == 1


def test_sizes_come_from_aspect_ratio_or_sides():
    assert job("aspect_ratio=16:9").sweep.sizes == ((88, 48),)
    assert job("width=96").sweep.sizes == ((96, 64),)
    assert job("width=96", "height=32").sweep.sizes == ((96, 32),)


def test_asking_for_the_models_own_value_is_the_same_request():
    assert request("max_sequence_length=16") == request()


def test_edits_get_the_models_strength_unless_one_is_given():
    assert request("prompts.task=edit").prompt_strength == 0.85
    assert request("prompts.task=edit", "prompt_strength=0.4").prompt_strength == 0.4
    assert request("prompts.task=edit").init_image is not None


def test_backend_options_are_typed_and_part_of_the_load():
    found = job("backend=fake", "backend.delay_s=1", "prompts.limit=1").sweep.load
    assert found.backend.options["delay_s"] == 1.0
    assert isinstance(found.backend.options["delay_s"], float)
    assert found.key != job("prompts.limit=1").sweep.load.key


# Refusals ----------------------------------------------------------------------------------------

REFUSED = {
    "typo": (["stepz=4"], "unknown field 'stepz'; did you mean steps"),
    "nested-typo": (["prompts.limt=4"], "did you mean prompts.limit"),
    "wrong-place": (["model.steps=4"], "did you mean steps"),
    "no-value": (["steps"], "expected NAME=VALUE"),
    "add": (["+steps=4"], "write steps=4"),
    "delete": (["~steps"], "write steps"),
    "word-for-int": (["steps=four"], "steps=four: must be an integer from 1 to 1000"),
    "float-for-int": (["steps=4.0"], "steps=4.0: must be an integer"),
    "steps-0": (["steps=0"], "steps=0: must be an integer from 1 to 1000"),
    "cfg-negative": (["cfg=-1"], "cfg=-1: must be a number from 0 to 100"),
    "cfg-nan": (["cfg=nan"], "cfg=nan: must be a number"),
    "strength-0": (["prompt_strength=0"], r"must be a number in \(0, 1\]"),
    "strength-above-1": (["prompt_strength=1.01"], r"must be a number in \(0, 1\]"),
    "strength-no-init": (["prompt_strength=0.5"], "acts only on an init image"),
    "width-odd": (["width=63"], "width=63: must be a multiple of 8 from 8 to 128"),
    "ratio-unknown": (["aspect_ratio=5:1"], "aspect_ratio=5:1: nano has 1:1, 16:9"),
    "ratio-and-width": (["aspect_ratio=16:9", "width=64"], "contradict"),
    "sampler": (["sampler=ddim"], "sampler=ddim: must be one of euler, heun, dpmpp_2m, unipc"),
    "seed-null": (["seed=null"], "seed=null"),
    "seed-negative": (["seed=-1"], "seed=-1: must be an integer from 0"),
    "tokens": (["max_sequence_length=17"], "nano takes at most 16"),
    "format": (["output_format=gif"], "one of png, jpg, webp"),
    "limit-0": (["prompts.limit=0"], "prompts.limit=0: must be an integer of at least 1"),
    "split": (["prompts.split=test"], "one of tune, heldout, all"),
    "file-missing": (["prompts=file", "prompts.path=/no.csv"], "prompts.path=/no.csv: there is no"),
    "file-unsaid": (["prompts=file"], "prompts.path is missing"),
    "model": (["model=nanoo"], "must be one of .*did you mean nano"),
    "backend": (["backend=eagr"], "must be one of .*did you mean eager"),
    "experiment": (["experiment=demoo"], "did you mean demo"),
    "prompts": (["prompts=imagenet"], "must be one of"),
    "negative-unguided": (["negative_prompt=ugly", "cfg=1"], "no effect at cfg=1"),
    "list-without-m": (["steps=4,8"], "several values need -m"),
    "text-with-comma": (["negative_prompt=a,b"], "quote a text that holds a comma"),
    "study-path": (["study=../x"], "letters, digits"),
    "study-empty": (["study="], "letters, digits"),
    "init-missing": (["init_image=/no.png"], "there is no file"),
    "init-twice": (["prompts.task=edit", f"init_image={__file__}"], "of its own"),
    "option-unknown": (["backend=fake", "backend.delay=1"], "backend.delay: unknown"),
    "option-type": (["backend=fake", "backend.delay_s=x"], "backend.delay_s=x: must be of type"),
    "option-choice": (["backend=eager", "backend.dtype=fp8"], "one of fp32, bf16, fp16"),
    "axes-range": (["axes.steps=[4,0]"], "steps=0"),
    "axes-word": (["axes.steps=[4,x]"], "steps=x"),
    "axes-batch": (["axes.batch_size=[1,0]"], "batch_size=0"),
    "axes-choice": (["axes.output_format=[png,gif]"], "output_format=gif"),
    "axes-null": (["axes.steps=[null]"], "steps=null"),
    "weights-folder": (["backend=eager", "model.path=/tmp"], "no model_index.json"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line_that_names_the_field(case):
    overrides, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message) as caught:
        job(*overrides)
    assert "\n" not in str(caught.value)
    assert overrides[-1].lstrip("+~").split("=")[0].split(".")[-1] in str(caught.value)


def test_real_weights_that_are_not_here_come_with_the_steps_to_get_them(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ConfigError, match=r"\(1\) accept .*\(2\) hf auth .*\(3\) .*\(4\) add model"
    ):
        job("model=sd35-medium", "backend=eager", "prompts.limit=1")


@pytest.mark.parametrize(
    "text", ["steps=4,8", "steps=range(1,3)", "steps=choice(4,8)", "batch_size=1,2,4,8"]
)
def test_sweeps_are_fine_with_m(text):
    check_overrides([text], multirun=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("study=a,b", "cannot be swept"),
        ("order_seed=1,2", "once per value"),
        ("init_image=a.png,b.png", "init_image column"),
        ("steps=interval(1,4)", "single values"),
        ("backend=fake,eagr", "backend=eagr"),
        ("backend=fake,fake", "runs once"),
    ],
)
def test_sweeps_that_are_refused_with_m(text, message):
    with pytest.raises(ConfigError, match=message):
        check_overrides([text], multirun=True)


def test_null_means_the_default():
    nullable = [name for name, field in FIELDS.items() if field.nullable]
    assert {name: check_field(name, None) for name in nullable} == dict.fromkeys(nullable)


def test_notes_say_what_has_no_effect():
    assert "every trial is timed" in job("timed_limit=3").sweep.notes[0]
    assert job("output_quality=50").sweep.notes == ("output_quality has no effect on png",)
    assert job("output_quality=50", "output_format=jpg").sweep.notes == ()
    assert "reads no weights" in job("model.path=/tmp").sweep.notes[0]


def test_batch_sizes_are_an_axis():
    assert job("batch_size=8").sweep.batch_sizes == (8,)
    assert (
        job("batch_size=8").sweep.timed_limit == 8 >= 2 * LEAST_IMAGES
    )  # was 4, was 2 in the demo
    swept = job("axes.batch_size=[1,4]", "timed_limit=2").sweep
    assert swept.batch_sizes == (1, 4)
    assert "every trial is timed" in swept.notes[0]
    assert job("axes.batch_size=[2,4]", "timed_limit=2").sweep.notes == ()


def test_metric_options_are_checked():
    found = metric_options(["metric.fid.reference=stats.npz"])
    assert found == {"fid": {"reference": "stats.npz"}}
    for text, message in (
        ("metric.fid.referenc=x", "did you mean reference"),
        ("metric.beauty.x=1", "expected metric.NAME"),
        ("metric.fid.reference=3", "of type text"),
    ):
        with pytest.raises(ConfigError, match=message):
            metric_options([text])


def test_limits_reach_the_job_and_are_no_part_of_a_trial():
    bare = freeze(compose(["backend=fake"]))
    assert bare.engine.limits == Limits()
    given = freeze(
        compose(
            [
                "backend=fake",
                "deadline_s=5",
                "memory_limit_gb=1.5",
                "max_failures=7",
                "starts=2",
                "keep_latents=true",
                "contention=error",
            ]
        )
    )
    assert given.engine.limits == Limits(
        deadline_s=5.0,
        memory_limit_bytes=1_500_000_000,
        max_failures=7,
        starts=2,
        keep_latents=True,
        contention="error",
    )
    assert expand(given.sweep).trials == expand(bare.sweep).trials
