"""Run a plan against a hosted service: what was paid for first, then alone, then side by side.

Three rounds. *Leftovers* of earlier runs: predictions that exist, or may exist, are asked after and
never made again. *Single stream*: the first trials of each setting, one at a time, whose latencies
are the service's own. *The rest*, up to `concurrency` at once, for throughput. The plan's order
holds inside each round.

This process alone writes: for each trial the ledger's lines as they happen (see `ledger`), then the
image, then the record. So a kill at any moment, and Ctrl-C, lose nothing that was paid for. A
budget or a balance that is used up ends the run when those in flight have been recorded.
"""

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from datetime import UTC, datetime
from urllib.parse import urlsplit

from sd35bench.analysis.settings import setting_key
from sd35bench.errors import ConfigError, Paused, UnsupportedRequest
from sd35bench.measure import environment, environment_id
from sd35bench.plan import Plan
from sd35bench.remote.flights import Flights
from sd35bench.remote.key import Key, read_key
from sd35bench.remote.ledger import Ledger
from sd35bench.remote.limiter import LEASE_S, Limiter, limiter_path
from sd35bench.remote.poll import Latencies
from sd35bench.remote.prediction import Life, Outcome
from sd35bench.remote.providers import provider_class
from sd35bench.remote.providers.base import Provider
from sd35bench.remote.retry import Line, Patience
from sd35bench.remote.settings import RemoteSettings
from sd35bench.remote.standing import Standing
from sd35bench.remote.transport import Transport
from sd35bench.remote.uploads import Uploads, content_type, data_uri
from sd35bench.store import Shard, Study, new_shard_id
from sd35bench.trials import RunSummary
from sd35bench.types import Record, Scalar, Session, Status, Trial

__all__ = ["prepare_remote", "run_remote"]

GIVE_UP_AFTER = 5
"""Trials in a row that failed for what the service did, not for what they asked."""
CHECKS = 2
"""Images decoded at once, each in a process of its own."""
SUFFIXES = {"png": ".png", "jpg": ".jpg", "webp": ".webp"}
NOT_OURS = ("torch", "diffusers", "transformers", "threads")
"""What a local environment says of the software that makes images: here the service's."""


def prepare_remote(plan: Plan, settings: RemoteSettings, key: bool = True) -> None:
    """Refuse up front what the service cannot do; `key` also asks whether there is a key.

    Raises: ConfigError.
    """
    provider = provider_class(settings.provider)(settings)
    if key:
        _key(provider, settings)
    for trial in plan.trials:
        refusal = provider.refusal(trial.request)
        if refusal is not None:
            raise ConfigError(f"backend={trial.load.backend.name}: {refusal}")
    if settings.init_image_url is not None and len(plan.inits) != 1:
        raise ConfigError(
            f"remote.init_image_url={settings.init_image_url}: it stands for one init image, and"
            f" these prompts have {len(plan.inits)}; leave it out, and they are uploaded"
        )
    if settings.init_image_url is None:
        for data in plan.inits.values():
            try:
                if provider.presign(content_type(data)) is None:
                    data_uri(data)
            except UnsupportedRequest as exc:
                raise ConfigError(f"backend={plan.load.backend.name}: {exc}") from exc


def run_remote(
    plan: Plan,
    study: Study,
    settings: RemoteSettings,
    progress: Callable[[Standing], None] | None = None,
    patience: Patience | None = None,
) -> RunSummary:
    """Have what is missing of `plan` made by the service; safe to interrupt and to repeat.

    Where a budget or the balance ends it, the summary's `paused` says so. Raises: ConfigError for
    the key, StudyLocked, DiskFull, StoreError. Failures of trials become records.
    """
    provider = provider_class(settings.provider)(settings)
    key = _key(provider, settings)
    with study.lock(plan.load.key):
        run = _Run(plan, study, settings, provider, progress)
        asyncio.run(run.everything(key, Patience() if patience is None else patience))
    return run.summary


