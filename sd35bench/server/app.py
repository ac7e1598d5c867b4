"""The application: routes behind keys and limits, errors in the vendor's shape, one document."""

import asyncio
import contextlib
import json
import logging
import math
from collections.abc import AsyncIterator, Mapping
from html import escape
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.security import APIKeyHeader, HTTPBearer
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.routing import compile_path

from sd35bench.errors import DiskFull, StoreError
from sd35bench.server.auth import ANYBODY, Caller, KeyRing
from sd35bench.server.envelope import Envelope, error_answer, log
from sd35bench.server.file_store import files_router, presign_router
from sd35bench.server.page import page_router
from sd35bench.server.routes import health_router, protocol_router
from sd35bench.server.schema import refusals
from sd35bench.server.settings import Refusal
from sd35bench.server.state import ServerState

SWEEP_S = 60.0
DAY_S = 86400.0
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h2 { font-size: 1.1rem; margin: 2rem 0 .3rem } code, pre { font-family: ui-monospace, monospace }
code { overflow-wrap: anywhere }
pre { background: #f4f4f4; padding: .8rem; overflow-x: auto; font-size: .85rem }
table { border-collapse: collapse } td, th { text-align: left; padding: .2rem 1rem .2rem 0;
vertical-align: top } .method { font-weight: 700 }
@media (prefers-color-scheme: dark) { body { background: #151515; color: #eee }
pre { background: #222 } a { color: #8cf } }
"""
_TITLE = "sd35bench serve"
_ABOUT = (
    "The hosted prediction protocol over one local backend. Create, poll until the status is"
    " success, error or cancelled, then fetch the output before it expires."
)


def create_app(state: ServerState) -> FastAPI:
    """Build the application over a state whose generator has been started."""
    app = FastAPI(
        title=_TITLE,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=_lifespan(state),
    )
    app.add_middleware(
        Envelope,
        only_loopback=state.keys is None,
        check_key=lambda headers: None if state.keys is None else _caller(state.keys, headers),
    )
    admitted = [Depends(_admission(state))]
    answers = refusals(400, 401, 408, 413, 429)
    app.include_router(protocol_router(state), dependencies=admitted)
    app.include_router(presign_router(state.files), dependencies=admitted, responses=answers)
    app.include_router(files_router(state.files))
    app.include_router(page_router())
    app.include_router(health_router(state))
    _add_document(app, has_keys=state.keys is not None)
    _add_errors(app)
    return app


def _lifespan(state: ServerState) -> Any:
    """Connect the generator's thread to this loop, and sweep expired files meanwhile."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        state.generator.on_end = state.ended.teller(asyncio.get_running_loop())
        sweeping = asyncio.create_task(_sweep(state))
        try:
            yield
        finally:
            sweeping.cancel()

    return lifespan


async def _sweep(state: ServerState) -> None:
    while True:
        try:
            await asyncio.to_thread(state.files.sweep)
            if state.settings.keep_days is not None:
                await asyncio.to_thread(state.store.prune, state.settings.keep_days * DAY_S)
        except (OSError, StoreError):
            log("sweeping failed", level=logging.ERROR, failed=True)
        await asyncio.sleep(SWEEP_S)


def _admission(state: ServerState) -> Any:
    """The dependency that finds out who is calling, and whether that is not too often."""

    def counted(request: Request, caller: Caller) -> None:
        wait_s = state.requests.wait_s(caller.id)
        if wait_s > 0:
            most = state.settings.requests_per_minute
            raise Refusal(
                429,
                f"Rate limit exceeded: {most} requests per minute",
                {"Retry-After": str(math.ceil(wait_s))},
            )
        request.state.caller = caller

    async def anybody(request: Request) -> None:
        counted(request, ANYBODY)

    keys = state.keys
    if keys is None:
        return anybody
    header = Depends(APIKeyHeader(name="X-API-Key", auto_error=False))
    bearer = Depends(HTTPBearer(auto_error=False))

    async def with_key(request: Request, _key: Any = header, _token: Any = bearer) -> None:
        counted(request, _caller(keys, request.headers))

    return with_key


def _caller(keys: KeyRing, headers: Headers) -> Caller:
    """Whose key a head carries. Raises: Refusal (401)."""
    given = headers.get("x-api-key")
    if given is None:
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip() if scheme.lower() == "bearer" and token.strip() else None
    caller = None if given is None else keys.caller(given)
    if caller is None:
        what = "Unknown API key" if given is not None else "API key is missing"
        raise Refusal(
            401,
            f"{what}: send it as X-API-Key: KEY or Authorization: Bearer KEY",
            {"WWW-Authenticate": "Bearer"},
        )
    return caller


def _add_document(app: FastAPI, has_keys: bool) -> None:
    """Serve one OpenAPI document at /openapi.json, and as a page without scripts at /docs."""
    made: dict[str, Any] = {}

    def openapi() -> dict[str, Any]:
        if not made:
            routes = app.routes
            made.update(get_openapi(title=_TITLE, version="1", description=_ABOUT, routes=routes))
            _as_answered(made)
        return made

    app.openapi = openapi

    async def docs() -> HTMLResponse:
        policy = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}
        return HTMLResponse(_docs_page(openapi(), has_keys), headers=policy)

    app.add_api_route("/docs", docs, include_in_schema=False)


def _as_answered(document: dict[str, Any]) -> None:
    """Take out FastAPI's own shape of a validation error: ours is a 400 like every other."""
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        document.get("components", {}).get("schemas", {}).pop(name, None)


def _methods(document: dict[str, Any], path: str) -> list[str]:
    """What a path can be asked with."""
    return [
        method.upper()
        for template, operations in document["paths"].items()
        if compile_path(template)[0].fullmatch(path)
        for method in operations
    ]


def _add_errors(app: FastAPI) -> None:
    """Everything that is raised becomes ``{"error": …}``."""

    async def refused(_: Request, exc: Any) -> JSONResponse:
        return error_answer(exc)

    async def http(request: Request, exc: Any) -> JSONResponse:
        headers = {} if exc.headers is None else dict(exc.headers)
        methods = _methods(app.openapi(), request.scope["path"])
        if exc.status_code == 405 and methods:
            headers["Allow"] = ", ".join(methods)  # Starlette names the first route's alone
        return error_answer(Refusal(exc.status_code, str(exc.detail), headers))

    async def invalid(_: Request, exc: Any) -> JSONResponse:
        found = [
            f"{'.'.join(str(part) for part in error['loc'])}: {error['msg']}"
            for error in exc.errors()
        ]
        text = "; ".join(found)[:1000].encode("utf-8", "backslashreplace").decode()
        return error_answer(Refusal(400, text))

    async def not_stored(_: Request, exc: Any) -> JSONResponse:
        log("request cannot be stored", level=logging.ERROR, error=str(exc))
        full = isinstance(exc, DiskFull)
        what = "the server's disk is full" if full else "the server cannot read or write its files"
        return error_answer(Refusal(503, f"{what}: try again later", {"Retry-After": "60"}))

    app.add_exception_handler(Refusal, refused)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(StoreError, not_stored)


def _docs_page(document: Mapping[str, Any], has_keys: bool) -> str:
    """The OpenAPI document as one page of plain HTML: no script, and nothing from another host.

    FastAPI's own page loads its program from a content delivery network, absent offline.
    """
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
