import ast
import importlib.util
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sd35bench.errors import ConfigError
from sd35bench.recommend.advice import recommend_document
from sd35bench.recommend.named_defaults import NAMED, verdict_beside
from sd35bench.stats.intervals import Interval
from sd35bench.types import SkipLayerGuidance, Task, Timings
from tests.studies.memory import LOAD, MemoryStudy, planted, record

T2I, I2I = "text-to-image", "image-to-image"
STABILITY = SkipLayerGuidance(layers=(2,), scale=2.5, start=0.01, stop=0.2)
GRID = {(12, 4.0): (0.90, 0.3), (28, 7.0): (0.92, 0.7), (40, 5.0): (0.5, 1.2)}


def _document(study: MemoryStudy, **profile: Any) -> dict[str, Any]:
    fields = {"margins": {"prompt_accuracy": 0.1, "edit_quality": 0.1}} | profile
    return recommend_document(study, {"p": fields})["profiles"]["p"]


def _defaults(study: MemoryStudy, task: str = T2I) -> dict[str, dict[str, Any]]:
    return {d["name"]: d for d in _document(study)[task]["named_defaults"]}


def test_named_defaults_are_those_of_the_installed_diffusers():
    """Read from its source: importing it takes long."""
    found = importlib.util.find_spec("diffusers")
    if found is None or found.origin is None:
        pytest.skip("diffusers is not installed")
    folder = Path(found.origin).parent / "pipelines" / "stable_diffusion_3"
    suffixes = {Task.TEXT_TO_IMAGE: "", Task.IMAGE_TO_IMAGE: "_img2img"}
    for default in (d for d in NAMED if d.name == "diffusers"):
        path = folder / f"pipeline_stable_diffusion_3{suffixes[default.task]}.py"
        taken = _call_defaults(path)
        assert taken["num_inference_steps"] == default.steps
        assert taken["guidance_scale"] == default.cfg
        if default.prompt_strength is not None:
            assert taken["strength"] == default.prompt_strength


def _call_defaults(path: Path) -> dict[str, Any]:
    """The literal defaults of the file's `__call__`."""
    tree = ast.parse(path.read_text())
    (call,) = (
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name == "__call__"
    )
    named = call.args.args[-len(call.args.defaults) :]
    pairs = zip(named, call.args.defaults, strict=True)
    return {arg.arg: value.value for arg, value in pairs if isinstance(value, ast.Constant)}


def test_default_in_the_study_is_held_against_the_choice(tmp_path):
    found = _defaults(planted(tmp_path, GRID, prompts=150))
    vendor, diffusers = found["vendor"], found["diffusers"]
    assert vendor["status"] == "in the study"
    assert vendor["verdict"] == "higher here; held-out prompts would tell"
    assert vendor["on"] == "the choice's prompts"
    assert vendor["difference"]["value"] == pytest.approx(0.4, abs=0.08)
    assert vendor["speed_ratio"]["value"] == pytest.approx(4.0, rel=0.05)
    assert vendor["command"] is None
    assert diffusers["verdict"] == "as good within the margin"


def test_held_out_prompts_count_where_there_are_any(tmp_path):
    study = planted(tmp_path, GRID, prompts=150)
    held = {(12, 4.0): (0.5, 0.3), (40, 5.0): (0.9, 1.2)}
    more = planted(tmp_path, held, prompts=150, first=500, split="heldout", rng_seed=4)
    study.kept, study.score_rows = study.kept + more.kept, study.score_rows + more.score_rows
    vendor = _defaults(study)["vendor"]
    assert vendor["on"] == "held-out prompts"
    assert vendor["verdict"] == "worse by more than the margin"


@pytest.mark.parametrize(("prompts", "verdict"), [(39, "higher here"), (80, "better")])
def test_better_is_said_of_held_out_prompts_alone_once_all_were_run(tmp_path, prompts, verdict):
    study = planted(tmp_path, GRID, prompts=40, seeds=1)
    held = {(12, 4.0): (0.9, 0.3), (40, 5.0): (0.5, 1.2)}
    fields = {"first": 500, "split": "heldout", "rng_seed": 4}
    more = planted(tmp_path, held, prompts=prompts, seeds=1, **fields)
    study.kept, study.score_rows = study.kept + more.kept, study.score_rows + more.score_rows
    vendor = _defaults(study)["vendor"]
    assert vendor["verdict"].startswith(verdict)
    assert (vendor["on"] == "held-out prompts") == (prompts == 80)


def test_better_is_corrected_for_the_number_of_defaults():
    found = Interval(0.05, 0.001, 0.099, 200, 200)
    assert verdict_beside(found, 0.1, True) == "better"
    assert verdict_beside(found, 0.1, False) == "as good within the margin"
    assert verdict_beside(found, 0.1, None) == "higher here; held-out prompts would tell"


