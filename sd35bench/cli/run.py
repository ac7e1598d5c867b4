"""`sd35bench run`: a Hydra application behind the parser of all verbs.

Hydra composes the jobs, one a load, and `RunTask` runs them here, one after the other or on one
crew. Where a launcher is named, Hydra calls `RunTask` for each, possibly on another machine.
"""

import dataclasses
import os
import shlex
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from sd35bench import plugins, words
from sd35bench.analysis.grouping import setting_key
from sd35bench.cli.hydra_flags import FLAGS as HYDRA_FLAGS
from sd35bench.cli.hydra_flags import answer_hydra, asks_hydra, root_of
from sd35bench.cli.output import (
    DONE,
    RESUMABLE,
    Answer,
    RunProgress,
    Terminal,
    console,
    is_quiet,
    remark,
    show_progress,
)
from sd35bench.cli.parser import (
    DRY_RUN,
    QUIET,
    VERBOSE,
    YES,
    Command,
    Flag,
    Given,
    in_columns,
    parse,
)
from sd35bench.cli.recommended import with_recommended
from sd35bench.cli.sinks import SINK
from sd35bench.config import Job, check_overrides, choices, freeze
from sd35bench.config.experiments import with_models_own
from sd35bench.config.files import GROUPS
from sd35bench.config.models import FIELDS, Known
from sd35bench.config.overrides import written
from sd35bench.config.sweeper import folders_made, sweep
from sd35bench.config.unread import refuse_unread
from sd35bench.engine import crew_of, run_together
from sd35bench.errors import ConfigError, JobsLost, SD35BenchError, StudyLocked, count_error
from sd35bench.estimate import RunCost, estimate
from sd35bench.machine.contention import REGIME
from sd35bench.plan import Plan, expand
from sd35bench.study.content_files import DAMAGED
from sd35bench.study.store import Study
from sd35bench.trials import RunSummary, shares
from sd35bench.types import CUT, Status, content_hash
from sd35bench.workers.lane import Crew

if TYPE_CHECKING:
    from rich.progress import Progress as ProgressBar

    from sd35bench.cli.auto_limit import Planned

_PLANNED = ("prompts.limit=auto", "margin=", "power=")
POLL_S = 0.5
"""How often to ask again for a study that another process holds."""


