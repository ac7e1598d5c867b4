"""The verbs that read a study: score, show, recommend, claims, report: a call and a print."""

import contextlib
import re
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sd35bench import plugins
from sd35bench.cli.output import (
    Answer,
    console,
    print_parts,
    remark,
    show_progress,
    tell,
    write_line,
)
from sd35bench.cli.parser import (
    MARKDOWN,
    QUIET,
    RESULTS_DIR,
    VERBOSE,
    Command,
    Flag,
    Given,
    in_columns,
)
from sd35bench.cli.sinks import SINK
from sd35bench.cli.slices import FLAGS as SLICES
from sd35bench.cli.slices import answer_parts, asks_part, parts_of, said
from sd35bench.errors import ConfigError, SD35BenchError, StoreError
from sd35bench.study.store import Study, study_names
from sd35bench.words import plural

if TYPE_CHECKING:
    from sd35bench.recommend.profiles import Profile
    from sd35bench.report.show import ShowOptions
    from sd35bench.workers.features import Spread

LATEST = Flag("--latest", "the study that was written last, in place of its name")


def score(given: Given) -> Answer:
    """Add metrics to a study."""
    from sd35bench.analysis.table import damaged_text

    study = _open(given)
    metrics = given.text("--metric")
    names = None if metrics is None else [n for n in metrics.split(",") if n]
    counts = score_missing(study, names, given.settings, True, given.config_dir)
    out = console(given.as_json)
    for name, count in counts["scored"].items():
        remark(f"{name}: {plural(count, 'new score')}", given.as_json)
    if counts["total"] == 0:
        remark("nothing was missing", given.as_json)
    out.say(*damaged_text(map(Path, counts["damaged"])))
    out.say(*(f"{name}: {note}" for name, note in counts["notes"].items()), *_refused(counts))
    return Answer(document=counts)


def show(given: Given) -> Answer:
    """Print a study's settings."""
    from sd35bench.report.show import ShowOptions, csv_text

    as_csv = given.has("--csv")
    if as_csv and given.has("--markdown"):
        raise ConfigError("--csv and --markdown are two forms; give one")
    shown = ShowOptions(sort=given.text("--sort"), columns=_names(given.text("--columns")))
    study = _open(given)
    counts = score_missing(study)
    make = partial(_marked, given, study, shown.sort)
    print_one = partial(_print_shown, given, shown)
    if asks_part(given):
        quiet = replace(given, as_json=True) if as_csv else given
        found = answer_parts(quiet, study, make, print_one)
    else:
        document = make(study)
        document["warnings"] += _refused(counts)
        if not given.as_json and not as_csv:
            print_one(document)
        found = Answer(document=document)
    if as_csv and not given.as_json:
        parts = found.document.get("parts", [found.document])
        rows = [{**p.get("where", {}), **row} for p in parts for row in p.get("settings", ())]
        write_line(csv_text(rows, shown.columns).rstrip("\n"))
    return found


def _marked(given: Given, study: Study, sort: str | None, part: Study) -> dict[str, Any]:
    """The document of a part of the study, its rows marked and in order."""
    from sd35bench.report.show import mark_rows, sort_rows
    from sd35bench.study.result_cache import kept_show

    pooled = given.has("--pool-hosts")

    def read() -> dict[str, Any]:
        from sd35bench.analysis.summary import show_document  # not needed for what is kept

        return show_document(part, pool_hosts=pooled)

    document = read() if pooled else kept_show(part, read)
    mark_rows(document, study.path, written_at(study))
    sort_rows(document, sort)
    return document


def _print_shown(given: Given, shown: "ShowOptions", document: dict[str, Any]) -> None:
    from sd35bench.report.show import settings_parts

    print_parts(settings_parts(document, shown), given.has("--markdown"))


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(filter(None, (text or "").replace(" ", "").split(",")))


