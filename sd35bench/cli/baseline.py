"""`baseline make`: a study as the small file that a gate is held against."""

import argparse
import shutil
from pathlib import Path

from sd35bench.cli.compare import (
    Parser,
    open_named,
    read_with_reruns,
    refusals,
    score_missing,
)
from sd35bench.cli.output import Answer, console
from sd35bench.errors import ConfigError

__all__ = ["baseline"]

EXAMPLES = """examples:
  sd35bench baseline make main baselines/main.json
      scores and latencies of every trial, a few kB, and beside it, where a set metric was scored,
      its images' features (main.features.npz); commit both
  sd35bench baseline make main baselines/main.json --images
      with the images in baselines/main.images/, for a gate that judges drift
"""


def baseline(arguments: list[str], as_json: bool) -> Answer:
    """Write a study's sides as one JSON file.

    Raises: ConfigError for an unknown study, or one without an image.
    """
    from sd35bench.disk import disk_errors, write_atomic
    from sd35bench.gate.baseline import (
        baseline_features,
        baseline_text,
        features_file,
        images_folder,
    )

    found = _parser().parse_args(arguments)
    path = Path(found.file)
    if path.suffix != ".json":
        raise ConfigError(f"FILE={found.file}: must end with .json, so that compare knows it")
    study = open_named(found.study, found.results_dir)
    if not study.done_keys():
        raise ConfigError(f"study {study.name!r} has no image yet; run it first")
    warnings = refusals(study, score_missing(study))
    sides = read_with_reruns(study)
    write_atomic(path, baseline_text(sides).encode())
    features = baseline_features(sides)
    if features is not None:
        write_atomic(features_file(path), features)
    digests = sorted({d for side in sides for d in side.images if d is not None})
    if found.images:
        folder = images_folder(path)
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for digest in digests:
                source = study.image_path(digest)
                shutil.copyfile(source, folder / source.name)
    trials = sum(len(side.pairs) for side in sides)
    out = console(as_json)
    for text in (f"written: {path} ({len(sides)} settings, {trials} trials)", *warnings):
        out.print(text, markup=False, soft_wrap=True)
    return Answer(
        document={
            "study": study.name,
            "path": str(path),
            "settings": len(sides),
            "trials": trials,
            "images": len(digests) if found.images else 0,
            "features": None if features is None else str(features_file(path)),
            "warnings": warnings,
        }
    )


def _parser() -> Parser:
    parser = Parser(
        prog="sd35bench baseline",
        description="Make the small file that `sd35bench compare FILE CANDIDATE` is held against.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("action", choices=["make"], help="make")
    parser.add_argument("study", help="name of the study")
    parser.add_argument("file", metavar="FILE", help="where to write it, ending with .json")
    parser.add_argument("--images", action="store_true", help="copy the images beside it")
    parser.add_argument("--results-dir", default="results", help="folder of the studies")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    return parser
