"""How often, and how many at once: one service's limits, kept by all processes of a machine.

A service counts what arrives with one key, whoever sends it. So the count lies in a file that
every process of this machine shares: SQLite, one short transaction for each request, nothing kept
open in between, so that a process can die at any instruction. The file is named by a hash of the
machine, the service and the key; neither is in it.

Requests: of any `per_minute` + 1 in a row, the last starts at least a window and a margin after
the first. The margin (1 s of 60) is for the way: looking a name up, TCP and TLS take one request
longer than another, so what left 60 s apart can arrive closer together.

Flights: a row per prediction that waits or runs, in order of arrival; the first `in_flight` rows
are in flight, so nobody overtakes, whichever process is quicker to look. A row of a process that
died counts until its prediction can have ended (its lease), unless the same name is taken up again.

Times are of a clock that all processes share and nobody can set, seconds since boot. A time in the
future was therefore written before a reboot, and counts as the moment of booting, which is the
latest that it can have been. A file that is no database any more counts as every limit used up.
"""

import asyncio
import fcntl
import hashlib
import math
import os
import platform
import random
import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from sd35bench import words
from sd35bench.errors import Paused, StoreError

T = TypeVar("T")
Clock = Callable[[], float]

WINDOW_S = 60.0
MARGIN_S = 1.0
LEASE_S = 600.0
"""Twice `remote.timeout_s`'s default: when a prediction that nobody asks after has surely ended."""
WAITING_S = 10.0
"""A row that waits is looked after several times a second; one not for so long has no process."""
LOOK_S = 0.2
"""How often one looks for a slot that another process gave back; its own wake at once."""
LOCK_S = 30.0
SAY_S = 10.0
"""A wait that is longer says what it waits for."""
SCHEMA = """
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS requests (at REAL NOT NULL);
CREATE INDEX IF NOT EXISTS requests_at ON requests (at);
CREATE TABLE IF NOT EXISTS flights (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT UNIQUE,
    until REAL NOT NULL,
    lease REAL NOT NULL
);
COMMIT;
"""


