"""The verbs that read a study: score, show, recommend, claims, report: a call and a print."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from sd35bench.cli.output import Answer, console, show_progress
from sd35bench.errors import ConfigError, StoreError
from sd35bench.store import Study

if TYPE_CHECKING:
    from sd35bench.recommend.profiles import Profile

__all__ = ["VERBS"]

EXAMPLES = {
    "score": """examples:
  sd35bench score grid                        the model's default metrics
  sd35bench score grid --metric fid_nano      one metric
  sd35bench score photos --metric fid metric.fid.reference=coco_stats.npz
  sd35bench score backends --metric drift metric.drift.reference=eager-bf16
                                              how far each backend's images are from that one's
""",
    "show": """examples:
  sd35bench show grid
  sd35bench show grid --markdown > grid.md
  sd35bench show grid --json | jq '.settings[].latency_s.p50'
""",
    "recommend": """examples:
  sd35bench recommend grid                    preview, balanced and final
  sd35bench recommend grid --profile preview
  sd35bench recommend grid --profile final,mine.yaml
                                              your own limits: the fields of configs/profile/*.yaml
  sd35bench recommend grid --markdown > defaults.md
  sd35bench recommend grid --confirm          the commands that make the held-out images
  sd35bench recommend grid --confirm --run    makes them, and says whether the choice holds there
""",
    "claims": """examples:
  sd35bench run experiment=claims && sd35bench claims claims
  sd35bench claims claims --markdown > claims.md
""",
    "report": """examples:
  sd35bench report grid                       writes results/grid/report.html
""",
}
MEANS = {
    "score": (
        "Compute metrics for a study's images; what is there already is not made again. Quality"
        " where there are trained weights, drift from eager where several backends ran."
    ),
    "show": "Print a study's settings as a table; scores what is missing first.",
    "recommend": "Name steps, cfg and prompt_strength per profile, with the evidence.",
    "claims": "Hold the vendor page's claims against a study: a verdict each, with the evidence.",
    "report": "Write one self-contained HTML file that opens offline.",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Turn argparse's exit into our error."""
        raise ConfigError(f"{message}; see {self.prog} --help")


def score(arguments: list[str], as_json: bool) -> Answer:
    """Add metrics to a study."""
    parser = _parser("score")
    parser.add_argument("--metric", help="names, comma-separated; default: the model's own")
    parser.add_argument("override", nargs="*", help="metric.NAME.OPTION=VALUE")
    found = parser.parse_intermixed_args(arguments)  # overrides come after --metric, too
    study = _open(found)
    names = None if found.metric is None else [n for n in found.metric.split(",") if n]
    counts = _score(study, names, found.override)
    out = console(as_json)
    for name, count in counts["scored"].items():
        out.print(f"{name}: {count} new scores", markup=False)
    if counts["total"] == 0:
        out.print("nothing was missing")
    for name, note in counts["notes"].items():
        out.print(f"{name}: {note}", markup=False, soft_wrap=True)
    _print_refused(out, counts)
    return Answer(document=counts)


def show(arguments: list[str], as_json: bool) -> Answer:
    """Print a study's settings."""
    from sd35bench.analysis.summary import show_document

    parser = _parser("show")
    parser.add_argument("--markdown", action="store_true", help="print a table for a document")
    found = parser.parse_args(arguments)
    study = _open(found)
    counts = _score(study)
    document = show_document(study)
    if found.markdown and not as_json:
        from sd35bench.report.markdown import settings_markdown

        print(settings_markdown(document), end="")
    elif not as_json:
        from sd35bench.report.tables import print_settings

        print_settings(document, console())
    _print_refused(console(as_json), counts)
    return Answer(document=document)


def recommend(arguments: list[str], as_json: bool) -> Answer:
    """Name a setting per profile and write recommended.yaml; confirm it on held-out prompts."""
    from sd35bench.cli.confirm import run_confirming
    from sd35bench.recommend.advice import recommend_document
    from sd35bench.report.recommend import write_recommended

    found = _recommend_arguments(arguments)
    profiles = _profiles(found.profile)
    study = _open(found)
    _score(study)
    document = recommend_document(study, profiles)
    exit_code = 0
    if found.run:
        exit_code = run_confirming(document["confirm"]["commands"])
        study = _open(found)
        _score(study)
        document = recommend_document(study, profiles)
    path = write_recommended(study, document)
    if not as_json:
        _print_recommended(document, found)
    console(as_json or found.markdown).print(f"written: {path}", markup=False, soft_wrap=True)
    return Answer(document=document, exit_code=exit_code)


def _profiles(names: str | None) -> dict[str, "Profile"]:
    """Read the profiles that `--profile` names, all of the package's by default.

    Raises: ConfigError for a name or a file that is none, or for two of one name.
    """
    from sd35bench.config import config_dir
    from sd35bench.recommend.profiles import load_profile, load_profiles

    folder = config_dir() / "profile"
    if names is None:
        return load_profiles(folder)
    found: dict[str, Profile] = {}
    for word in dict.fromkeys(names.split(",")):
        profile = load_profile(word, folder)
        if profile.name in found:
            raise ConfigError(
                f"--profile={names}: two profiles are called {profile.name!r}; give one of them"
                " another `name` in its file"
            )
        found[profile.name] = profile
    return found


def _recommend_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = _parser("recommend")
    parser.add_argument(
        "--profile", help="names, or YAML files of your own, comma-separated; default: all"
    )
    parser.add_argument("--markdown", action="store_true", help="print it for a document")
    parser.add_argument(
        "--confirm", action="store_true", help="print the commands that make held-out images"
    )
    parser.add_argument("--run", action="store_true", help="with --confirm: make them now")
    found = parser.parse_args(arguments)
    if found.run and not found.confirm:
        raise ConfigError("--run makes held-out images; give it with --confirm")
    if found.markdown and found.confirm and not found.run:
        raise ConfigError("--markdown prints the recommendation, --confirm commands; give one")
    return found


def _print_recommended(document: dict[str, Any], found: argparse.Namespace) -> None:
    from sd35bench.report.recommend import print_confirming, print_recommendation

    if found.markdown:
        from sd35bench.report.recommend_markdown import recommendation_markdown

        print(recommendation_markdown(document), end="")
    elif found.confirm and not found.run:
        print_confirming(document, console())
    else:
        print_recommendation(document, console())


def claims(arguments: list[str], as_json: bool) -> Answer:
    """Judge the vendor page's claims on a study."""
    from sd35bench.claims.verdicts import METRICS, claims_document

    parser = _parser("claims")
    parser.add_argument("--markdown", action="store_true", help="print tables for a document")
    found = parser.parse_args(arguments)
    study = _open(found)
    _score(study)
    _score_more(study, METRICS)
    document = claims_document(study)
    if found.markdown and not as_json:
        from sd35bench.report.claims import claims_markdown

        print(claims_markdown(document), end="")
    elif not as_json:
        from sd35bench.report.claims import print_claims

        print_claims(document, console())
    return Answer(document=document)


def report(arguments: list[str], as_json: bool) -> Answer:
    """Write the HTML report."""
    from sd35bench.claims.verdicts import METRICS, is_claims_study
    from sd35bench.config import config_dir
    from sd35bench.recommend.profiles import load_profiles
    from sd35bench.report.html import write_report

    study = _open(_parser("report").parse_args(arguments))
    _score(study)
    if is_claims_study(study):
        _score_more(study, METRICS)
    path = write_report(study, load_profiles(config_dir() / "profile"))
    console(as_json).print(f"report: {path.resolve()}", markup=False, soft_wrap=True)
    return Answer(document={"study": study.name, "path": str(path)})


VERBS: dict[str, Callable[[list[str], bool], Answer]] = {
    "score": score,
    "show": show,
    "recommend": recommend,
    "claims": claims,
    "report": report,
}


def _parser(verb: str) -> _Parser:
    parser = _Parser(
        prog=f"sd35bench {verb}",
        description=MEANS[verb],
        epilog=EXAMPLES[verb],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("study", nargs="?", help="name of the study")
    parser.add_argument("--results-dir", default="results", help="folder of the studies")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    return parser


def _open(found: argparse.Namespace) -> Study:
    root = Path(found.results_dir)
    if found.study is None:
        known = sorted(path.parent.name for path in root.glob("*/study.json"))
        there = ", ".join(known) if known else "none yet; make one with sd35bench run"
        raise ConfigError(f"which study? in {root} there are: {there}")
    try:
        study = Study.open(root, found.study)
    except StoreError as exc:  # an unknown name is wrong input, unlike a study that is broken
        raise ConfigError(str(exc)) from exc
    if not study.done_keys():
        raise ConfigError(f"study {study.name!r} has no image yet; see what failed with run again")
    return study


def _score(
    study: Study, names: Sequence[str] | None = None, overrides: Sequence[str] = ()
) -> dict[str, Any]:
    from sd35bench.config.options import metric_options
    from sd35bench.score import score_study

    options = metric_options(overrides)
    with show_progress() as bar:
        task = bar.add_task(f"scoring {study.name}", total=None)

        def moved(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        return score_study(study, names, moved, options)


def _score_more(study: Study, names: Sequence[str]) -> None:
    """Score metrics that are no defaults, where there are images that they can judge."""
    from sd35bench.errors import MetricError

    try:
        _score(study, names)
    except MetricError:  # random weights: no claim about quality is tested on them
        return


def _print_refused(out: Any, counts: dict[str, Any]) -> None:
    for name, why in counts["refused"].items():
        out.print(f"not scored: {name}: {why}", markup=False, soft_wrap=True)
