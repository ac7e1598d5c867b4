"""Calls to a hosted service's API: what was certainly not sent, refused, or lost, told apart.

A create costs money and has no idempotency key, so what its caller must know of a failure is
whether it may be sent again:

===================  =================================================  ======================
error                what happened                                      may a create be resent
===================  =================================================  ======================
`NotSent`            lookup, vetting, TCP or TLS failed                 yes
`Refused`            a complete answer: 4xx, or 301, 307, 308           yes, once its cause is gone
`LostAnswer`         any other failure after bytes may have left        no: look it up
`ServerFailed`       a kind of `LostAnswer`: a complete answer of any   no: look it up
                     other status
===================  =================================================  ======================

A 4xx says that the request was not acted upon, a 301, 307 or 308 that it was not processed here.
No 5xx says so: a gateway's 502 or 504 comes while the service behind it may be at work, and an
application's 500 may come after its database has committed. 302 and 303 are how some services
answer a POST that succeeded. No redirect is followed.

A 2xx without a whole, sane JSON document is lost too. Sane: UTF-8, no duplicate names, no NaN or
infinity, no integer over 64 bits (they overflow where floats are made of them), nested no deeper
than `MAX_DEPTH`, so that whoever reads it needs no care for these.

The key leaves only in headers to the base URL's host. Where a service sends it back (error texts
quote it, debug endpoints echo headers), it is masked out of bodies, ids and messages before
anybody sees them, and an exception whose chain quotes it is cut off from its cause.

It may come as it is, in another case, in base64, in hexadecimal or percent-encoded,
and it may be cut. So text is compared in runs: `_RUN` characters in a row of any of these forms,
whatever their case, are masked, together with what continues them. By chance a run of 8 characters
of a random key is in a text of 10^6 characters once in 10^7 texts; whoever uses a word of a
language for a key gets masked words.

Cost: one look-up per character of an answer, 0.1 µs.
"""

import base64
import contextlib
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Any, Self
from urllib.parse import quote

import httpx2

from sd35bench.errors import LostAnswer, RemoteError, UnsafeAddress
from sd35bench.remote.addresses import Unresolved, check_url
from sd35bench.remote.http import Answer, Interrupted, Network, Outgoing, exchange
from sd35bench.remote.providers.base import Call

MAX_RETRY_AFTER_S = 3600.0
_REFUSING_REDIRECTS = (301, 307, 308)
_NO_CONTENT = (204, 205)
_FRAMING = frozenset(
    {"connection", "content-length", "expect", "host", "keep-alive", "te", "trailer"}
    | {"transfer-encoding", "upgrade"}
)
_REASON_CHARS = 300
_SAID = ("error", "errors", "title", "message", "error_message", "msg", "detail", "details", "logs")
MAX_DEPTH = 64
_LARGEST = 2**64
_IMAGE = re.compile(
    r"(data:image/[a-z]+;base64,)?(iVBORw0KGgo|/9j/|UklGR)[A-Za-z0-9+/]{1000,}={0,2}"
)
"""A PNG, JPEG or WEBP file in base64. A key is not looked for in it: 4 MB take 0.4 s, and what
looks like eight characters of the key there is chance, and would be cut out of a paid image."""
_MASK = "[key]"
_SHORTEST = 8
"""Shorter words stand in ordinary answers (a key `local` in every URL of localhost), and no service
hands out such keys."""
_RUN = 8
_SHORT = 16
"""A key below this is masked whole only: half of it is a word (`canary-key` has `canary`)."""


class BadJson(ValueError):
    """Bytes that are no JSON document, or one that nobody should have to handle."""


class NotSent(RemoteError):
    """A request never left this machine; sending it again is safe."""


class _Answered(RemoteError):
    def __init__(
        self, message: str, *, status: int, retry_after_s: float | None, request_id: str | None
    ) -> None:
        super().__init__(message)
        self.status, self.retry_after_s, self.request_id = status, retry_after_s, request_id


class Refused(_Answered):
    """The service answered that it did not act: `status`, `retry_after_s`, `request_id`."""


