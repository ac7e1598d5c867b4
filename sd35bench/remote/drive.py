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
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from urllib.parse import urlsplit

from sd35bench.analysis.grouping import setting_key
from sd35bench.errors import ConfigError, Paused, UnsupportedRequest
from sd35bench.machine.measure import environment, environment_id
from sd35bench.plan import Plan
from sd35bench.remote.images import sniff
from sd35bench.remote.inputs import defaults
from sd35bench.remote.key import Key, read_key
from sd35bench.remote.ledger import CircuitBreaker, Ledger
from sd35bench.remote.limiter import LEASE_S, Limiter, WaitBounds, limiter_path
from sd35bench.remote.prediction import Flights, HostedTrial, Outcome
from sd35bench.remote.providers import provider_class
from sd35bench.remote.providers.base import Provider, RemoteSettings
from sd35bench.remote.retry import Client, Latencies, RetryPolicy
from sd35bench.remote.transport import Transport
from sd35bench.remote.uploads import Uploads, content_type, data_uri
from sd35bench.study.store import Study
from sd35bench.trials import Observer, Price, Run, RunSummary, open_run
from sd35bench.types import Record, Scalar, Session, Status, Trial

GIVE_UP_AFTER = 5
"""Trials in a row that failed for what the service did, not for what they asked."""
CHECKS = 2
"""Images decoded at once, each in a process of its own."""
NOT_OURS = ("torch", "diffusers", "transformers", "threads")
"""What a local environment says of the software that makes images: here the service's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostedService:
    """The engine of backends that call a service; this process waits and writes."""

    settings: RemoteSettings
    policy: RetryPolicy = field(default_factory=RetryPolicy)

    @property
    def price(self) -> Price:
        """What the service bills; budgets count with it where no charge is reported."""
        settings = self.settings
        return Price(
            usd_per_image=settings.usd_per_image,
            is_billed=True,
            confirm_above_usd=settings.confirm_above_usd,
            resubmits=settings.on_ambiguous == "resubmit",
        )

    @property
    def starts(self) -> int:
        """Nothing is loaded here."""
        return 0

    def prepare(self, plan: Plan, *, dry: bool) -> None:
        """Refuse up front what the service cannot do; a run that is not dry needs a key.

        Raises: ConfigError.
        """
        settings = self.settings
        provider = provider_class(settings.provider)(settings)
        if not dry:
            _key(provider, settings)
        for trial in plan.trials:
            refusal = provider.refusal(trial.request)
            if trial.request.seed > provider.most_seed:
                refusal = f"seed={trial.request.seed}: the service takes 0 to {provider.most_seed}"
            if refusal is not None:
                raise ConfigError(f"backend={trial.load.backend.name}: {refusal}")
        if settings.init_image_url is not None and len(plan.inits) != 1:
            raise ConfigError(
                f"remote.init_image_url={settings.init_image_url}: it stands for one init image,"
                f" and these prompts have {len(plan.inits)}; leave it out, and they are uploaded"
            )
        if settings.init_image_url is None:
            for data in plan.inits.values():
                try:
                    if provider.presign(content_type(data)) is None:
                        data_uri(data, provider.data_uri_bytes)
                except UnsupportedRequest as exc:
                    raise ConfigError(f"backend={plan.load.backend.name}: {exc}") from exc

    def run(self, plan: Plan, study: Study, observer: Observer | None = None) -> RunSummary:
        """Have what is missing of `plan` made by the service; safe to interrupt and to repeat.

        Where a budget or the balance ends it, the summary's `paused` says so. Raises: ConfigError
        for the key, StudyLocked, DiskFull, StoreError. Failures of trials become records.
        """
        provider = provider_class(self.settings.provider)(self.settings)
        key = _key(provider, self.settings)

        with open_run(plan, study, observer) as run:
            if run.missing:
                asyncio.run(_Rounds(run, self.settings, provider).make(key, self.policy))
        return run.summary


class _Rounds:
    """Makes a run's images at a service: what is open, and the ledger of what was paid."""

    def __init__(self, run: Run, settings: RemoteSettings, provider: Provider) -> None:
        self.run, self.settings, self.provider = run, settings, provider
        self.flights = Flights(self._show)
        self.paused: Paused | None = None
        self.blamed = 0
        self.said = False
        self.started = time.perf_counter()

    async def make(self, key: Key | None, policy: RetryPolicy) -> None:
        """All rounds; raises the first of what ends a run."""
        run = self.run
        run.new_session()
        self.ledger = Ledger(run.study.path, run.session_id)
        self.spent_before_usd = self.ledger.spent_usd
        price_usd, limit_usd = self.settings.usd_per_image, self.settings.max_cost_usd
        # A lost create that may be resubmitted can cost twice, as its help says.
        most = 2 if self.settings.on_ambiguous == "resubmit" else 1
        self.ledger.agreed_usd = most * price_usd * len(run.missing)
        budget_usd = self.ledger.agreed_usd if limit_usd is None else limit_usd
        self.breaker = CircuitBreaker(self.ledger, run.done, price_usd, budget_usd)
        run.append_session(self._session())
        try:
            with ThreadPoolExecutor(CHECKS) as checks:
                await self._rounds(self._client(self._transport(key), checks, key, policy))
        finally:
            run.summary.wall_s = time.perf_counter() - self.started
            run.summary.measured_s = self.flights.busy_s
            run.summary.cost_usd = self.ledger.spent_usd - self.spent_before_usd
            if self.provider.synchronous:
                self._drop_copies()
            self.ledger.close()
        if self.paused is not None:
            run.summary.paused = self._what_is_left(self.paused)

    def _drop_copies(self) -> None:
        """Remove the images that were kept until their records were written."""
        done = self.run.study.done_keys()
        kept = [(i.kept, i.trial in done) for i in self.ledger.intents() if i.kept is not None]
        needed = {digest for digest, recorded in kept if not recorded}
        for digest in {digest for digest, _ in kept} - needed:
            (self.run.study.path / "refused" / digest).unlink(missing_ok=True)

    def _transport(self, key: Key | None) -> Transport:
        provider = self.provider
        return Transport(
            self.settings.base_url,
            allow_loopback=self.settings.allow_loopback,
            headers=lambda: {} if key is None else provider.headers(key.reveal()),
        )

    def _client(
        self, transport: Transport, checks: Executor, key: Key | None, policy: RetryPolicy
    ) -> Client:
        settings = self.settings
        path = limiter_path(settings.base_url, "" if key is None else key.reveal())
        self.limiter = Limiter(
            path,
            per_minute=settings.requests_per_minute,
            in_flight=settings.concurrency,
            lease_s=max(LEASE_S, 2 * settings.timeout_s),
        )
        return Client(
            provider=self.provider,
            transport=transport,
            limiter=self.limiter,
            ledger=self.ledger,
            settings=settings,
            latencies=Latencies(settings.expected_latency_s),
            checks=checks,
            policy=policy,
            paused=lambda: self.paused,
            bounds=WaitBounds(
                limit_s=settings.timeout_s, stopped=lambda: self.paused, say=self._say
            ),
        )

    async def _rounds(self, client: Client) -> None:
        uploads = Uploads(client, self.run.study)
        left = [t for t in self.run.missing if self._is_left(t)]
        fresh = [t for t in self.run.missing if not self._is_left(t)]
        width = self.settings.concurrency
        await self._round(iter(left), min(width, len(left)), client, uploads)
        first = _first_of_settings(self.run.plan.trials, self.settings.single_stream)
        alone = self._probe_first([t for t in fresh if t.key in first], fresh)
        await self._round(iter(alone), min(1, len(alone)), client, uploads)
        alone_keys = {t.key for t in alone}
        rest = [t for t in fresh if t.key not in alone_keys]
        await self._round(iter(rest), min(width, len(rest)), client, uploads)

    def _probe_first(self, alone: list[Trial], fresh: list[Trial]) -> list[Trial]:
        """On probation, put one that was never bought in front of those that run alone."""
        if not self.breaker.probation or not fresh:
            return alone
        probe = next((t for t in fresh if self.ledger.latest(t.key) is None), fresh[0])
        return [probe, *(t for t in alone if t.key != probe.key)]

    def _is_left(self, trial: Trial) -> bool:
        intent = self.ledger.latest(trial.key)
        return intent is not None and intent.may_exist

    def _goes_on(self, trial: Trial) -> bool:
        """Whether the service may still be at work on it, and count it as in flight."""
        intent = self.ledger.latest(trial.key)
        return intent is not None and intent.may_exist and intent.phase is None

    async def _round(
        self, trials: Iterator[Trial], width: int, client: Client, uploads: Uploads
    ) -> None:
        """Have `width` workers take trials until there are none, or the run pauses."""

        async def work() -> None:
            for trial in trials:
                if self.paused is not None:
                    return
                try:
                    await self._one(trial, client, uploads)
                except Paused as exc:
                    self.paused = exc if self.paused is None else self.paused

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(width):
                    group.create_task(work())
        except BaseExceptionGroup as many:  # one that ends the run; the rest were cancelled
            first = many.exceptions[0]
            raise first from first.__cause__

    async def _one(self, trial: Trial, client: Client, uploads: Uploads) -> None:
        name = f"{self.run.study.path.resolve()}:{trial.key}"
        setting = setting_key(trial)
        async with self.limiter.flight(name, client.bounds) as slot:
            with self.flights.one() as flight:
                started_at = datetime.now(UTC).isoformat()
                hosted = HostedTrial(
                    client,
                    trial,
                    flight,
                    self.run.study.path / "refused",
                    uploads,
                    download_hosts(self.provider, self.settings),
                    setting,
                )
                try:
                    outcome = await hosted.run()
                finally:
                    if self._goes_on(trial):
                        slot.abandon()
        intent = self.ledger.latest(trial.key)
        if intent is not None and outcome.timings is not None:
            started_at = intent.at.isoformat()  # its latency counts from there, after our waits
        self._keep(trial, outcome, started_at)

    def _keep(self, trial: Trial, outcome: Outcome, started_at: str) -> None:
        ok = outcome.status is Status.OK
        # The file's name ends with what it is: not every model can be told a format.
        suffix = f".{sniff(outcome.data)}"
        image = self.run.study.put_image(outcome.data, suffix) if ok else None
        unsent = self.provider.not_sent()
        self.run.append(
            Record(
                trial=trial,
                status=outcome.status,
                session_id=self.run.session_id,
                started_at=started_at,
                phase=outcome.phase,
                error=outcome.error,
                timings=outcome.timings,
                image=image,
                image_bytes=len(outcome.data) if ok else None,
                # Of a service that chooses their number, what a request says is not what ran.
                effective_steps=None if "steps" in unsent else trial.request.effective_steps,
                remote=outcome.call,
            )
        )
        self._count_blame(trial, outcome)
        self._show()

    def _count_blame(self, trial: Trial, outcome: Outcome) -> None:
        """End the run where the service fails, or is paid for what cannot be used."""
        self.blamed = self.blamed + 1 if outcome.blames_service else 0
        if self.blamed >= GIVE_UP_AFTER and self.paused is None:
            self.paused = Paused(f"{self.blamed} trials in a row failed, the last: {outcome.error}")
        intent = self.ledger.latest(trial.key)
        usable = outcome.status is Status.OK
        if intent is not None and self.ledger.owns(intent):
            stop = self.breaker.count(intent, usable, f"{outcome.error}")
            self.paused = stop if self.paused is None else self.paused
        elif usable:
            self.breaker.probation = False

    def _what_is_left(self, paused: Paused) -> str:
        """The reason, and what the same command would still do and cost."""
        left = len(self.run.missing) - self.run.summary.done
        price_usd = self.settings.usd_per_image
        paid = sum(
            self._is_left(t) for t in self.run.missing if t.key not in self.run.study.done_keys()
        )
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
            id=self.run.session_id,
            load=self.run.plan.load,
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
                **({"inputs": defaults(settings.inputs)} if settings.inputs else {}),
            },
        )

    def _say(self, text: str) -> None:
        """Say once what a run waits for, on a terminal or not."""
        if not self.said:
            self.said = True
            print(f"sd35bench: {text}; it waits", file=sys.stderr, flush=True)

    def _show(self) -> None:
        self.run.show(
            in_flight=len(self.flights), cost_usd=self.ledger.spent_usd - self.spent_before_usd
        )


def download_hosts(provider: Provider, settings: RemoteSettings) -> tuple[str, ...]:
    """The hosts that an output may come from; another base URL may serve its own."""
    known = (*provider.output_hosts, *settings.output_hosts)
    host = urlsplit(settings.base_url).hostname
    own = settings.base_url == provider.base_url or host is None
    return known if own else (*known, str(host))


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
