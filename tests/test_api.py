"""The public API: its signatures, its torch-free import, and that it says what the verbs say."""

import ast
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

import sd35bench as sb
from sd35bench import api, cli
from tests.studies.drawn import make_study

ROOT = Path(__file__).parent.parent
SIGNATURES = """
ConfigError
Plots(study: 'Study') -> 'None'
Plots.front(self, metric: 'str | None' = None) -> 'Figure'
Plots.grid(self, prompt: 'str | int' = 0, x: 'str' = 'steps', y: 'str' = 'cfg', seed: 'int | None' = None, **fixed: 'Any') -> 'Image'
SD35BenchError
Study(store: '_Store', config_dir: 'str | Path | None' = None, plugin_dir: 'str | Path | None' = None, last_run: 'Mapping[str, Any] | None' = None) -> 'None'
Study.compare(self, other: 'Study | str | Path', policy: 'str' = 'all') -> 'dict[str, Any]'
Study.images(self, as_: 'Form' = 'arrow') -> 'Any'
Study.name
Study.path
Study.recommend(self, profile: 'str | None' = None) -> 'dict[str, Any]'
Study.report(self) -> 'Path'
Study.score(self, *metrics: 'str', **options: 'Any') -> 'dict[str, Any]'
Study.settings(self, as_: 'Form' = 'arrow') -> 'Any'
Study.show(self) -> 'dict[str, Any]'
Study.sql(self, query: 'str', as_: 'Form' = 'arrow') -> 'Any'
open(name: 'str', results_dir: 'str | Path' = 'results', *, config_dir: 'str | Path | None' = None, plugin_dir: 'str | Path | None' = None) -> 'Study'
run(*settings: 'str', study: 'str' = 'default', results_dir: 'str | Path' = 'results', config_dir: 'str | Path | None' = None, plugin_dir: 'str | Path | None' = None, yes: 'bool' = False) -> 'Study'
"""  # noqa: E501 - a line a signature


def signatures():
    for name in sorted(api.__all__):
        found = getattr(api, name)
        if isinstance(found, type) and issubclass(found, Exception):
            yield name
            continue
        yield f"{name}{inspect.signature(found)}"
        for member, value in sorted(vars(found).items()) if isinstance(found, type) else ():
            if member.startswith("_"):
                continue
            text = inspect.signature(value) if inspect.isfunction(value) else ""
            yield f"{name}.{member}{text}"


def test_signatures_are_the_promised_ones():
    """A change here is a change for everybody's notebooks: CHANGELOG.md says it."""
    assert list(signatures()) == SIGNATURES.strip().splitlines()


def test_everything_public_is_documented_and_reexported():
    assert set(sb.__all__) == {*api.__all__, "__version__"} == set(dir(sb))
    assert all(getattr(sb, name) is getattr(api, name) for name in api.__all__)
    for name in api.__all__:
        found = getattr(api, name)
        members = vars(found).items() if isinstance(found, type) else ()
        assert inspect.getdoc(found), name
        assert [m for m, v in members if not m.startswith("_") and not inspect.getdoc(v)] == []
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = sb.nothing


@pytest.mark.parametrize(
    "order",
    ["import sd35bench as sb; sb.run; from sd35bench import api", "from sd35bench import api"],
    ids=["package first", "api first"],
)
def test_import_loads_no_torch_in_either_order(order):
    code = f"{order}; import sys, sd35bench as sb; assert sb.Study is api.Study and 'torch' not in"
    subprocess.run([sys.executable, "-c", f"{code} sys.modules"], cwd=ROOT, check=True)


