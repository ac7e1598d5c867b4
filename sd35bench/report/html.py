"""The report as one HTML file that needs nothing else: no network, no other file, no server.

Jinja2 escapes every value; images are data URIs; the wall's data is JSON whose markup characters
are escaped. A content security policy lets run only the script and the styles that are in the
file, by their hashes, and forbids every connection.
"""

import base64
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from sd35bench.analysis.summary import show_document
from sd35bench.claims.verdicts import claims_document, is_claims_study
from sd35bench.errors import ConfigError, StoreError
from sd35bench.recommend.advice import recommend_document
from sd35bench.report.blocks import split_interval
from sd35bench.report.figures import (
    Estimate,
    decimals_for,
    format_interval,
    format_number,
    latency_decimals,
)
from sd35bench.report.page import Document, build_document
from sd35bench.report.style import read_asset
from sd35bench.store import Study

__all__ = ["content_policy", "embed_json", "render_report", "write_report"]

# ASCII output already writes U+2028 and lone surrogates as escapes.
_ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}


def write_report(study: Study, profiles: Mapping[str, Any] | None = None) -> Path:
    """Write `results/<study>/report.html` and return its path; replaced whole or not at all.

    `profiles` are those of `recommend`; without them the report names no recommended setting.

    Raises: StoreError if it cannot be written.
    """
    show = show_document(study)
    claims = claims_document(study) if is_claims_study(study) else None
    document = build_document(study, show, _recommend(study, profiles), claims)
    path = study.path / "report.html"
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(render_report(document).encode("utf-8", "replace"))
        os.replace(temporary, path)
    except OSError as exc:
        temporary.unlink(missing_ok=True)
        raise StoreError(f"cannot write {path}: {exc.strerror}") from exc
    return path


def _recommend(study: Study, profiles: Mapping[str, Any] | None) -> dict[str, Any] | str | None:
    """The recommendation, or why there is none."""
    if profiles is None:
        return None
    try:
        return recommend_document(study, profiles)
    except ConfigError as exc:
        return f"No recommendation: {exc}"


def render_report(document: Document) -> str:
    """HTML of a document; pure."""
    script, style = (
        Markup(read_asset("report.js")),
        Markup(read_asset("charts.css") + read_asset("report.css")),
    )
    policy = content_policy(script, style)
    template = _environment().get_template("report.html.j2")
    return template.render(
        d=document, policy=policy, script=script, style=style, data=embed_json(document.wall)
    )


def content_policy(script: str, style: str) -> str:
    """Policy under which only this script and this style run, and nothing is fetched."""
    return "; ".join(
        [
            "default-src 'none'",
            "img-src data:",
            f"script-src '{_hash(script)}'",
            f"style-src '{_hash(style)}'",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )


def embed_json(value: Mapping[str, Any]) -> Markup:
    """JSON that is safe inside a `<script>` element, whatever its strings hold."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return Markup("".join(_ESCAPES.get(c, c) for c in text))


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sd35bench.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name, decimals in (("", decimals_for), ("latency_", latency_decimals)):
        environment.filters[name + "value"] = _value_filter(decimals)
        environment.filters[name + "interval"] = _interval_filter(decimals)
    environment.filters["sentence"] = lambda text: text[:1].upper() + text[1:]
    environment.filters["beside"] = lambda text: split_interval(text)[0]
    environment.filters["interval_of"] = lambda text: split_interval(text)[1]
    return environment


def _value_filter(decimals: Callable[[Estimate], int]) -> Callable[[Estimate], str]:
    return lambda e: format_number(e.value, decimals(e))


def _interval_filter(decimals: Callable[[Estimate], int]) -> Callable[[Estimate], str]:
    return lambda e: format_interval(e, decimals(e))


def _hash(content: str) -> str:
    digest = hashlib.sha256(content.encode("utf-8")).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"