class RunTask:
    """One command's jobs; a launcher of Hydra's calls it for each, also in another process."""

    def __init__(
        self,
        dry_run: bool,
        yes: bool = False,
        asked: Sequence[str] = (),
        say: Callable[[str], None] | None = None,
    ) -> None:
        """With `dry_run` the jobs are prepared and not launched; `yes` agrees to their bill.

        `asked`: the command line's settings, each of which some job must read. `say` gets the
        plans' notes before anything is launched.
        """
        self.dry_run, self.yes, self.asked, self.say = dry_run, yes, list(asked), say
        self.prepared: list[tuple[Job, Plan]] = []
        self.before: set[str] = set()
        self.damaged = 0

    def __reduce__(self) -> tuple[Any, ...]:
        """What travels to another process: not the plans, each job makes its own again."""
        return _arrived, (self.dry_run, self.yes, plugins.given())

    @property
    def is_launched(self) -> bool:
        """Whether Hydra launches the jobs: a launcher of its own is named, or set up."""
        return any(text.lstrip("+").startswith("hydra") for text in self.asked)

    def prepare(self, configs: Sequence[DictConfig]) -> bool:
        """Validate and plan every job before the first is launched; True ends it there."""
        refuse_unread(self.asked, configs)
        for config in configs:
            job = freeze(config)
            self.prepared.append((job, expand(job.sweep)))
        for job, plan in self.prepared:
            job.engine.prepare(plan, dry=self.dry_run)
        study = _there(self.prepared[0][0])
        self.damaged = 0 if study is None else len(study.images().damaged)
        if (say := self.say) is not None:
            for note in _notes(self.prepared):
                say(f"note: {note}")
        if not (self.dry_run or self.yes):
            self._refuse_bill()
        if self.is_launched:
            self.before = _done(self.prepared[0][0])
        return self.dry_run or not self.is_launched

    def _refuse_bill(self) -> None:
        """Refuse a bill that was not agreed to. Raises: ConfigError."""
        billed = [(job, plan) for job, plan in self.prepared if job.engine.price.is_billed]
        limit = min((job.engine.price.confirm_above_usd for job, _ in billed), default=0.0)
        refuse_bill(_estimate(billed).usd if billed else 0.0, limit, "would")

    def __call__(self, config: DictConfig) -> dict[str, Any] | SD35BenchError:
        """Run one job; our own errors are returned, so that the other jobs still run."""
        try:
            job = freeze(config)
            return _alone(job, expand(job.sweep))
        except SD35BenchError as exc:
            return exc

    def recount(self, lost: JobsLost) -> list[dict[str, Any]]:
        """What the store says of jobs whose launcher lost one; others of them may still run."""
        done, found = _done(self.prepared[0][0]), []
        for _, plan in self.prepared:
            keys = {trial.key for trial in plan.trials}
            summary = RunSummary(planned=len(plan.trials), skipped=len(keys & self.before))
            summary.done, summary.failed = len((keys & done) - self.before), len(keys - done)
            if summary.failed:
                summary.errors = {f"a job of the launcher ended without an answer: {lost}": 1}
                summary.statuses = {Status.CRASHED.value: summary.failed}
            found.append(dataclasses.asdict(summary))
        return found

    def run_all(self) -> list[dict[str, Any] | SD35BenchError]:
        """Run the jobs of equal crews together and the others one by one; as `__call__`."""
        crews = [crew_of(job.engine, plan) for job, plan in self.prepared]
        with folders_made():
            self.prepared[0][0].results_dir.mkdir(parents=True, exist_ok=True)
        found: dict[int, dict[str, Any] | SD35BenchError] = {}
        for first, crew in enumerate(crews):
            alike = [i for i, other in enumerate(crews) if crew and other == crew]
            group = alike or [first]
            if first not in found:
                try:
                    found |= zip(group, self._group(group, crew), strict=True)
                except SD35BenchError as exc:
                    found |= dict.fromkeys(group, exc)
        return [found[i] for i in range(len(crews))]

    def _group(self, group: Sequence[int], crew: Crew | None) -> list[dict[str, Any]]:
        jobs = [self.prepared[i] for i in group]
        if crew is None:
            return [_alone(*job) for job in jobs]
        study = Study.open(jobs[0][0].results_dir, jobs[0][0].study, create=True)
        with show_progress() as bar:
            pooled = [(job.engine, plan, _progress(bar, plan)) for job, plan in jobs]
            return [dataclasses.asdict(s) for s in run_together(pooled, study, crew)]


def _arrived(dry_run: bool, yes: bool, folders: Sequence[str]) -> RunTask:
    """The task in another process, with plug-ins from the same folders."""
    for folder in folders:
        plugins.use_folder(folder)
    return RunTask(dry_run, yes)


def _progress(bar: "ProgressBar", plan: Plan) -> RunProgress:
    return RunProgress(bar, f"{plan.load.model.name} on {plan.load.backend.name}")


def run_plan(job: Job, plan: Plan, study: Study) -> RunSummary:
    """Make what is missing of a plan; failures are records."""
    with show_progress() as bar:
        return job.engine.run(plan, study, _progress(bar, plan))


def _alone(job: Job, plan: Plan) -> dict[str, Any]:
    study = Study.open(job.results_dir, job.study, create=True)
    return dataclasses.asdict(run_plan(job, plan, study))