def recommend(given: Given) -> Answer:
    """Name a setting per profile and write recommended.yaml; confirm it on held-out prompts."""
    from sd35bench.cli.run import run_confirming
    from sd35bench.recommend.advice import recommend_document
    from sd35bench.report.recommend import write_recommended

    _check_together(given)
    profiles = profiles_of(given.text("--profile"), given.config_dir)
    study = _open(given)
    counts = score_missing(study)
    if asks_part(given):  # nothing is written: the study's own advice is on all prompts
        return answer_parts(
            given,
            study,
            lambda part: recommend_document(part, profiles),
            lambda document: _print_recommended(document, given),
        )
    looks = given.whole("--looks")
    if looks is not None:
        from sd35bench.recommend.look_plan import plan_looks

        plan_looks(study, looks)
    if given.has("--plan"):
        return _plan(study, profiles, given)
    document = recommend_document(study, profiles)
    exit_code = 0
    if given.has("--run"):
        exit_code = run_confirming(document["confirm"]["commands"])
        counts = score_missing(study)
        document = recommend_document(study, profiles)
    document["warnings"] += _refused(counts)
    path = write_recommended(study, document)
    if not given.as_json:
        _print_recommended(document, given)
    out = console(given.as_json or given.has("--markdown") or given.has("--snippet"))
    out.say(f"written: {path}")
    return Answer(document=document, exit_code=exit_code)


def _plan(study: Study, profiles: dict[str, "Profile"], given: Given) -> Answer:
    """Say how many images would decide; nothing is written."""
    from sd35bench.recommend.sample_size import Asked, plan_document

    power = given.number("--power")
    asked = Asked(margin=given.number("--margin"))
    asked = asked if power is None else replace(asked, power=power)
    document = plan_document(study, profiles, asked)
    if not given.as_json:
        from sd35bench.report.recommend import plan_parts

        print_parts(plan_parts(document), given.has("--markdown"))
    return Answer(document=document)


def profiles_of(names: str | None, extra: Path | None = None) -> dict[str, "Profile"]:
    """Read the profiles that `--profile` names, all of the package's by default.

    `extra` is a folder of the user's own YAML files.

    Raises: ConfigError for a name or a file that is none, or for two of one name.
    """
    from sd35bench.config import config_dir
    from sd35bench.config.files import own_file
    from sd35bench.recommend.profiles import load_profile, load_profiles

    folder = config_dir() / "profile"
    if names is None:
        return load_profiles(folder)
    found: dict[str, Profile] = {}
    for word in dict.fromkeys(names.split(",")):
        profile = load_profile(own_file("profile", word, extra), folder)
        if profile.name in found:
            raise ConfigError(
                f"--profile={names}: two profiles are called {profile.name!r}; give one of them"
                " another `name` in its file"
            )
        found[profile.name] = profile
    return found


def _check_together(given: Given) -> None:
    """Refuse flags of `recommend` that do not go together. Raises: ConfigError."""
    confirm, run = given.has("--confirm"), given.has("--run")
    if run and not confirm:
        raise ConfigError("--run makes held-out images; give it with --confirm")
    if given.has("--markdown") and confirm and not run:
        raise ConfigError("--markdown prints the recommendation, --confirm commands; give one")
    kind = given.text("--snippet")
    if kind is not None:
        from sd35bench.report.recommend import SNIPPETS

        if kind not in SNIPPETS:
            raise ConfigError(f"--snippet={kind}: give one of {', '.join(SNIPPETS)}")
        for name in ("--confirm", "--plan", "--markdown", "--why"):
            if given.has(name):
                raise ConfigError(f"--snippet prints text to copy; leave {name} out")
    if given.has("--plan") and confirm:
        raise ConfigError("--plan says how many images to make, --confirm confirms; give one")
    for name in ("--confirm", "--plan", "--looks"):
        if given.has(name) and asks_part(given):
            raise ConfigError(f"{name} is of all prompts; leave --where and --slice out")
    for name in ("--margin", "--power"):
        if given.has(name) and not given.has("--plan"):
            raise ConfigError(f"{name} is of a plan; give it with --plan")


def _print_recommended(document: dict[str, Any], given: Given) -> None:
    from sd35bench.report import recommend as forms

    kind, as_markdown = given.text("--snippet"), given.has("--markdown")
    if kind is not None:
        write_line(forms.snippets(document, kind))
    elif as_markdown:
        print_parts(forms.paper_parts(document), as_markdown)
    elif given.has("--confirm") and not given.has("--run"):
        print_parts(forms.confirming_parts(document))
    else:
        in_full = given.has("--why")
        print_parts((forms.evidence_parts if in_full else forms.answer_parts)(document))


