"""`sd35gate` in a pytest run of its own: what passes, what fails, and what CI gets to see."""

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest

from sd35bench import pytest_plugin
from sd35bench.cli import answer
from tests.studies import drawn

pytest_plugins = ["pytester"]
QUIET = ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
"""The module was imported by the outer pytest."""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Studies `same`, `less` (a setting is missing) and a baseline file; all verbs imported."""
    root = tmp_path_factory.mktemp("gate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawn, "MODEL", replace(drawn.MODEL, name="other"))
        drawn.make_study(root / "results", "same", steps=(4, 12), cfgs=(4.0,), strengths=())
        drawn.make_study(root / "results", "less", steps=(4,), cfgs=(4.0,), strengths=())
    results = f"--results-dir={root / 'results'}"
    answer("baseline", ["make", "same", str(root / "baseline.json"), results])
    # A pytest inside pytest forgets the modules that it imports: numpy cannot be imported twice.
    answer("compare", [str(root / "baseline.json"), "same", results])
    return root


@pytest.fixture
def gate(root, pytester, monkeypatch):
    """Run one test with this call of `sd35gate`; gives the result and the JUnit properties."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    for name in ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY"):
        monkeypatch.delenv(name, raising=False)
    (pytester.path / "results").symlink_to(root / "results")
    (pytester.path / "baseline.json").symlink_to(root / "baseline.json")

    def run(call: str, *arguments: str):
        pytester.makepyfile(f"def test_model(sd35gate):\n    sd35gate({call})\n")
        found = pytester.runpytest_inprocess(
            "-p", "sd35bench.pytest_plugin", "--junitxml=j.xml", *QUIET, *arguments
        )
        tree = ElementTree.parse(pytester.path / "j.xml")
        return found, {p.get("name"): p.get("value") for p in tree.iter("property")}

    return run


def test_the_same_images_pass_and_leave_properties(gate):
    found, properties = gate("'baseline.json', 'same', policy='exact'")
    found.assert_outcomes(passed=1)
    assert properties["sd35gate"] == "pass"
    assert properties["sd35gate.exit_code"] == "0"
    assert any(name.endswith(".drift.changed") for name in properties)


def test_a_candidate_that_lacks_settings_fails_as_compare_does(gate, pytester, monkeypatch):
    summary = pytester.path / "summary.md"
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    found, properties = gate("'baseline.json', policy='exact'", "--sd35-candidate=less")
    found.assert_outcomes(failed=1)
    assert properties["sd35gate.exit_code"] == "1"
    found.stdout.fnmatch_lines(["*fail: less against *", "*coverage: fail: *"])
    found.stdout.fnmatch_lines(["::error file=*.py,line=1,title=sd35gate%3A test_model::fail: *"])
    assert "less against" in summary.read_text()


def test_undecided_passes_with_a_warning(gate, pytester, monkeypatch):
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    pytester.makeini("[pytest]\nsd35_candidate = same")
    found, properties = gate("'baseline.json', policy='speed'")
    found.assert_outcomes(passed=1, warnings=1)
    assert (properties["sd35gate"], properties["sd35gate.exit_code"]) == ("undecided", "0")
    found.stdout.fnmatch_lines(["*Undecided: undecided: same against *", "::warning file=*"])


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("'baseline.json', 'nosuch'", "*nothing was judged: study 'nosuch'*"),
        ("'nosuch.json', 'same'", "*nothing was judged: *nosuch.json*"),
        ("'baseline.json'", "*which study is the candidate?*less, same*"),
    ],
    ids=["study", "file", "which"],
)
def test_wrong_input_fails_with_words_of_its_own(gate, call, said):
    found, properties = gate(call)
    found.assert_outcomes(failed=1)
    found.stdout.fnmatch_lines([said])
    assert properties == {}


def report(**fields):
    told = [("sd35gate", "fail"), ("sd35gate.message", "fail: 50 %\nsecond line")]
    common = {"user_properties": told, "failed": True, "location": ("a,b.py", 4, "test_x[1:2]")}
    return SimpleNamespace(**{**common, **fields})


def test_an_annotation_is_one_line_whatever_is_in_it():
    assert pytest_plugin.annotation(report()) == (
        "::error file=a%2Cb.py,line=5,title=sd35gate%3A test_x[1%3A2]::fail: 50 %25%0Asecond line"
    )
    assert pytest_plugin.annotation(report(user_properties=[])) is None


def test_the_plug_in_imports_nothing_of_ours():
    code = (
        "import sys, sd35bench.pytest_plugin;"
        "print([m for m in sys.modules if m.startswith('sd35bench.')], 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "['sd35bench.pytest_plugin'] False\n"