def run(given: Given) -> Answer:
    """Make what is missing of a point, a grid or an experiment.

    Raises: ConfigError before anything is loaded; StudyLocked, DiskFull, StoreError.
    """
    given = with_recommended(given)
    if any(text.startswith(_PLANNED) for text in given.settings):
        from sd35bench.cli.auto_limit import read_auto, run_planned

        auto = read_auto(given.settings)
        if auto is not None:
            return run_planned(given, auto, run, _look)
    check_overrides(given.settings, given.has("-m"), given.config_dir)
    out = console(given.as_json)
    say = partial(remark, as_json=given.as_json)
    given = _with_models_own(given, say)
    if asks_hydra(given):
        return answer_hydra(given)
    task = RunTask(given.has("--dry-run"), given.has("--yes"), given.settings, say)
    began = time.perf_counter()
    try:
        results = sweep(task, written(given.settings), given.config_dir, root_of(given))
    except JobsLost as exc:
        results = task.recount(exc)
    job, _ = task.prepared[0]
    if task.dry_run:
        found = _estimate(task.prepared)
        _print_estimate(out, job, found)
        return Answer(document=found.document(job.study))
    results = results if task.is_launched else task.run_all()
    elapsed_s = time.perf_counter() - began
    for result in results:
        if isinstance(result, SD35BenchError):
            raise result
    made = [result for result in results if isinstance(result, dict)]
    document = _document(job, made) | {"elapsed_s": elapsed_s}
    incomplete = document["failed"] or document["paused"] is not None
    if task.damaged:
        say(
            f"{task.damaged} stored images were damaged, so their trials were tried again; where"
            f" a new file took the name of one, the old one is kept as NAME{DAMAGED}"
        )
    if incomplete or not is_quiet():
        _print_summary(out, document)
    _print_unnamed(say, job)
    return Answer(document=document, exit_code=RESUMABLE if incomplete else DONE)


def _with_models_own(given: Given, say: Callable[[str], None]) -> Given:
    """An experiment with another model: that one's prompts and batch size, and a line on it."""
    settings, notes = with_models_own(given.settings, given.config_dir)
    for note in notes:
        say(f"note: {note}")
    return dataclasses.replace(given, settings=settings)


def _look(given: Given) -> "Planned":
    """What a command would run; nothing is made."""
    from sd35bench.cli.auto_limit import Planned

    given = _with_models_own(given, lambda _: None)
    check_overrides(given.settings, given.has("-m"), given.config_dir)
    task = RunTask(dry_run=True)
    sweep(task, written(given.settings), given.config_dir, root_of(given))
    job, _ = task.prepared[0]
    settings = {setting_key(trial) for _, plan in task.prepared for trial in plan.trials}
    return Planned(
        settings=len(settings),
        prompts=min(len(job.sweep.prompts) for job, _ in task.prepared),
        loads=[plan.load for _, plan in task.prepared],
        study=job.study,
        results_dir=job.results_dir,
    )


def _estimate(prepared: Sequence[tuple[Job, Plan]]) -> RunCost:
    """What is still to do and what it takes; jobs that plan the same trials count once."""
    plans = {
        content_hash([trial.key for trial in plan.trials]): (plan, job.engine)
        for job, plan in prepared
    }
    job, _ = prepared[0]
    return estimate(list(plans.values()), job.results_dir, job.study)


def run_confirming(runs: Sequence[dict[str, Any]], patient: bool = False) -> int:
    """Run the very commands that are printed, one after the other; the first bad code ends it.

    `patient`: wait where another process makes the same images, in place of refusing.

    Raises: ConfigError where a hosted service would be asked, which costs money; StudyLocked.
    """
    hosted = next((r for r in runs if r["hosted"]), None)
    if hosted is not None:
        raise ConfigError(
            f"--run does not spend money on a hosted service; run it yourself: {hosted['command']}"
        )
    typed = (shlex.split(each["command"])[2:] for each in runs)
    left = [parse("run", COMMANDS["run"], each, as_json=True) for each in typed]
    while left:
        try:
            answer = run(left[0])
        except StudyLocked:
            if not patient:
                raise
            time.sleep(POLL_S)
            continue
        if answer.exit_code != 0:
            return answer.exit_code
        left.pop(0)
    return 0


def _notes(prepared: Sequence[tuple[Job, Plan]]) -> list[str]:
    """What the plans say, and where there is too little to do for every start; each once."""
    notes = [note for _, plan in prepared for note in plan.notes]
    for job, plan in prepared:
        asked = job.engine.starts
        found = len(shares(plan.batches, asked))
        if found < asked:
            notes.append(f"starts={asked}: {found} blocks (prompts and seeds) make {found} starts")
    return list(dict.fromkeys(notes))


def refuse_bill(usd: float, limit: float, verb: str) -> None:
    """Refuse a bill that was not agreed to; `verb`: how sure it is. Raises: ConfigError."""
    if usd > limit:
        raise ConfigError(
            f"remote.confirm_above_usd={limit:g}: this {verb} cost up to {words.bill(usd)}; add"
            " --yes to agree, or see --dry-run"
        )