class ServerFailed(_Answered, LostAnswer):
    """The service answered with a status that leaves open what it did, a 5xx mostly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A 2xx answer; `body` is ``None`` only where the status says that there is none.

    `sent_at` and `received_at` are `time.perf_counter`'s seconds: before the lookup of the host
    (connecting is part of the time), and after the last byte.
    """

    status: int
    body: Any
    request_id: str | None
    retry_after_s: float | None
    sent_at: float
    received_at: float


@dataclass(frozen=True, slots=True)
class Secrets:
    """The words that must not be repeated; its repr does not show them."""

    _runs: Mapping[int, frozenset[str]] = field(repr=False)

    @classmethod
    def of(cls, headers: Mapping[str, str]) -> Self:
        """Take the last word of each header's value: the key, after `Bearer` or the like."""
        last = {words[-1] for value in headers.values() if (words := value.split())}
        runs: dict[int, set[str]] = {}
        for word in last:
            for form in _forms(word) if len(word) >= _SHORTEST else ():
                size = _RUN if len(word) >= _SHORT else len(form)
                found = runs.setdefault(size, set())
                found.update(form[i : i + size] for i in range(len(form) - size + 1))
        return cls({size: frozenset(found) for size, found in runs.items()})

    def mask(self, text: str) -> str:
        """The text with every secret replaced."""
        kept, end = [], 0
        for start, stop in self._found(text):
            if start > end or not kept:
                kept += [text[end:start], _MASK]
            end = max(end, stop)
        return "".join((*kept, text[end:]))

    def safe_cause(self, error: BaseException) -> BaseException | None:
        """The exception if nothing in its chain quotes a secret; nothing if something does."""
        link: BaseException | None = error
        while link is not None:
            text = str(link)
            if self.mask(text) != text:
                return None
            link = link.__cause__ or link.__context__
        return error

    def _found(self, text: str) -> Iterator[tuple[int, int]]:
        """Where secrets are, from left to right; the places may overlap."""
        lowered = "".join(c.lower() if len(c.lower()) == 1 else c for c in text)
        places = (
            (i, i + size)
            for size, runs in self._runs.items()
            for i in range(len(lowered) - size + 1)
            if lowered[i : i + size] in runs
        )
        yield from sorted(places)


