"""Predictions on disk: one that was accepted is stored before its client gets the answer.

SQLite in WAL mode with ``synchronous=FULL``: a commit has reached the disk when it returns. A
prediction goes created → starting → processing → success | error | cancelled, and only forward,
except that a server that dies gives what it was making back to the queue, at its old place. One
that has seen the server die `MOST_STARTS` times is reported as failed, or it could kill for ever.

Cost: an accept is one commit (one fsync), a prediction's life four; a poll is one indexed read.
"""

import contextlib
import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from sd35bench.errors import StoreError
from sd35bench.server.settings import Refusal
from sd35bench.types import Request, from_json, to_json

MOST_STARTS = 5

_SCHEMA = """
CREATE TABLE IF NOT EXISTS predictions (
    place INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL,
    model TEXT NOT NULL, load TEXT NOT NULL, input TEXT NOT NULL, request TEXT NOT NULL,
    status TEXT NOT NULL, starts INTEGER NOT NULL DEFAULT 0, to_cancel INTEGER NOT NULL DEFAULT 0,
    price REAL NOT NULL, created_at REAL NOT NULL, started_at REAL, completed_at REAL,
    output TEXT, error_code TEXT, error TEXT, predict_s REAL
);
CREATE TABLE IF NOT EXISTS spent (owner TEXT PRIMARY KEY, usd REAL NOT NULL);
CREATE INDEX IF NOT EXISTS by_owner ON predictions (owner, status);
CREATE INDEX IF NOT EXISTS by_place ON predictions (owner, place);
CREATE INDEX IF NOT EXISTS by_status ON predictions (status, place);
"""
_OPEN = "status IN ('created', 'starting', 'processing')"
_RUNNING = "status IN ('starting', 'processing')"
_COLUMNS = (
    "id, owner, model, load, input, status, price, created_at, started_at, completed_at, output,"
    " error_code, error, predict_s"
)


