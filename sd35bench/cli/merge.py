"""`sd35bench merge`: studies from machines that share nothing, united in one."""

from pathlib import Path
from typing import Any

from sd35bench.cli.output import Answer, console
from sd35bench.cli.parser import RESULTS_DIR, Command, Flag, Given
from sd35bench.errors import ConfigError
from sd35bench.study.store import Study

SHOWN = 10


def merge(given: Given) -> Answer:
    """Unite studies; trials in which they disagree are named.

    Raises: ConfigError where a source is no study, StudyLocked where something writes to one.
    """
    from sd35bench.study.merge import merge_document, merge_studies

    name = given.text("--into")
    if name is None or "/" in name:
        raise ConfigError("merge needs the name of the study to unite in, --into NAME")
    sources = [_find(given.results_dir, word) for word in given.words]
    target = given.results_dir / name
    found = merge_studies(sources, target)
    document = merge_document(found, sources, Study.open(given.results_dir, name))
    _print(console(given.as_json), document)
    return Answer(document=document)


def _find(root: Path, word: str) -> Path:
    """A source by its name in the results folder, or by its path."""
    return next((p for p in (root / word, Path(word)) if (p / "study.json").is_file()), Path(word))


def _print(out: Any, document: dict[str, Any]) -> None:
    def say(text: str) -> None:
        out.print(text, markup=False, soft_wrap=True)

    for conflict in document["conflicts"][:SHOWN]:
        sides = "; ".join(
            f"{s['study']}: {s['status']} {(s['image'] or '')[:12]}" for s in conflict["sides"]
        )
        counts = conflict["counts"]
        said = f"{counts['status']} {(counts['image'] or '')[:12]}".strip()
        say(f"conflict in trial {conflict['key']}: {sides} → {said} counts")
    more = len(document["conflicts"]) - SHOWN
    if more > 0:
        say(f"and {more} more conflicts; --json names all")
    for text in document["damaged"]:
        say(f"damaged, not copied: {text}")
    for kind in ("renamed", "left_out"):
        for text in document[kind]:
            say(f"{kind.replace('_', ' ')}: {text}")
    copied = ", ".join(f"{n} {kind}" for kind, n in document["copied"].items())
    say(
        f"study {document['study']}: {document['records']} trials,"
        f" {document['duplicates']} in several studies alike, {len(document['conflicts'])} in"
        f" conflict; copied: {copied or 'nothing, all was there'}"
    )


COMMANDS = {
    "merge": Command(
        call=merge,
        words=("STUDY", "[STUDY ...]"),
        about="""Studies are named, or given as paths of folders that came from other machines.
Nothing of them is changed. A trial that several have is kept once: an image wins over a failure,
else the newest shard does; trials with unlike images or statuses are named. An interrupted merge
is finished by the same command. Studies that something writes to are refused.""",
        examples="""
sd35bench merge gpu1 gpu2 --into all
sd35bench merge /mnt/a/results/grid /mnt/b/results/grid --into grid
sd35bench merge more --into grid            adds to a study that is there
""",
        flags=(Flag(name="--into", value="NAME", means="the study to unite in"), RESULTS_DIR),
    )
}
