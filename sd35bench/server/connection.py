"""One connection: what a stranger may hold before the key is known, and for how long.

uvicorn gives a connection all the time and memory that it asks for: 1,200 half-sent heads used up
the process's file descriptors, bodies were read before the key was looked at (2 GB), and a body of
1-byte chunks, parsed as fast as it came, stopped the event loop for seconds. So here the head comes
first, whole, within `HEAD_S` seconds and `MOST_HEAD_BYTES`. Nothing of a body is parsed before the
application asks for it, which it does once the key is known, and then `SLICE_BYTES` at a time. A
body that is refused is thrown away unparsed until its client has read the answer.

There is a limit to connections. A new one takes the place of the one that has waited longest
without a request; where all are at work it is answered 503. Refusals are counted, and logged once a
second.

Cost: about 20 µs a request, for finding the end of its head.
"""

import asyncio
import json
import logging
import re
import resource
from typing import Any

import h11
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from sd35bench.server.envelope import log

MOST_CONNECTIONS = 512
SPARE_FILES = 256
"""File descriptors for everything that is not a connection."""
BACKLOG = 64
"""The event loop accepts as many at once, before the oldest can be closed."""
QUEUE = 1024
"""The kernel keeps as many until then; one that it drops is tried again after 1 s, then 3 s."""
NO_PLACE = "too many connections: try again"
HEAD_S = 10.0
MOST_HEAD_BYTES = 16 * 2**10
STALL_S = 30.0
"""A client that takes nothing of its answer for so long is gone."""
LINGER_S = 5.0
MOST_LINGER_BYTES = 32 * 2**20
"""What is read and thrown away so that a client that still sends gets to read its answer."""
READ_BYTES = 32 * 2**10
"""At a time, and so what a connection holds of a body that nobody asked for; asyncio's own 256 KiB
made 130 MB of 512 connections, and turns of the event loop of 100 ms."""
SLICE_BYTES = 4096
"""Of 1-byte chunks, 680 to a slice: about 10 ms of the event loop."""
FREE_FRAMING_BYTES = 2**16
"""From here on more than half of what a chunked body sends must be body."""
LOG_EVERY_S = 1.0
_HEAD_END = re.compile(rb"\r?\n\r?\n")
_LENGTHS = re.compile(rb"\n(content-length|transfer-encoding)[ \t]*:", re.IGNORECASE)


class ConnectionLimit:
    """All connections of one server, and the refusals that are not logged one by one."""

    def __init__(self, most: int = MOST_CONNECTIONS) -> None:
        """`most`: connections; fewer where the process may not have so many files open."""
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        room = most if soft == resource.RLIM_INFINITY else max(16, soft - SPARE_FILES)
        self.most = min(most, room)
        self.open: set[Connection] = set()
        self._waiting: dict[Connection, None] = {}  # in the order in which they began to wait
        self._extra: set[Connection] = set()  # refused, and not closed yet
        self._refused: dict[str, int] = {}
        self._timer: asyncio.TimerHandle | None = None

    def enter(self, connection: "Connection") -> bool:
        """Take a connection in, in place of the longest waiting; says whether there was room."""
        if len(self.open) >= self.most:
            oldest = next(iter(self._waiting), None)
            if oldest is None:
                return False
            self.leave(oldest)
            oldest.drop("pushed out: it waited longest without a request")
        self.open.add(connection)
        return True

    def leave(self, connection: "Connection") -> None:
        """Forget a connection."""
        self.open.discard(connection)
        self._waiting.pop(connection, None)

    def lingers(self, connection: "Connection") -> bool:
        """Whether a refused connection may stay until its client has read the answer."""
        self.waits(connection, True)  # its place can be had
        if connection not in self.open:
            self._extra = {c for c in self._extra if not c.transport.is_closing()}
            if len(self._extra) >= SPARE_FILES // 4:
                return False
            self._extra.add(connection)
        return True

    def waits(self, connection: "Connection", waits: bool) -> None:
        """Say that a connection waits for a head, or no longer does."""
        self._waiting.pop(connection, None)
        if waits and connection in self.open:
            self._waiting[connection] = None

    def count(self, reason: str) -> None:
        """Count what was refused; one line a second says how often."""
        self._refused[reason] = self._refused.get(reason, 0) + 1
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(LOG_EVERY_S, self._log)

    def _log(self) -> None:
        counts, self._refused, self._timer = self._refused, {}, None
        log("refused", level=logging.WARNING, connections=len(self.open), counts=counts)


