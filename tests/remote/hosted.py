"""Plans, settings and policy for tests that call the fault server as a hosted service.

Also a program: `python -m tests.remote.hosted ROOT URL COUNT` runs a plan, to be killed.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from sd35bench.fields import make_trial
from sd35bench.plan import Batch, Plan
from sd35bench.remote.drive import HostedService
from sd35bench.remote.providers.base import RemoteSettings
from sd35bench.remote.retry import RetryPolicy
from sd35bench.study.store import Study
from sd35bench.trials import RunSummary
from sd35bench.types import BackendSpec, Load, ModelSpec, PromptRef, Record, Request
from tests.remote.fault_server import SIZES

PRICE_USD = 0.035
MODEL = ModelSpec(name="nano", path="", weights_digest="none", max_sequence_length=16)
HASTY = RetryPolicy(
    backoff_s=0.002,
    backoff_limit_s=0.01,
    listing_waits_s=(0.0, 0.01),
    unsent=2,
    missing=2,
    downloads=2,
)


def hosted_settings(url: str, **changes: Any) -> RemoteSettings:
    """Calls to a fault server: quick polls, no rate limit."""
    settings = RemoteSettings(
        provider="eachlabs",
        base_url=url,
        slug="nano",
        allow_loopback=True,
        requests_per_minute=1_000_000,
        timeout_s=20.0,
        usd_per_image=PRICE_USD,
        expected_latency_s=0.02,
        single_stream=1,
        aspect_ratios={size: ratio for ratio, size in SIZES.items()},
    )
    return dataclasses.replace(settings, **changes)


def hosted_plan(url: str, count: int, inits: tuple[bytes, ...] = (), **fields: Any) -> Plan:
    """`count` prompts at one setting, each with the init images in turn where there are any."""
    import hashlib

    backend = BackendSpec(
        name="eachlabs", kind="eachlabs", options={"base_url": url, "slug": "nano"}
    )
    load = Load(model=MODEL, backend=backend, threads=1)
    defaults: dict[str, Any] = {"steps": 4, "cfg": 5.0, "seed": 0, "width": 64, "height": 64}
    digests = [hashlib.sha256(data).hexdigest() for data in inits]
    batches = []
    for i in range(count):
        if digests:
            defaults |= {"init_image": digests[i % len(digests)], "prompt_strength": 0.5}
        trial = make_trial(
            load=load,
            request=Request(prompt=f"prompt {i}", **{**defaults, **fields}),
            batch_size=1,
            prompt=PromptRef(id=f"{i}", set="test"),
        )
        batches.append(Batch(trials=(trial,)))
    return Plan(
        load=load, batches=tuple(batches), inits=dict(zip(digests, inits, strict=True)), notes=()
    )


def ledger_lines(study: Study) -> list[dict[str, Any]]:
    """All lines of all ledgers, in order."""
    return [
        json.loads(line)
        for path in sorted((study.path / "remote").glob("*.jsonl"))
        for line in path.read_text().splitlines()
    ]


def by_prompt(study: Study) -> dict[str, Record]:
    return {record.trial.request.prompt: record for record in study.records()}


def run(study: Study, plan: Plan, url: str, **changes: Any) -> RunSummary:
    return HostedService(settings=hosted_settings(url, **changes), policy=HASTY).run(plan, study)


if __name__ == "__main__":
    found = Study.open(Path(sys.argv[1]), "study", create=True)
    run(found, hosted_plan(sys.argv[2], int(sys.argv[3])), sys.argv[2])
