"""`sd35bench run`: a Hydra application with flags of its own.

Hydra refuses flags that it does not know and -m behind an override, so ours are taken out of the
arguments first. Each load's job calls `RunTask`, possibly on another machine; the rest is summing.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from sd35bench.cli.help import run_help
from sd35bench.cli.output import Answer, TrialProgress, console, show_progress
from sd35bench.config import Job, check_overrides, freeze
from sd35bench.config.fields import nearest
from sd35bench.config.overrides import expand_short_names
from sd35bench.errors import ConfigError, SD35BenchError
from sd35bench.estimate import Estimate, estimate
from sd35bench.plan import Plan, expand
from sd35bench.run import shares
from sd35bench.sweeper import sweep

__all__ = ["RunTask", "run"]

RESUMABLE = 3
SWITCHES = {
    "-m": "multirun",
    "--multirun": "multirun",
    "--dry-run": "dry_run",
    "--yes": "yes",
    "-h": "help",
    "--help": "help",
}


@dataclasses.dataclass(slots=True)
class Flags:
    """The flags of `run` that are not Hydra's; `yes` agrees to spend money."""

    multirun: bool = False
    dry_run: bool = False
    yes: bool = False
    help: bool = False
    config_dir: Path | None = None


class RunTask:
    """The task that Hydra's launcher calls once per load; can be sent to another process."""

    def __init__(self, dry_run: bool) -> None:
        """With `dry_run` the jobs are prepared and not launched."""
        self.dry_run = dry_run
        self.prepared: list[tuple[Job, Plan]] = []

    def __getstate__(self) -> dict[str, Any]:
        """What travels to another process: not the plans, each job makes its own again."""
        return {"dry_run": self.dry_run, "prepared": []}

    def prepare(self, configs: Sequence[DictConfig]) -> bool:
        """Validate and plan every job before the first is launched; True ends it there."""
        for config in configs:
            job = freeze(config)
            self.prepared.append((job, expand(job.sweep)))
        return self.dry_run

    def __call__(self, config: DictConfig) -> dict[str, Any] | SD35BenchError:
        """Run one job; our own errors are returned, so that the other jobs still run."""
        from sd35bench.machine import measure_once
        from sd35bench.run import run_plan
        from sd35bench.store import Study

        try:
            job = freeze(config)
            plan = expand(job.sweep)
            study = Study.open(job.results_dir, job.study, create=True)
            measure_once(study, plan.load)
            with show_progress() as bar:
                title = f"{plan.load.model.name} on {plan.load.backend.name}"
                summary = run_plan(plan, study, TrialProgress(bar, title), job.limits)
        except SD35BenchError as exc:
            return exc
        return dataclasses.asdict(summary)


def run(arguments: list[str], as_json: bool) -> Answer:
    """Make what is missing of a point, a grid or an experiment.

    Raises: ConfigError before anything is loaded; StudyLocked, DiskFull, StoreError.
    """
    flags, overrides = _split(arguments)
    if flags.help:
        console().print(run_help(flags.config_dir), markup=False, soft_wrap=True)
        return Answer()
    check_overrides(overrides, flags.multirun, flags.config_dir)
    task = RunTask(flags.dry_run)
    results = sweep(task, expand_short_names(overrides), flags.config_dir)
    job, _ = task.prepared[0]
    out = console(as_json)
    for note in _notes(task.prepared):
        out.print(f"note: {note}", markup=False, soft_wrap=True)
    if flags.dry_run:
        found = estimate(
            [(plan, job.usd_per_image) for job, plan in task.prepared],
            job.results_dir,
            job.study,
            job.limits.starts,
        )
        _print_estimate(out, job, found)
        return Answer(document=found.document(job.study))
    for result in results:
        if isinstance(result, SD35BenchError):
            raise result
    document = _document(job, results)
    _print_summary(out, document)
    return Answer(document=document, exit_code=RESUMABLE if document["failed"] else 0)