def claims(given: Given) -> Answer:
    """Judge the vendor page's claims on a study."""
    from sd35bench.claims.catalogue import METRICS, claims_document

    study = _open(given)
    score_missing(study)
    _score_more(study, METRICS)
    document = claims_document(study)
    if not given.as_json:
        from sd35bench.report.claims import claims_parts

        print_parts(claims_parts(document), given.has("--markdown"))
    return Answer(document=document)


def report(given: Given) -> Answer:
    """Write the HTML report."""
    from sd35bench.claims.catalogue import METRICS, is_claims_study
    from sd35bench.report.page import write_report

    if len(given.words) > 1:
        return _report_beside(given)
    study = _open(given)
    score_missing(study)
    if is_claims_study(study):
        _score_more(study, METRICS)
    profiles = profiles_of(None)
    if asks_part(given):
        return _report_parts(given, study, profiles)
    path = _told(given, write_report(study, profiles, link=_links(given)))
    return Answer(document={"study": study.name, "path": path})


def _told(given: Given, path: Path) -> str:
    """Say where a report is."""
    console(given.as_json).say(f"report: {path.resolve()}")
    return str(path)


def _report_beside(given: Given) -> Answer:
    """Write one report on several studies. Raises: ConfigError for what only one can have."""
    from sd35bench.report.page import write_beside

    names = given.words
    if len(set(names)) < len(names):
        raise ConfigError(f"report {' '.join(names)}: give each study once")
    for flag in ("--images", "--where", "--slice", SINK.name):
        if given.has(flag):
            raise ConfigError(f"{flag} is of one study; leave it out, or give one study")
    studies = [_open(replace(given, words=[name])) for name in names]
    for study in studies:
        score_missing(study)
    path = _told(given, write_beside(studies, profiles_of(None)))
    return Answer(document={"studies": names, "path": path})


def _links(given: Given) -> bool:
    """Whether images are files beside the page. Raises: ConfigError for a third way."""
    way = given.text("--images")
    if way not in (None, "inside", "link"):
        raise ConfigError(f"--images={way}: give inside or link")
    return way == "link"


def _report_parts(given: Given, study: Study, profiles: dict[str, "Profile"]) -> Answer:
    """Write a report of each part, beside the one of the whole."""
    from sd35bench.report.page import write_report

    found = []
    for where, part in parts_of(given, study):
        word = re.sub(r"[^\w.-]+", "-", said(where))
        path = write_report(part, profiles, f"report-{word}.html", link=_links(given))
        found.append({"where": where, "path": _told(given, path)})
    return Answer(document={"study": study.name, "parts": found})


def open_study(root: Path, name: str) -> Study:
    """Open a study. Raises: ConfigError for an unknown name, which is wrong input."""
    try:
        return Study.open(root, name)
    except StoreError as exc:
        raise ConfigError(str(exc)) from exc


def _open(given: Given) -> Study:
    """Open the study that was named, which must have an image. Raises: ConfigError."""
    root = given.results_dir
    if given.has(LATEST.name):
        if given.words:
            raise ConfigError(f"{LATEST.name} names the study; leave {given.words[0]!r} out")
        given = replace(given, words=[latest(root)])
    if not given.words:
        there = ", ".join(study_names(root)) or "none yet; make one with sd35bench run"
        raise ConfigError(f"which study? in {root} there are: {there}")
    study = open_study(root, given.words[0])
    if not study.has_image():
        damaged = len(study.images().damaged)
        if damaged:
            raise ConfigError(
                f"study {study.name!r} has no whole image: {damaged} are damaged;"
                f" `{plugins.command(f'verify {study.name}')}` names them, and the same run makes"
                " them again"
            )
        raise ConfigError(f"study {study.name!r} has no image yet; see what failed with run again")
    return study


def written_at(study: Study) -> float:
    """When the journal was last written, seconds since 1970; 0 before the first record."""
    return max((path.stat().st_mtime for path in study.shards()), default=0.0)


