"""A client to be killed: `python -m tests.reliability.client ROOT URL COUNT SEED CONCURRENCY`.

What `sd35bench run backend=eachlabs` runs once its command line is read (`HostedService.run`, with
its decoder's processes and its limiter), without Hydra, whose import would be most of a short life;
and with shorter waits between looks for a lost create, or short lives would end before the second
look. It says "running" when it begins.
"""

import sys
from pathlib import Path

from sd35bench.remote.drive import HostedService
from sd35bench.remote.retry import RetryPolicy
from sd35bench.study.store import Study
from tests.remote.hosted import hosted_plan, hosted_settings

__all__ = ["STUDY", "main", "policy"]

STUDY = "study"


def policy() -> RetryPolicy:
    """Short waits: the server under test answers from this machine."""
    return RetryPolicy(backoff_s=0.05, backoff_limit_s=0.5, listing_waits_s=(0.05, 0.2, 0.5))


def main(root: str, url: str, count: str, seed: str, *options: str) -> None:
    """`options`: fields of RemoteSettings as NAME=INTEGER."""
    named = (option.split("=") for option in options)
    changes = {name: int(value) for name, value in named}
    study = Study.open(Path(root), STUDY, create=True)
    plan = hosted_plan(url, int(count), seed=int(seed))
    print("running", flush=True)
    settings = hosted_settings(url, **{"single_stream": 2, **changes})
    HostedService(settings=settings, policy=policy()).run(plan, study)


if __name__ == "__main__":
    main(*sys.argv[1:])
