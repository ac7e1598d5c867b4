"""`sd35bench serve`: the hosted prediction protocol over one local backend."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from sd35bench.cli.output import Answer, console
from sd35bench.cli.parser import Command, Given, in_columns
from sd35bench.config.files import choices
from sd35bench.config.serve import SERVE_FIELDS, compose_serve, freeze_serve
from sd35bench.errors import ConfigError


def serve(given: Given) -> Answer:
    """Serve until a signal comes, or make a key.

    Raises: ConfigError for wrong input, BackendError or WorkerDied where the backend cannot be had.
    """
    as_json = given.as_json
    config = compose_serve(given.settings, given.config_dir)
    if config.make_key is not None:
        return _make_key(config.make_key, config.key_file, as_json)
    settings = freeze_serve(config)
    from sd35bench.server.serving import serve as serve_settings

    def ready(url: str) -> None:
        document = {
            "url": url,
            "pid": os.getpid(),
            "model": settings.model.name,
            "backend": settings.load.backend.name,
        }
        page = f"{url}/ to try it by hand, {url}/docs for the routes; Ctrl-C ends it"
        line = json.dumps(document) if as_json else f"ready on {url} ({page})"
        # With --json stdout is kept for the document, which here comes while the verb still runs.
        print(line, file=sys.__stdout__ if as_json else sys.stdout, flush=True)

    serve_settings(settings, ready)
    return Answer()


def _make_key(name: str, key_file: str | None, as_json: bool) -> Answer:
    """Make a key and show it; nothing else ever can. Raises: ConfigError."""
    from sd35bench.server.auth import make_key

    if key_file is None:
        raise ConfigError(f"make_key={name}: give the file that keeps its hash, key_file=FILE")
    path = Path(key_file).expanduser()
    key = make_key(name, path)
    document: dict[str, Any] = {"name": name, "key": key, "key_file": str(path)}
    if not as_json:
        console().print(f"{key}\nkept as a hash in {path}; shown only now", markup=False)
    return Answer(document=document)


def _details(extra: Path | None) -> str:
    groups = [
        in_columns(f"{group}=", ", ".join(choices(group, extra))) for group in ("model", "backend")
    ]
    fields = [
        in_columns(f"{field.name}=", f"{field.means}; {field.allowed}; default: {field.default}")
        for field in SERVE_FIELDS.values()
    ]
    option = in_columns("backend.OPTION=", "the backend's own: see configs/backend/")
    ending = (
        "\nLogs are JSON lines on stderr. Exit codes: 0 ended by a signal, 2 wrong input, 4 other."
    )
    return "\n".join(["Groups:", *groups, "\nFields:", *fields, option, ending])


COMMANDS = {
    "serve": Command(
        call=serve,
        settings="NAME=VALUE ...",
        about="""Any client that was written for the hosted service runs against it by changing the
base URL; a page at / is for trying by hand, /docs lists the routes. One image is made at a time, in
order; what was accepted survives a restart with the same state_dir. Ctrl-C or SIGTERM ends it.""",
        examples="""
sd35bench serve no_auth=true
    the embedded model on http://127.0.0.1:8000, for this machine alone
sd35bench serve make_key=alice key_file=keys.txt
    make a key; it is shown once, the file keeps its hash
sd35bench serve model=sd35-medium backend=compile-bf16 host=0.0.0.0 key_file=keys.txt
    for others; put TLS in front of it
sd35bench serve no_auth=true port=0 --json
    a free port; one JSON line with its url once it is ready
""",
        details=_details,
    )
}
