"""JSON from a service: decoded strictly, so that whoever reads it meets no surprise."""

import json
import math
from typing import Any

from sd35bench.remote.secrets import Secrets

__all__ = ["MAX_DEPTH", "BadJson", "decode_json"]

MAX_DEPTH = 64
_LARGEST = 2**64


class BadJson(ValueError):
    """Bytes that are no JSON document, or one that nobody should have to handle."""


def decode_json(data: bytes, secrets: Secrets) -> Any:
    """Decode a document, blotting secrets out of its strings and names.

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
        whole = value.encode("utf-8", "replace").decode("utf-8")
        return secrets.blot(whole)
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
