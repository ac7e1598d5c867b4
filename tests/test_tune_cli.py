import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import sd35bench.cli.tune as verb
from sd35bench.analysis.summary import show_document
from sd35bench.backends.fake import FakeBackend
from sd35bench.cli import main
from sd35bench.config import config_dir
from sd35bench.config.tune import _sorted_out, read_tuning
from sd35bench.errors import ConfigError
from sd35bench.recommend.advice import recommend_document
from sd35bench.recommend.profiles import load_profile, load_profiles
from sd35bench.study.store import Study
from sd35bench.types import Status
from tests.tune_driver import score

FAKE = ["backend=fake", "study=t", "prompts.limit=16"]
GRID = [*FAKE, "steps=1,2,8", "cfg=1,2"]
DRIVER = [sys.executable, "-m", "tests.tune_driver"]

pytestmark = pytest.mark.usefixtures("empty_folder", "fakes_here")


@pytest.fixture
def ruled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Score by the driver's rule: no torch."""
    monkeypatch.setattr(verb, "score_missing", score)


def records(name: str = "t") -> list:
    return list(Study.open(Path("results"), name).all_records())


@pytest.mark.usefixtures("ruled")
def test_tune_writes_what_it_found_and_other_verbs_read_the_study(call):
    code, document = call("tune", *GRID, "images=72")
    assert code == 0
    assert json.loads(Path("results/t/tune.json").read_text()) == document
    best = document["recommended"]
    assert best["setting"]["steps"] == 8
    assert best["quality"]["ci95"][0] <= best["quality"]["value"] <= best["quality"]["ci95"][1]
    assert best["quality"]["n"] == 16
    assert best["latency_s"]["n"] == 16
    assert document["confirmed"] is False
    assert best["confirmation"]["status"] == "not run"
    assert "held-out" in document["confirmation"]
    used = document["images"]["used"]
    assert document["images"] == {"used": used, "budget": 72, "exhaustive": 96, "share": used / 96}
    assert used <= 72
    assert len(records()) == used, "what it says that it used is what was made"
    assert {r.trial.prompt.split for r in records()} == {"tune"}
    statuses = {row["status"] for row in document["tried"]}
    assert statuses & {"dominated", "out of reach"}
    study = Study.open(Path("results"), "t")
    assert len(show_document(study)["settings"]) == 6
    profiles = load_profiles(config_dir() / "profile")
    chosen = recommend_document(study, {"balanced": profiles["balanced"]})["profiles"]["balanced"]
    assert chosen["text-to-image"]["setting"]["steps"] == 8
    code, again = call("tune", *GRID, "images=72")
    assert again == document
    assert len(records()) == used, "nothing is done twice"


