"""Kinds of values that a configuration holds, and what the command line says of a field."""

import re
from typing import Annotated, Any

from annotated_types import doc
from PIL import ImageColor
from pydantic import AfterValidator, BeforeValidator, Field

_STUDY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def _as_text(value: Any) -> Any:
    """A study may be called 2026; YAML takes that for a number."""
    return f"{value}" if isinstance(value, int | float) and value is not True else value


def workers_count(value: Any) -> Any:
    """Bound a number of workers. Raises: ValueError."""
    if isinstance(value, int) and not 1 <= value <= 1024:
        raise ValueError("must be from 1 to 1024")
    return value


def _plain_text(value: str) -> str:
    if "\0" in value:
        raise ValueError("a null character")
    return value


def _some_text(value: str) -> str:
    if not value:
        raise ValueError("empty")
    return value


def a_colour(value: str) -> str:
    """Refuse what is no colour of CSS. Raises: ValueError."""
    ImageColor.getrgb(value)
    return value


def _study_name(value: str) -> str:
    if _STUDY_NAME.fullmatch(value) is None or value.endswith((".", ".tmp")):
        raise ValueError("not the name of a folder")
    return value


def no_minus_zero(value: float) -> float:
    """Take the sign off a zero."""
    return value + 0.0  # -0.0 would be another trial than 0.0


AnyText = Annotated[str, BeforeValidator(_as_text), AfterValidator(_plain_text), doc("text")]
Text = Annotated[AnyText, AfterValidator(_some_text)]
StudyName = Annotated[
    Text, AfterValidator(_study_name), doc("letters, digits, . _ - (at most 100)")
]


def known(default: Any, means: str, said: str | None = None, *, axis: bool = False) -> Any:
    """A field that the command line knows: its default, what it means, its default in words."""
    plain = "none" if default is None else str(default).lower()
    words = {"said": plain if said is None else said, "axis": axis}
    return Field(default, description=means, json_schema_extra=words)