def boot_clock() -> float:
    """Seconds since boot, the same in all processes; it runs on while the machine sleeps."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()


def limiter_path(base_url: str, key: str) -> Path:
    """Where this machine counts what is sent to a service with a key; only a hash of it is named.

    Below $XDG_STATE_HOME/sd35bench, or ~/.local/state/sd35bench. The machine's name is in the hash
    as well: a home folder can be shared by machines whose clocks have nothing in common.
    """
    state = os.environ.get("XDG_STATE_HOME", "")
    root = Path(state) if Path(state).is_absolute() else Path.home() / ".local" / "state"
    key_hash = hashlib.sha256(key.encode()).hexdigest()[:16]
    place = "\n".join([platform.node(), base_url.rstrip("/"), key_hash])
    return root / "sd35bench" / f"limits-{hashlib.sha256(place.encode()).hexdigest()[:24]}.sqlite"


@dataclass(slots=True)
class Slot:
    """A slot in flight. `abandon` it where the prediction may go on: it then counts to its end."""

    row: int
    abandoned: bool = False

    def abandon(self) -> None:
        """Leave the slot taken until the lease ends, as nobody will say when the prediction did."""
        self.abandoned = True


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitBounds:
    """How a wait for a slot ends early, and what it says.

    `stopped` gives the reason why nobody needs the slot any more; after `limit_s` nobody waits on;
    `say` gets one line once `SAY_S` have passed.
    """

    limit_s: float = math.inf
    stopped: Callable[[], Paused | None] = lambda: None
    say: Callable[[str], None] = lambda _: None


class Limiter:
    """The limits of one service and key, kept with every other process that opens the same file.

    `per_minute` request starts in any `window_s` seconds, `in_flight` predictions at once;
    `lease_s` is how long after its start, or its last renewal, a prediction can still be running.
    One object belongs to one event loop. Raises: StoreError where the file cannot be used.
    """

    def __init__(
        self,
        path: Path,
        *,
        per_minute: int,
        in_flight: int,
        lease_s: float = LEASE_S,
        window_s: float = WINDOW_S,
        margin_s: float = MARGIN_S,
        clock: Clock = boot_clock,
    ) -> None:
        if per_minute < 1 or in_flight < 1:
            raise ValueError(
                f"limits of {per_minute} a minute and {in_flight} in flight: need >= 1"
            )
        self._count = SharedCount(path, per_minute, in_flight, lease_s, window_s + margin_s)
        self._clock = clock
        self._turn = asyncio.Lock()
        self._freed = asyncio.Event()

    async def request(self, bounds: WaitBounds | None = None) -> None:
        """Wait until one more request may leave, and count it; in this process first come first.

        Alone on its key a process whose turn it is waits one window at most, so that its bound is
        two windows at least. Raises: Paused where other processes keep it waiting for longer.
        """
        bounds = WaitBounds() if bounds is None else bounds
        limit_s = max(bounds.limit_s, 2 * self._count.span_s)
        async with self._turn:
            began, said = time.monotonic(), False
            while True:
                wait_s = await asyncio.to_thread(self._count.take, self._clock)
                if wait_s <= 0:
                    return
                waited_s = time.monotonic() - began
                if waited_s >= limit_s:
                    raise Paused(_no_turn(self._count.per_minute, waited_s))
                if waited_s + wait_s >= SAY_S and not said:
                    bounds.say(_no_turn(self._count.per_minute, waited_s + wait_s))
                    said = True
                # Jitter keeps processes that wait for the same moment from meeting at the lock.
                await asyncio.sleep(wait_s + random.uniform(0, 0.01))

    @asynccontextmanager
    async def flight(
        self, name: str | None = None, bounds: WaitBounds | None = None
    ) -> AsyncIterator[Slot]:
        """Hold one slot in flight; waits until there is one, or its bounds end that.

        Raises: Paused where the bounds end the wait.

        `name` is the prediction's, unique on this machine (the study's folder and the trial's key):
        who takes it up again after a crash takes over the slot that it still holds, instead of
        waiting until the lease has ended.
        """
        held = Slot(await self._entered(name, WaitBounds() if bounds is None else bounds))
        renewal = asyncio.create_task(self._renew(held.row))
        try:
            yield held
        finally:
            renewal.cancel()
            if not held.abandoned:
                await self._leave(held.row)

    async def _entered(self, name: str | None, bounds: WaitBounds) -> int:
        row: int | None = None
        began, said = time.monotonic(), False
        while True:
            entering = asyncio.to_thread(self._count.enter, self._clock, row, name)
            entry = asyncio.ensure_future(entering)
            try:
                row, granted = await asyncio.shield(entry)
                if granted:
                    return row
                waited_s = time.monotonic() - began
                if waited_s >= SAY_S and not said:
                    bounds.say(_no_slot(self._count.in_flight, waited_s))
                    said = True
                ended = bounds.stopped()
                if ended is None and waited_s >= bounds.limit_s:
                    ended = Paused(_no_slot(self._count.in_flight, waited_s))
                if ended is not None:
                    await self._leave(row)
                    raise ended
                await self._freed_or(random.uniform(0.5, 1.5) * LOOK_S)
            except asyncio.CancelledError:
                # A thread goes on when its caller does not, and so would its row.
                row, _ = await entry
                await self._leave(row)
                raise

    async def _renew(self, row: int) -> None:
        while True:
            await asyncio.sleep(self._count.lease_s / 2)
            await asyncio.to_thread(self._count.renew, self._clock, row)

    async def _leave(self, row: int) -> None:
        await asyncio.shield(asyncio.to_thread(self._count.leave, self._clock, row))
        self._freed.set()  # wakes those who wait now …
        self._freed.clear()  # … and not those who come later

    async def _freed_or(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._freed.wait()
        except TimeoutError:
            return


def _no_turn(per_minute: int, waited_s: float) -> str:
    return (
        f"no request may leave for {words.number(waited_s, 0)} s:"
        f" remote.requests_per_minute={per_minute} is used up by this run, or by others with the"
        " same service and key"
    )


def _no_slot(in_flight: int, waited_s: float) -> str:
    return (
        f"no slot was free for {words.number(waited_s, 0)} s: {in_flight} predictions, of this run"
        " or of others with the same service and key, may still be at work there"
    )


@dataclass(frozen=True, slots=True)
class SharedCount:
    """The file: each method is one transaction, on a connection of its own."""

    path: Path
    per_minute: int
    in_flight: int
    lease_s: float
    span_s: float

    def take(self, clock: Clock) -> float:
        """Count one request, or say how many seconds to wait before asking again (0: counted)."""
        return self._do(clock, self._take)

    def enter(self, clock: Clock, row: int | None, name: str | None) -> tuple[int, bool]:
        """Queue up, or look again from `row`; says which row it is and whether it is in flight."""
        return self._do(clock, lambda file, now: self._enter(file, now, row, name))

    def renew(self, clock: Clock, row: int) -> None:
        """Start the lease of a slot in flight anew."""
        self._do(clock, lambda file, now: _keep(file, row, now, self.lease_s))

    def leave(self, clock: Clock, row: int) -> None:
        """Give the slot, or the place in the queue, back."""
        self._do(clock, lambda file, _: file.execute("DELETE FROM flights WHERE id = ?", (row,)))

    def _take(self, file: sqlite3.Connection, now: float) -> float:
        file.execute("UPDATE requests SET at = 0 WHERE at > ?", (now,))
        file.execute("DELETE FROM requests WHERE at <= ?", (now - self.span_s,))
        found = file.execute(
            "SELECT at FROM requests ORDER BY at DESC LIMIT 1 OFFSET ?", (self.per_minute - 1,)
        ).fetchone()
        # Rounding can leave a row that is due to the last digit: no wait, but the request counts.
        wait_s = 0.0 if found is None else found[0] + self.span_s - now
        if wait_s > 0:
            return wait_s
        file.execute("INSERT INTO requests (at) VALUES (?)", (now,))
        return 0.0

    def _enter(
        self, file: sqlite3.Connection, now: float, row: int | None, name: str | None
    ) -> tuple[int, bool]:
        file.execute("UPDATE flights SET until = ? + lease WHERE until > ? + lease", (now, now))
        file.execute("DELETE FROM flights WHERE until <= ? AND id IS NOT ?", (now, row))
        if row is None:
            row = _queued(file, now, name)
        ahead = file.execute("SELECT count(*) FROM flights WHERE id < ?", (row,)).fetchone()[0]
        granted = ahead < self.in_flight
        _keep(file, row, now, self.lease_s if granted else WAITING_S)
        return row, granted

    def _do(self, clock: Clock, work: Callable[[sqlite3.Connection, float], T]) -> T:
        """One transaction; a file that proves to be broken is replaced, and the work done again."""
        try:
            try:
                return self._once(clock, work)
            except sqlite3.OperationalError:
                raise  # locked, full, not writable: the file itself is sound
            except sqlite3.DatabaseError:
                self._rebuild(clock())
                return self._once(clock, work)
        except (sqlite3.Error, OSError) as exc:
            raise StoreError(
                f"{self.path}: the requests of all processes are counted here, and {exc}; make its"
                " folder writable, or set XDG_STATE_HOME to one that is"
            ) from exc

    def _once(self, clock: Clock, work: Callable[[sqlite3.Connection, float], T]) -> T:
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with closing(_connect(self.path)) as file:
            file.execute("BEGIN IMMEDIATE")
            result = work(file, clock())  # the clock after the lock: times never run backwards
            file.execute("COMMIT")
            return result

    def _rebuild(self, now: float) -> None:
        """Put a new file in the broken one's place that says: all limits are used up right now."""
        with open(self.path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if _is_sound(self.path):
                return  # another process was first
            fresh = self.path.with_suffix(".new")
            fresh.unlink(missing_ok=True)
            with closing(_connect(fresh)) as file:
                file.execute("BEGIN")
                rows = [(now,)] * self.per_minute
                file.executemany("INSERT INTO requests (at) VALUES (?)", rows)
                slots = [(now + self.lease_s, self.lease_s)] * self.in_flight
                file.executemany("INSERT INTO flights (until, lease) VALUES (?, ?)", slots)
                file.execute("COMMIT")
            # A journal of the broken file would be played back into the new one.
            self.path.with_name(f"{self.path.name}-journal").unlink(missing_ok=True)
            fresh.replace(self.path)


def _queued(file: sqlite3.Connection, now: float, name: str | None) -> int:
    """Return the row that the name has already, or a new one at the end of the queue."""
    found = file.execute("SELECT id FROM flights WHERE name = ?", (name,)).fetchone()
    if found is not None:
        return found[0]
    values = (name, now + WAITING_S, WAITING_S)
    added = file.execute("INSERT INTO flights (name, until, lease) VALUES (?, ?, ?)", values)
    assert added.lastrowid is not None
    return added.lastrowid


def _keep(file: sqlite3.Connection, row: int, now: float, lease: float) -> None:
    """Extend a row, and put it back where another process took it for dead."""
    file.execute(
        "INSERT INTO flights (id, until, lease) VALUES (?, ?, ?)"
        " ON CONFLICT (id) DO UPDATE SET until = excluded.until, lease = excluded.lease",
        (row, now + lease, lease),
    )


def _connect(path: Path) -> sqlite3.Connection:
    """Open the file; one that is not there is made.

    Nothing is synced to the disk: a process that dies takes nothing with it, and what a power cut
    takes is older than the boot that follows.
    """
    file = sqlite3.connect(path, timeout=LOCK_S, isolation_level=None)
    try:
        file.execute("PRAGMA synchronous = OFF")
        if file.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0:
            file.executescript(SCHEMA)
    except BaseException:
        file.close()
        raise
    return file


def _is_sound(path: Path) -> bool:
    try:
        with closing(_connect(path)) as file:
            return file.execute("PRAGMA quick_check").fetchone()[0] == "ok"
    except sqlite3.OperationalError:
        raise
    except sqlite3.DatabaseError:
        return False