def _forms(word: str) -> Iterator[str]:
    """Every form in which a word is looked for, in lower case."""
    data = word.encode()
    yield word.lower()
    yield data.hex()
    yield quote(word, safe="").lower()
    for before in range(3):  # base64 depends on what stands in front, modulo 3
        padded = b"\0" * before + data
        whole = len(padded) // 3 * 4
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            inner = encode(padded).decode()[-(-before * 4 // 3) : whole]
            if len(inner) >= _SHORTEST:
                yield inner.lower()


class Transport:
    """Sends a provider's calls to one base URL, each on a connection of its own (`exchange`)."""

    def __init__(
        self,
        base_url: str,
        *,
        allow_loopback: bool,
        headers: Callable[[], Mapping[str, str]],
        timeout_s: float = 30.0,
        max_body_bytes: int = 4 * 2**20,
        network: Network | None = None,
    ) -> None:
        """Read the URL; `headers` makes the headers that carry the key, for each call anew.

        Raises: UnsafeAddress for a base URL that is neither https nor loopback where allowed.
        """
        check_url(base_url, hosts=None, allow_loopback=allow_loopback)
        self._base_url = base_url.rstrip("/")
        self._allow_loopback = allow_loopback
        self._headers = headers
        self._timeout_s, self._max_body_bytes = timeout_s, max_body_bytes
        self._network = Network() if network is None else network

    async def send(self, call: Call) -> Reply:
        """Send one call, once, and read its JSON answer within the deadline.

        An answer that is an image file is read as its data URI.

        Raises: NotSent, Refused, LostAnswer (ServerFailed among them); nothing else.
        """
        key_headers = dict(self._headers())
        secrets = Secrets.of(key_headers)
        headers = {"Accept": "application/json", **call.headers}
        content = call.content
        if call.json is not None:
            headers["Content-Type"] = "application/json"
            content = json.dumps(call.json, allow_nan=False, separators=(",", ":")).encode()
        outgoing = Outgoing(
            method=call.method,
            url=self._url(call),
            headers={**headers, **key_headers},
            content=content,
        )
        answer = await self._exchange(outgoing, secrets, call.timeout_s, call.max_body_bytes)
        return Reply(
            status=answer.head.status,
            body=_body(answer, secrets),
            request_id=_request_id(answer, secrets),
            retry_after_s=_retry_after_s(answer),
            sent_at=answer.sent_at,
            received_at=answer.received_at,
        )

    async def put(self, url: str, data: bytes, headers: Mapping[str, str]) -> None:
        """Upload bytes to a presigned URL, vetted, with these headers and without the key.

        Raises: UnsafeAddress, NotSent, Refused, LostAnswer.
        """
        vetted = check_url(url, hosts=None, allow_loopback=self._allow_loopback)
        framing = sorted({name.lower() for name in headers} & _FRAMING)
        if framing:
            raise NotSent(f"an upload asks for headers that only HTTP may set: {framing}")
        secrets = Secrets.of(self._headers())
        outgoing = Outgoing(method="PUT", url=vetted, headers=headers, content=data)
        _raise_unless_ok(await self._exchange(outgoing, secrets), secrets)

    def _url(self, call: Call) -> httpx2.URL:
        """The call's URL; a path cannot leave the base URL's host."""
        if not call.path.startswith("/"):
            raise NotSent(f"path {call.path[:100]!a} does not begin with a slash")
        try:
            url = check_url(
                self._base_url + call.path, hosts=None, allow_loopback=self._allow_loopback
            )
            return url.copy_merge_params(call.query) if call.query else url
        except (UnsafeAddress, httpx2.InvalidURL) as exc:
            raise NotSent(f"path {call.path[:100]!a} makes no URL: {exc}") from exc

    async def _exchange(
        self,
        outgoing: Outgoing,
        secrets: Secrets,
        timeout_s: float | None = None,
        max_body_bytes: int | None = None,
    ) -> Answer:
        try:
            return await exchange(
                outgoing,
                allow_loopback=self._allow_loopback,
                timeout_s=self._timeout_s if timeout_s is None else timeout_s,
                max_bytes=self._max_body_bytes if max_body_bytes is None else max_body_bytes,
                network=self._network,
            )
        except Interrupted as exc:
            kind = LostAnswer if exc.sent else NotSent
            raise kind(secrets.mask(_line(str(exc)))) from secrets.safe_cause(exc)
        except (UnsafeAddress, Unresolved) as exc:
            raise NotSent(str(exc)) from exc


def _body(answer: Answer, secrets: Secrets) -> Any:
    """The decoded body of a 2xx answer. Raises: Refused, LostAnswer."""
    _raise_unless_ok(answer, secrets)
    if answer.head.status in _NO_CONTENT:
        return None
    kind = answer.head.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind.startswith("image/") and kind.isascii():
        return f"data:{kind};base64,{base64.b64encode(answer.body).decode()}"
    try:
        return decode_json(answer.body, secrets)
    except BadJson as exc:
        shown = _line(_text(answer, secrets)[:2000])[:80]
        raise LostAnswer(
            f"the service answered {answer.head.status} with what is no usable JSON ({exc}):"
            f" {shown!r}"
        ) from exc


def _raise_unless_ok(answer: Answer, secrets: Secrets) -> None:
    """Raise what an answer other than 2xx means. Raises: Refused, ServerFailed."""
    status = answer.head.status
    if 200 <= status < 300:
        return
    refused = 400 <= status < 500 or status in _REFUSING_REDIRECTS
    kind = Refused if refused else ServerFailed
    told = "refused" if refused else "failed, and may have acted"
    if 300 <= status < 400:
        place = secrets.mask(_line(answer.head.headers.get("location", "nowhere")))[:200]
        told += f" (a redirect to {place}, which is not followed; correct the base URL)"
    reason = _reason(answer, secrets)
    raise kind(
        f"the service {told}: HTTP {status}" + (f": {reason}" if reason else ""),
        status=status,
        retry_after_s=_retry_after_s(answer),
        request_id=_request_id(answer, secrets),
    )


def _reason(answer: Answer, secrets: Secrets) -> str:
    """The service's own words, on one line; empty where it has none."""
    try:
        body = decode_json(answer.body, secrets)
    except BadJson:
        text = _text(answer, secrets)[:4000]
        body = re.sub(r"<(style|script).*?</\1>|<[^>]*>", " ", text, flags=re.DOTALL)
    return secrets.mask(_line("; ".join(_said(body))))[:_REASON_CHARS]


def _text(answer: Answer, secrets: Secrets) -> str:
    """A body as text, masked while it is whole: half a key at a cut would stay."""
    return secrets.mask(answer.body.decode("utf-8", "replace"))


def _said(body: Any) -> list[str]:
    """The sentences of an error body, wherever the usual services put them."""
    if isinstance(body, str):
        return [body]
    if isinstance(body, list):
        return [text for item in body[:3] for text in _said(item)]
    if not isinstance(body, dict):
        return []
    return [text for name in _SAID if name in body for text in _said(body[name])]


def _line(text: str) -> str:
    """Text on one line, without control characters: it may reach a terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _request_id(answer: Answer, secrets: Secrets) -> str | None:
    value = answer.head.headers.get("x-request-id")
    return None if value is None else secrets.mask(_line(value))[:128]


def _retry_after_s(answer: Answer) -> float | None:
    """Seconds until a retry is welcome, in [0, `MAX_RETRY_AFTER_S`]; ``None`` if unsaid or absurd.

    A date is taken relative to the answer's own Date, so that a clock that is wrong at either end
    does not matter; without one, relative to ours.
    """
    value = answer.head.headers.get("retry-after", "").strip()
    if re.fullmatch(r"[+-]?[0-9]+(\.[0-9]*)?", value):
        seconds = float(value)
    else:
        until = _date(value)
        if until is None:
            return None
        now = _date(answer.head.headers.get("date", ""))
        seconds = until - (time.time() if now is None else now)
    return min(max(seconds, 0.0), MAX_RETRY_AFTER_S)


def _date(text: str) -> float | None:
    with contextlib.suppress(ValueError, TypeError, IndexError, OverflowError):
        date = parsedate_to_datetime(text)
        return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
    return None


def decode_json(data: bytes, secrets: Secrets) -> Any:
    """Decode a document, masking secrets in its strings and names.

    Lone surrogates, which no file can hold, become question marks: they may stand in a log text
    beside an image that was paid for.

    Raises: BadJson for anything but one UTF-8 JSON document without duplicate names, NaN,
    infinities, integers over 64 bits, and nesting over `MAX_DEPTH`.
    """
    try:
        document = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_constant,
            parse_float=_finite,
            parse_int=_small,
        )
        return _clean(document, secrets, 0)
    except BadJson:
        raise
    except UnicodeDecodeError as exc:
        raise BadJson(f"not UTF-8 at byte {exc.start}") from None  # it holds all of the bytes
    except json.JSONDecodeError as exc:
        raise BadJson(f"{exc.msg} at character {exc.pos}") from None  # it holds all of the text
    except RecursionError:
        raise BadJson(f"nested deeper than {MAX_DEPTH}") from None  # a thousand frames say no more


def _clean(value: Any, secrets: Secrets, depth: int) -> Any:
    if isinstance(value, str):
        if _IMAGE.fullmatch(value) is not None:
            return value
        whole = value.encode("utf-8", "replace").decode("utf-8")
        return secrets.mask(whole)
    if isinstance(value, dict | list) and depth == MAX_DEPTH:
        raise BadJson(f"nested deeper than {MAX_DEPTH}")
    if isinstance(value, list):
        return [_clean(item, secrets, depth + 1) for item in value]
    if isinstance(value, dict):
        return {
            _clean(name, secrets, depth + 1): _clean(item, secrets, depth + 1)
            for name, item in value.items()
        }
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise BadJson("a name stands twice in one object, so what it means cannot be told")
    return found


def _constant(name: str) -> Any:
    raise BadJson(f"{name} is no JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise BadJson("a number is too large for a float")
    return number


def _small(text: str) -> int:
    # The length first: Python refuses, after some work, to read more than 4,300 digits.
    if len(text) > 21 or abs(int(text)) >= _LARGEST:
        raise BadJson("an integer has more than 64 bits")
    return int(text)