class _Flow(FlowControl):
    """uvicorn's flow control, which also tells the connection when a body is asked for."""

    def __init__(self, transport: Any, connection: "Connection") -> None:
        super().__init__(transport)
        self._connection = connection

    def resume_reading(self) -> None:
        self.read_paused = False
        self._connection.body_wanted()


class _Closing:
    """A transport whose `close` lets a client that still sends read its answer first."""

    def __init__(self, transport: asyncio.Transport, connection: "Connection") -> None:
        self._transport, self._connection = transport, connection

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def close(self) -> None:
        self._connection.close(self._transport)


class Connection(H11Protocol):
    """uvicorn's protocol behind bounds; `limit` is shared by all connections of a server."""

    def __init__(self, *args: Any, limit: ConnectionLimit, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limit = limit
        self._unread = bytearray()
        self._wanted = self._lingers = self._scheduled = False
        self._lingered = self._raw = self._decoded = 0
        self._left: int | None = None  # of a body whose length was said
        self._head_timer: asyncio.TimerHandle | None = None
        self._end_timer: asyncio.TimerHandle | None = None

    # What the event loop calls -------------------------------------------------------------------

    def connection_made(self, transport: Any) -> None:
        """Take the connection in, or answer 503."""
        transport.max_size = READ_BYTES
        super().connection_made(_Closing(transport, self))  # type: ignore[arg-type]
        self.flow = _Flow(transport, self)
        if not self._limit.enter(self):
            self._refuse(503, NO_PLACE, b"Retry-After: 1\r\n")
            return
        self._limit.waits(self, True)
        self._head_timer = self.loop.call_later(HEAD_S, self._head_late)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        self._limit.leave(self)
        self._cancel_timers()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Keep what came until it is its turn."""
        if self._lingers:
            self._lingered += len(data)
            if self._lingered > MOST_LINGER_BYTES:
                self.transport.abort()
            return
        self._unread += data
        self._advance()

    def eof_received(self) -> None:
        """The client sends no more; after a refusal that is the end."""
        if self._lingers:
            self.transport.abort()

    def pause_writing(self) -> None:
        """The client does not read."""
        super().pause_writing()
        self._end_timer = self.loop.call_later(STALL_S, self.drop, "stalled: it reads no answer")

    def resume_writing(self) -> None:
        """It does again."""
        super().resume_writing()
        if self._end_timer is not None and not self._lingers:
            self._end_timer.cancel()

    # What uvicorn calls --------------------------------------------------------------------------

    def on_response_complete(self) -> None:
        """Close where a body was left unread, else wait for the next head."""
        if self.conn.their_state is h11.SEND_BODY:
            self.transport.close()
            return
        super().on_response_complete()
        self._wanted = False
        if not self.transport.is_closing():
            self._limit.waits(self, True)
            self._advance()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP."""
        self._refuse(400, msg)

    def body_wanted(self) -> None:
        """Parse the body from now on."""
        self._wanted = True
        self.transport.resume_reading()
        self._schedule()

    def close(self, transport: asyncio.Transport) -> None:
        """End the connection; where its client still sends, once it had the time to read."""
        if transport.is_closing() or self._lingers:
            return
        if self.conn.their_state is not h11.SEND_BODY or not transport.can_write_eof():
            transport.close()
            return
        self._linger(transport)

    def drop(self, reason: str) -> None:
        """End the connection at once."""
        self._limit.count(reason)
        self.transport.abort()

    # Heads and bodies ----------------------------------------------------------------------------

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self.loop.call_soon(self._advance_later)

    def _advance_later(self) -> None:
        self._scheduled = False
        self._advance()

    def _advance(self) -> None:
        """Hand on what may be: a whole head, or a slice of a body that is wanted."""
        if self._lingers or self.transport.is_closing():
            return
        state = self.conn.their_state
        if state is h11.IDLE:
            self._take_head()
        elif state is h11.SEND_BODY and self._wanted:
            self._take_slice()
        elif len(self._unread) > SLICE_BYTES:
            self.transport.pause_reading()

    def _take_head(self) -> None:
        found = _HEAD_END.search(self._unread)
        if found is None:
            if len(self._unread) > MOST_HEAD_BYTES:
                self._refuse(431, "the head of the request is too large")
                return
            if self._unread and self._head_timer is None:
                self._head_timer = self.loop.call_later(HEAD_S, self._head_late)
            self.transport.resume_reading()
            return
        head = bytes(self._unread[: found.end()])
        del self._unread[: found.end()]
        if len(head) > MOST_HEAD_BYTES:
            self._refuse(431, "the head of the request is too large")
            return
        # Two lengths are two ends: behind a proxy that reads the other one hides a second request.
        if len(_LENGTHS.findall(head)) > 1:
            self._refuse(400, "send one Content-Length, or Transfer-Encoding, and not both")
            return
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        self._limit.waits(self, False)
        self._raw = self._decoded = 0
        super().data_received(head)
        if self.conn.their_state is h11.SEND_BODY:
            said = [value for name, value in self.headers if name == b"content-length"]
            self._left = int(said[0]) if said else None
        self._schedule()

    def _take_slice(self) -> None:
        if not self._unread:
            self.transport.resume_reading()
            return
        most = SLICE_BYTES if self._left is None else min(HIGH_WATER_LIMIT, self._left)
        part = bytes(self._unread[:most])
        del self._unread[:most]
        if self._left is not None:
            self._left -= len(part)
        before = len(self.cycle.body)
        super().data_received(part)
        self._raw += len(part)
        self._decoded += len(self.cycle.body) - before
        if self._raw > FREE_FRAMING_BYTES and 2 * self._decoded < self._raw:
            self._refuse(400, "the body's chunks are too small")
            return
        if self.conn.their_state is h11.DONE and self.conn.trailing_data[0]:
            self.cycle.keep_alive = False  # a request behind chunks, whose head was not looked at
        if len(self.cycle.body) > HIGH_WATER_LIMIT:
            self._wanted = False  # until the application has taken it
        if self._unread:
            self.transport.pause_reading()
            self._schedule()

    # Ends ----------------------------------------------------------------------------------------

    def _head_late(self) -> None:
        self._head_timer = None
        self._limit.count("late: no whole head in time")
        self.transport.close()

    def _refuse(self, status: int, reason: str, headers: bytes = b"") -> None:
        """Answer without the application, and close."""
        self._limit.count(reason)
        if self.cycle is not None and not self.cycle.response_complete:
            if self.cycle.response_started:
                self.transport.abort()
                return
            self.cycle.disconnected = True  # what the application still says is not sent
            self.cycle.message_event.set()
        body = json.dumps({"error": reason}).encode()
        start = b"HTTP/1.1 %d %b\r\nContent-Type: application/json\r\n" % (
            status,
            STATUS_PHRASES[status],
        )
        length = b"Content-Length: %d\r\nConnection: close\r\n\r\n" % len(body)
        self.transport.write(start + headers + length + body)
        self._linger(self.transport)

    def _linger(self, transport: Any) -> None:
        self._lingers = True
        self._unread.clear()
        self._cancel_timers()
        if not self._limit.lingers(self):
            transport.abort()
            return
        self._end_timer = self.loop.call_later(LINGER_S, transport.abort)
        transport.write_eof()
        transport.resume_reading()

    def _cancel_timers(self) -> None:
        for timer in (self._head_timer, self._end_timer):
            if timer is not None:
                timer.cancel()
        self._head_timer = self._end_timer = None
