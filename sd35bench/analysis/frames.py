"""A pyarrow table as the reader's library has tables."""

import importlib
from typing import Any, Literal

from sd35bench.errors import ConfigError

Form = Literal["arrow", "pandas", "polars"]
FORMS = ("arrow", "pandas", "polars")


def require_form(form: str) -> None:
    """Refuse a form that cannot be had. Raises: ConfigError."""
    if form not in FORMS:
        raise ConfigError(f"as_={form!r}: must be one of {', '.join(FORMS)}")
    name = "pyarrow" if form == "arrow" else form
    try:
        importlib.import_module(name)
    except ImportError as exc:
        raise ConfigError(
            f"as_={form!r}: {name} is not installed; pip install {name}, or take as_='arrow'"
        ) from exc


def convert(table: Any, form: str) -> Any:
    """A pyarrow Table in the reader's library. Raises: ConfigError as `require_form`."""
    require_form(form)
    if form == "pandas":
        return table.to_pandas()
    return importlib.import_module("polars").from_arrow(table) if form == "polars" else table
