"""The page at /: a prompt by hand, the queue, and the image: no build, no framework.

It is one more client of the public routes: it asks /healthz whether a key is needed, takes every
range from the schema that the server validates with, and stays under the rate that its key may ask
at. The policy lets nothing in that is not of this server.
"""

import hashlib
from importlib import resources

from fastapi import APIRouter, Request
from fastapi.responses import Response

_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
}
_PAGE = "index.html"
_PARTS = ("page.css", "page.js", "client.js", "form.js", "view.js")
_POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none';"
    " form-action 'none'; frame-ancestors 'none'"
)


def page_router() -> APIRouter:
    """GET / and /page/{what it needs}; read once, revalidated by digest."""
    router = APIRouter(include_in_schema=False)
    folder = resources.files(__name__)
    for name in (_PAGE, *_PARTS):
        path = "/" if name == _PAGE else f"/page/{name}"
        content_type = _TYPES[name.rpartition(".")[2]]
        _add_file(router, path, folder.joinpath(name).read_bytes(), content_type)
    return router


def _add_file(router: APIRouter, path: str, data: bytes, content_type: str) -> None:
    headers = {
        "Cache-Control": "no-cache",
        "Content-Security-Policy": _POLICY,
        "Content-Type": content_type,
        "ETag": f'"{hashlib.sha256(data).hexdigest()[:32]}"',
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }

    @router.api_route(path, methods=["GET", "HEAD"])
    async def read(request: Request) -> Response:
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        return Response(data, headers=headers)
