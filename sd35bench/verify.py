"""Is a study whole? Every file that a result stands on is read, once, and nothing is written.

Files named by a digest are hashed whether or not they seem unchanged; lines are parsed as the
verbs parse them. A problem names the file, what is wrong with it, and what puts it right.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from sd35bench.analysis.reference import load_reference
from sd35bench.disk import read_regular
from sd35bench.errors import MetricError, StoreError
from sd35bench.remote.ledger import Ledger, ledger_folder
from sd35bench.study.content_files import read_named
from sd35bench.study.store import Study, load_features, load_machine
from sd35bench.types import Record, Session, Status

AGAIN = "run the same command again: it makes it again, or fetches it where a service made it"
SCORE = "delete the file and run sd35bench score"
PAID = "restore the file: it says what was paid for"


@dataclass(slots=True)
class Verification:
    """What was looked at, by kind, and what is wrong: file, what, remedy."""

    checked: Counter[str] = field(default_factory=Counter)
    problems: list[dict[str, str]] = field(default_factory=list)

    @contextlib.contextmanager
    def look(self, kind: str, path: Path, remedy: str) -> Iterator[None]:
        """Count a file; a StoreError becomes a problem with this remedy."""
        self.checked[kind] += 1
        try:
            yield
        except StoreError as exc:
            self.problems.append({"file": str(path), "what": str(exc), "remedy": remedy})


def verify_study(path: Path) -> Verification:
    """Read all of a study's journal, images, features, scores and ledgers.

    Raises: nothing for damage; that is what it returns.
    """
    found = Verification()
    with found.look("study", path / "study.json", 'write {"schema": 1} into it'):
        Study.open(path.parent, path.name)
    study = Study(path)
    records = _journal(study, found)
    if (path / "view").exists():
        with found.look("view", path / "view", "delete the folder: the next reader makes it anew"):
            wrong = study.check_view()
            if wrong is not None:
                raise StoreError(f"the Parquet view is not the journal's: {wrong}")
    _files(study, records, found)
    readers: dict[str, tuple[str, str, Callable[[Path], Any]]] = {
        "scores": ("scores/*.jsonl", SCORE, lambda file: study.check_lines("scores", file)),
        "machine": ("machine/*.json", "delete the file: run measures it again", load_machine),
        "references": ("references/*.npz", SCORE, _load_reference),
        "features": ("features/*/*.npz", SCORE, load_features),
        "ledgers": (
            f"{ledger_folder(path).name}/*.jsonl",
            PAID,
            partial(read_regular, follow=True),
        ),
    }
    for kind, (files, remedy, read) in readers.items():
        for file in sorted(path.glob(files)):
            with found.look(kind, file, remedy):
                read(file)
    if found.checked["ledgers"]:
        with found.look("purchases", ledger_folder(path), "restore the file"):
            intents = Ledger(path, None).intents()
            found.checked["purchases"] = len(intents)
            done = {r.trial.key for r in records}  # what has its record needs no copy
            kept_of = {i.kept for i in intents if i.kept is not None and i.trial not in done}
            for digest in sorted(kept_of):
                kept = path / "refused" / digest
                with found.look("refused", kept, "it is fetched again if the service has it"):
                    read_named(kept)
    return found


def _load_reference(path: Path) -> None:
    try:
        load_reference(path)
    except MetricError as exc:
        raise StoreError(str(exc)) from exc


def _journal(study: Study, found: Verification) -> list[Record]:
    """Read every shard by itself, so that each bad one is named; returns what can be read."""
    records: dict[str, Record] = {}
    sessions: set[str] = set()
    for shard in study.shards():
        with found.look("journal", shard, "restore the file, or move that line out of it"):
            for line in study.check_lines("journal", shard):
                if isinstance(line, Session):
                    sessions.add(line.id)
                elif isinstance(line, Record):
                    before = records.get(line.trial.key)
                    ok = before is not None and before.status is Status.OK
                    if not ok or line.status is Status.OK:
                        records[line.trial.key] = line
    ok = [r for r in records.values() if r.status is Status.OK]
    found.checked["records"] = len(records)
    for name in sorted({r.session_id for r in ok} - sessions):
        shard = study.path / "journal" / f"{name}.jsonl"
        with found.look("sessions", shard, "restore the file"):
            raise StoreError(f"no session {name}, which made images: its shard is not there")
    return ok


def _files(study: Study, records: list[Record], found: Verification) -> None:
    """Hash each file that a record names."""
    named: dict[tuple[str, str], None] = {}
    for record in records:
        request = record.trial.request
        for kind, digest in (
            ("images", record.image),
            ("inits", request.init_image),
            ("latents", record.latents),
        ):
            if digest is not None:
                named[kind, digest] = None
    for kind, digest in named:
        path = study.find_stored(kind, digest)
        with found.look(kind, path, AGAIN):
            read_named(path)


def document(study: str, found: Verification, root: Path) -> dict[str, Any]:
    """What `verify --json` prints; files are named from the study's folder where they are in it."""

    def short(name: str) -> str:
        path = Path(name)
        return str(path.relative_to(root)) if path.is_relative_to(root) else name

    problems = [{**each, "file": short(each["file"])} for each in found.problems]
    checked = dict(sorted(found.checked.items()))
    return {"study": study, "whole": not problems, "checked": checked, "problems": problems}
