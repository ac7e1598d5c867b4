"""`sd35bench data`: a study's settings, images and pairs as files for other programs."""

from pathlib import Path

from sd35bench.cli.output import Answer, console
from sd35bench.cli.parser import RESULTS_DIR, Command, Flag, Given
from sd35bench.cli.slices import WHERE, parts_of
from sd35bench.cli.study import open_study, score_missing
from sd35bench.errors import ConfigError

_KINDS = ("--csv", "--parquet", "--dataset")


def data(given: Given) -> Answer:
    """Write what was asked for.

    Raises: ConfigError where nothing was, or a folder for a dataset is not empty.
    """
    from sd35bench import data as tables
    from sd35bench.analysis.summary import show_document
    from sd35bench.analysis.table import read_table

    if not any(map(given.has, _KINDS)):
        raise ConfigError(f"data needs a folder to write to: {', '.join(_KINDS)}; see data --help")
    study = open_study(given.results_dir, given.words[0])
    score_missing(study)
    part = parts_of(given, study)[0][1] if given.has("--where") else study
    table = read_table(part)
    images = tables.images_table(part, table)
    found = {
        "settings": tables.settings_table(show_document(part, table)),
        "images": images,
        "pairs": tables.pairs_table(images, tables.metric_names(table), given.text("--reference")),
    }
    written: list[Path] = []
    for flag, write in (("--csv", tables.write_csv), ("--parquet", tables.write_parquet)):
        folder = given.text(flag)
        if folder is not None:
            written += write(Path(folder), found)
    folder = given.text("--dataset")
    if folder is not None:
        tables.write_dataset(Path(folder), part, images)
        written.append(Path(folder))
    out = console(given.as_json)
    counts = {name: table.num_rows for name, table in found.items()}
    said = ", ".join(f"{count} {name}" for name, count in counts.items())
    out.say(*(f"written: {path}" for path in written))
    out.print(said, markup=False)
    return Answer(document={"study": study.name, **counts, "written": [str(p) for p in written]})


COMMANDS = {
    "data": Command(
        call=data,
        words=("STUDY",),
        about="""A row of settings is a row of `show --json`, a row of images a trial (failed ones
too), a row of pairs two images of one prompt, seed and size: a setting's and the reference
setting's. Seeds are whole uint64 numbers. Scores what is missing first.""",
        examples="""
sd35bench data grid --parquet tables        tables/settings.parquet, images.parquet, pairs.parquet
sd35bench data grid --csv tables            the same as CSV
sd35bench data grid --dataset grid-images   images and metadata.jsonl, as Hugging Face's imagefolder
sd35bench data mine --csv animals --where category=animals
sd35bench data grid --csv tables --reference 0b2f6c1a9d3e@5d41402a
                                            pairs against this setting (`id` in settings.csv)
""",
        flags=(
            Flag("--csv FOLDER", "write settings.csv, images.csv, pairs.csv"),
            Flag("--parquet FOLDER", "write the same as Parquet"),
            Flag("--dataset FOLDER", "a new folder with copies of the images and metadata.jsonl"),
            Flag(
                "--reference ID",
                "the setting of pairs' other side; default: the one with most images, of"
                " several the one with most steps",
            ),
            WHERE,
            RESULTS_DIR,
        ),
    )
}
