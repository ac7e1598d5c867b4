"""pytest plug-in: the fixture `sd35gate` holds a study against a baseline, as `compare` does.

    def test_model(sd35gate):
        sd35gate("baseline.json", policy="quality")

The test fails where `sd35bench compare` ends with exit code 1 (a regression, or a required
dimension that could not be measured), and where it ends with 2 (nothing to compare), with another
message. An undecided gate passes with a warning, unless the policy says that it fails. Each call
adds JUnit properties, on GitHub an annotation, and what `compare --markdown` writes to the step's
summary. pytest loads this module at every start, so that it imports nothing but pytest.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

CANDIDATE = "sd35_candidate"
RESULTS_DIR = "sd35_results_dir"
_PROPERTY = "sd35gate"


class Undecided(UserWarning):
    """The data do not show whether the candidate is worse by more than the margin."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add what says which study is the candidate: on the command line, or in the ini file."""
    group = parser.getgroup("sd35bench")
    for name, dest, means in (
        ("--sd35-candidate", CANDIDATE, "study that `sd35gate` holds against baselines"),
        ("--sd35-results-dir", RESULTS_DIR, "folder of the studies (results)"),
    ):
        group.addoption(name, dest=dest, metavar="NAME", help=means)
        parser.addini(dest, means)


@pytest.fixture
def sd35gate(request: pytest.FixtureRequest) -> Callable[..., dict[str, Any]]:
    """A function that fails the test where a candidate is worse than a baseline."""

    def gate(
        baseline: str | os.PathLike[str],
        candidate: str | None = None,
        policy: str | os.PathLike[str] = "all",
    ) -> dict[str, Any]:
        """Judge a candidate as `sd35bench compare BASELINE CANDIDATE --policy POLICY` does.

        Args:
            baseline: a file of `sd35bench baseline make`, by its path from pytest's root, or a
                study.
            candidate: a study; default: `--sd35-candidate`, the ini's `sd35_candidate`, or the
                only study that is there.
            policy: a name, or a YAML file.

        Returns: the document of `compare --json`.
        """
        from sd35bench.cli.output import FAILED

        results_dir = request.config.rootpath / (_option(request.config, RESULTS_DIR) or "results")
        name = candidate or _option(request.config, CANDIDATE) or _only_study(results_dir)
        before = _from_root(request.config.rootpath, baseline, ".json")
        asked = _from_root(request.config.rootpath, policy, ".yaml", ".yml")
        document, code = _compare(before, name, asked, results_dir)
        # `record_property` does this, and warns about the default kind of JUnit file.
        request.node.user_properties += _properties(document, code)
        if code == FAILED:
            pytest.fail(_message(document), pytrace=False)
        if document["verdict"] == "undecided":
            warnings.warn(Undecided(_message(document)), stacklevel=2)
        return document

    return gate


def _option(config: pytest.Config, name: str) -> str | None:
    return config.getoption(name) or config.getini(name) or None


def _from_root(root: Path, given: str | os.PathLike[str], *endings: str) -> str:
    """A file's path from pytest's root; a name stays as it is."""
    text = os.fspath(given)
    return str(root / text) if text.endswith(endings) else text


def _only_study(results_dir: Path) -> str:
    from sd35bench.study.store import study_names

    names = study_names(results_dir)
    if len(names) != 1:
        there = ", ".join(names) if names else "none"
        pytest.fail(
            f"sd35gate: which study is the candidate? In {results_dir} there are: {there}; name it"
            " in the call, with --sd35-candidate, or as sd35_candidate in the ini file",
            pytrace=False,
        )
    return names[0]


def _compare(
    baseline: str, candidate: str, policy: str, results_dir: Path
) -> tuple[dict[str, Any], int]:
    """Run the verb; what it refuses as wrong input fails the test and is no regression."""
    from sd35bench.cli import answer
    from sd35bench.cli.output import append_summary
    from sd35bench.errors import ConfigError, MetricError
    from sd35bench.report.gate import comparison_parts

    words = [baseline, candidate, f"--policy={policy}", f"--results-dir={results_dir}"]
    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    try:
        found = answer("compare", words)
    except (ConfigError, MetricError) as exc:
        pytest.fail(f"sd35gate: nothing was judged: {exc}", pytrace=False)
    if summary:
        append_summary(Path(summary), comparison_parts(found.document))
    return found.document, found.exit_code


def _properties(document: Mapping[str, Any], code: int) -> Iterator[tuple[str, str]]:
    """JUnit properties: the verdict, the exit code of `compare`, and each figure on one line."""
    from sd35bench.report.gate import figure_text

    yield _PROPERTY, document["verdict"]
    yield f"{_PROPERTY}.exit_code", str(code)
    yield f"{_PROPERTY}.policy", str(document["policy"])
    for comparison in document["comparisons"]:
        for dimension, found in comparison["dimensions"].items():
            for figure in found["figures"]:
                name = f"{_PROPERTY}.{comparison['title']}.{dimension}.{figure['name']}"
                yield name, figure_text(figure)
    yield f"{_PROPERTY}.message", _message(document)


def _message(document: Mapping[str, Any]) -> str:
    """The verdict, and a line for all that did not pass."""
    from sd35bench.report.gate import failed_gates

    head = (
        f"{document['verdict']}: {document['candidate']} against {document['baseline']},"
        f" policy {document['policy']}, {document['n_pairs']} pairs"
    )
    lines = [
        f"{comparison['title']}: {dimension}: {found['verdict']}: {found['reason']}"
        for comparison in document["comparisons"]
        for dimension, found in comparison["dimensions"].items()
        if found["verdict"] in ("fail", "undecided")
        or (found["required"] and found["verdict"] == "not applicable")
    ]
    return "\n".join([head, *failed_gates(document), *lines])


# GitHub -------------------------------------------------------------------------------------------


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """On GitHub, an annotation at each test whose gate failed or stayed undecided."""
    if os.environ.get("GITHUB_ACTIONS") != "true":
        return
    for reports in list(terminalreporter.stats.values()):
        for report in reports:
            if getattr(report, "when", None) == "call":
                line = annotation(report)
                if line is not None:
                    terminalreporter.write_line(line)


def annotation(report: Any) -> str | None:
    """GitHub's workflow command for a test report; ``None`` where a gate passed or was not asked.

    Source: GitHub, "Workflow commands for GitHub Actions", setting an error message.
    """
    found = dict(report.user_properties)
    if _PROPERTY not in found or found[_PROPERTY] == "pass":
        return None
    level = "error" if report.failed else "warning"
    file, line, test = report.location
    said = {"file": file, "line": str((line or 0) + 1), "title": f"sd35gate: {test}"}
    places = ",".join(f"{name}={_escaped(text, ':,')}" for name, text in said.items())
    return f"::{level} {places}::{_escaped(found[f'{_PROPERTY}.message'])}"


def _escaped(text: str, more: str = "") -> str:
    """Percent-encode what would end a workflow command, or one of its properties."""
    for char in f"%\r\n{more}":
        text = text.replace(char, f"%{ord(char):02X}")
    return text