def test_version_is_the_projects_and_types_are_shipped():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert sb.__version__ == project["project"]["version"]
    assert (ROOT / "sd35bench" / "py.typed").exists()
    assert project["tool"]["setuptools"]["package-data"]["sd35bench"] == ["py.typed"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    root = tmp_path_factory.mktemp("results")
    make_study(root, "demo", steps=(4, 12), cfgs=(1.0, 4.0), strengths=(), fail_every=23)
    return root


@pytest.fixture
def study(results, monkeypatch):
    """A study whose scores are all there."""
    for module in ("study", "compare"):
        name = f"sd35bench.cli.{module}.score_missing"
        monkeypatch.setattr(name, lambda *_, **__: {"refused": {}})
    return sb.open("demo", results)


def test_settings_are_the_rows_of_show(study):
    rows, shown = study.settings().to_pylist(), study.show()["settings"]
    assert [(r["steps"], r["cfg"]) for r in rows] == [(4, 1.0), (4, 4.0), (12, 1.0), (12, 4.0)]
    for row, figures in zip(rows, shown, strict=True):
        assert row["latency_s_p50"] == figures["latency_s"]["p50"]
        accuracy = figures["metrics"]["prompt_accuracy"]
        assert row["prompt_accuracy"] == accuracy["value"]
        assert [row["prompt_accuracy_low"], row["prompt_accuracy_high"]] == accuracy["ci95"]
        assert row["prompt_accuracy_n"] == accuracy["n"]


def test_images_have_every_trial_with_scores_and_files(study):
    rows = study.images().to_pylist()
    failed = [row for row in rows if row["status"] != "ok"]
    assert len(failed) == len(rows) // 23
    assert {(row["path"], row["prompt_accuracy"], row["generate_s"]) for row in failed} == {
        (None, None, None)
    }
    assert all(Path(row["path"]).is_file() for row in rows if row["status"] == "ok")
    assert {row["prompt_accuracy"] for row in rows} > {0.5, 1.0}


def test_sql_answers_and_needs_no_scores(study, tmp_path):
    count = "SELECT count(*) AS n FROM records WHERE status = 'ok'"
    ok = [row for row in study.images().to_pylist() if row["status"] == "ok"]
    assert study.sql(count).to_pylist() == [{"n": len(ok)}]
    make_study(tmp_path, "bare", steps=(4,), cfgs=(1.0,), strengths=(), scored=False)
    bare = sb.open("bare", tmp_path)
    assert bare.sql("SELECT count(*) AS n FROM scores").to_pylist() == [{"n": 0}]


def test_documents_are_those_of_the_verbs(study, results):
    where = f"--results-dir={results}"
    verbs = cli.answer("recommend", ["demo", "--profile", "balanced", where]).document
    assert study.recommend(profile="balanced") == verbs
    judged = cli.answer("compare", ["demo", "demo", "--policy", "quality", where]).document
    assert study.compare("demo", policy="quality") == judged
    assert study.compare(study, policy="quality") == judged


@pytest.mark.parametrize("form", ["pandas", "polars"])
def test_tables_come_in_the_readers_library(study, form):
    pytest.importorskip(form, reason=f"pip install 'sd35bench[tables]' has {form}")
    for table in (study.settings(as_=form), study.images(as_=form)):
        assert type(table).__module__.partition(".")[0] == form
        assert len(table) > 3
    assert study.sql("SELECT 1 AS one", as_=form).shape == (1, 1)


def test_a_missing_library_and_an_unknown_form_are_said(study, monkeypatch):
    monkeypatch.setitem(sys.modules, "polars", None)
    with pytest.raises(sb.ConfigError, match=r"polars is not installed; pip install polars, or"):
        study.settings(as_="polars")
    with pytest.raises(sb.ConfigError, match="as_='excel': must be one of arrow, pandas, polars"):
        study.images(as_="excel")


def test_front_and_grid_are_drawn(study):
    assert study.plot.front().svg.startswith("<svg")
    with pytest.raises(sb.ConfigError, match=r"metric=fid: there is no such plot; there are"):
        study.plot.front("fid")
    sheet = study.plot.grid("red circle on the left", x="steps", y="cfg", seed=1)
    wanted = next(
        row
        for row in study.images().to_pylist()
        if (row["prompt"], row["seed"]) == ("a red circle on the left", 1)
        and (row["steps"], row["cfg"]) == (12, 4.0)
    )
    from PIL import Image

    shown = np.asarray(sheet)[-132:-4:2, -132:-4:2]  # the last cell, each pixel twice as large
    assert np.array_equal(shown, np.asarray(Image.open(wanted["path"]).convert("RGB")))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"prompt": "circle"}, r"prompt='circle': \d+ prompts have it, such as"),
        ({"prompt": 99}, r"prompt=99: there are \d+ prompts"),
        ({"seed": 7}, "seed=7: this prompt has 0, 1"),
        ({"x": "stepz"}, "stepz: no field of a setting; did you mean steps"),
        ({"y": "width"}, "settings differ in cfg beside steps and width; choose one: cfg="),
        ({"y": "width", "cfg": 9.0}, "cfg=9.0: no image has it; there are 1, 4"),
    ],
)
def test_grid_refuses_what_it_cannot_show(study, arguments, said):
    with pytest.raises(sb.ConfigError, match=said):
        study.plot.grid(**arguments)


def test_run_says_what_the_verb_is_told(monkeypatch, results):
    told = []

    def answer(verb, arguments, as_json=True):
        told.append((verb, *arguments))
        return cli.Answer(document={"done": 1})

    monkeypatch.setattr("sd35bench.cli.answer", answer)
    study = sb.run("steps=4,16", study="demo", results_dir=results, config_dir="conf", yes=True)
    words = ("steps=4,16", "study=demo", f"results_dir={results}", "--config-dir=conf", "--yes")
    assert told == [("run", "-m", *words)]
    assert study.last_run == {"done": 1}
    with pytest.raises(sb.ConfigError, match="--dry-run: expected NAME=VALUE"):
        sb.run("--dry-run")
    with pytest.raises(sb.ConfigError, match="study 'gone' is not in"):
        sb.open("gone", results)


def test_page_names_what_there_is():
    text = (ROOT / "docs" / "python.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    called = {ast.unparse(n.func) for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Call)}
    names = {line.partition("(")[0].replace("Plots.", "Study.plot.") for line in signatures()}
    known = {f"sb.{name}".replace("sb.Study.", "study.") for name in names}
    assert called == known - {"sb.Study", "sb.Plots", "sb.ConfigError", "sb.SD35BenchError"} - {
        *("study.name", "study.path", "study.show")
    }