class _Run:
    """The state of one run: what is done, what is open, the shard and the ledger it writes."""

    def __init__(
        self,
        plan: Plan,
        study: Study,
        settings: RemoteSettings,
        provider: Provider,
        progress: Callable[[Standing], None] | None,
    ) -> None:
        self.plan, self.study, self.settings, self.provider = plan, study, settings, provider
        self.progress = progress
        self.done = study.done_keys()
        trials = {trial.key: trial for trial in plan.trials}.values()
        self.missing = [trial for trial in trials if trial.key not in self.done]
        planned = len(plan.trials)
        self.summary = RunSummary(planned=planned, skipped=planned - len(self.missing))
        self.session_id = new_shard_id()
        self.shard: Shard = study.shard(self.session_id)
        self.flights = Flights(self._show)
        self.paused: Paused | None = None
        self.blamed = 0
        self.started = time.perf_counter()

    async def everything(self, key: Key | None, patience: Patience) -> None:
        """All rounds; raises the first of what ends a run."""
        if not self.missing:
            return
        for digest, data in self.plan.inits.items():
            if not self.study.init_path(digest).exists():
                self.study.put_init(data)
        self.ledger = Ledger(self.study.path, self.session_id)
        self.spent_before_usd = self.ledger.spent_usd
        self.shard.append_session(self._session())
        try:
            async with self._transport(key) as transport:
                with ThreadPoolExecutor(CHECKS) as checks:
                    await self._rounds(self._line(transport, checks, key, patience))
        finally:
            self.summary.wall_s = time.perf_counter() - self.started
            self.summary.measured_s = self.flights.busy_s
            self.summary.cost_usd = self.ledger.spent_usd - self.spent_before_usd
            self.shard.close()
            self.ledger.close()
        if self.paused is not None:
            self.summary.paused = self._what_is_left(self.paused)

    def _transport(self, key: Key | None) -> Transport:
        provider = self.provider
        return Transport(
            self.settings.base_url,
            allow_loopback=self.settings.allow_loopback,
            headers=lambda: {} if key is None else provider.headers(key.reveal()),
        )

    def _line(
        self, transport: Transport, checks: Executor, key: Key | None, patience: Patience
    ) -> Line:
        settings = self.settings
        path = limiter_path(settings.base_url, "" if key is None else key.reveal())
        self.limiter = Limiter(
            path,
            per_minute=settings.requests_per_minute,
            in_flight=settings.concurrency,
            lease_s=max(LEASE_S, 2 * settings.timeout_s),
        )
        return Line(
            provider=self.provider,
            transport=transport,
            turns=self.limiter,
            ledger=self.ledger,
            settings=settings,
            latencies=Latencies(settings.expected_latency_s),
            checks=checks,
            patience=patience,
        )

    async def _rounds(self, line: Line) -> None:
        uploads = Uploads(line, self.study)
        left = [t for t in self.missing if self._is_left(t)]
        fresh = [t for t in self.missing if not self._is_left(t)]
        first = _first_of_settings(self.plan.trials, self.settings.single_stream)
        alone = [t for t in fresh if t.key in first]
        rest = [t for t in fresh if t.key not in first]
        for trials, width in (
            (left, self.settings.concurrency),
            (alone, 1),
            (rest, self.settings.concurrency),
        ):
            await self._round(iter(trials), min(width, len(trials)), line, uploads)

    def _is_left(self, trial: Trial) -> bool:
        intent = self.ledger.latest(trial.key)
        return intent is not None and intent.may_exist

    def _goes_on(self, trial: Trial) -> bool:
        """Whether the service may still be at work on it, and count it as in flight."""
        intent = self.ledger.latest(trial.key)
        return intent is not None and intent.may_exist and intent.phase is None

    async def _round(
        self, trials: Iterator[Trial], width: int, line: Line, uploads: Uploads
    ) -> None:
        """Have `width` workers take trials until there are none, or the run pauses."""

        async def work() -> None:
            for trial in trials:
                if self.paused is not None:
                    return
                await self._one(trial, line, uploads)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(width):
                    group.create_task(work())
        except BaseExceptionGroup as many:  # one that ends the run; the rest were cancelled
            first = many.exceptions[0]
            raise first from first.__cause__

    async def _one(self, trial: Trial, line: Line, uploads: Uploads) -> None:
        name = f"{self.study.path.resolve()}:{trial.key}"
        setting = setting_key(trial)
        async with self.limiter.flight(name) as slot:
            if self.paused is not None:
                return
            with self.flights.one() as flight:
                started_at = datetime.now(UTC).isoformat()
                life = Life(
                    line,
                    trial,
                    flight,
                    lambda: uploads.url(trial.request.init_image),
                    download_hosts(self.provider, self.settings),
                    setting,
                )
                try:
                    outcome = await life.run()
                except Paused as exc:
                    self.paused = exc if self.paused is None else self.paused
                    return
                finally:
                    if self._goes_on(trial):
                        slot.abandon()
        intent = self.ledger.latest(trial.key)
        if intent is not None and outcome.timings is not None:
            started_at = intent.at.isoformat()  # its latency counts from there, after our waits
        self._keep(trial, outcome, started_at)

    def _keep(self, trial: Trial, outcome: Outcome, started_at: str) -> None:
        ok = outcome.status is Status.OK
        suffix = SUFFIXES[trial.request.output_format]
        image = self.study.put_image(outcome.data, suffix) if ok else None
        self.shard.append_record(
            Record(
                trial=trial,
                status=outcome.status,
                session_id=self.session_id,
                started_at=started_at,
                phase=outcome.phase,
                error=outcome.error,
                timings=outcome.timings,
                image=image,
                image_bytes=len(outcome.data) if ok else None,
                effective_steps=trial.request.effective_steps,
                remote=outcome.call,
            )
        )
        self._count(outcome)
        self._show()

    def _count(self, outcome: Outcome) -> None:
        summary = self.summary
        if outcome.status is Status.OK:
            summary.done += 1
        else:
            summary.failed += 1
            text = outcome.status.value if outcome.error is None else outcome.error
            for counts, name in (
                (summary.errors, text),
                (summary.statuses, outcome.status.value),
            ):
                counts[name] = counts.get(name, 0) + 1
        summary.ambiguous += outcome.status is Status.AMBIGUOUS
        self.blamed = self.blamed + 1 if outcome.blames_service else 0
        if self.blamed >= GIVE_UP_AFTER and self.paused is None:
            self.paused = Paused(f"{self.blamed} trials in a row failed, the last: {outcome.error}")

    def _what_is_left(self, paused: Paused) -> str:
        """The reason, and what the same command would still do and cost."""
        left = len(self.missing) - self.summary.done
        price_usd = self.settings.usd_per_image
        paid = sum(self._is_left(t) for t in self.missing if t.key not in self.study.done_keys())
        bill = f"at {price_usd:g} USD each" if price_usd else "at no cost"
        return (
            f"paused: {paused}; {left} trials are left, {paid} of them created before, the other"
            f" {left - paid} {bill}; the same command goes on"
        )

    def _session(self) -> Session:
        """What this run is; a service is not loaded, and nothing is warmed up."""
        settings = self.settings
        where = _environment(settings)
        return Session(
            id=self.session_id,
            load=self.plan.load,
            started_at=datetime.now(UTC).isoformat(),
            environment_id=environment_id(where),
            environment=where,
            load_s=0.0,
            first_call_s=0.0,
            warmup_s=0.0,
            in_force={
                "provider": settings.provider,
                "base_url": settings.base_url,
                "slug": settings.slug,
                "concurrency": settings.concurrency,
                "requests_per_minute": settings.requests_per_minute,
                "single_stream": settings.single_stream,
                "usd_per_image": settings.usd_per_image,
            },
        )

    def _show(self) -> None:
        if self.progress is not None:
            self.progress(
                Standing(
                    done=self.summary.done,
                    failed=self.summary.failed,
                    total=len(self.missing),
                    in_flight=len(self.flights),
                    cost_usd=self.ledger.spent_usd - self.spent_before_usd,
                    minutes=(time.perf_counter() - self.started) / 60,
                )
            )


