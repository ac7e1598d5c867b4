"""Which verbs are run, on which studies, and what of it is kept."""

import contextlib
import io
import json
import os
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

from sd35bench.cli import main
from sd35bench.study.store import Study
from tests.golden.forms import html_text, json_text, neutral
from tests.golden.studies import freeze, make_all, score_by_rule

POLICY = """
coverage: 0.5
undecided: fail
dimensions:
  quality:
    required: true
    margins: {kid_golden: 0.01, cmmd_golden: 0.5, fid_golden: 1.0, prompt_accuracy: 0.1}
"""
PROFILE = """
name: mine
objective: best-quality
latency_limit_s: 0.3
cost_limit_usd: 0.01
usd_per_hour: 2.0
reference: vendor
margins: {prompt_accuracy: 0.2, edit_quality: 0.2}
"""
POINTS = "backend=fake study=tuned steps=1,2,8 cfg=1,2 prompts.limit=8"
SEARCH = f"{POINTS} first=4"
GRID = "backend=fake study=fake steps=4,16 cfg=1,4 seed=0,1 prompts.limit=2"
SECONDS = {
    r'("?\w*(?:wall|load|warmup|elapsed)_s"?): [\d.e-]+': r"\1: <seconds>",
    r'("overhead_frac"): [\d.e-]+': r"\1: <share>",
    r"\d+\.\d s after loading": "<seconds> after loading",
    r"free_bytes\": \d+": 'free_bytes": <bytes>',
}
"""What this machine's clock and disk make of a run."""
VERSIONS = {
    r'"(sd35bench|numpy|pillow|torch|torchmetrics|open-clip-torch|transformers)": "[^"]*"': (
        r'"\1": "<version>"'
    ),
    r'"digest": "\w+"': '"digest": "<digest>"',
    r"\(digest \w+\)": "(digest <digest>)",
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One command: its words, the files that it writes, what of its output differs by machine.

    `forms` are the flags with which it is run, by the ending of the golden file's name. `before`
    is called first.
    """

    name: str
    words: str
    forms: dict[str, str] = field(default_factory=lambda: {"json": "--json", "txt": ""})
    files: tuple[str, ...] = ()
    masks: dict[str, str] = field(default_factory=dict)
    before: Callable[[], None] | None = None


def _three(markdown: str = "--markdown") -> dict[str, str]:
    return {"json": "--json", "txt": "", "md": markdown}


def _once(ending: str = "txt") -> dict[str, str]:
    return {ending: "--json" if ending == "json" else ""}


def _gate(name: str, words: str) -> Case:
    """A comparison in all its forms at once."""
    out = f"out/{name}"
    files = (f"{out}.xml", f"{out}.md", f"{out}.html")
    flags = f"--junit {files[0]} --markdown {files[1]} --html {files[2]}"
    return Case(name=name, words=f"{words} {flags}", forms=_once("json"))


def _frozen(name: str) -> Callable[[], None]:
    def act() -> None:
        study = Study.open(Path("results"), name)
        freeze(study)
        score_by_rule(study)

    return act


def _held_out() -> None:
    """Run the commands that the search's answer asks for, and freeze what they made."""
    document = json.loads(Path("results/tuned/tune.json").read_text())
    for each in document["confirm"]["commands"]:
        main([*shlex.split(each["command"])[1:], "--json"])
    _frozen("tuned")()


VERBS = (
    *("run", "score", "show", "recommend", "tune", "claims", "compare", "baseline", "report"),
    *("reference", "serve", "export", "doctor"),
)
STUDIES = ("grid", "hosted", "backends", "claims")
CASES = (
    Case(name="help", words="--help", forms=_once()),
    *(Case(name=f"help-{v}", words=f"{v} --help", forms=_once()) for v in VERBS),
    # run
    Case(name="run-dry", words=f"run -m {GRID} --dry-run"),
    Case(
        name="run-dry-notes",
        words="run -m backend=fake study=none steps=4,4 cfg=0,1,4 prompts.limit=2 sampler=heun"
        " negative_prompt=,blurry skip_layer_guidance=none,stability output_format=png,jpg"
        " output_quality=50,90 batch_size=1,2 --dry-run",
        forms=_once(),
    ),
    Case(name="run-dry-demo", words="run experiment=demo backend=fake --dry-run", forms=_once()),
    Case(
        name="run-dry-hosted",
        words="run -m model=sd35-medium backend=eachlabs prompts=starter steps=20,40"
        " study=none --dry-run",
        forms=_once("json"),
    ),
    Case(name="run", words=f"run -m {GRID}", forms=_once("json"), masks=SECONDS),
    Case(name="run-again", words=f"run -m {GRID}", forms=_once(), masks=SECONDS),
    Case(
        name="run-failing",
        words="run -m backend=fake backend.fail_every=3 study=failing steps=2,3 prompts.task=edit"
        " prompt_strength=0.5,0.9 prompts.limit=2",
        forms={"txt": "", "json": "--json"},
        masks=SECONDS,
    ),
    Case(name="run-wrong", words="run backend=fake stepz=4", forms=_once("json")),
    Case(name="run-out-of-range", words="run backend=fake steps=0 cfg=4", forms=_once()),
    # score
    Case(
        name="score",
        words="score fake --metric sharpness,contrast",
        forms={"json": "--json", "txt": ""},
        before=_frozen("fake"),
    ),
    Case(name="score-unknown", words="score grid --metric beauty", forms=_once("json")),
    # show, report, claims, recommend
    *(
        Case(name=f"show-{name}", words=f"show {name}", forms=_three())
        for name in (*STUDIES, "fake", "sets-a")
    ),
    Case(name="show-none", words="show nothing"),
    *(Case(name=f"report-{name}", words=f"report {name}", forms=_once("json")) for name in STUDIES),
    Case(name="claims", words="claims claims", forms=_three()),
    Case(name="claims-none", words="claims fake", forms=_once()),
    Case(name="recommend-grid", words="recommend grid", forms=_three()),
    Case(name="recommend-grid-why", words="recommend grid --why", forms=_once()),
    Case(name="recommend-grid-confirm", words="recommend grid --confirm", forms=_once()),
    Case(
        name="recommend-mine",
        words="recommend grid --profile mine.yaml",
        forms={"txt": "", "md": "--markdown"},
    ),
    Case(name="recommend-hosted", words="recommend hosted", forms=_three()),
    Case(name="recommend-backends", words="recommend backends", forms=_once()),
    # tune
    Case(name="tune-dry", words=f"tune {SEARCH} --confirm --dry-run"),
    Case(
        name="tune-wrong",
        words="tune study=t steps=1:3:0.5 backend=fake",
    ),
    Case(
        name="tune-made",
        words=f"run -m {POINTS}",
        forms=_once("json"),
        masks=SECONDS,
    ),
    Case(
        name="tune",
        words=f"tune {SEARCH} images=48",
        before=_frozen("tuned"),
    ),
    Case(
        name="tune-confirmed",
        words=f"tune {SEARCH} images=48",
        forms={"json": "--json", "md": "--markdown"},
        before=_held_out,
    ),
    Case(name="report-tuned", words="report tuned", forms=_once("json")),
    # gate
    *(
        _gate(f"compare-{policy}", f"compare main branch --policy {policy}")
        for policy in ("all", "speed")
    ),
    Case(name="compare-drift", words="compare main branch --policy drift", forms=_once()),
    Case(name="compare-quality", words="compare main branch --policy quality", forms=_once()),
    Case(name="compare-same", words="compare main main", forms=_once()),
    Case(name="compare-part", words="compare main part", forms=_once()),
    _gate("compare-sets", "compare sets-a sets-b --policy sets.yaml"),
    Case(name="compare-backends", words="compare backends backends --policy drift", forms=_once()),
    Case(name="baseline", words="baseline make main out/main.json --images"),
    Case(name="baseline-sets", words="baseline make sets-a out/sets.json", forms=_once("json")),
    Case(name="compare-file", words="compare out/main.json branch", forms=_once()),
    Case(
        name="compare-sets-file",
        words="compare out/sets.json sets-b --policy sets.yaml",
        forms=_once(),
    ),
    Case(name="compare-none", words="compare main hosted"),
    # reference
    Case(
        name="reference",
        words="reference make held study=sets-a extractor=nano keep=100 --force",
        masks=VERSIONS,
    ),
    Case(name="reference-wrong", words="reference make held"),
)
WRITTEN = {
    **{f"report-{name}.html": f"results/{name}/report.html" for name in (*STUDIES, "tuned")},
    "baseline.file.json": "out/main.json",
}
"""Golden file → what a verb wrote, beyond the files that `compare` was told to write."""


def outputs(here: Path) -> dict[str, str]:
    """Run everything in the folder `here`; returns the golden files' texts by name."""
    found: dict[str, str] = {}
    # Keys name the threads, by default all cores seen; the suite pins its processes to one.
    cores = mock.patch("os.sched_getaffinity", return_value={0, 1})
    with cores, contextlib.chdir(here), mock.patch.dict(os.environ, _surroundings(here)):
        make_all(Path("results"))
        Path("out").mkdir()
        Path("sets.yaml").write_text(POLICY)
        Path("mine.yaml").write_text(PROFILE)
        for case in CASES:
            if case.before is not None:
                _quietly(case.before)
            found |= dict(_run(case, here))
        for path in sorted(Path("out").glob("compare-*")):
            found[path.name] = neutral(_written(path), here, {})
        for name, path in WRITTEN.items():
            found[name] = neutral(_written(Path(path)), here, {})
    return found


def _surroundings(here: Path) -> dict[str, str]:
    """A terminal of 80 columns, and no weights but the package's."""
    return {
        "COLUMNS": "80",
        "LINES": "50",
        "NO_COLOR": "1",
        "TERM": "dumb",
        "HF_HUB_CACHE": str(here / ".hub"),
        "TORCH_HOME": str(here / ".torch"),
        "EACHLABS_API_KEY": "",
    }


def _run(case: Case, here: Path) -> Iterator[tuple[str, str]]:
    for ending, flag in case.forms.items():
        words = [*shlex.split(case.words), *([flag] if flag else [])]
        code, out, err = _call(words)
        if ending == "json" and out:
            out = json_text(json.loads(out))
        text = f"$ sd35bench {shlex.join(words)}\nexit code {code}\n"
        text += f"--- stdout\n{out}" + (f"--- stderr\n{err}" if err else "")
        yield f"{case.name}.{ending}.txt", neutral(text, here, case.masks)


def _call(words: list[str]) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    return code, out.getvalue(), err.getvalue()


def _quietly(act: Callable[[], None]) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        act()


def _written(path: Path) -> str:
    text = path.read_text()
    return html_text(text) if path.suffix == ".html" else text