def test_default_that_is_not_there_has_the_command_that_adds_it(tmp_path):
    found = _defaults(planted(tmp_path, GRID, prompts=30))
    assert {d["status"] for n, d in found.items() if n.startswith("stability")} == {
        "not in the study"
    }
    words = shlex.split(found["stability-slg"]["command"])
    options = dict(word.split("=", 1) for word in words if "=" in word)
    wanted = {
        "steps": "50",
        "cfg": "4",
        "sampler": "dpmpp_2m",
        "skip_layer_guidance": "stability",
        "prompts.split": "tune",
        "prompts.limit": "30",
        "study": "synthetic",
    }
    assert wanted.items() <= options.items()
    assert "skip_layer" not in found["stability"]["command"]


def test_skip_layer_guidance_tells_stabilitys_defaults_apart(tmp_path):
    study = planted(tmp_path, GRID, prompts=30)
    for p in range(30):
        for seed in (0, 1):
            common = {"steps": 50, "sampler": "dpmpp_2m", "seed": seed}
            skipping = record(p, cfg=4.0, skip_layer_guidance=STABILITY, **common)
            study.add(skipping, prompt_accuracy=0.5)
            study.add(record(p, cfg=4.0, **common), prompt_accuracy=0.5)
    found = _defaults(study.touch_images())
    assert found["stability-slg"]["status"] == "in the study"
    assert found["stability"]["status"] == "not in the study"


def test_another_sampler_backend_or_shift_is_not_the_default(tmp_path):
    other = replace(LOAD, backend=replace(LOAD.backend, name="compile"))
    study = planted(tmp_path, {(12, 4.0): (0.9, 0.3), (8, 4.0): (0.2, 0.2)}, prompts=20)
    for p in range(20):
        for seed in (0, 1):
            for change in ({"sampler": "heun"}, {"shift": 1.5}, {"load": other}):
                row = record(p, steps=40, cfg=5.0, seed=seed, **change)
                study.add(row, prompt_accuracy=0.0)
    assert _defaults(study.touch_images())["vendor"]["status"] == "not in the study"


def _edits(tmp_path) -> MemoryStudy:
    study = MemoryStudy(tmp_path)
    for p in range(40):
        for steps, strength, kept in ((16, 0.7, 0.9), (40, 0.85, 0.6), (16, 0.3, 0.1)):
            timings = Timings(generate_s=steps / 40, encode_s=0.0)
            fields = {"init_image": f"{p:064d}", "prompt_strength": strength, "cfg": 5.0}
            row = record(p, steps=steps, timings=timings, **fields)
            study.add(row, prompt_accuracy=1.0, init_kept=kept + 0.002 * (p % 5))
    return study.touch_images()


def test_edits_have_defaults_of_their_own_with_a_strength(tmp_path):
    found = _defaults(_edits(tmp_path), I2I)
    assert set(found) == {"vendor", "diffusers"}
    assert found["vendor"]["verdict"] == "higher here; held-out prompts would tell"
    assert "prompt_strength=0.6" in found["diffusers"]["command"]
    assert "steps=50" in found["diffusers"]["command"]


def test_profile_may_hold_others_against_a_named_default(tmp_path):
    study = planted(tmp_path, GRID | {(4, 1.0): (0.1, 0.05), (8, 4.0): (0.52, 0.2)}, prompts=150)
    entry = _document(study, reference="vendor")[T2I]
    # As good as the vendor's 40 steps within 0.1; far from as good as the best.
    assert entry["setting"]["steps"] == 8
    assert "of vendor" in entry["evidence"]["reason"]
    assert entry["confirmation"]["against"]["steps"] == 40
    assert _document(study)[T2I]["setting"]["steps"] == 12


def test_reference_that_is_not_there_is_an_answer_and_an_unknown_one_the_users_error(tmp_path):
    study = planted(tmp_path, GRID, prompts=20)
    entry = _document(study, reference="stability")[T2I]
    assert entry["setting"] is None
    assert "no setting like stability's (50 steps, cfg 5)" in entry["evidence"]["reason"]
    with pytest.raises(ConfigError, match=r"profile\.reference='vender'"):
        _document(study, reference="vender")


def test_defaults_of_this_model_say_nothing_of_others_or_of_what_a_host_cannot_do(tmp_path):
    sana = replace(LOAD, model=replace(LOAD.model, family="sana"))
    found = _defaults(planted(tmp_path, GRID, prompts=20, load=sana))
    assert {d["status"] for d in found.values()} == {"not applicable"}
    options = {"base_url": "https://example.com", "slug": "x"}
    backend = replace(LOAD.backend, name="eachlabs", kind="eachlabs", options=options)
    hosted = _defaults(planted(tmp_path, GRID, prompts=20, load=replace(LOAD, backend=backend)))
    assert "neither a sampler" in hosted["stability"]["verdict"]
    assert hosted["vendor"]["status"] == "in the study"
