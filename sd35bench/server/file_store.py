"""Files that the server hands out and takes in: outputs, uploads, and the tickets for uploads.

A name is the permission: 128 random bits that only its owner knows, so that reading needs no
key and a link works in a browser. Uploading needs a ticket, made for one content type, good for
one image and fifteen minutes; its secret lies hashed on disk. Age is the file's modification time,
so a restart forgets nothing and extends nothing.

    outputs/<prediction>-<random>.webp      uploads/<random>.png      tickets/<random>.png.json
"""

import contextlib
import hashlib
import hmac
import json
import os
import re
import secrets
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from sd35bench.disk import disk_errors, write_atomic
from sd35bench.errors import SD35BenchError
from sd35bench.remote.images import BadImage, check_image

CONTENT_TYPES = {
    "image/jpeg": "jpg",
    "image/jpg": "jpg",
    "image/png": "png",
    "image/webp": "webp",
}
"""What may be uploaded, and the suffix it is stored under; the second spelling is a common slip."""

TICKET_LIFETIME_S = 900.0
_MEDIA = {"jpg": "image/jpeg", "png": "image/png", "webp": "image/webp"}
_NAME = re.compile(r"[A-Za-z0-9_-]{20,120}\.(?:png|jpg|webp)", re.ASCII)
_PREDICTION = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)
_TOKEN_BYTES = 16
_TORN_S = 3600.0
"""A temporary file older than this belongs to no write that still runs."""


class BadUpload(SD35BenchError):
    """What was uploaded is not the image that the ticket was made for."""