def _split(arguments: Sequence[str]) -> tuple[Flags, list[str]]:
    """Take our flags out, wherever they stand."""
    flags, overrides = Flags(), []
    rest = iter(arguments)
    for text in rest:
        if text in SWITCHES:
            setattr(flags, SWITCHES[text], True)
        elif text == "--config-dir" or text.startswith("--config-dir="):
            value = text.partition("=")[2] if "=" in text else next(rest, "")
            flags.config_dir = Path(value)
            if not value or not flags.config_dir.is_dir():
                raise ConfigError(f"--config-dir={value}: there is no such folder")
        elif text.startswith("-"):
            known = [*SWITCHES, "--json", "--config-dir"]
            raise ConfigError(f"unknown flag {text}{nearest(text, known)}; see run --help")
        else:
            overrides.append(text)
    return flags, overrides


def _notes(prepared: Sequence[tuple[Job, Plan]]) -> list[str]:
    """What the plans say, and where there is too little to do for every start; each once."""
    notes = [note for _, plan in prepared for note in plan.notes]
    for job, plan in prepared:
        asked, found = job.limits.starts, len(shares(plan.batches, job.limits.starts))
        if found < asked:
            notes.append(f"starts={asked}: {found} blocks (prompts and seeds) make {found} starts")
    return list(dict.fromkeys(notes))


def _document(job: Job, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Sum the jobs' summaries into what `run --json` prints."""

    def total(name: str) -> Any:
        known = [r[name] for r in results if r[name] is not None]
        return sum(known) if known else None

    wall_s, measured_s, done = total("wall_s"), total("measured_s"), total("done")
    errors: Counter[str] = Counter()
    statuses: Counter[str] = Counter()
    for result in results:
        errors.update(result["errors"])
        statuses.update(result["statuses"])
    path = job.results_dir / job.study
    return {
        "study": job.study,
        "planned": total("planned"),
        "done": done,
        "skipped": total("skipped"),
        "failed": total("failed"),
        "loads": total("loads"),
        "load_s": total("load_s"),
        "warmup_s": total("warmup_s"),
        "wall_s": wall_s,
        "overhead_frac": max(0.0, 1 - measured_s / wall_s) if done and wall_s else None,
        "errors": dict(errors),
        "statuses": dict(statuses),
        "paths": {"study": str(path), "images": str(path / "images")},
    }


def _print_summary(out: Any, document: dict[str, Any]) -> None:
    name = document["study"]
    out.print(
        f"study {name}: {document['done']} made, {document['skipped']} were there already,"
        f" {document['failed']} failed, of {document['planned']} planned",
        markup=False,
    )
    if document["loads"]:
        out.print(f"{document['loads']} load(s), {document['wall_s']:.1f} s after loading")
    if document["statuses"]:
        counts = (f"{count} {status}" for status, count in document["statuses"].items())
        out.print(f"failed: {', '.join(counts)}", markup=False)
    for text, count in list(document["errors"].items())[:5]:
        out.print(f"failed {count} times: {text}", markup=False, soft_wrap=True)
    if document["failed"]:
        out.print("the same command tries the failed ones again")
    out.print(f"next: sd35bench show {name}", markup=False)


def _print_estimate(out: Any, job: Job, found: Estimate) -> None:
    if found.seconds is None:
        time_text = "unknown (nothing like it has run here yet)"
    else:
        time_text = f"about {found.seconds / 60:.1f} min"
    lines = (
        f"study {job.study}: {found.trials} trials, {found.done} done, {found.to_do} to do",
        f"{found.settings} settings, {found.loads} loads",
        f"time: {time_text}",
        f"disk: about {found.disk_bytes / 1e6:.1f} MB",
        f"money: {found.usd:.2f} USD",
        "nothing was written or loaded",
    )
    for line in lines:
        out.print(line, markup=False, soft_wrap=True)
