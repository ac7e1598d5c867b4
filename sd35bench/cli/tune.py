"""`sd35bench tune`: adaptive search instead of a grid; parses, prints, calls `sd35bench.tune`."""

import functools
from collections.abc import Sequence
from typing import Any

from sd35bench import plugins, words
from sd35bench.cli.output import Answer, Terminal, console, print_parts, remark
from sd35bench.cli.parser import DRY_RUN, MARKDOWN, QUIET, VERBOSE, YES, Command, Flag, Given
from sd35bench.cli.run import refuse_bill, run_confirming, run_plan, takes
from sd35bench.cli.study import score_missing
from sd35bench.config import Job
from sd35bench.config.experiments import with_models_own
from sd35bench.config.tune import CATEGORIES, Tuning, read_tuning
from sd35bench.errors import ConfigError, Paused
from sd35bench.estimate import RunCost, estimate
from sd35bench.fields import FIELDS, KEYED
from sd35bench.plan import Plan
from sd35bench.study.store import Study
from sd35bench.tune.confirm import confirm_choice, held_out_at_most
from sd35bench.tune.search import WAVE
from sd35bench.tune.session import Budget, Outcome
from sd35bench.tune.space import GRIDS
from sd35bench.tune.study_adapter import StudyLab
from sd35bench.types import Scalar

SAMPLED = 24
"""Settings of the grid from whose cost that of the search is guessed."""


def tune(given: Given) -> Answer:
    """Search for a setting and write tune.json.

    Raises: ConfigError before anything is loaded; Paused, DiskFull, StoreError.
    """
    confirm, markdown = given.has("--confirm"), given.has("--markdown")
    settings, notes = with_models_own(given.settings, given.config_dir)
    for note in notes:
        remark(f"note: {note}", given.as_json or markdown)
    tuning = read_tuning(settings, given.config_dir)
    _check_flags(given, tuning)
    _prepare(tuning, dry=given.has("--dry-run"))
    bill = _bill(tuning, confirm)
    if given.has("--dry-run"):
        _print_bill(console(given.as_json), bill)
        return Answer(document=bill)
    if not given.has("--yes"):
        limit = min(job.engine.price.confirm_above_usd for job in tuning.jobs.values())
        refuse_bill(bill["usd"], limit, "may")
    document, exit_code = _tune(tuning, confirm)
    if not given.as_json:
        from sd35bench.report.tuning import tuning_parts

        print_parts(tuning_parts(document), markdown)
    say = functools.partial(remark, as_json=given.as_json or markdown)
    say(f"written: {tuning.job.results_dir / tuning.job.study / 'tune.json'}")
    name = tuning.job.study
    say(
        f"next: {plugins.command(f'show {name}')}, or recommend {name}: every profile, by its own"
        " rule, on the prompts that the settings share (fewer than here, where some were dropped"
        " early)"
    )
    return Answer(document=document, exit_code=exit_code)


def _tune(tuning: Tuning, confirm: bool) -> tuple[dict[str, Any], int]:
    """Search, confirm the choice where asked, write down what was found; the exit code too."""
    from sd35bench.tune.document import tune_document, write_tuning

    study = Study.open(tuning.job.results_dir, tuning.job.study, create=True)
    lab = _lab(tuning, study)
    found = _search(tuning, study, lab)
    held = confirm_choice(study, lab, found, tuning.profile)
    exit_code = 0
    if confirm and held.confirm["commands"]:
        exit_code = run_confirming(held.confirm["commands"], patient=True)
        lab.score()
        held = confirm_choice(study, lab, found, tuning.profile)
    document = tune_document(study.name, lab, tuning.budget, tuning.profile, found, held)
    write_tuning(study, document)
    return document, exit_code


def _search(tuning: Tuning, study: Study, lab: StudyLab) -> Outcome:
    from sd35bench.tune.optuna_journal import Worker, open_journal
    from sd35bench.tune.search import Search
    from sd35bench.tune.session import tune as search_and_race

    worker = Worker(study.path)
    try:
        search = Search(
            tuning.space,
            open_journal(study.path),
            objectives=lab.objectives,
            identity=lab.identity,
            whole=tuning.budget.trials >= tuning.space.size,
            seed=tuning.job.sweep.order_seed,
            worker=worker.name,
        )
        search.agree(tuning.about)
        report = functools.partial(remark, as_json=True)
        return search_and_race(
            lab, search, worker.claim_dead, tuning.budget, tuning.profile, report
        )
    finally:
        worker.close()


