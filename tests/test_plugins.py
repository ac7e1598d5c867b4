"""Where plug-ins come from, what is refused, and that nothing is imported unasked."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sd35bench import cli, plugins
from sd35bench.backends.base import Backend
from sd35bench.errors import ConfigError
from sd35bench.evaluations import sampler_order
from sd35bench.study.store import Study
from tests.installed import install_example, write_dist_info
from tests.studies.drawn import make_study

METRIC = """
from sd35bench.metrics.base import ImageMetric, Value
class Level(ImageMetric):
    quality = False
    higher_is_better = False
    bounds = (0, 255)
    def __init__(self, name, of):
        self.name, self.of = name, of
    def score_images(self, images, records, inits):
        return [Value(float(i.mean()), {"of": self.of}) for i in images]
class Wrong: ...
"""

MINE = """
from sd35bench.backends.base import Backend
class Mine(Backend):
    def __init__(self, load): self.in_force = {}
    def generate(self, requests, inits): ...
class Other: ...
"""


def path_with(site):
    """`PYTHONPATH` of a process that has the package installed."""
    return os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))


@pytest.fixture
def site(tmp_path, monkeypatch):
    """The example package, installed in a folder on the path."""
    folder = install_example(tmp_path / "site")
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    plugins.use_folder(None)
    for name in [n for n in sys.modules if n.startswith("sd35bench_example")]:
        del sys.modules[name]


@pytest.fixture
def folder(tmp_path):
    """A folder with a module of the user's own."""
    found = tmp_path / "own"
    found.mkdir()
    (found / "own_backend.py").write_text(MINE)
    yield found
    plugins.use_folder(None)


def test_entry_points_are_named_and_imported_only_when_called(site):
    found = plugins.entry_points("backends")
    assert "squares" in found
    assert "sd35bench_example" not in sys.modules
    assert issubclass(found["squares"](), Backend)
    assert plugins.packages()["sd35bench-example"] == [
        "backends squares",
        "metrics brightness",
        "prompts counted",
        "samplers euler_karras",
    ]
    assert site / "sd35bench_example" / "configs" in plugins.package_configs()


def test_class_by_entry_point_or_by_place(site):
    by_name = plugins.load_class("backends", "squares", Backend)
    by_place = plugins.load_class("backends", "sd35bench_example.backend:Squares", Backend)
    assert by_name is by_place


def test_class_of_the_plugin_folder(folder):
    plugins.use_folder(str(folder))
    assert plugins.load_class("backends", "own_backend:Mine", Backend).__name__ == "Mine"
    plugins.use_folder(None)
    assert str(folder) not in sys.path
    with pytest.raises(ConfigError, match=r"own_backend.*--plugin-dir"):
        plugins.load_class("backends", "own_backend:Mine", Backend)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("own_backend:Other", r"Other does not derive from sd35bench\.backends\.base\.Backend"),
        ("own_backend:Missing", "cannot be imported: AttributeError"),
        ("broken:Mine", "cannot be imported: ZeroDivisionError"),
        ("nowhere:Mine", "no installed package has a module 'nowhere', and not in"),
        ("json:JSONDecoder", "'json'.*belongs to no installed package"),
        ("squiggles", "backend.kind=squiggles is unknown; known: eager"),
    ],
)
def test_refused_by_name(folder, kind, said):
    (folder / "broken.py").write_text("1 / 0")
    plugins.use_folder(str(folder))
    with pytest.raises(ConfigError, match=said):
        plugins.load_class("backends", kind, Backend, known=["eager"])


def test_a_name_of_two_packages_is_refused_with_both(site, tmp_path, monkeypatch):
    other = tmp_path / "other"
    write_dist_info(other, "rival", {"sd35bench.backends": {"squares": "rival:Squares"}})
    monkeypatch.syspath_prepend(str(other))
    with pytest.raises(ConfigError, match=r"squares.*of rival and .* of sd35bench-example"):
        plugins.load_class("backends", "squares", Backend)


