"""`--sink`: after a verb, its study goes to the trackers that are named."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from sd35bench.cli.output import Answer, console
from sd35bench.cli.parser import Flag, Given
from sd35bench.errors import SD35BenchError
from sd35bench.study.store import Study

SINK = Flag(
    "--sink NAMES",
    "send settings, figures, front and a few images there afterwards: mlflow, tensorboard,"
    " trackio, wandb, comma-separated; a failure there is a warning",
)


def named(given: Given) -> list[str]:
    """The sinks of `--sink`. Raises: ConfigError for a name that is none."""
    from sd35bench.sinks.base import sink_names

    return sink_names(given.text(SINK.name))


def sent(given: Given, found: Answer, names: list[str]) -> Answer:
    """What a verb found, once its study was sent to these sinks."""
    document = found.document if isinstance(found.document, dict) else {}
    path = _study(given, document)
    if path is None:
        return found
    return replace(found, document={**document, "sinks": _send(given, path, document, names)})


def _study(given: Given, document: dict[str, Any]) -> Path | None:
    """The folder of the study that a verb was about; ``None`` where it made none."""
    if given.verb != "run":
        return given.results_dir / given.words[0]
    paths = document.get("paths")
    return None if paths is None else Path(paths["study"])


def _send(
    given: Given, path: Path, document: dict[str, Any], names: list[str]
) -> dict[str, str | None]:
    from sd35bench.sinks.send import send

    try:
        study = Study.open(path.parent, path.name)
        advice = document if "profiles" in document else _advice(given, study)
    except SD35BenchError as exc:
        sent: dict[str, str | None] = dict.fromkeys(names, str(exc))
    else:
        report = document.get("path") if given.verb == "report" else None
        sent = send(names, study, advice, None if report is None else Path(report))
    out = console(given.as_json or given.has("--markdown") or given.has("--snippet"))
    for name, why in sent.items():
        out.say(f"sent to {name}" if why is None else f"warning: not sent to {name}: {why}")
    return sent


def _advice(given: Given, study: Study) -> dict[str, Any] | None:
    """What is on the front; ``None`` where nothing can be compared, and before there are scores."""
    from sd35bench.config import config_dir
    from sd35bench.recommend.advice import recommend_document
    from sd35bench.recommend.profiles import load_profiles

    if given.verb == "run":
        return None
    try:
        return recommend_document(study, load_profiles(config_dir() / "profile"))
    except SD35BenchError:
        return None