def _lab(tuning: Tuning, study: Study) -> StudyLab:
    jobs = {job.sweep.load.key: job for job in tuning.jobs.values()}
    return StudyLab(
        study,
        tuning.space,
        tuning.sources,
        lambda plan: _run(jobs[plan.load.key], plan, study),
        lambda: score_missing(study),
    )


def _run(job: Job, plan: Plan, study: Study) -> None:
    """Make what is missing of a plan; failures are records, which the race looks at.

    Raises: Paused where a budget or a balance is used up.
    """
    summary = run_plan(job, plan, study)
    if summary.paused is not None:
        raise Paused(summary.paused)


def _check_flags(given: Given, tuning: Tuning) -> None:
    """Refuse flags that do not go together, or with this backend. Raises: ConfigError."""
    if given.has("--confirm") and tuning.job.engine.price.is_billed:
        raise ConfigError(
            "--confirm does not spend money on a hosted service; leave it out, and the answer has"
            " the commands that make the held-out images"
        )
    if given.has("--markdown") and given.has("--dry-run"):
        raise ConfigError("--markdown prints what was found, and --dry-run finds nothing; give one")


def _prepare(tuning: Tuning, dry: bool) -> None:
    """Refuse what an engine cannot do, before anything is asked of it. Raises: ConfigError."""
    lab = StudyLab(_nowhere(tuning), tuning.space, tuning.sources, _never, _never)
    jobs = {job.sweep.load.key: job for job in tuning.jobs.values()}
    for plan in lab.plans(_sample(tuning), range(1)):
        jobs[plan.load.key].engine.prepare(plan, dry=dry)


def _bill(tuning: Tuning, confirm: bool) -> dict[str, Any]:
    """What the search, and its confirmation, may take at most, from what a sample takes.

    Time and disk of one image are the slope between one and two prompts of the sample, a load's
    time what is left of one; each wave and each round loads every backend once.
    """
    lab = StudyLab(_nowhere(tuning), tuning.space, tuning.sources, _never, _never)
    points, budget = _sample(tuning), tuning.budget
    one, two = (_estimate(tuning, lab.plans(points, range(n))) for n in (1, 2))
    more = two.trials - one.trials
    loads = one.loads * _rounds(tuning.space.size, budget, lab.prompts) + (2 if confirm else 0)
    held_out = held_out_at_most(lab) if confirm else 0
    images = budget.images + held_out
    seconds = None
    if one.seconds is not None and two.seconds is not None:
        image_s = (two.seconds - one.seconds) / more
        load_s = max(0.0, one.seconds - image_s * one.trials) / max(one.loads, 1)
        seconds = image_s * images + load_s * loads
    return {
        "study": tuning.job.study,
        "dry_run": True,
        "grid": tuning.space.size,
        "trials": budget.trials,
        "images": budget.images,
        "held_out_images": held_out,
        "exhaustive": tuning.space.size * lab.prompts * lab.images_per_prompt,
        "prompts": lab.prompts,
        "loads": loads,
        "estimated_s": seconds,
        "disk_bytes": round((two.disk_bytes - one.disk_bytes) / more * images),
        "usd": max(s.usd_per_image for s in tuning.sources.values()) * budget.images,
    }


def _estimate(tuning: Tuning, plans: Sequence[Plan]) -> RunCost:
    job = tuning.job
    nowhere = f"{job.study}.not-there"  # what the study has already is not taken off
    engines = {job.sweep.load.key: job.engine for job in tuning.jobs.values()}
    return estimate([(p, engines[p.load.key]) for p in plans], job.results_dir, nowhere)