def download_hosts(provider: Provider, settings: RemoteSettings) -> tuple[str, ...]:
    """The hosts that an output may come from; another base URL may serve its own."""
    if settings.base_url == provider.base_url:
        return provider.output_hosts
    host = urlsplit(settings.base_url).hostname
    return (*provider.output_hosts, *(() if host is None else (host,)))


def _key(provider: Provider, settings: RemoteSettings) -> Key | None:
    """The key; a service on this machine may go without."""
    try:
        return read_key(provider.key_variable, settings.key_file)
    except ConfigError:
        if settings.allow_loopback and settings.key_file is None:
            return None
        raise


def _environment(settings: RemoteSettings) -> dict[str, Scalar]:
    """Where figures come from: this client, and a service on hardware that nobody names."""
    here = environment()
    unknown: dict[str, Scalar] = {n: None for n in here if n in NOT_OURS or n.startswith("gpu_")}
    return {**here, **unknown, "service": urlsplit(settings.base_url).netloc}


def _first_of_settings(trials: Sequence[Trial], count: int) -> set[str]:
    """Keys of the first `count` trials of each setting, in the plan's order."""
    seen: dict[str, int] = {}
    first = set()
    for trial in trials:
        setting = setting_key(trial)
        if seen.setdefault(setting, 0) < count:
            seen[setting] += 1
            first.add(trial.key)
    return first