class Phase(StrEnum):
    """Where a prediction stands, in the protocol's words."""

    CREATED = "created"
    STARTING = "starting"
    PROCESSING = "processing"
    SUCCESS = "success"
    ERROR = "error"
    CANCELLED = "cancelled"

    @property
    def is_over(self) -> bool:
        """Whether nothing more will change."""
        return self in (Phase.SUCCESS, Phase.ERROR, Phase.CANCELLED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """One row as a client may see it; times are seconds since the epoch.

    `load` names the model and backend that it was accepted for; the store fills it in.
    """

    id: str
    owner: str
    model: str
    input: dict[str, Any]
    status: Phase
    price: float
    created_at: float
    load: str = ""
    started_at: float | None = None
    completed_at: float | None = None
    output: str | None = None
    error_code: str | None = None
    error: str | None = None
    predict_s: float | None = None

    @property
    def cost_usd(self) -> float | None:
        """What it cost: only images do; unknown until it is over."""
        if not self.status.is_over:
            return None
        return self.price if self.status is Phase.SUCCESS else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What the generator needs of a prediction."""

    id: str
    request: Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What one owner may have: predictions open at once, and USD in all; ``None`` is no bound."""

    concurrency: int | None
    balance_usd: float | None
    retry_after_s: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """Which predictions to list: the newest first, `limit` from `offset`; ``None`` takes all."""

    status: Phase | None = None
    since: float | None = None
    until: float | None = None
    limit: int = 100
    offset: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """One page of a listing, and how many there are on all pages."""

    predictions: list[Prediction]
    total: int


class PredictionStore:
    """All predictions of one server, in one file; any thread may call, one at a time goes on.

    Every method raises StoreError where the file cannot be read or written.
    """

    def __init__(self, path: Path, load_key: str, now: Callable[[], float] = time.time) -> None:
        """Open or make the file; `load_key` names the model and backend that images come from."""
        self.load_key, self._now = load_key, now
        self._lock = threading.Lock()
        with self._errors():
            self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._db.row_factory = sqlite3.Row
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.executescript(_SCHEMA)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    def recover(self) -> list[str]:
        """Give back to the queue what a dead server was making; returns what is still to do.

        What was accepted for another model or backend is reported as failed: the image would not
        be the one that was asked for.
        """
        with self._change() as db:
            failed = "UPDATE predictions SET status='error', error_code=?, error=?, completed_at=?"
            other = "the server was started again with another model or backend; create it again"
            db.execute(
                f"{failed} WHERE {_OPEN} AND load != ?",
                ("not-served", other, self._now(), self.load_key),
            )
            deadly = f"the server ended {MOST_STARTS} times while it was making this image"
            db.execute(
                f"{failed} WHERE {_RUNNING} AND starts >= ?",
                ("crashed", deadly, self._now(), MOST_STARTS),
            )
            db.execute(
                "UPDATE predictions SET status='cancelled', completed_at=?"
                f" WHERE {_RUNNING} AND to_cancel",
                (self._now(),),
            )
            db.execute(f"UPDATE predictions SET status='created', started_at=NULL WHERE {_RUNNING}")
            rows = db.execute(f"SELECT id FROM predictions WHERE {_OPEN} ORDER BY place")
            return [row["id"] for row in rows]

    def accept(self, prediction: Prediction, request: Request, bounds: Bounds) -> None:
        """Put a prediction at the end of the queue; it is on disk when this returns.

        Raises: Refusal, 429 where its owner has too many open, 402 where the balance does not
        cover it and what is open; then nothing was stored.
        """
        p = prediction
        with self._change() as db:
            self._check(db, p.owner, p.price, bounds)
            db.execute(
                "INSERT INTO predictions (id, owner, model, load, input, request, status, price,"
                " created_at) VALUES (?, ?, ?, ?, ?, ?, 'created', ?, ?)",
                (
                    *(p.id, p.owner, p.model, self.load_key),
                    *(json.dumps(p.input), json.dumps(to_json(request)), p.price, p.created_at),
                ),
            )

    def check(self, owner: str, price: float, bounds: Bounds) -> None:
        """Raise as `accept` would, before work is spent on a request. Raises: Refusal."""
        with self._read() as db:
            self._check(db, owner, price, bounds)

    def take(self) -> Work | None:
        """Take the oldest of the queue, which is "starting" from now on."""
        with self._change() as db:
            row = db.execute(
                "SELECT id, request FROM predictions WHERE status='created' ORDER BY place LIMIT 1"
            ).fetchone()
            if row is None:
                return None
            db.execute(
                "UPDATE predictions SET status='starting', starts=starts+1, started_at=?"
                " WHERE id=?",
                (self._now(), row["id"]),
            )
        return Work(id=row["id"], request=from_json(Request, json.loads(row["request"])))

    def processing(self, prediction_id: str) -> None:
        """Say that the worker has it."""
        self._write(
            "UPDATE predictions SET status='processing' WHERE id=? AND status='starting'",
            prediction_id,
        )

    def put_back(self, prediction_id: str) -> None:
        """Give what was taken back to its old place, as if it had not been started."""
        self._write(
            "UPDATE predictions SET status='created', starts=starts-1, started_at=NULL"
            f" WHERE id=? AND {_RUNNING}",
            prediction_id,
        )

    def succeed(self, prediction_id: str, output: str, predict_s: float) -> None:
        """End a prediction with its image; one that was to be cancelled is, without the image."""
        self._write(
            "UPDATE predictions SET status=iif(to_cancel, 'cancelled', 'success'), predict_s=?,"
            f" output=iif(to_cancel, NULL, ?), completed_at=? WHERE id=? AND {_RUNNING}",
            *(predict_s, output, self._now(), prediction_id),
        )

    def fail(self, prediction_id: str, code: str, reason: str) -> None:
        """End a prediction with the reason why there is no image."""
        self._write(
            "UPDATE predictions SET status=iif(to_cancel, 'cancelled', 'error'),"
            f" error_code=?, error=?, completed_at=? WHERE id=? AND {_RUNNING}",
            *(code, reason, self._now(), prediction_id),
        )

    def is_to_cancel(self, prediction_id: str) -> bool:
        """Whether a client has asked to cancel it since it was taken."""
        with self._read() as db:
            row = db.execute("SELECT to_cancel FROM predictions WHERE id=?", (prediction_id,))
            return bool(row.fetchone()["to_cancel"])

    def cancel(self, owner: str, prediction_id: str) -> Prediction | None:
        """Cancel what waits, mark what runs; returns how it stands now, ``None`` if unknown."""
        with self._change() as db:
            where = "WHERE id=? AND owner=?"
            db.execute(
                "UPDATE predictions SET status='cancelled', completed_at=?"
                f" {where} AND status='created'",
                (self._now(), prediction_id, owner),
            )
            db.execute(
                f"UPDATE predictions SET to_cancel=1 {where} AND {_RUNNING}", (prediction_id, owner)
            )
            return self._get(db, owner, prediction_id)

    def get(self, owner: str, prediction_id: str) -> Prediction | None:
        """Return one of an owner's predictions, ``None`` if it has none of that id."""
        with self._read() as db:
            return self._get(db, owner, prediction_id)

    def listing(self, owner: str, query: Query) -> Listed:
        """Return one page of an owner's predictions, the newest first."""
        conditions: list[str] = ["owner=?"]
        values: list[str | float] = [owner]
        for condition, value in (
            ("status=?", query.status),
            ("created_at>=?", query.since),
            ("created_at<=?", query.until),
        ):
            if value is not None:
                conditions.append(condition)
                values.append(value)
        where = " AND ".join(conditions)
        with self._read() as db:
            total = db.execute(f"SELECT count(*) FROM predictions WHERE {where}", values)
            rows = db.execute(
                f"SELECT {_COLUMNS} FROM predictions WHERE {where}"
                " ORDER BY place DESC LIMIT ? OFFSET ?",
                [*values, query.limit, query.offset],
            )
            found = [_prediction(row) for row in rows]
            return Listed(predictions=found, total=total.fetchone()[0])

    def prune(self, older_than_s: float) -> int:
        """Forget what is over for so long, but not what it cost; returns how many there were."""
        before = self._now() - older_than_s
        over = f"NOT ({_OPEN}) AND completed_at < ?"
        with self._change() as db:
            db.execute(
                "INSERT INTO spent SELECT owner, sum(price) FROM predictions WHERE"
                f" status='success' AND {over} GROUP BY owner"
                " ON CONFLICT (owner) DO UPDATE SET usd = usd + excluded.usd",
                (before,),
            )
            return db.execute(f"DELETE FROM predictions WHERE {over}", (before,)).rowcount

    def queue_length(self) -> int:
        """How many predictions, of all owners, are not over."""
        with self._read() as db:
            return db.execute(f"SELECT count(*) FROM predictions WHERE {_OPEN}").fetchone()[0]

    def _get(self, db: sqlite3.Connection, owner: str, prediction_id: str) -> Prediction | None:
        row = db.execute(
            f"SELECT {_COLUMNS} FROM predictions WHERE id=? AND owner=?", (prediction_id, owner)
        ).fetchone()
        return None if row is None else _prediction(row)

    def _check(self, db: sqlite3.Connection, owner: str, price: float, bounds: Bounds) -> None:
        if bounds.concurrency is not None:
            query = f"SELECT count(*) FROM predictions WHERE owner=? AND {_OPEN}"
            if db.execute(query, (owner,)).fetchone()[0] >= bounds.concurrency:
                raise Refusal(
                    429,
                    f"Too many concurrent predictions: at most {bounds.concurrency} may be open;"
                    " wait for one to end",
                    {"Retry-After": str(bounds.retry_after_s)},
                )
        if bounds.balance_usd is not None:
            query = (
                "SELECT coalesce(sum(price), 0) FROM predictions WHERE owner=?"
                f" AND (status='success' OR {_OPEN})"
            )
            spent = db.execute(query, (owner,)).fetchone()[0]
            pruned = db.execute("SELECT usd FROM spent WHERE owner=?", (owner,)).fetchone()
            spent += 0.0 if pruned is None else pruned[0]
            if spent + price > bounds.balance_usd + 1e-9:
                raise Refusal(402, "Insufficient balance: it does not cover what is in flight")

    @contextlib.contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        """One transaction: all of it on disk at the end, or none of it."""
        with self._lock, self._errors():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def _write(self, change: str, *values: str | float) -> None:
        with self._change() as db:
            db.execute(change, values)

    @contextlib.contextmanager
    def _read(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._errors():
            yield self._db

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as exc:
            raise StoreError(f"the predictions' file cannot be read or written: {exc}") from exc


def _prediction(row: sqlite3.Row) -> Prediction:
    values = dict(row)
    values["input"] = json.loads(values["input"])
    values["status"] = Phase(values["status"])
    return Prediction(**values)
