"""Sinks for tests: one that keeps what it gets, and some that fail as trackers do."""

from typing import ClassVar

from sd35bench.sinks.base import Sink


class Recorder(Sink):
    """Keeps the calls of all its instances."""

    calls: ClassVar[list[tuple]] = []

    def __init__(self, study, folder):
        super().__init__(study, folder)
        self.calls.append(("open", study, folder))

    def put_setting(self, entry):
        self.calls.append(("setting", entry))

    def put_front(self, front):
        self.calls.append(("front", [entry.id for entry in front]))

    def put_file(self, path):
        self.calls.append(("file", path))

    def close(self):
        self.calls.append(("close",))


class Away(Recorder):
    """Its server does not answer."""

    def put_setting(self, entry):
        raise ConnectionError("no route to host\nand 40 more lines")


class Exits(Recorder):
    """Ends the process, as some do without a login."""

    def put_setting(self, entry):
        raise SystemExit(1)


class Absent(Recorder):
    """Its tracker is not installed."""

    def __init__(self, study, folder):
        import no_such_tracker  # noqa: F401  # pyright: ignore
