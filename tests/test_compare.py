"""`compare` and `baseline make` as typed, on the fake backend: exit codes, files, reruns."""

import json
from collections import Counter
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from sd35bench import fields
from sd35bench.cli import compare, main
from sd35bench.gate import rerun
from sd35bench.gate.rerun import reruns_of
from sd35bench.gate.sides import read_sides
from sd35bench.study.store import Study
from sd35bench.types import Status

pytestmark = pytest.mark.usefixtures("all_fakes_here")

POLICY = """
dimensions:
  failures: {required: true, margins: {failed: 0.05}}
  memory: {margins: {peak_rss_bytes: 1.5}, noise: 1.1}
  latency: {start_spread: 0.15, margins: {p50: 1.5}}
  drift: {required: true, margins: {mean_abs: 1.0}}
"""


def _run(root, study, *more):
    limit = [] if any(word.startswith("prompts.limit") for word in more) else ["prompts.limit=24"]
    asked = [*limit, "steps=2", f"study={study}", f"results_dir={root}", *more]
    return main(["run", "backend=fake", *asked])


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    """`a` and `b` alike, `bad` with every other image failing, `other` with another seed.

    `late` died twice, so that the rest was given up; `few` was asked for half of the prompts.
    """
    root = tmp_path_factory.mktemp("results")
    for name, more in (
        ("a", []),
        ("b", []),
        ("bad", ["backend.fail_every=2"]),
        ("other", ["seed=9"]),
        ("late", ["backend.fault=exit", "backend.fault_every=6", "max_failures=2"]),
        ("few", ["prompts.limit=12"]),
        ("empty", ["backend.fail_every=1"]),
    ):
        assert _run(root, name, *more) in (0, 3)
    (root / "own.yaml").write_text(POLICY)
    return root


def _compare(studies, capsys, *arguments):
    policy = ["--policy", str(studies / "own.yaml"), "--results-dir", str(studies), "--json"]
    code = main(["compare", *arguments, *policy])
    return code, json.loads(capsys.readouterr().out)


def test_alike_studies_pass(studies, capsys):
    code, document = _compare(studies, capsys, "a", "b")
    assert code == 0
    assert document["n_pairs"] == 24
    assert document["dimensions"]["drift"]["verdict"] == "pass"


@pytest.mark.parametrize(
    ("candidate", "code"),
    [("bad", 1), ("empty", 1), ("late", 1), ("few", 1), ("other", 2), ("no", 2)],
)
def test_exit_codes(studies, capsys, candidate, code):
    found, document = _compare(studies, capsys, "a", candidate)
    assert found == code
    assert ("error" in document) == (code == 2)


def test_policy_may_ask_for_a_part_and_what_was_given_up_has_failed(studies, capsys, tmp_path):
    path, where = tmp_path / "half.yaml", ["--results-dir", str(studies), "--json"]
    path.write_text("coverage: 0.5\ndimensions:\n  failures: {margins: {failed: 0.2}}\n")
    assert main(["compare", "a", "few", "--policy", str(path), *where]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["gate"]["coverage"]["share"] == 0.5
    assert main(["compare", "a", "late", "--policy", str(path), *where]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["gate"]["coverage"]["share"] == 1.0
    (figure,) = document["comparisons"][0]["dimensions"]["failures"]["figures"]
    kept = Study.open(studies, "late").records()
    assert sum(r.status is Status.SKIPPED for r in kept) > 6
    assert figure["candidate"] == sum(r.status is not Status.OK for r in kept) / 24


def test_what_could_not_be_scored_is_said(studies, capsys, monkeypatch, tmp_path):
    refused = {"refused": {"prompt_accuracy": "no evaluator here"}}
    monkeypatch.setattr(compare, "score_missing", lambda _: refused)
    _, document = _compare(studies, capsys, "a", "b")
    said = [f"{n}: prompt_accuracy was not scored: no evaluator here" for n in "ab"]
    assert document["warnings"][-2:] == said
    arguments = ["baseline", "make", "a", str(tmp_path / "a.json"), "--results-dir", str(studies)]
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["warnings"] == said[:1]


def test_every_form_is_written(studies, capsys, tmp_path):
    paths = {name: tmp_path / f"gate.{name}" for name in ("junit", "markdown", "html")}
    paths["markdown"].write_text("# earlier step\n")
    flags = [text for name, path in paths.items() for text in (f"--{name}", str(path))]
    code, _ = _compare(studies, capsys, "a", "bad", *flags)
    assert code == 1
    assert ElementTree.parse(paths["junit"]).getroot().tag == "testsuites"
    assert paths["markdown"].read_text().startswith("# earlier step\n# Fail: bad against a")
    assert "bad</bdi> against" in paths["html"].read_text()


def test_baseline_file_stands_in_for_the_study(studies, capsys, tmp_path):
    plain, with_images = tmp_path / "plain.json", tmp_path / "full.json"
    common = ["--results-dir", str(studies)]
    assert main(["baseline", "make", "a", str(plain), *common]) == 0
    assert main(["baseline", "make", "a", str(with_images), "--images", *common]) == 0
    assert len(list((tmp_path / "full.images").iterdir())) == 24
    capsys.readouterr()
    assert _compare(studies, capsys, str(plain), "b")[0] == 0  # the same digests: no image needed
    drifted = "drifted"
    assert _run(studies, drifted, "cfg=2") == 0
    capsys.readouterr()
    code, document = _compare(studies, capsys, str(plain), drifted)
    assert code == 1
    assert "--images" in document["dimensions"]["drift"]["reason"]
    _, document = _compare(studies, capsys, str(with_images), drifted)
    assert document["comparisons"][0]["dimensions"]["drift"]["figures"][0]["effect"] > 0
    assert document["comparisons"][0]["differs"] == {"cfg": [4.0, 2.0]}


def test_rerun_starts_both_sides_in_turn_and_is_counted(studies, capsys, tmp_path):
    code, document = _compare(studies, capsys, "a", "b", "--rerun", "2")
    assert code == 0
    figure = document["comparisons"][0]["dimensions"]["latency"]["figures"][0]
    assert figure["note"].startswith("3 couples")
    assert figure["n"] == 72
    opened = [Study.open(studies, name) for name in ("a", "b")]
    starts = sorted(
        (s.started_at, study.name)
        for study in opened
        for again in reruns_of(study)
        for s in again.sessions().values()
    )
    assert [name for _, name in starts] == ["a", "b", "b", "a"]
    path = tmp_path / "with-reruns.json"
    assert main(["baseline", "make", "a", str(path), "--results-dir", str(studies)]) == 0
    capsys.readouterr()
    _, again = _compare(studies, capsys, str(path), "b")
    kept = again["comparisons"][0]["dimensions"]["latency"]["figures"][0]
    assert (kept["note"], kept["n"]) == (figure["note"], 72)
    assert kept["ci95"] == pytest.approx(figure["ci95"], rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "b", "--rerun", "0"], "--rerun=0"),
        (["a", "a", "--rerun", "1"], "are one study"),
        (["x.json", "b"], "cannot be read"),
        (["a", "b", "--policy", "fast"], "known: all, drift, exact, quality, speed"),
        (["a"], "CANDIDATE"),
    ],
)
def test_wrong_input_is_named(studies, capsys, arguments, message):
    assert main(["compare", *arguments, "--results-dir", str(studies)]) == 2
    assert message in capsys.readouterr().err