def takes(seconds: float | None, disk_bytes: float, usd: str, about: str) -> list[str]:
    """What a dry run says last: time (`about` before it), disk, money."""
    time_text = "unknown (nothing like it has run here yet)"
    if seconds is not None:
        time_text = f"{about} {words.number(seconds / 60, 1)} min"
    return [
        f"time: {time_text}",
        f"disk: about {words.size_in(disk_bytes, 'MB')}",
        f"money: {usd}",
        "nothing was written or loaded",
    ]


def _document(job: Job, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Sum the jobs' summaries into what `run --json` prints."""

    def total(name: str) -> Any:
        known = [r[name] for r in results if r[name] is not None]
        return sum(known) if known else None

    def totals(*names: str) -> dict[str, Any]:
        return {name: total(name) for name in names}

    wall_s, measured_s = total("wall_s"), total("measured_s")
    errors: dict[str, int] = {}
    statuses: Counter[str] = Counter()
    for result in results:
        for text, count in result["errors"].items():
            count_error(errors, text, count)
        statuses.update(result["statuses"])
    path = job.results_dir / job.study
    return {
        "study": job.study,
        **totals("planned", "done", "skipped", "failed", "truncated", "loads"),
        **totals("load_s", "warmup_s", "wall_s"),
        "overhead_frac": max(0.0, 1 - measured_s / wall_s) if total("done") and wall_s else None,
        "errors": errors,
        "statuses": dict(statuses),
        **totals("timed", "disturbed", "retimed"),
        "speed": min((r["speed"] for r in results if r["speed"] is not None), default=None),
        **totals("cost_usd", "ambiguous"),
        "paused": next((r["paused"] for r in results if r["paused"] is not None), None),
        "paths": {"study": str(path), "images": str(path / "images")},
    }


def _there(job: Job) -> Study | None:
    """The study, if it is there."""
    there = os.path.exists(job.results_dir / job.study / "study.json")
    return Study.open(job.results_dir, job.study) if there else None


def _done(job: Job) -> set[str]:
    study = _there(job)
    return set() if study is None else study.done_keys()


def _print_unnamed(say: Callable[[str], None], job: Job) -> None:
    count = len(Study.open(job.results_dir, job.study).unnamed())
    if count:
        files = words.plural(count, "file")
        say(
            f"{files} of images that no record names are kept;"
            f" `{plugins.command(f'clean {job.study}')}` lists them"
        )


def _print_summary(out: Terminal, document: dict[str, Any]) -> None:
    name = document["study"]
    out.print(
        f"study {name}: {document['done']} made, {document['skipped']} were there already,"
        f" {document['failed']} failed, of {document['planned']} planned",
        markup=False,
    )
    if document["loads"]:
        wall_s, elapsed_s = document["wall_s"], document["elapsed_s"]
        beside = f" of workers beside each other, {words.number(elapsed_s, 1)} s in all"
        said = beside if wall_s > elapsed_s else ""
        loads = words.plural(document["loads"], "load")
        out.print(f"{loads}, {words.number(wall_s, 1)} s after loading{said}")
    if document["disturbed"] or document["retimed"]:
        out.say(
            f"{document['disturbed']} of {document['timed']} timed images were disturbed by other"
            f" work, after {document['retimed']} were timed again"
        )
    if document["speed"] is not None and document["speed"] < REGIME:
        out.print(f"this machine ran at {words.number(document['speed'], 2)} of its best")
    if document["statuses"]:
        counts = (f"{count} {status}" for status, count in document["statuses"].items())
        out.print(f"failed: {', '.join(counts)}", markup=False)
    for text, count in list(document["errors"].items())[:5]:
        out.say(f"failed {words.plural(count, 'time')}: {text}")
    if document["cost_usd"] is not None:
        out.print(f"cost: {words.in_usd(document['cost_usd'])}")
    if document["paused"] is not None:
        out.say(document["paused"])
    if document["truncated"]:
        out.print(f"prompts of {document['truncated']} images {CUT}", soft_wrap=True)
    if document["failed"]:
        out.print("the same command tries the failed ones again")
    out.say(f"next: {plugins.command(f'show {name}')}")


def _already(found: RunCost) -> str:
    """What was spent and asked for before, where a hosted service was."""
    if not found.created and not found.spent_usd:
        return ""
    return (
        f", after {words.number(found.spent_usd, 2)} so far; {found.created} images were asked for"
        " before and cost nothing more"
    )


def _print_estimate(out: Terminal, job: Job, found: RunCost) -> None:
    out.say(
        f"study {job.study}: {words.plural(found.trials, 'trial')}, {found.done} done,"
        f" {found.to_do} to do",
        f"{words.plural(found.settings, 'setting')}, {words.plural(found.loads, 'load')}",
        *takes(found.seconds, found.disk_bytes, words.bill(found.usd) + _already(found), "about"),
    )


def _details(extra: Path | None) -> str:
    """All override names with type, range and default, and every group's choices."""
    parts = ["Groups:"]
    for group in GROUPS:
        if group not in ("metric", "profile"):
            parts.append(in_columns(group + "=", ", ".join(choices(group, extra))))
    parts.append("  (defaults: model=nano backend=eager, and the model's own prompts)\n")
    parts.append("For each image (all of these can be swept with -m):")
    parts += [_field_lines(field) for field in FIELDS.values() if field.axis]
    parts.append("\nFor the run:")
    parts.append(in_columns("prompt=", "one prompt, commas included; give it again for each more"))
    parts += [_field_lines(field) for field in FIELDS.values() if not field.axis]
    parts.append(in_columns("backend.OPTION=", "the backend's own: see configs/backend/"))
    parts.append(
        "\nValues with commas, colons or quotes go in quotes: 'negative_prompt=\"blurry, dark\"'\n"
        "Exit codes: 0 done, 2 wrong input, 3 interrupted, paused or some images failed (run"
        " again), 4\nother."
    )
    return "\n".join(parts)


def _field_lines(field: Known) -> str:
    allowed = in_columns("", f"{field.allowed}; default: {field.default}")
    return f"{in_columns(field.name + '=', field.means)}\n{allowed}"


COMMANDS = {
    "run": Command(
        call=run,
        settings="NAME=VALUE ...",
        about="The same command again makes only what is missing; failed images are tried again.",
        examples="""
sd35bench run steps=28 cfg=4 prompts.limit=4
    one setting of the embedded model, four prompts
sd35bench run prompt="a red cube, a blue sphere" steps=8 study=mine
    a prompt of your own; prompt=... again for each further one
sd35bench run -m steps=4,16,28 cfg=1,4,7 seed=0,1 prompts.limit=16 study=grid
    a grid; the model is loaded once
sd35bench run -m prompt_strength=0.3,0.6,0.9 prompts.task=edit study=edits
    image-to-image on the embedded model's edit pairs
sd35bench run -m steps=4,16,28 prompts.limit=auto margin=0.05 study=enough
    as many prompts as it takes to tell whether a setting loses more than the margin: a pilot of
    16 prompts first (power=0.8: how probable it is that the rest decides)
sd35bench run from=results/grid/recommended.yaml profile=balanced prompts.path=mine.txt
    what recommend named, on prompts of your own; words of your own win over the file's
sd35bench run -m backend=eager,eager-bf16 batch_size=16 study=backends
    one load per backend
sd35bench run model=sd35-medium model.path=models/sd35-medium prompts=file prompts.path=my.csv
    a real checkpoint and your own prompts
sd35bench run model=sd35-medium backend=eachlabs prompts.limit=20 remote.max_cost_usd=1
    a hosted service, with a budget; the key comes from EACHLABS_API_KEY
sd35bench run experiment=demo --dry-run
    what a stored sweep would do and take
sd35bench run experiment=demo --cfg job --package model
    what Hydra makes of a command line, without running it
""",
        flags=(
            Flag("-m, --multirun", "sweep: comma lists become a grid (anywhere on the line)"),
            DRY_RUN,
            YES,
            SINK,
            QUIET,
            VERBOSE,
            *HYDRA_FLAGS,
        ),
        details=_details,
    )
}
