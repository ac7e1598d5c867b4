"""`compare`, the gate, and `baseline make`, the small file that a gate is held against."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sd35bench.cli.output import (
    DONE,
    FAILED,
    Answer,
    append_summary,
    console,
    print_parts,
    show_progress,
)
from sd35bench.cli.parser import RESULTS_DIR, Command, Flag, Given
from sd35bench.cli.study import open_study, score_missing
from sd35bench.errors import ConfigError, StoreError
from sd35bench.gate.sides import Side
from sd35bench.study.content_files import read_named
from sd35bench.study.store import Study
from sd35bench.words import plural

if TYPE_CHECKING:
    from sd35bench.gate.policy import Policy


def compare(given: Given) -> Answer:
    """Judge a candidate and write what was asked for.

    Raises: ConfigError where nothing can be compared.
    """
    from sd35bench.gate.judge import gate_fails
    from sd35bench.report.gate import comparison_parts

    if given.has("--plan"):
        return _plan(given)
    if len(given.words) < 2:
        raise ConfigError(
            f"expected `sd35bench compare BASELINE CANDIDATE`, not {' '.join(given.words)!r}; see"
            " compare --help (only --plan takes a baseline alone)"
        )
    policy = read_policy(given.flags.get("--policy", "all"), given.config_dir)
    before, after = (Source(name, given.results_dir) for name in given.words)
    rounds = given.whole("--rerun")
    if rounds is not None:
        _rerun(before, after, rounds)
    document = judge(before, after, policy)
    out = console(given.as_json)
    if not given.as_json:
        print_parts(comparison_parts(document))
    out.say(*(f"written: {path}" for path in _write(given, document, before, after)))
    return Answer(document=document, exit_code=FAILED if gate_fails(document) else DONE)


def judge(before: "Source", after: "Source", policy: "Policy") -> dict[str, Any]:
    """Hold a candidate (`after`) against a baseline, scoring first what has no score.

    Raises: ConfigError where nothing can be compared.
    """
    from sd35bench.gate.dimensions import ImageDistances
    from sd35bench.gate.judge import compare_sides

    sides = before.sides(_needs_scores(policy)), after.sides(_needs_scores(policy))
    distances = ImageDistances(before.find_image, after.find_image)
    document = compare_sides(*sides, policy, distances)
    document["warnings"] += list(dict.fromkeys((*before.unscored, *after.unscored)))
    return document


def read_policy(name: str, extra: Path | None = None) -> "Policy":
    """A policy by its name, also in the user's own folder `extra`, or its file.

    Raises: ConfigError.
    """
    from sd35bench.config import config_dir
    from sd35bench.config.files import own_file
    from sd35bench.config.overrides import metric_options
    from sd35bench.gate.policy import load_policy

    if extra is not None:
        metric_options((), extra)  # names of metrics that the folder adds, which margins may name
    return load_policy(own_file("policy", name, extra), config_dir() / "policy")


def _needs_scores(policy: "Policy") -> bool:
    """Speed, memory, failures and changed files need no scores; drift does for its noise floor."""
    drift = policy.dimensions.get("drift")
    return "quality" in policy.dimensions or (
        drift is not None and set(drift.margins) != {"changed"}
    )


def _plan(given: Given) -> Answer:
    """Say what each policy sees at which n; nothing is judged, so the exit code is 0."""
    from sd35bench.config import config_dir
    from sd35bench.gate.dimensions import ImageDistances
    from sd35bench.gate.power import plan_document
    from sd35bench.gate.sides import match_sides
    from sd35bench.report.gate import plan_parts

    folder = config_dir() / "policy"
    named = given.text("--policy")
    names = sorted(p.stem for p in folder.glob("*.yaml")) if named is None else [named]
    policies = [read_policy(name, given.config_dir) for name in names]
    sources = [Source(name, given.results_dir) for name in given.words]
    scored = any(map(_needs_scores, policies))
    sides = [source.sides(scored) for source in sources]
    pairs = match_sides(*sides)[0] if len(sides) == 2 else [(sides[0][0], None)]
    distances = ImageDistances(sources[0].find_image, sources[-1].find_image)
    document = plan_document(*pairs[0], policies, distances)
    out = console(given.as_json)
    if not given.as_json:
        print_parts(plan_parts(document))
    markdown = given.text("--markdown")
    if markdown is not None:
        append_summary(Path(markdown), plan_parts(document))
        out.say(f"written: {markdown}")
    return Answer(document=document)


class Source:
    """A study or a baseline file, by the name that the user gave."""

    def __init__(self, name: str, results_dir: Path) -> None:
        from sd35bench.gate.baseline import images_folder

        self.file = Path(name) if name.endswith(".json") else None
        self.study = None if self.file is not None else open_study(results_dir, name)
        self.images = None if self.file is None else images_folder(self.file)
        self.unscored: list[str] = []

    def sides(self, scored: bool) -> list[Side]:
        """Its settings; `scored` says whether what has no score yet gets one first."""
        from sd35bench.gate.baseline import read_baseline

        if self.file is not None:
            return read_baseline(self.file)
        assert self.study is not None
        if scored:
            self.unscored = refusals(self.study, score_missing(self.study))
        sides = read_with_reruns(self.study)
        if not sides:
            raise ConfigError(f"study {self.study.name!r} has no record yet; run it first")
        return sides

    def find_image(self, digest: str) -> Path | None:
        """Path of an image, or ``None`` where it is gone or damaged."""
        if self.study is not None:
            try:
                return self.study.image_path(digest)
            except StoreError:
                return None
        assert self.images is not None
        found = next(iter(self.images.glob(f"{digest}.*")), None)
        try:
            return None if found is None or not read_named(found) else found
        except StoreError:
            return None

    def captions(self) -> dict[str, str]:
        """What was asked for each image, by digest; nothing where there is only a file."""
        records = [] if self.study is None else self.study.records()
        asked = ((r.image, r.trial.request) for r in records)
        return {i: f"{q.prompt} (seed {q.seed})" for i, q in asked if i is not None}


def read_with_reruns(study: Study) -> list[Side]:
    """A study's settings, with the further process starts of its reruns."""
    from sd35bench.gate.rerun import reruns_of
    from sd35bench.gate.sides import merge_starts, read_sides

    more = [side for again in reruns_of(study) for side in read_sides(again)]
    return [merge_starts(side, more) for side in read_sides(study)]