def test_rerun_refuses_another_environment(studies, capsys, monkeypatch):
    """Other code than what was judged must not be timed in its place."""
    fresh = Study.sessions

    def moved(self):
        found = fresh(self)
        if ".rerun-" not in self.name:
            return found
        name = next(iter(found))
        other = {**found[name].environment, "commit": "another"}
        return {name: replace(found[name], environment_id="x", environment=other)}

    monkeypatch.setattr(Study, "sessions", moved)
    assert main(["compare", "a", "b", "--rerun", "1", "--results-dir", str(studies)]) == 2
    assert "differs in commit" in capsys.readouterr().err


def test_settings_that_differ_in_shift_alone_are_two_in_reruns_and_titles(
    tmp_path, capsys, monkeypatch
):
    asked = ["shift=1,3", "steps=4", "cfg=4", "prompts.limit=64", "-m"]
    for name in ("a", "b"):
        assert _run(tmp_path, name, *asked) == 0
    capsys.readouterr()
    where = ["--results-dir", str(tmp_path), "--json"]
    main(["compare", "a", "b", "--policy", "speed", "--rerun", "1", *where])
    document = json.loads(capsys.readouterr().out)
    titles = [c["title"] for c in document["comparisons"]]
    assert sorted(titles) == ["fake, 4 steps, cfg 4, shift 1", "fake, 4 steps, cfg 4, shift 3"]
    for name in ("a", "b"):
        (again,) = reruns_of(Study.open(tmp_path, name))
        made = Counter(r.trial.request.shift for r in again.records())
        assert made == {1.0: 48, 3.0: 48}

    def asked() -> Counter[float | None]:
        trials = [b.trials[0] for plan in rerun._plans(study) for b in plan.batches]
        return Counter(trial.request.shift for trial in trials)

    # Mutants: an own list of what a setting is, and a title that knows no shift.
    study = Study.open(tmp_path, "a")
    assert asked() == {1.0: 48, 3.0: 48}
    monkeypatch.setattr(rerun, "setting_identity", lambda request: (request.steps, request.cfg))
    assert asked().total() == 48
    said = fields.unusual_words
    shiftless = lambda setting, names: said(setting, (n for n in names if n != "shift"))  # noqa: E731
    monkeypatch.setattr(fields, "unusual_words", shiftless)
    assert not {side.title for side in read_sides(study)} & set(titles)


@pytest.mark.usefixtures("two_cores")
def test_settings_that_differ_in_size_or_threads_alone_have_two_titles(tmp_path, capsys):
    for more in (["width=32,64"], ["width=32", "threads=1"]):
        assert _run(tmp_path, "sizes", *more, "prompts.limit=2", "-m") == 0
    capsys.readouterr()
    titles = [side.title for side in read_sides(Study.open(tmp_path, "sizes"))]
    assert len(set(titles)) == 3
    assert "fake, 2 steps, cfg 4, 64x64" in titles
    assert "fake, 2 steps, cfg 4, 32x64, threads 1" in titles


def test_plan_says_what_each_ready_policy_sees_and_judges_nothing(studies, capsys):
    for sides in (["a"], ["a", "bad"]):
        code = main(["compare", *sides, "--plan", "--results-dir", str(studies), "--json"])
        document = json.loads(capsys.readouterr().out)
        assert code == 0
        assert set(document["policies"]) == {"all", "drift", "exact", "quality", "speed"}
    assert main(["compare", "a", "--plan", "--results-dir", str(studies)]) == 0
    shown = capsys.readouterr().out
    assert "exact, by prompts" in shown
    assert "…" not in shown, "nothing is cut off at 80 columns"


def test_same_code_again_is_exact_and_another_seed_is_not_the_same_pair(studies, capsys):
    where = ["--policy", "exact", "--results-dir", str(studies), "--json"]
    assert main(["compare", "a", "b", *where]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == "pass"
    assert main(["compare", "a", "bad", *where]) == 1
    assert "failed on one side" in capsys.readouterr().out
