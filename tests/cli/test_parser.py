"""The one parser: where flags may stand, what is refused, and what the help is made of."""

from pathlib import Path

import pytest

from sd35bench.cli.output import Answer
from sd35bench.cli.parser import RESULTS_DIR, Command, Flag, help_text, parse
from sd35bench.errors import ConfigError

COMMAND = Command(
    call=lambda _: Answer(),
    words=("make", "NAME", "[FILE]"),
    settings="OPTION=VALUE ...",
    examples="sd35bench verb make a",
    flags=(
        Flag("-m, --multirun", "sweep"),
        Flag("--count N", "how many"),
        Flag("--config-dir DIR", "your own"),
    ),
)


def given(*arguments: str):
    return parse("verb", COMMAND, arguments, as_json=False)


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("flag", [["--count", "3"], ["--count=3"]], ids=["apart", "joined"])
def test_flags_may_stand_anywhere(place, flag):
    words = ["make", "a", "x=1"]
    found = given(*words[:place], *flag, *words[place:])
    assert (found.words, found.settings, found.whole("--count")) == (["make", "a"], ["x=1"], 3)


def test_another_name_of_a_flag_is_the_flag():
    assert given("make", "a", "--multirun").has("-m")
    assert not given("make", "a").has("-m")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["make", "a", "--coun", "3"], "unknown flag --coun; did you mean --count?"),
        (["make", "a", "--count"], "--count needs a value, --count N"),
        (["make", "a", "--count", "--json"], "--count needs a value"),
        (["make", "a", "-m=1"], "-m takes no value"),
        (["make"], "expected `sd35bench verb make NAME [FILE]`, not 'make'"),
        (["make", "a", "b", "c"], "not 'make a b c'"),
        (["mak", "a"], "did you mean make?"),
    ],
)
def test_what_is_wrong_is_said_with_what_is_meant(arguments, said):
    with pytest.raises(ConfigError) as caught:
        given(*arguments)
    assert said in str(caught.value)
    assert "see verb --help" in str(caught.value)


def test_values_of_flags_are_checked(tmp_path):
    with pytest.raises(ConfigError, match="--count=three: must be a whole number"):
        given("make", "a", "--count=three").whole("--count")
    with pytest.raises(ConfigError, match="there is no such folder"):
        _ = given("make", "a", "--config-dir", f"{tmp_path}/none").config_dir
    assert given("make", "a", f"--config-dir={tmp_path}").config_dir == tmp_path


def test_help_needs_no_words_and_names_every_flag():
    assert given("--help").has("--help")
    text = help_text("verb", "does it", COMMAND)
    assert text.startswith("sd35bench verb: does it\n\nUsage: sd35bench verb make NAME [FILE] OPT")
    for name in ("-m, --multirun", "--count N", "--config-dir DIR", "--json", "--help, -h"):
        assert f"\n  {name} " in text


SPELLINGS = [
    *(["results_dir=d"], ["results-dir=d"], ["--results-dir=d"], ["--results-dir", "d"]),
    ["--results_dir=d"],
]


@pytest.mark.parametrize("words", SPELLINGS, ids=" ".join)
def test_the_results_folder_is_spelt_as_one_likes(words):
    """A flag of verbs that read studies, a setting of those that make them."""
    assert given("make", "a", *words, "x=1").settings == ["results_dir=d", "x=1"]
    reads = Command(call=COMMAND.call, examples="", words=("[STUDY]",), flags=(RESULTS_DIR,))
    found = parse("show", reads, ["a", *words], as_json=False)
    assert (found.words, found.results_dir) == (["a"], Path("d"))


def test_a_study_may_be_called_like_the_flag():
    reads = Command(call=COMMAND.call, examples="", words=("[STUDY]",), flags=(RESULTS_DIR,))
    assert parse("show", reads, ["results-dir"], as_json=False).words == ["results-dir"]
    with pytest.raises(ConfigError, match="--results-dir needs a value"):
        parse("show", reads, ["a", "--results-dir"], as_json=False)
