from pathlib import Path

import pytest

from sd35bench.analysis.profiles import Profile, as_profiles, load_profiles
from sd35bench.errors import ConfigError

PROFILES = Path(__file__).parents[2] / "configs" / "profile"


def test_shipped_profiles_are_preview_balanced_final_and_ever_stricter():
    found = load_profiles(PROFILES)
    assert list(found)[:3] == ["preview", "balanced", "final"]
    assert found["preview"].latency_limit_frac is not None
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
        ({"latency_limit_frac": float("nan")}, "latency_limit_frac"),
        ({"margins": {"fid": -1}}, "margins.fid"),
        ({"margins": {"fid": True}}, "margins.fid"),
        ([], "expected keys"),
    ],
    ids=["typo", "zero", "text", "nan", "negative", "bool", "list"],
)
def test_bad_profile_is_refused_by_name(raw, names):
    with pytest.raises(ConfigError, match=names):
        as_profiles({"p": raw})


def test_folder_without_profiles_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no YAML"):
        load_profiles(tmp_path)