def _rounds(size: int, budget: Budget, prompts: int) -> int:
    """Waves of settings (one where the grid is tried whole), and doublings of the depth."""
    rounds = 0
    while budget.first * 2**rounds < prompts:
        rounds += 1
    return rounds + (1 if budget.trials >= size else -(-budget.trials // WAVE))


def _sample(tuning: Tuning) -> list[tuple[Scalar, ...]]:
    """Points spread evenly over the grid, its two ends among them."""
    count = min(SAMPLED, tuning.space.size)
    last = tuning.space.size - 1
    return [tuning.space.point(i * last // (count - 1)) for i in range(count)]


def _print_bill(out: Terminal, bill: dict[str, Any]) -> None:
    held_out, usd = bill["held_out_images"], words.bill(bill["usd"])
    out.say(
        f"study {bill['study']}: at most {bill['trials']} of {bill['grid']} settings, on up to"
        f" {bill['prompts']} prompts",
        f"at most {bill['images']} images; the full grid would take {bill['exhaustive']}"
        f" ({words.digits(100 * bill['images'] / bill['exhaustive'])} %)",
        *([f"at most {held_out} held-out images to confirm the choice"] if held_out else []),
        f"about {bill['loads']} loads, each with a warm-up per kind of setting",
        *takes(bill["estimated_s"], bill["disk_bytes"], usd, "at most about"),
    )


def _nowhere(tuning: Tuning) -> Study:
    """A study that is only named: nothing is read from it or written to it."""
    return Study(tuning.job.results_dir / tuning.job.study)


def _never(*_: Any) -> None:
    raise AssertionError("a dry run makes nothing")


def _axes() -> str:
    """Every axis: numbers with the step of a range that names none, then lists of names."""
    later = [n for n in GRIDS if n in FIELDS and FIELDS[n].neutral is not KEYED]
    numbers = ([n for n in GRIDS if n not in later], later)
    first, others = (", ".join(words.plain(GRIDS[n]) for n in names) for names in numbers)
    said = (f"a range without a step is rounded to {first}", f"the same, to {others}")
    lines = zip((*numbers, CATEGORIES), (*said, "lists of names"), strict=True)
    return "\n".join(f"  {' '.join(names)}\n{' ' * 19}{text}" for names, text in lines) + "\n"


COMMANDS = {
    "tune": Command(
        call=tune,
        settings="study=NAME AXIS=VALUES ... NAME=VALUE ...",
        about="""Every setting gets the same first prompts; those that are shown to be worse on
these very prompts (95 % intervals, clustered by prompt) get no more, the others get twice as many,
and so on. The same command goes on where it was, and makes nothing twice; a larger trials= or
images= goes further. Several processes may share one study: they take turns where they need the
same backend.

Axes: LOW:HIGH, LOW:HIGH:STEP, or a list A,B,C
"""
        + _axes()
        + """
The search:
  profile=NAME     what a setting is wanted for: preview, balanced, final, or a YAML file of your
                   own with limits, objective and margins; default: balanced
  trials=N         settings that may be tried; default: the grid, at most 32
  images=N         images that may be made; default: 40 % of all prompts for every one of trials
  first=N          prompts that every setting gets before the first are dropped; default: 8
Everything else is as in `sd35bench run` (model=, backend=, prompts.limit=, seed=, order_seed= ...).

Exit codes: 0 done, 2 wrong input, 3 interrupted or paused (run again), 4 other.""",
        examples="""
sd35bench tune study=tuned steps=4:28 cfg=1:9 --dry-run
    what a search over 25 x 17 settings may take
sd35bench tune study=tuned steps=4,8,16,28 cfg=1,2,4,7 prompts.limit=64
    16 settings, at most 40 % of the images that all of them would take
sd35bench tune study=tuned steps=4:28 cfg=1:9 sampler=euler,heun profile=final trials=40
    a larger space; Optuna chooses the 40 settings that are tried
sd35bench tune study=edits prompts.task=edit steps=8:28 prompt_strength=0.3:0.95
    image-to-image: following the prompt and keeping the init image, both
sd35bench tune study=tuned steps=4,8,16,28 cfg=1,2,4,7 prompts.limit=64 --confirm
    the same search, and whether its choice holds on prompts that it never saw
sd35bench tune study=slg skip_layer_guidance=none,stability skip_layer_scale=1:4 cfg=3:6
""",
        flags=(
            Flag(
                "--confirm",
                "make held-out images of the chosen setting and of what it was held"
                " against, and say whether the choice holds there",
            ),
            MARKDOWN,
            DRY_RUN,
            YES,
            QUIET,
            VERBOSE,
        ),
    )
}