class TicketRefused(SD35BenchError):
    """A ticket is unknown, expired or used, or its secret is wrong; which one stays unsaid."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """Leave to upload one image: PUT its bytes to `put_path` with `headers`, then `public_path`.

    Both paths begin with a slash; `put_path` carries the secret. `expires_at` is in seconds since
    the epoch.
    """

    id: str
    put_path: str
    public_path: str
    expires_at: float
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """A file as it is served; `expires_in_s` is the time until it is removed."""

    name: str
    data: bytes
    content_type: str
    expires_in_s: float


class FileStore:
    """Outputs and uploads of one server in one folder; one process writes it.

    Methods block on the disk: call them from a thread. Lifetimes are in seconds, `now` gives
    seconds since the epoch.
    """

    def __init__(
        self,
        folder: Path,
        *,
        output_lifetime_s: float,
        upload_lifetime_s: float,
        max_upload_bytes: int,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Use `folder`, made if need be for this user alone. Raises: DiskFull, StoreError."""
        self.max_upload_bytes = max_upload_bytes
        self._now = now
        self._lifetimes_s = {
            "outputs": output_lifetime_s,
            "uploads": upload_lifetime_s,
            # A ticket outlives no upload, or it could be used a second time.
            "tickets": min(TICKET_LIFETIME_S, upload_lifetime_s),
        }
        self._folder = folder
        self._commit = threading.Lock()
        with disk_errors(folder):
            for name in self._lifetimes_s:
                (folder / name).mkdir(mode=0o700, parents=True, exist_ok=True)

    def put_output(self, prediction_id: str, data: bytes, suffix: str) -> str:
        """Store a prediction's image and return its URL's path.

        `suffix` is "png", "jpg" or "webp", with or without its dot. The random part is new each
        time: who knows a prediction's id still cannot guess its image.

        Raises: DiskFull, StoreError; ValueError for an id or suffix that no prediction has.
        """
        bare = suffix.removeprefix(".")
        if bare not in _MEDIA or not _PREDICTION.fullmatch(prediction_id):
            raise ValueError(f"no output is named {prediction_id!r} with suffix {suffix!r}")
        name = f"{prediction_id}-{secrets.token_urlsafe(_TOKEN_BYTES)}.{bare}"
        self._write(self._folder / "outputs" / name, data)
        return f"/outputs/{name}"

    def presign(self, content_type: str) -> Ticket:
        """Make a ticket to upload one image of a content type (a key of `CONTENT_TYPES`).

        Raises: DiskFull, StoreError; ValueError for another content type.
        """
        if content_type not in CONTENT_TYPES:
            known = ", ".join(CONTENT_TYPES)
            raise ValueError(f"content_type {content_type!r} is not taken: use one of {known}")
        ticket_id = secrets.token_urlsafe(_TOKEN_BYTES)
        secret = secrets.token_urlsafe(_TOKEN_BYTES)
        name = f"{ticket_id}.{CONTENT_TYPES[content_type]}"
        expires_at = self._now() + self._lifetimes_s["tickets"]
        kept = {"content_type": content_type, "secret_sha256": _digest(secret.encode())}
        self._write(self._folder / "tickets" / f"{name}.json", json.dumps(kept).encode())
        return Ticket(
            id=ticket_id,
            put_path=f"/uploads/{name}?token={secret}",
            public_path=f"/uploads/{name}",
            expires_at=expires_at,
            headers={"Content-Type": content_type},
        )

    def ticket_content_type(self, name: str, secret: str) -> str:
        """Return the content type that a ticket was made for. Raises: TicketRefused."""
        refused = TicketRefused(
            "this upload address is unknown, expired or used: ask POST /v1/upload/presign for"
            " another"
        )
        path = self._alive("tickets", name, ".json")
        if path is None:
            raise refused
        try:
            kept = json.loads(path.read_bytes())
        except (OSError, ValueError):
            raise refused from None
        if not hmac.compare_digest(kept["secret_sha256"], _digest(secret.encode())):
            raise refused
        return kept["content_type"]

    def put_upload(self, name: str, secret: str, data: bytes) -> None:
        """Store what a ticket was made for; the same bytes again change nothing.

        So a client whose answer was lost may send once more, and nobody can replace an image that
        a prediction already names.

        Raises: TicketRefused, BadUpload (not one whole PNG, JPEG or WebP image, or not of the
        ticket's content type), DiskFull, StoreError.
        """
        suffix = CONTENT_TYPES[self.ticket_content_type(name, secret)]
        found = _format(data)
        if found != suffix:
            raise BadUpload(f"the upload is {found}, its content type says {suffix}: presign anew")
        path = self._folder / "uploads" / name
        with self._commit:
            if not path.exists():
                self._write(path, data)
            elif path.read_bytes() != data:
                raise TicketRefused("this upload address was used for another image: presign anew")

    def read(self, kind: str, name: str) -> StoredFile | None:
        """Return a file of "outputs" or "uploads"; ``None`` if it never was, or is too old."""
        path = self._alive(kind, name)
        if path is None:
            return None
        try:
            data, born = path.read_bytes(), path.stat().st_mtime
        except OSError:
            return None  # swept in between
        return StoredFile(
            name=name,
            data=data,
            content_type=_MEDIA[path.suffix.removeprefix(".")],
            expires_in_s=max(born + self._lifetimes_s[kind] - self._now(), 0.0),
        )

    def read_upload(self, path: str) -> bytes | None:
        """Return the image at an upload's or an output's URL path; ``None`` if there is none."""
        found = re.fullmatch(r"/(uploads|outputs)/([^/]+)", path)
        file = None if found is None else self.read(found[1], found[2])
        return None if file is None else file.data

    def sweep(self) -> int:
        """Remove expired files, and what a killed write left; returns how many."""
        return sum(1 for path in self._expired() if _unlink(path))

    def _expired(self) -> Iterator[Path]:
        now = self._now()
        for kind, lifetime_s in self._lifetimes_s.items():
            for path in (self._folder / kind).iterdir():
                limit_s = _TORN_S if path.suffix == ".tmp" else lifetime_s
                with contextlib.suppress(FileNotFoundError):
                    if path.stat().st_mtime + limit_s <= now:
                        yield path

    def _alive(self, kind: str, name: str, ending: str = "") -> Path | None:
        """The path of a file that exists and is young enough; names that escape have no file."""
        if kind not in self._lifetimes_s or not _NAME.fullmatch(name):
            return None
        path = self._folder / kind / f"{name}{ending}"
        try:
            status = path.lstat()
        except OSError:
            return None
        is_file = stat.S_ISREG(status.st_mode)
        return path if is_file and self._now() < status.st_mtime + self._lifetimes_s[kind] else None

    def _write(self, path: Path, data: bytes) -> None:
        write_atomic(path, data)
        now = self._now()
        with disk_errors(path):
            os.utime(path, (now, now))
            path.chmod(0o600)


def _format(data: bytes) -> str:
    try:
        return check_image(data).format
    except BadImage as exc:
        raise BadUpload(f"the upload is not taken: {exc}") from exc


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _unlink(path: Path) -> bool:
    try:
        path.unlink()
    except OSError:
        return False
    return True
