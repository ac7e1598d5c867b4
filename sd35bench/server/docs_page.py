"""The OpenAPI document as one page of plain HTML: no script, and nothing from another host.

FastAPI's own page loads its program from a content delivery network, which is not there offline.
"""

import json
from collections.abc import Mapping
from html import escape
from typing import Any

__all__ = ["docs_page"]

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h2 { font-size: 1.1rem; margin: 2rem 0 .3rem } code, pre { font-family: ui-monospace, monospace }
pre { background: #f4f4f4; padding: .8rem; overflow-x: auto; font-size: .85rem }
table { border-collapse: collapse } td, th { text-align: left; padding: .2rem 1rem .2rem 0;
vertical-align: top } .method { font-weight: 700 }
@media (prefers-color-scheme: dark) { body { background: #151515; color: #eee }
pre { background: #222 } a { color: #8cf } }
"""


def docs_page(document: Mapping[str, Any], has_keys: bool) -> str:
    """Render every operation with its parameters, body and answers."""
    keys = (
        "Routes under /v1 want a key: <code>X-API-Key: KEY</code> or"
        " <code>Authorization: Bearer KEY</code>."
        if has_keys
        else "This server asks for no key."
    )
    title = escape(document["info"]["title"])
    parts = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>',
        f"<main><h1>{title}</h1><p>{escape(document['info']['description'])}</p><p>{keys}"
        ' The same as a document: <a href="/openapi.json">/openapi.json</a>.'
        ' To try a prompt by hand: <a href="/">the page</a>.</p>',
    ]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            parts.append(_operation(method, path, operation))
    parts.append("</main></body></html>")
    return "\n".join(parts)


def _operation(method: str, path: str, operation: Mapping[str, Any]) -> str:
    word = escape(method.upper())
    parts = [
        f'<section><h2><span class="method">{word}</span> <code>{escape(path)}</code></h2>',
        f"<p>{escape(operation.get('summary', ''))}</p>",
        _parameters(operation.get("parameters", [])),
        _body(operation.get("requestBody", {})),
        _answers(operation["responses"]),
        "</section>",
    ]
    return "\n".join(part for part in parts if part)


def _parameters(parameters: list[Mapping[str, Any]]) -> str:
    rows = [
        f"<tr><td><code>{escape(p['name'])}</code></td><td>in {escape(p['in'])}</td>"
        f"<td>{escape(p.get('description', ''))}</td></tr>"
        for p in parameters
    ]
    return f"<table>{''.join(rows)}</table>" if rows else ""


def _body(body: Mapping[str, Any]) -> str:
    found = body.get("content", {}).get("application/json")
    if found is None:
        return ""
    text = json.dumps(found["schema"], indent=2, ensure_ascii=False)
    return f"<details><summary>Body (JSON Schema)</summary><pre>{escape(text)}</pre></details>"


def _answers(answers: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        f"<tr><td><code>{escape(status)}</code></td><td>{escape(answer['description'])}</td></tr>"
        for status, answer in answers.items()
    ]
    return f"<table><tr><th>Status</th><th>Means</th></tr>{''.join(rows)}</table>"