@pytest.mark.usefixtures("ruled")
def test_tune_confirms_its_choice_on_prompts_that_no_search_sees(call, capsys):
    asked = [*FAKE, "steps=1,8", "cfg=2", "images=32"]
    bill = call("tune", *asked, "--confirm", "--dry-run")[1]
    assert bill["held_out_images"] == 2 * 2 * 16, "at most two settings on twice the prompts"
    before = call("tune", *asked)[1]
    code, document = call("tune", *asked, "--confirm")
    assert code == 0
    entry = document["recommended"]["confirmation"]
    assert (entry["status"], document["confirmed"]) == ("confirmed", True)
    assert document["confirm"] == {"commands": [], "images": 0}
    assert [c["setting"]["steps"] for c in before["confirm"]["commands"]] == [8, 1]
    assert entry["against"]["steps"] == 1, "the runner-up, though it was beaten"
    assert entry["n_prompts"] == before["confirm"]["commands"][0]["prompts"] >= 16
    held = [r for r in records() if r.trial.prompt.split == "heldout"]
    assert len(held) == before["confirm"]["images"]
    assert document["images"] == before["images"], "they are not the search's"
    assert json.loads(Path("results/t/tune.json").read_text()) == document
    capsys.readouterr()
    assert main(["tune", *asked, "--markdown"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("## Tuned setting from study t\n")
    assert f"Confirmed on {entry['n_prompts']} held-out prompts" in out
    assert len(records()) == document["images"]["used"] + len(held)


@pytest.mark.usefixtures("ruled")
def test_tune_races_ranges_samplers_and_backends(call):
    arguments = [
        "study=t",
        "prompts.limit=8",
        "first=4",
        "backend=fake,also",
        "trials=6",
        "images=48",
    ]
    folder = Path("own/backend")
    folder.mkdir(parents=True)
    text = (config_dir() / "backend" / "fake.yaml").read_text()
    (folder / "also.yaml").write_text(text.replace("name: fake", "name: also"))
    own = ["--config-dir", "own", "steps=1:8", "cfg=1:3:0.25", "sampler=euler,heun"]
    code, document = call("tune", *arguments, *own)
    assert code == 0
    assert document["settings"] == {"tried": 6, "grid": 8 * 9 * 2 * 2, "trials": 6}
    made = records()
    assert len({r.trial.load.key for r in made}) == 2
    assert all(r.trial.request.cfg * 4 % 1 == 0 for r in made), "on the stated grid"
    assert len({r.trial.key for r in made}) == len(made) == document["images"]["used"]


@pytest.mark.usefixtures("ruled")
def test_tune_counts_settings_that_are_the_same_images_once(call):
    code, document = call("tune", *FAKE, "prompts.limit=8", "first=4", "cfg=0,0.5,1,4", "steps=2")
    assert code == 2, "prompts.limit is given twice"
    code, document = call(
        "tune", "backend=fake", "study=t", "prompts.limit=8", "first=4", "cfg=0,0.5,1,4", "steps=2"
    )
    assert code == 0
    assert document["settings"]["tried"] == 2
    assert {r.trial.request.cfg for r in records()} == {1.0, 4.0}


def test_tune_dry_run_makes_nothing(call):
    code, bill = call("tune", *GRID, "--dry-run")
    assert code == 0
    assert (bill["grid"], bill["images"], bill["exhaustive"]) == (6, 38, 96)
    assert bill["estimated_s"] is None
    assert not Path("results").exists()


HOSTED = ["study=t", "model=sd35-medium", "prompts=starter", "backend=eachlabs", "steps=20,40"]
REFUSED = {
    "nothing to search": (["study=t"], "nothing to search"),
    "no study": (["steps=2,4"], "study"),
    "held-out prompts": (["study=t", "steps=2,4", "prompts.split=heldout"], "held-out"),
    "unknown profile": (["study=t", "steps=2,4", "profile=fast"], "balanced"),
    "range upside down": (["study=t", "steps=8:2"], "LOW < HIGH"),
    "half a step": (["study=t", "steps=1:3:0.5"], "steps=1.5"),
    "out of range": (["study=t", "cfg=1:500"], "cfg"),
    "no number": (["study=t", "cfg=1:high"], "expected numbers"),
    "batches": (["study=t", "steps=2,4", "batch_size=8"], "timed"),
    "too few prompts": (["study=t", "steps=2,4", "prompts.limit=4"], "prompts.limit=8"),
    "too few images": (["study=t", "steps=2,4", "images=3"], "at least 32"),
    "one trial": (["study=t", "steps=2,4", "trials=1"], "trials=1"),
    "unknown sampler": (["study=t", "sampler=euler,ddim"], "ddim"),
    "unknown backend": (["study=t", "backend=eager,eagle"], "did you mean eager"),
    "strength without init": (["study=t", "prompt_strength=0.3:0.9"], "init image"),
    "scale without guidance": (["study=t", "skip_layer_scale=1:4"], "skip_layer_guidance"),
    "unknown field": (["study=t", "steps=2,4", "stepz=4"], "stepz"),
    "a sweep of something else": (["study=t", "steps=2,4", "width=64,72"], "width"),
    "random weights": (["study=t", "steps=2,4", "model.weights=random"], "quality"),
    "local against hosted": (
        ["study=t", "model=sd35-medium", "prompts=starter", "backend=fake,eachlabs"],
        "two studies",
    ),
    "no flag": (["study=t", "steps=2,4", "--dryrun"], "--dry-run"),
    "money for a confirmation": (
        [*HOSTED, "first=4", "--confirm"],
        "does not spend money",
    ),
    "two outputs": (["study=t", "steps=2,4", "--markdown", "--dry-run"], "give one"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_tune_refuses_before_it_makes_anything(case, call):
    arguments, says = REFUSED[case]
    code, document = call("tune", *arguments)
    assert code == 2
    assert says in document["error"]["message"]
    assert not Path("results").exists()


@pytest.mark.usefixtures("ruled")
def test_tune_refuses_to_mix_two_searches_in_one_study(call):
    arguments = ["backend=fake", "study=t", "prompts.limit=8", "first=4"]
    assert call("tune", *arguments, "steps=1,2")[0] == 0
    code, document = call("tune", *arguments, "steps=1,4")
    assert code == 2
    assert "another study name" in document["error"]["message"]


def test_an_experiments_other_model_gets_its_own_prompts_and_images_alone(monkeypatch, call):
    """As `run` does; mutant: the settings as they were typed, nano's shapes 24 at once."""
    seen: list[str] = []

    def read(settings, _):
        seen.extend(settings)
        raise ConfigError("seen")

    monkeypatch.setattr(verb, "read_tuning", read)
    assert call("tune", "experiment=defaults", "model=sd35-medium", "study=t")[0] == 2
    assert {"prompts=starter", "batch_size=1"} <= set(seen)
    _, _, fixed = _sorted_out([*seen, "steps=4,8"])
    assert "batch_size=1" in fixed


def test_tune_asks_before_it_spends(call, monkeypatch):
    monkeypatch.setenv("EACHLABS_API_KEY", "not-a-key")
    asked = HOSTED
    code, bill = call("tune", *asked, "first=4", "--dry-run")
    assert code == 0
    assert bill["usd"] == pytest.approx(bill["images"] * 0.035, rel=0.9)
    code, document = call("tune", *asked, "first=4", "remote.confirm_above_usd=0.01")
    assert code == 2
    assert "--yes" in document["error"]["message"]
    assert not Path("results").exists()


def test_tuning_maps_skip_layer_scales_to_guidance():
    tuning = read_tuning(
        ["study=t", "skip_layer_guidance=none,stability", "skip_layer_scale=1:2:0.5", "cfg=3,4"]
    )
    assert tuning.space.size == 2 * 3 * 2
    assert set(tuning.sources) == {(None, "none"), (None, "stability")}
    scales = tuning.sources[None, "stability"].values["skip_layer_scale"]
    assert [(s, g.scale) for s, g in scales.items()] == [(1, 1), (1.5, 1.5), (2, 2)]


def test_tuning_asks_for_the_models_own_shift_as_none():
    with pytest.raises(ConfigError, match="shift"):
        read_tuning(["study=t", "shift=0:3"])
    tuning = read_tuning(["study=t", "shift=1:4:1"])
    assert tuning.space.size == 4


# Several processes ----------------------------------------------------------------------------

SLOW = [
    "backend=fake",
    "backend.delay_s=0.02",
    "study=t",
    "prompts.limit=16",
    "images=48",
    "steps=1,8",
    "cfg=1,2",
]


@pytest.mark.usefixtures("forked_python")
def test_tune_survives_a_kill_and_makes_nothing_twice():
    victim = subprocess.Popen([*DRIVER, *SLOW, "--json"], env=_environment())
    _wait_for(lambda: len(list(Path("results/t/images").glob("*/*"))) >= 10)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    journal = Path("results/t/tune/journal.log")
    with open(journal, "ab") as file:
        file.write(b'{"op_code": 4, "half a li')  # what a kill within a write leaves
    before = {r.trial.key for r in records() if r.status is Status.OK}
    done = subprocess.run(
        [*DRIVER, *SLOW, "--json"], env=_environment(), capture_output=True, timeout=240
    )
    assert done.returncode == 0, done.stderr.decode()
    document = json.loads(done.stdout)
    assert document["recommended"]["setting"]["steps"] == 8
    keys = [r.trial.key for r in records()]
    assert before <= set(keys)
    assert len(keys) == len(set(keys)) == document["images"]["used"]


@pytest.mark.usefixtures("forked_python")
def test_tune_is_shared_by_two_processes():
    workers = [
        subprocess.Popen([*DRIVER, *SLOW, "--json"], env=_environment(), stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    documents = [json.loads(worker.communicate(timeout=240)[0]) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    assert documents[0]["recommended"] == documents[1]["recommended"]
    keys = [r.trial.key for r in records()]
    assert len(keys) == len(set(keys)) == documents[0]["images"]["used"]


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}


def _wait_for(condition, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


# The whole profile ----------------------------------------------------------------------------


def profile_file(**fields) -> str:
    Path("own.yaml").write_text(json.dumps(fields))  # JSON is YAML
    return "own.yaml"


PROFILES = {
    "the fastest": {"margins": {"prompt_accuracy": 0.5}},
    "the best quality in time": {"objective": "best-quality", "latency_limit_s": 9.0},
    "a price": {"cost_limit_usd": 1.0, "usd_per_hour": 3600.0, "objective": "best-quality"},
}


@pytest.fixture
def slower_by_steps(fakes_here, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have latencies rise with the steps.

    Settings of 0.1 ms are ordered by chance. Where one is just shown to be as good, `tune`, whose
    looks share the error, may name another than `recommend`, which looks once: not at margin 0.5.
    """
    real = FakeBackend.generate

    def generate(self, requests, inits):
        time.sleep(0.004 * requests[0].steps)
        return real(self, requests, inits)

    monkeypatch.setattr(FakeBackend, "generate", generate)


@pytest.mark.usefixtures("ruled", "slower_by_steps")
@pytest.mark.parametrize("case", PROFILES)
def test_tune_chooses_what_recommend_chooses_of_the_same_images(case, call):
    file = profile_file(**PROFILES[case])
    asked = [*FAKE, "steps=1,2,4,8", "cfg=2", "first=16", f"profile={file}", "images=96"]
    code, document = call("tune", *asked)
    assert code == 0
    assert document["images"]["used"] == 64, "all settings have all prompts"
    best, study = document["recommended"], Study.open(Path("results"), "t")
    profile = load_profile(file, Path())
    entry = recommend_document(study, {"own": profile})["profiles"]["own"]["text-to-image"]
    assert entry["setting_id"].partition("@")[0] == best["setting_key"]
    assert best["wanted"] == profile.objective


@pytest.mark.usefixtures("ruled")
def test_tune_recommends_no_setting_whose_trials_fail(call):
    code, document = call("tune", *FAKE, "steps=1,8", "cfg=2", "backend.fail_every=3")
    assert code == 0
    assert document["recommended"] is None
    assert {row["status"] for row in document["tried"]} == {"failed"}


@pytest.mark.usefixtures("ruled")
def test_tune_holds_settings_against_a_named_default(call):
    file = profile_file(reference="vendor", objective="best-quality")
    code, document = call("tune", *FAKE, "steps=1,40", "cfg=2,5", f"profile={file}")
    assert code == 0
    best, vendor = document["recommended"], {"steps": 40, "cfg": 5}
    assert (best["reference"], best["setting"]) == ("vendor", {"steps": 40, "cfg": 2})
    assert best["non_inferiority"]["rival"] == best["difference_from_best"]["best"] == vendor
    assert best["confirmation"]["against"]["cfg"] == 5
    row = next(row for row in document["tried"] if row["setting"] == vendor)
    deepest = max(row["prompts"] for row in document["tried"])
    assert row["prompts"] == deepest, "what others are held against goes on to the end"


UNANSWERABLE = {
    "a default that is not searched": ({"reference": "vendor"}, "steps=40, cfg=5"),
    "a default that nobody has": ({"reference": "mine"}, "expected best, or one of vendor"),
    "a price that is unknown": ({"cost_limit_usd": 0.01}, "usd_per_hour"),
    "a field that is none": ({"objektive": "fastest"}, "objektive"),
}


@pytest.mark.parametrize("case", UNANSWERABLE)
def test_tune_refuses_a_profile_that_a_search_cannot_honour(case, call):
    fields, says = UNANSWERABLE[case]
    code, document = call("tune", *GRID, f"profile={profile_file(**fields)}")
    assert code == 2
    assert says in document["error"]["message"]
    assert not Path("results").exists()


ANOTHER = {
    "seeds": ["seed=5"],
    "prompts": ["prompts.seed=9"],
    "negative prompts": ["negative_prompt=blurry"],
    "size": ["width=72"],
}


@pytest.mark.usefixtures("ruled")
def test_tune_refuses_to_go_on_with_another_sweep_in_the_same_study(call):
    asked = ["backend=fake", "study=t", "prompts.limit=8", "first=4", "steps=1,2"]
    assert call("tune", *asked)[0] == 0
    made = len(records())
    for case, changed in ANOTHER.items():
        code, document = call("tune", *asked, *changed)
        assert (case, code) == (case, 2)
        assert "another study name" in document["error"]["message"]
    assert len(records()) == made
    assert call("tune", *asked)[0] == 0
