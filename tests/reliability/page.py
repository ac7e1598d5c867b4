"""docs/reliability.md, rendered from the results of what ran; no figure is written by hand."""

import math
from collections.abc import Mapping, Sequence
from datetime import datetime

from tests.reliability.experiment import PACKAGES, Experiment, Figure, Result
from tests.reliability.history import FOUND

__all__ = ["page"]

HEAD = """# Reliability of the client and the server

What happens to money, predictions and images when processes die, answers are nonsense, or two
hundred clients come at once: measured on one machine by one command,

    make reliability

It runs every experiment below at full size, keeps what each found in
`results/reliability/NAME.json`, and writes this page from those files: no figure is typed. Of each
run that this page shows, a table says the scale; at 0.2 the n is a fifth, as is its bound. {cost}
`python -m tests.reliability --only NAME` repeats one; `--scale 0.1` makes all of them small, and
the page says so. The same experiments are tests of `make test-slow`, which fail where a bound is
passed. A quick test of the default suite proves that the harness can fail: it plants a prediction
that is paid for twice, one that is lost, an image of somebody else's and a limit that is passed,
and each must be counted.

Bounds stand in the tables; at "0 at most" a single case would have failed the run. No failure in n
independent tries leaves a rate of up to 3/n unrefuted (95 % confidence), which is said where n
counts tries of that kind.
"""
RULE_OF_THREE = 3.0
NONE = "not run"


def page(experiments: Sequence[Experiment], results: Mapping[str, Result]) -> str:
    """Render the page; `results` by name, those of experiments that did not run may be missing."""
    found = [results[each.name] for each in experiments if each.name in results]
    together = sum(result.seconds for result in found)
    cost = f"Added up, the experiments took {together / 60:.0f} minutes; two run at a time."
    parts = [HEAD.format(cost=cost), _summary(experiments, results), _where(found)]
    parts += [_section(each, results.get(each.name)) for each in experiments]
    parts.append(_history())
    return "\n".join(parts)


def _summary(experiments: Sequence[Experiment], results: Mapping[str, Result]) -> str:
    lines = [
        "## In short",
        "",
        "| experiment | verdict | what was bounded |",
        "| --- | --- | --- |",
    ]
    for each in experiments:
        result = results.get(each.name)
        if result is None:
            lines.append(f"| {_link(each)} | {NONE} | |")
            continue
        bounded = "; ".join(f"{f.name}: {_value(f.value)}" for f in result.figures if f.is_bounded)
        verdict = "holds" if result.holds else "**broken**"
        lines.append(f"| {_link(each)} | {verdict} | {bounded} |")
    return "\n".join([*lines, ""])


def _where(results: Sequence[Result]) -> str:
    lines = [
        "## When and on what",
        "",
        "| experiment | at (UTC) | took | cores | scale | commit |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for result in results:
        at = datetime.fromisoformat(result.at).strftime("%Y-%m-%d %H:%M")
        lines.append(
            f"| {result.name} | {at} | {result.seconds:.0f} s |"
            f" {result.environment['cpu_count']} | {result.scale:g} | {_commit(result)} |"
        )
    for said in {_machine(result): None for result in results}:
        lines += ["", said]
    return "\n".join([*lines, ""])


def _section(experiment: Experiment, result: Result | None) -> str:
    e = experiment
    lines = [f"## {e.title}", "", e.did, "", f"**A failure is:** {e.fails_if}", ""]
    if result is None:
        lines.append(f"It was {NONE}.")
    else:
        lines += ["| figure | value | bound |", "| --- | ---: | --- |"]
        lines += [f"| {f.name} | {_value(f.value)} | {_bound(f)} |" for f in result.figures]
        lines += [line for f in result.figures for line in _upper(f, result)]
        for text in result.seen:
            lines += ["", f"Seen: {text}"]
    return "\n".join([*lines, "", f"**Does not show:** {e.shows_not}", ""])


def _upper(figure: Figure, result: Result) -> list[str]:
    """What a zero leaves open, where the figure says over how many tries it was counted."""
    if figure.out_of is None or figure.value != 0:
        return []
    tries = next(f.value for f in result.figures if f.name == figure.out_of)
    if isinstance(tries, str) or tries <= 0:
        return []
    most = 100 * min(1.0, RULE_OF_THREE / tries)
    return ["", f"{figure.name}: 0 of {tries:g}, so below {most:.2g} % with 95 % confidence."]


def _history() -> str:
    lines = ["## What these experiments found", ""]
    lines += [f"- {text}" for text in FOUND] or ["Nothing yet."]
    return "\n".join([*lines, ""])


def _link(experiment: Experiment) -> str:
    anchor = "".join(c for c in experiment.title.lower() if c.isalnum() or c in " -")
    return f"[{experiment.title}](#{anchor.replace(' ', '-')})"


def _value(value: float | str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return "unknown" if math.isnan(value) else f"{value:g}"
    return f"{value:,}"


def _bound(figure: Figure) -> str:
    if figure.least is not None and figure.least == figure.most:
        return f"exactly {figure.least:g}"
    low = [] if figure.least is None else [f"{figure.least:g} at least"]
    high = [] if figure.most is None else [f"{figure.most:g} at most"]
    said = ", ".join(low + high)
    return said if figure.holds else f"**broken:** {said}"


def _commit(result: Result) -> str:
    here = result.environment
    commit = here.get("commit")
    if commit is None:
        return "unknown"
    return f"`{str(commit)[:12]}`" + (" with changes not yet committed" if here["dirty"] else "")


def _machine(result: Result) -> str:
    e = result.environment
    versions = ", ".join(f"{name} {e[name]}" for name in PACKAGES)
    return (
        f"{e['cpu_model']}, {float(e['ram_bytes']) / 1e9:.0f} GB,"
        f" {str(e['os']).split('-')[0]}; Python {e['python']}, sd35bench {e['sd35bench']},"
        f" {versions}."
    )