def latest(root: Path) -> str:
    """Name the study whose journal was written last. Raises: ConfigError where there is none."""
    times: dict[str, float] = {}
    for name in study_names(root):
        with contextlib.suppress(SD35BenchError):  # one that cannot be read is not the one meant
            times[name] = written_at(Study.open(root, name))
    if not times:
        raise ConfigError(f"--latest: no study in {root}; sd35bench run makes one")
    return max(times, key=lambda name: times[name])


def score_missing(
    study: Study,
    names: Sequence[str] | None = None,
    overrides: Sequence[str] = (),
    anew: bool = False,
    extra: Path | None = None,
) -> dict[str, Any]:
    """Score what is missing, the model's default metrics where no `names` are given.

    That nothing was missing is remembered of a large study; `anew` looks all the same. `extra` is
    a folder of the user's own YAML files.

    Returns: what `score_study` does; at least ``{"refused": {metric: why}}``.
    """
    from sd35bench.study.result_cache import keep_scored, read_scored

    # Asked before Hydra is loaded for options, which takes half a second.
    unasked = names is None and not overrides and extra is None
    known = read_scored(study) if unasked and not anew else None
    if known is not None:
        return known
    from sd35bench.config.overrides import metric_options

    options = metric_options(overrides, extra)
    defaults = names is None and not options
    if not study.has_image():
        return {"refused": {}, "damaged": []}
    from sd35bench.score import score_study

    with show_progress() as bar:
        task, began = bar.add_task(f"scoring {study.name}", total=None), time.monotonic()

        def moved(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)
            tell(bar, task, began)

        with _workers(overrides) as workers:
            found = score_study(study, names, moved, options, workers)
    if defaults:
        keep_scored(study, found)
    return found


def _workers(overrides: Sequence[str]) -> AbstractContextManager["Spread | None"]:
    """Who embeds the images: this process, unless workers are asked for."""
    if not overrides:
        return nullcontext()
    from sd35bench.config.place import spread_of

    return spread_of(overrides)


def _score_more(study: Study, names: Sequence[str]) -> None:
    """Score metrics that are no defaults, where there are images that they can judge."""
    from sd35bench.errors import MetricError

    try:
        score_missing(study, names)
    except MetricError:  # random weights: no claim about quality is tested on them
        return


def _refused(counts: dict[str, Any]) -> list[str]:
    return [f"not scored: {name}: {why}" for name, why in counts["refused"].items()]


def _metric_names(extra: Path | None) -> str:
    """All metrics, those of packages and of the user's own folder too."""
    from sd35bench.config.files import choices
    from sd35bench.plugins import entry_points

    names = sorted({*choices("metric", extra), *entry_points("metrics")})
    return "Metrics:\n" + in_columns("--metric", ", ".join(names))


