"""`compare`: the gate. A call, and the forms in which its document is written."""

import argparse
from pathlib import Path
from typing import Any, NoReturn

from sd35bench.cli.output import Answer, console, show_progress
from sd35bench.errors import ConfigError, StoreError
from sd35bench.gate.sides import Side
from sd35bench.store import Study

__all__ = ["Parser", "compare", "open_named", "read_with_reruns", "refusals", "score_missing"]

REGRESSION = 1
EXAMPLES = """examples:
  sd35bench compare main branch                     every dimension, 95 % intervals
  sd35bench compare baselines/main.json branch --policy quality
                                                    against a committed file
  sd35bench compare main branch --policy speed --rerun 5
                                                    five more process starts of both, in turn
  sd35bench compare main branch --junit gate.xml --markdown "$GITHUB_STEP_SUMMARY" --html gate.html

Exit codes: 0 passed (undecided passes with a warning, unless the policy says otherwise),
1 a regression, a required dimension that could not be measured, or a candidate that lacks
settings or pairs of the baseline, 2 nothing to compare.

The candidate must have recorded everything that the baseline did; what failed or was given up
counts as failed. For a candidate that is smaller on purpose copy the policy into a file of your
own and set its `coverage`: 0.5 asks for half of the settings and half of each one's pairs.
"""
MEANS = (
    "Hold a candidate study against a baseline study or file: latency, memory, failures, quality,"
    " drift. Each passes, fails, or stays undecided, with effect, interval, margin and n."
)


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are ours."""

    def error(self, message: str) -> NoReturn:
        """Turn argparse's exit into our error."""
        raise ConfigError(f"{message}; see {self.prog} --help")


def compare(arguments: list[str], as_json: bool) -> Answer:
    """Judge a candidate and write what was asked for.

    Raises: ConfigError where nothing can be compared.
    """
    from sd35bench.config import config_dir
    from sd35bench.gate.distances import ImageDistances
    from sd35bench.gate.judge import compare_sides, gate_fails
    from sd35bench.gate.policy import load_policy
    from sd35bench.report.gate import print_comparison

    found = _parser().parse_args(arguments)
    policy = load_policy(found.policy, config_dir() / "policy")
    before, after = (_Source(name, found.results_dir) for name in (found.baseline, found.candidate))
    if found.rerun is not None:
        _rerun(before, after, found.rerun)
    # Speed, memory and failures need no scores; drift needs them for its noise floor.
    scored = bool({"quality", "drift"} & set(policy.dimensions))
    sides = before.sides(scored), after.sides(scored)
    distances = ImageDistances(before.find_image, after.find_image)
    document = compare_sides(*sides, policy, distances)
    unscored = dict.fromkeys((*before.unscored, *after.unscored))
    document["warnings"] += list(unscored)
    out = console(as_json)
    if not as_json:
        print_comparison(document, out)
    for path in _write(found, document, before, after):
        out.print(f"written: {path}", markup=False, soft_wrap=True)
    return Answer(document=document, exit_code=REGRESSION if gate_fails(document) else 0)


class _Source:
    """A study or a baseline file, by the name that the user gave."""

    def __init__(self, name: str, results_dir: str) -> None:
        from sd35bench.gate.baseline import images_folder

        self.file = Path(name) if name.endswith(".json") else None
        self.study = None if self.file is not None else open_named(name, results_dir)
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
        """Path of an image, or ``None``."""
        if self.study is not None:
            try:
                return self.study.image_path(digest)
            except StoreError:
                return None
        assert self.images is not None
        return next(iter(self.images.glob(f"{digest}.*")), None)

    def captions(self) -> dict[str, str]:
        """What was asked for each image, by digest; nothing where there is only a file."""
        records = [] if self.study is None else self.study.records()
        asked = ((r.image, r.trial.request) for r in records)
        return {i: f"{q.prompt} (seed {q.seed})" for i, q in asked if i is not None}


def open_named(name: str, results_dir: str) -> Study:
    """Open a study. Raises: ConfigError for an unknown name, which is wrong input."""
    try:
        return Study.open(Path(results_dir), name)
    except StoreError as exc:
        raise ConfigError(str(exc)) from exc


def read_with_reruns(study: Study) -> list[Side]:
    """A study's settings, with the further process starts of its reruns."""
    from sd35bench.alternate import reruns_of
    from sd35bench.gate.sides import merge_starts, read_sides

    more = [side for again in reruns_of(study) for side in read_sides(again)]
    return [merge_starts(side, more) for side in read_sides(study)]


def refusals(study: Study, scored: dict[str, Any]) -> list[str]:
    """Say why metrics of a study could not be scored; `scored` is what `score_missing` returned."""
    return [f"{study.name}: {m} was not scored: {why}" for m, why in scored["refused"].items()]


def score_missing(study: Study) -> dict[str, Any]:
    """Score what is missing: the model's default metrics, where there is an image at all.

    Returns: what `score_study` does; at least ``{"refused": {metric: why}}``.
    """
    from sd35bench.score import score_study

    if not study.done_keys():
        return {"refused": {}}
    with show_progress() as bar:
        task = bar.add_task(f"scoring {study.name}", total=None)
        return score_study(
            study, progress=lambda done, total: bar.update(task, completed=done, total=total)
        )


def _parser() -> Parser:
    parser = Parser(
        prog="sd35bench compare",
        description=MEANS,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("baseline", help="a study, or a file of `sd35bench baseline make`")
    parser.add_argument("candidate", help="a study, or such a file")
    parser.add_argument(
        "--policy", default="all", help="quality, drift, speed, all, or a YAML file; default: all"
    )
    parser.add_argument(
        "--rerun", type=int, metavar="K", help="make K more process starts of both, in turn"
    )
    parser.add_argument("--junit", metavar="FILE", help="write JUnit XML")
    parser.add_argument("--markdown", metavar="FILE", help="append Markdown (a step summary)")
    parser.add_argument("--html", metavar="FILE", help="write a page with the worst pairs")
    parser.add_argument("--results-dir", default="results", help="folder of the studies")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    return parser


def _rerun(before: _Source, after: _Source, rounds: int) -> None:
    from sd35bench.alternate import rerun

    if before.study is None or after.study is None:
        raise ConfigError("--rerun: a baseline file cannot be run again; name two studies")
    with show_progress() as bar:
        task = bar.add_task("rerun", total=None)

        def told(number: int, total: int, name: str) -> None:
            text = f"rerun {number + 1} of {total}: {name}"
            bar.update(task, completed=number, total=total, description=text)

        rerun(before.study, after.study, rounds, told)


def _write(
    found: argparse.Namespace, document: dict[str, Any], before: _Source, after: _Source
) -> list[Path]:
    """Write the files that were asked for and return their paths."""
    from sd35bench.disk import disk_errors, write_atomic
    from sd35bench.report.gate import compare_markdown
    from sd35bench.report.junit import junit_xml

    written = []
    if found.junit is not None:
        written.append(Path(found.junit))
        write_atomic(written[-1], junit_xml(document).encode())
    if found.markdown is not None:
        written.append(Path(found.markdown))
        # A step summary is one file that every step adds to.
        with disk_errors(written[-1]), open(written[-1], "a", encoding="utf-8") as file:
            file.write(compare_markdown(document))
    if found.html is not None:
        from sd35bench.report.compare_page import compare_page

        written.append(Path(found.html))
        page = compare_page(document, before.find_image, after.find_image, after.captions())
        write_atomic(written[-1], page.encode("utf-8", "replace"))
    return written