def test_the_working_folder_is_no_place_of_code(folder, tmp_path, monkeypatch):
    """Also where `python -m` has put it on the path, with a package's metadata beside it."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    write_dist_info(folder, "planted", {"sd35bench.backends": {"planted": "own_backend:Mine"}})
    assert "planted" not in plugins.entry_points("backends")
    with pytest.raises(ConfigError, match="would come from the working folder"):
        plugins.load_class("backends", "own_backend:Mine", Backend)
    with pytest.raises(ConfigError, match="is the working folder"):
        plugins.use_folder(".")


def test_an_installed_module_that_the_working_folder_shadows_is_refused(site, folder, monkeypatch):
    (folder / "sd35bench_example").mkdir()
    (folder / "sd35bench_example" / "__init__.py").write_text("raise SystemExit('ran')")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    for kind in ("squares", "sd35bench_example.backend:Squares"):
        with pytest.raises(ConfigError, match="would come from the working folder"):
            plugins.load_class("backends", kind, Backend)


def test_a_folder_that_is_none_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="there is no such folder"):
        plugins.use_folder(str(tmp_path / "gone"))
    assert Path(str(tmp_path)) not in map(Path, sys.path)


# An installed package, in use ---------------------------------------------------------------------


@pytest.mark.model
def test_installed_package_is_seen_and_used(site, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", path_with(site))
    monkeypatch.chdir(tmp_path)
    run = ["run", "backend=squares", "backend.side_px=4", "prompts=counted", "prompts.limit=2"]
    assert cli.main([*run, "study=mine", "steps=2"]) == 0
    assert cli.main(["score", "mine", "--metric", "brightness"]) == 0
    study = Study.open(Path("results"), "mine")
    values = [s.value for s in study.scores() if s.metric == "brightness"]
    assert len(values) == 2
    assert 100 < min(v for v in values if v is not None) < 155
    assert {r.trial.request.prompt for r in study.records()} == {"2 red circles", "3 red circles"}
    document = cli.answer("contract", ["sd35bench-example"]).document
    assert (document["ok"], len(document["backends"][0]["checks"])) == (True, 13)
    found = cli.answer("doctor", ["squares"]).document
    assert {check["name"]: check["ok"] for check in found["checks"]} == {"backend squares": True}
    assert cli.answer("doctor", ["sd35bench-example"]).document["checks"][0]["ok"] is True
    capsys.readouterr()
    cli.main(["run", "--help"])
    said = capsys.readouterr().out
    assert "squares" in said
    assert "counted" in said
    cli.main(["score", "--help"])
    assert "brightness" in capsys.readouterr().out


def test_contract_says_what_a_backend_breaks(site, capsys):
    path = site / "sd35bench_example" / "backend.py"
    path.write_text(path.read_text().replace("request.negative_prompt, ", ""))
    answer = cli.answer("contract", ["squares"])
    broken = [c for c in answer.document["backends"][0]["checks"] if not c["ok"]]
    assert answer.exit_code == 1
    assert [(c["check"], c["detail"]) for c in broken] == [
        ("negative prompt acts", "negative_prompt changed nothing")
    ]


def test_a_metric_of_a_config_folder_is_scored(folder, tmp_path, monkeypatch):
    """`score` takes the folder; its options are checked by the YAML."""
    (folder / "own_metric.py").write_text(METRIC)
    conf = tmp_path / "conf" / "metric"
    conf.mkdir(parents=True)
    text = "family: level\nkind: own_metric:Level\noptions: {of: 1}\nallowed: {of: int}\n"
    (conf / "level.yaml").write_text(text)
    make_study(tmp_path / "results", "s", steps=(4,), cfgs=(1.0,), strengths=())
    monkeypatch.chdir(tmp_path)
    words = ["score", "s", "--metric=level", "--config-dir=conf", f"--plugin-dir={folder}"]
    assert cli.answer("score", [*words[1:], "metric.level.of=3"]).document["scored"] == {
        "level": 12
    }
    scores = [s for s in Study.open(Path("results"), "s").scores() if s.metric == "level"]
    assert {s.detail["of"] for s in scores} == {3}
    assert all(s.detail["declared"]["higher_is_better"] is False for s in scores)
    for wrong, said in (("metric.level.off=3", "no such option"), ("metric.level.of=x", "of type")):
        with pytest.raises(ConfigError, match=said):
            cli.answer("score", [*words[1:], wrong])
    with pytest.raises(ConfigError, match="metric='level' is unknown"):
        cli.answer("score", words[1:3])
    (conf / "level.yaml").write_text(text.replace("Level", "Wrong"))
    with pytest.raises(ConfigError, match=r"Wrong does not derive from sd35bench\.metrics\.base"):
        cli.answer("score", words[1:])


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_takes_both_folders(verb, capsys):
    assert cli.main([verb, "--help"]) == 0
    said = capsys.readouterr().out
    assert "--config-dir DIR" in said
    assert "--plugin-dir DIR" in said


KARRAS = """
import sys
from sd35bench.config import compose, freeze
from sd35bench.errors import ConfigError
job = freeze(compose(["sampler=euler_karras", "prompts.limit=1"]))
print(job.sweep.axes["sampler"], "torch" in sys.modules)
try:
    freeze(compose(["sampler=euler_karras", "prompts.limit=1", "backend=core"]))
except ConfigError as exc:
    print(exc)
"""


def test_a_sampler_is_a_choice_where_diffusers_runs_it(site):
    done = subprocess.run(
        [sys.executable, "-c", KARRAS],
        env={**os.environ, "PYTHONPATH": path_with(site)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines() == [
        "('euler_karras',) False",
        "sampler=euler_karras: backend core has euler, heun, dpmpp_2m, unipc",
    ], done.stderr


def test_a_sampler_builds_its_scheduler_from_the_models_own(site):
    from diffusers import FlowMatchEulerDiscreteScheduler

    from sd35bench.backends.samplers import flow_scheduler

    own = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0)
    found = flow_scheduler(own, "euler_karras", None)
    assert (found.config.shift, found.config.use_karras_sigmas) == (3.0, True)
    assert sampler_order("euler_karras") == 1