def refusals(study: Study, scored: dict[str, Any]) -> list[str]:
    """Say why metrics of a study could not be scored; `scored` is what `score_missing` returned."""
    return [f"{study.name}: {m} was not scored: {why}" for m, why in scored["refused"].items()]


def _rerun(before: Source, after: Source, rounds: int) -> None:
    from sd35bench.gate.rerun import rerun

    if before.study is None or after.study is None:
        raise ConfigError("--rerun: a baseline file cannot be run again; name two studies")
    with show_progress() as bar:
        task = bar.add_task("rerun", total=None)

        def show(number: int, total: int, name: str) -> None:
            text = f"rerun {number + 1} of {total}: {name}"
            bar.update(task, completed=number, total=total, description=text)

        rerun(before.study, after.study, rounds, show)


def _write(given: Given, document: dict[str, Any], before: Source, after: Source) -> list[Path]:
    """Write the files that were asked for and return their paths."""
    from sd35bench.disk import write_atomic
    from sd35bench.report.gate import compare_page, comparison_parts, junit_xml

    written = []
    junit, markdown, html = (given.text(name) for name in ("--junit", "--markdown", "--html"))
    if junit is not None:
        written.append(Path(junit))
        write_atomic(written[-1], junit_xml(document).encode())
    if markdown is not None:
        written.append(Path(markdown))
        append_summary(written[-1], comparison_parts(document))
    if html is not None:
        written.append(Path(html))
        page = compare_page(document, before.find_image, after.find_image, after.captions())
        write_atomic(written[-1], page.encode("utf-8", "replace"))
    return written


