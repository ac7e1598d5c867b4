"""`sd35bench reference make`: what set metrics are held against, computed once and kept."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd35bench import plugins
from sd35bench.cli.output import Answer, console, show_progress
from sd35bench.cli.parser import RESULTS_DIR, Command, Flag, Given, whole
from sd35bench.errors import ConfigError, StoreError, nearest
from sd35bench.metrics.base import Extractor, is_nano, maker
from sd35bench.metrics.dinov2 import FAMILY
from sd35bench.metrics.extractors import Backbone, choose_extractor
from sd35bench.metrics.make_reference import Choice, from_folder, from_study
from sd35bench.study.store import Study

OPTIONS = (
    *("images", "study", "setting", "extractor", "model", "pretrained", "weights"),
    *("limit", "keep", "seed"),
)


@dataclass(frozen=True, slots=True)
class _Asked:
    """The command line, taken apart."""

    name: str
    options: dict[str, str]
    results: Path

    @property
    def choice(self) -> Choice:
        """How many images, and rows to keep. Raises: ConfigError."""
        given = self.options.items()
        return Choice(**{k: whole(k, v) for k, v in given if k in ("limit", "keep", "seed")})


def reference(given: Given) -> Answer:
    """Make a reference's file.

    Raises: ConfigError for wrong input, MetricError where weights or images are missing.
    """
    asked = _read(given)
    path = asked.results / "references" / f"{asked.name}.npz"
    if path.exists() and not given.has("--force"):
        raise ConfigError(
            f"{path} is there already, and values refer to it; choose another name, or write over"
            " it with --force"
        )
    document = _make(asked, path)
    console(given.as_json).say(*_lines(document))
    return Answer(document=document)


def _read(given: Given) -> _Asked:
    """Read name and options. Raises: ConfigError naming the word and what is allowed."""
    name, options = given.words[1], {}
    for text in given.settings:
        key, _, value = text.partition("=")
        if key not in OPTIONS or not value:
            raise ConfigError(
                f"{text}: no such option; there are: {', '.join(OPTIONS)}{nearest(key, OPTIONS)}"
            )
        options[key] = value
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ConfigError(f"{name!r} is no name: letters, digits, dot, hyphen, underscore")
    if ("images" in options) == ("study" in options):
        raise ConfigError("give either images=DIR or study=NAME")
    if "setting" in options and "study" not in options:
        raise ConfigError(f"setting={options['setting']} needs study=NAME")
    return _Asked(name, options, given.results_dir)


def _make(asked: _Asked, path: Path) -> dict[str, Any]:
    """Embed, reduce, write, and say what was written."""
    from sd35bench.analysis.reference import save_reference

    study = None if "images" in asked.options else _study(asked)
    extractor, label = _extractor(asked, study)
    _ = extractor.name  # says what to do where its weights are missing, before any image is read
    with show_progress() as bar:
        task = bar.add_task(f"embedding for {asked.name}", total=None)

        def moved(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        if study is None:
            folder = Path(asked.options["images"])
            made = from_folder(asked.name, folder, extractor, asked.choice, moved)
        else:
            setting = asked.options.get("setting")
            made = from_study(asked.name, study, extractor, asked.choice, setting, moved)
    digest = save_reference(path, made)
    return {
        "name": made.name,
        "path": str(path),
        "digest": digest,
        "n": made.gaussian.n,
        "features": 0 if made.features is None else len(made.features),
        "label": label,
        "source": made.source,
        "min_images": extractor.min_images,
        "provenance": made.provenance,
    }


def _study(asked: _Asked) -> Study:
    """Open the study, and let the guards look at its images."""
    from sd35bench.score import score_study

    try:
        study = Study.open(asked.results, asked.options["study"])
    except StoreError as exc:  # an unknown name is wrong input, unlike a study that is broken
        raise ConfigError(f"study={asked.options['study']}: {exc}") from exc
    score_study(study, [])
    return study


def _extractor(asked: _Asked, study: Study | None) -> tuple[Extractor, str]:
    given = asked.options
    name = given.get("extractor")
    if name is None and study is not None:
        models = {maker(r) for r in study.records()}
        name = "nano" if models and all(map(is_nano, models)) else None
    name = "inception" if name is None else name
    if name not in ("inception", "nano", "clip", FAMILY):
        raise ConfigError(f"extractor={name}: must be one of inception, nano, clip, {FAMILY}")
    if name != FAMILY and (name == "clip") != ("model" in given):
        raise ConfigError("extractor=clip and model=NAME|local-dir:PATH belong together")
    backbone = Backbone(name, given.get("model"), given.get("pretrained"), given.get("weights"))
    return choose_extractor(name, backbone)


def _lines(document: dict[str, Any]) -> list[str]:
    said = [f"{document['name']}: {document['source']}, embedded by {document['label']}"]
    if document["n"] < document["min_images"]:
        said.append(
            f"for kernel distances only: a Fréchet distance on {document['label']} needs"
            f" {document['min_images']} images, here are {document['n']}"
        )
    said.append(f"written: {document['path']} (digest {document['digest'][:16]})")
    said.append(
        "use it: "
        + plugins.command(
            f"score STUDY --metric kid_{document['label']} metric.kid.reference={document['path']}"
        )
    )
    return said


COMMANDS = {
    "reference": Command(
        call=reference,
        words=("make", "NAME"),
        settings="images=DIR|study=NAME [OPTION=VALUE ...]",
        about="""Embeds the images once and writes RESULTS/references/NAME.npz: mean and covariance,
features, and where they came from (images' digest, extractor with its weights' digest, resizing,
versions).

Options:
  images=DIR        a folder of images, and the folders in it
  study=NAME        the images of a study's setting; setting=ID where it has several
  extractor=        inception, nano, clip or dinov2; default: nano for a study of nano, else
                    inception
  model=            of clip: an open_clip name; of dinov2: a Hub id (default
                    facebook/dinov2-large); or local-dir:PATH of either
  pretrained=       its tag or checkpoint's path
  weights=          of extractor=inception: torch-fidelity's checkpoint; default: torch's cache
  limit=N           take N of the images, drawn with seed=
  keep=N            rows of features to keep, drawn with seed=; default: 10000
  seed=N            of both draws; default: 0""",
        examples="""
sd35bench reference make coco images=coco/val2017 limit=5000
sd35bench score photos --metric fid,kid metric.fid.reference=results/references/coco.npz \\
    metric.kid.reference=results/references/coco.npz
sd35bench reference make baseline study=grid setting=1f3a extractor=nano
""",
        flags=(Flag("--force", "write over a reference of this name"), RESULTS_DIR),
    )
}
