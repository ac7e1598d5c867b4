"""A server to be killed: `python -m tests.reliability.server FOLDER DELAY_S`; it says its URL.

`sd35bench.server.serving.serve`, which is what the verb calls once its settings are read, over the
fake backend in its worker process; without Hydra, whose import would be a third of each start.
"""

import sys
from pathlib import Path

from sd35bench.server.serving import serve
from tests.server.live import make_settings

__all__ = ["main"]


def main(folder: str, delay_s: str) -> None:
    settings = make_settings(
        Path(folder),
        backend={"delay_s": float(delay_s)},
        requests_per_minute=None,
        concurrency=None,
    )
    serve(settings, lambda url: print(url, flush=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