COMMANDS = {
    "score": Command(
        call=score,
        words=("[STUDY]",),
        settings="[metric.NAME.OPTION=VALUE ...] [workers=N] [threads=N] [engine=ray]",
        about="""Only what is missing is computed. Without --metric: quality where there are trained
weights, and drift, how far images are from eager's, where several backends ran. `workers` processes
extract the images' features, each on `threads` cores of its own, as in `run`; the number of workers
changes no bit of any score.""",
        examples="""
sd35bench score grid                        the model's default metrics
sd35bench score grid --metric fid_nano      one metric
sd35bench score photos --metric fid metric.fid.reference=coco_stats.npz
sd35bench score backends --metric drift metric.drift.reference=eager-bf16
                                            how far each backend's images are from that one's
sd35bench score photos --metric clip_score workers=8 threads=4
sd35bench score photos --metric clip_score engine=ray threads=8 ray.address=auto
                                            on the actors of a Ray cluster
""",
        flags=(
            Flag("--metric NAMES", "names, comma-separated; default: the model's own"),
            SINK,
            QUIET,
            VERBOSE,
            RESULTS_DIR,
        ),
        details=_metric_names,
    ),
    "show": Command(
        call=show,
        words=("[STUDY]",),
        about="""Scores what is missing first. Marks the settings that no other is both faster and
better than, and those that `recommend` chose. Columns are named as in --json.

On a narrow terminal columns go in this order: n; threads, where other fields tell the settings
apart; memory; × target; metrics from the last on; × eager. What differs between settings stays,
as words in one column where its columns do not fit. A line names what went; --columns shows it.""",
        examples="""
sd35bench show grid
sd35bench show grid --markdown > grid.md
sd35bench show --latest --sort=-clip_score    the study written last, the best first
sd35bench show grid --columns steps,cfg,clip_score,latency_s
sd35bench show grid --csv > grid.csv
sd35bench show mine --slice category        a table for each value of a column of your prompt file
sd35bench show grid --json | jq '.settings[].latency_s.p50'
""",
        flags=(
            LATEST,
            Flag(
                "--sort COLUMN",
                "order by a column, such as steps or latency_s; =-COLUMN: the highest first",
            ),
            Flag("--columns NAMES", "only these columns, comma-separated"),
            *SLICES,
            Flag("--csv", "print CSV with every column, or with those of --columns"),
            MARKDOWN,
            Flag(
                "--pool-hosts",
                "one row a setting over unlike hosts and devices, with the spread between",
            ),
            RESULTS_DIR,
        ),
    ),
    "recommend": Command(
        call=recommend,
        words=("[STUDY]",),
        about="""A profile says what a setting is for. preview: the best within a quarter of the
vendor's work; balanced: the fastest that is as good as the best, within a margin; final: the same
with a smaller margin. The answers go to results/STUDY/recommended.yaml, which
`sd35bench run from=FILE profile=NAME` takes.""",
        examples="""
sd35bench recommend grid                    preview, balanced and final
sd35bench recommend grid --why              the evidence: other settings, named defaults, commands
sd35bench recommend grid --profile final --snippet diffusers
                                            Python to copy; also: command, api
sd35bench recommend grid --profile preview
sd35bench recommend grid --profile final,mine.yaml
                                            your own limits: the fields of configs/profile/*.yaml
sd35bench recommend grid --markdown > defaults.md
sd35bench recommend grid --plan --margin 0.05
                                            how many images would decide, before they are paid for
sd35bench recommend grid --looks 256        from now on looks at up to 256 prompts hold together
sd35bench recommend grid --confirm          the commands that make the held-out images
sd35bench recommend grid --confirm --run    makes them, and says whether the choice holds there
""",
        flags=(
            Flag(
                "--profile NAMES", "names, or YAML files of your own, comma-separated; default: all"
            ),
            Flag("--why", "print all the evidence"),
            Flag("--snippet KIND", "print to copy: command, diffusers or api"),
            MARKDOWN,
            Flag("--confirm", "print the commands that make held-out images"),
            Flag("--run", "with --confirm: make them now"),
            Flag("--plan", "say how many images would decide; the study is the pilot"),
            Flag(
                "--margin M",
                "with --plan: what may be lost of quality; default: each profile's own",
            ),
            Flag(
                "--power P",
                "with --plan: probability to decide where settings are equal; default: 0.8",
            ),
            Flag(
                "--looks N", "plan to look again as prompts are added, up to N; fixed once a study"
            ),
            *SLICES,
            SINK,
            RESULTS_DIR,
        ),
    ),
    "claims": Command(
        call=claims,
        words=("[STUDY]",),
        about="""Each claim gets a verdict with effect and interval; what the study lacks for one is
named with the command that makes it.""",
        examples="""
sd35bench run experiment=claims && sd35bench claims claims
sd35bench claims claims --markdown > claims.md
""",
        flags=(MARKDOWN, RESULTS_DIR),
    ),
    "report": Command(
        call=report,
        words=("[STUDY...]",),
        about="The file opens offline. First: the answer, the chosen setting's images beside"
        " a default's,\nand quality over latency. Then a grid of images over any two fields.",
        examples="sd35bench report grid                       writes results/grid/report.html\n"
        "sd35bench report grid --images link         writes results/grid/report/index.html\n"
        "sd35bench report before after               both side by side in one page",
        flags=(
            Flag(
                "--images inside|link",
                "inside: one file of at most 20 MB, with a choice of images (the default);"
                " link: a folder whose pages show every image from its file",
            ),
            *SLICES,
            SINK,
            RESULTS_DIR,
        ),
    ),
}
