from pathlib import Path

import pytest

from sd35bench.errors import ConfigError
from sd35bench.recommend.profiles import Profile, as_profiles, load_profile, load_profiles

PROFILES = Path(__file__).parents[2] / "configs" / "profile"


def test_shipped_profiles_are_preview_balanced_final_and_ever_stricter():
    found = load_profiles(PROFILES)
    assert list(found)[:3] == ["preview", "balanced", "final"]
    assert found["preview"].evaluations_limit == 20, (
        "a quarter of the vendor's 40 steps with guidance"
    )
    assert found["balanced"].margin("prompt_accuracy") > found["final"].margin("prompt_accuracy")


def test_margin_is_by_the_longest_beginning_and_0_where_none_is_named():
    profile = Profile(name="p", margins={"clip": 1.0, "clip_score_nano": 0.2})
    assert profile.margin("clip_score_nano") == 0.2
    assert profile.margin("clip_score_x") == 1.0
    assert profile.margin("fid") == 0.0


@pytest.mark.parametrize(
    ("raw", "names"),
    [
        ({"latency_limit": 1}, "latency_limit"),
        ({"latency_limit_s": 0}, "latency_limit_s"),
        ({"latency_limit_s": "fast"}, "latency_limit_s"),
        ({"latency_mean_limit_s": -1}, "latency_mean_limit_s"),
        ({"latency_p95_limit_s": "1"}, "latency_p95_limit_s"),
        ({"evaluations_limit": float("nan")}, "evaluations_limit"),
        ({"latency_limit_frac": 0.4}, "latency_limit_frac: .* give evaluations_limit"),
        ({"margins": {"fid": -1}}, "margins.fid"),
        ({"margins": {"fid": True}}, "margins.fid"),
        ({"margins": {"prompt_acuracy": 0.1}}, "margins.prompt_acuracy: no choice"),
        ({"failures_limit": 2}, "failures_limit=2: expected a share"),
        ({"name": 3}, "name=3"),
        ([], "expected keys"),
    ],
    ids=[
        *("typo", "zero", "text", "mean", "p95", "nan", "gone"),
        *("negative", "bool", "metric", "share", "name", "list"),
    ],
)
def test_bad_profile_is_refused_by_name(raw, names):
    with pytest.raises(ConfigError, match=names):
        as_profiles({"p": raw})


def test_folder_without_profiles_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no YAML"):
        load_profiles(tmp_path)


def test_profile_of_ones_own_is_read_from_its_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("latency_limit_s: 2\nmargins: {clip_score: 0.5}\nfailures_limit: 0\n")
    found = load_profile(str(path), PROFILES)
    assert (found.name, found.latency_limit_s, found.failures_limit) == ("mine", 2.0, 0.0)
    assert found.margin("clip_score_nano") == 0.5
    assert load_profile("final", PROFILES) == load_profiles(PROFILES)["final"]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("finall", None, "--profile=finall: must be one of .* did you mean final"),
        ("none.yaml", None, "there is no such file"),
        ("mine.yaml", "latency_limit_s: -1", "mine.yaml: profile.latency_limit_s=-1: expected"),
        ("mine.yaml", "margins: [", "cannot read .*mine.yaml"),
    ],
    ids=["misspelt", "missing", "value", "no-yaml"],
)
def test_what_is_no_profile_is_refused_with_its_place(tmp_path, monkeypatch, name, text, says):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=says):
        load_profile(name, PROFILES)