def baseline(given: Given) -> Answer:
    """Write a study's sides as one JSON file.

    Raises: ConfigError for an unknown study, or one without an image.
    """
    from sd35bench.disk import copy_atomic, write_atomic
    from sd35bench.gate.baseline import (
        baseline_features,
        baseline_text,
        features_file,
        images_folder,
    )

    _, name, file = given.words
    path = Path(file)
    if path.suffix != ".json":
        raise ConfigError(f"FILE={file}: must end with .json, so that compare knows it")
    study = open_study(given.results_dir, name)
    if not study.done_keys():
        raise ConfigError(f"study {study.name!r} has no image yet; run it first")
    warnings = refusals(study, score_missing(study))
    sides = read_with_reruns(study)
    write_atomic(path, baseline_text(sides).encode())
    features = baseline_features(sides)
    if features is not None:
        write_atomic(features_file(path), features)
    digests = sorted({d for side in sides for d in side.images if d is not None})
    if given.has("--images"):
        for source in map(study.image_path, digests):
            copy_atomic(source, images_folder(path) / source.name)
    trials = sum(len(side.pairs) for side in sides)
    counts = f"{plural(len(sides), 'setting')}, {plural(trials, 'trial')}"
    console(given.as_json).say(f"written: {path} ({counts})", *warnings)
    return Answer(
        document={
            "study": study.name,
            "path": str(path),
            "settings": len(sides),
            "trials": trials,
            "images": len(digests) if given.has("--images") else 0,
            "features": None if features is None else str(features_file(path)),
            "warnings": warnings,
        }
    )


_COMPARE = Command(
    call=compare,
    words=("BASELINE", "[CANDIDATE]"),
    about="""Both are studies; the baseline may also be a file of `sd35bench baseline make`.
Compared are latency, memory, failures, quality and drift (how far the images are from each other):
each passes, fails, or stays undecided, with effect, interval, margin and n. What is read off images
that are the same file on both sides passes at any n.

The candidate must have recorded everything that the baseline did; what failed or was given up
counts as failed. For a candidate that is smaller on purpose copy the policy into a file of your
own and set its `coverage`: 0.5 asks for half of the settings and half of each one's pairs.

Exit codes: 0 passed (undecided passes with a warning, unless the policy says otherwise),
1 a regression, a required dimension that could not be measured, or a candidate that lacks
settings or pairs of the baseline, 2 nothing to compare.""",
    examples="""
sd35bench compare main branch                     every dimension, 95 % intervals
sd35bench compare baselines/main.json branch --policy quality
                                                  against a committed file
sd35bench compare main branch --policy exact      a refactor: the same images, bit for bit
sd35bench compare main --plan                     what each policy sees with 16 to 512 prompts
sd35bench compare main branch --policy speed --rerun 5
                                                  five more process starts of both, in turn
sd35bench compare main branch --junit gate.xml --markdown "$GITHUB_STEP_SUMMARY" --html gate.html
""",
    flags=(
        Flag("--policy NAME", "quality, drift, exact, speed, all, or a YAML file; default: all"),
        Flag(
            "--plan",
            "judge nothing; say which harm each policy would see at which n, from a pilot"
            " (BASELINE CANDIDATE) or, with assumed spreads, from BASELINE alone",
        ),
        Flag("--rerun K", "first run both again, K process starts in turn"),
        Flag("--junit FILE", "write JUnit XML"),
        Flag("--markdown FILE", "append Markdown, as a CI step summary takes"),
        Flag("--html FILE", "write a page with the pairs that lost most"),
        RESULTS_DIR,
    ),
)
_BASELINE = Command(
    call=baseline,
    words=("make", "STUDY", "FILE"),
    about="FILE ends with .json. `sd35bench compare FILE CANDIDATE` is held against it.",
    examples="""
sd35bench baseline make main baselines/main.json
    scores and latencies of every trial, a few kB, and beside it, where a set metric was scored,
    its images' features (main.features.npz); commit both
sd35bench baseline make main baselines/main.json --images
    with the images in baselines/main.images/, for a gate that judges drift
""",
    flags=(Flag("--images", "copy the images beside it"), RESULTS_DIR),
)
COMMANDS = {"compare": _COMPARE, "baseline": _BASELINE}
