"""One prediction, from the intent to spend money to an image on this machine.

    new ─ intent journalled ─ create sent once ┬ answered ─ id journalled ─┐
           │  ▲                                ├ refused: 429, never left ─┤ (a new intent, later)
           │  └──────────── wait ──────────────┘                           │
           │                                   └ lost ─ looked for ┬ found ┤
           │                                                       └ AMBIGUOUS, or a new create
           │                                                               ▼
    left by an earlier run, with or without an id ──────────────────────► polled ─ end journalled
                                                                           │
                              OK ◄─ format, size and content checked ◄─ downloaded

A synchronous service answers the create with the image. It is on disk before the journal says how
it ended, so that a crash loses nothing that came. Where a service has no list of what it made, an
answer that was lost stays AMBIGUOUS at once: nobody can say what became of it.

The create is the only step that costs, and the only one that is never repeated blindly: a service
without idempotency keys would make, and bill, a second image. What its answer does not prove to
have been refused is looked for in the service's own list of predictions, by its input. Trials
differ in it, so a listed prediction with the input that was sent, which no intent of the study has,
is the one. What is listed without its input is polled for it: that is free.
"""

import asyncio
import contextlib
import functools
import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from sd35bench.disk import write_atomic
from sd35bench.errors import InvalidImage, LostAnswer, Paused, RemoteError, UnsafeAddress
from sd35bench.remote.addresses import HostNotAllowed
from sd35bench.remote.download import DEADLINE_S, Downloaded, download
from sd35bench.remote.http import Interrupted
from sd35bench.remote.images import decode_image, sniff
from sd35bench.remote.inputs import takes, takes_size
from sd35bench.remote.ledger import Intent
from sd35bench.remote.providers.base import UNNAMED, Phase, Prediction, RemoteSettings
from sd35bench.remote.retry import (
    Client,
    Deadline,
    PredictionFailed,
    ask,
    despite_cancel,
    find_lost,
    intervals,
    refuse_key,
    retry_after,
    send,
    shortest_gap_s,
)
from sd35bench.remote.transport import NotSent, Refused, Reply, ServerFailed
from sd35bench.remote.uploads import Uploads
from sd35bench.types import RemoteCall, Request, Status, Timings, Trial
from sd35bench.workers.worker import check_image

BAD_REQUEST = (400, 422)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a trial; `data` is the image file as it was downloaded.

    `phase` is where it failed. `blames_service`: one of several in a row ends the run.
    """

    status: Status
    call: RemoteCall
    error: str | None = None
    phase: str | None = None
    data: bytes = b""
    timings: Timings | None = None
    blames_service: bool = False


class Flights:
    """The open predictions of one run; `busy_s` is the time with at least one."""

    def __init__(self, changed: Callable[[], None] = lambda: None) -> None:
        """`changed` is called whenever one opens or ends."""
        self._open: set[Flight] = set()
        self._changed = changed
        self._since = 0.0
        self.busy_s = 0.0

    def __len__(self) -> int:
        return len(self._open)

    @contextlib.contextmanager
    def one(self) -> Iterator["Flight"]:
        """Have one open."""
        flight = Flight(self)
        if not self._open:
            self._since = time.perf_counter()
        self._open.add(flight)
        for each in self._open:
            each.most = max(each.most, len(self._open))
        self._changed()
        try:
            yield flight
        finally:
            self._open.remove(flight)
            if not self._open:
                self.busy_s += time.perf_counter() - self._since
            self._changed()


class Flight:
    """One open prediction; `most` is how many were open at once while it was, itself included."""

    def __init__(self, flights: Flights) -> None:
        self._flights = flights
        self.most = 0

    @property
    def now(self) -> int:
        """How many are open now, itself included."""
        return len(self._flights)


class HostedTrial:
    """One trial's prediction; `run` it once."""

    def __init__(
        self,
        client: Client,
        trial: Trial,
        flight: Flight,
        refused: Path,
        uploads: Uploads,
        hosts: tuple[str, ...],
        setting: str,
    ) -> None:
        """`uploads` gives the images' URLs at the service; `hosts` may serve the output.

        Images that were paid for and are not on record are kept in the folder `refused`.
        """
        self.client, self.trial, self.flight, self.refused = client, trial, flight, refused
        self.uploads, self.hosts, self.setting = uploads, hosts, setting
        self.deadline = Deadline(client.settings.timeout_s)
        self.step = "create"
        self.resumed = self.resubmitted = False
        self.attempts = self.polls = 0
        self.prediction_id: str | None = None
        self.request_id: str | None = None
        self.sent_at = self.answered_at = 0.0
        self.queue_s: float | None = None
        self.bound_s: float | None = None
        self.ended: Prediction | None = None
        self.download_s: float | None = None

    async def run(self) -> Outcome:
        """Make it to the end; what fails becomes an outcome.

        Raises: Paused where a budget or the balance is used up, ConfigError for the key.
        """
        try:
            return await self._resume_or_create()
        except PredictionFailed as exc:
            return self._failed(exc.status, str(exc), exc.blames_service)
        except InvalidImage as exc:
            return self._failed(Status.INVALID_IMAGE, str(exc))
        except RemoteError as exc:
            return self._failed(Status.ERROR, f"{type(exc).__name__}: {exc}")

    async def _resume_or_create(self) -> Outcome:
        """Take up what an earlier run left; make it anew only where it certainly ended."""
        left = self.client.ledger.latest(self.trial.key)
        if left is None or not left.may_exist:
            return await self._image(await self._create())
        self.resumed = True
        try:
            if left.prediction is None and left.kept is None:
                return await self._image(await self._resolve(left))
            return await self._image(left)
        except (PredictionFailed, InvalidImage) as exc:
            image_lost = not isinstance(exc, PredictionFailed) or exc.image_lost
            if not image_lost or not self._may_resubmit():
                raise
        return await self._image(await self._create())

    # Create ------------------------------------------------------------------------------------

    async def _create(self) -> Intent:
        """Have the service make it; returns an intent with a prediction's id."""
        self.step = "create"
        request = self.trial.request
        image_url = await self.uploads.url(request.init_image)
        images = {role: await self.uploads.uploaded(digest) for role, digest in request.images}
        inputs = self.client.provider.input_with(request, image_url, images)
        unsent = 0
        while True:
            await self.client.limiter.request(self.client.bounds)
            paused = self.client.paused()
            if paused is not None:
                raise paused  # decided while this one waited: nothing more is bought
            self.deadline.start()
            retry_after_s = None
            try:
                return await despite_cancel(self._send(inputs))
            except NotSent as exc:
                unsent += 1
                self._check_reachable(exc, unsent)
                problem = exc
            except Refused as exc:
                if exc.status != 429:
                    self._refused(exc)
                problem, retry_after_s = exc, retry_after(self.client, exc)
            except LostAnswer:
                intent = self.client.ledger.latest(self.trial.key)
                assert intent is not None
                return await self._resolve(intent)
            wait_s = self.client.policy.wait_s(self.attempts - 1, retry_after_s)
            why = f"nothing was created ({problem})"
            await self.deadline.wait(wait_s, why)
            await self.deadline.wait(0.0, why)  # no create once the time is up: nobody would wait

    async def _send(self, inputs: dict[str, Any]) -> Intent:
        """Send one create, once, and write down what came of it.

        Raises: NotSent and Refused where nothing was created, LostAnswer where that is unknown.
        """
        client, settings = self.client, self.client.settings
        # A file inside the input says nothing that the rest does not, at 256 kB a line.
        kept = {n: v for n, v in inputs.items() if not f"{v}".startswith("data:")}
        intent = client.ledger.intend(
            self.trial.key, kept, settings.usd_per_image, settings.max_cost_usd
        )
        self.attempts += 1
        try:
            reply = await send(client, client.provider.create(inputs))
            created = client.provider.read_created(reply.body)
        except (NotSent, Refused, UnsafeAddress) as exc:
            client.ledger.refused(intent, str(exc))
            raise
        except RemoteError as exc:
            client.ledger.lost(intent, str(exc))
            raise LostAnswer(str(exc)) from exc
        self.sent_at, self.answered_at = reply.sent_at, reply.received_at
        self.request_id = reply.request_id
        if client.provider.synchronous:
            await self._answered(intent, created)
            return intent
        if client.ledger.owner(created.id) is not None:
            why = f"the service answered with prediction {created.id}, which another trial has"
            client.ledger.lost(intent, why)
            raise RemoteError(f"{why}: its image would be the other's")
        client.ledger.created(intent, created.id, "answered")
        return intent

    async def _answered(self, intent: Intent, made: Prediction) -> None:
        """Put on disk what a create was answered with: nobody could be asked for it again.

        Raises: PredictionFailed where it is no image.
        """
        if made.id != UNNAMED:
            self.request_id = made.id
        made = self._checked_seed(made)
        if made.phase is Phase.SUCCEEDED:
            try:
                if not made.outputs[0].startswith("data:"):
                    raise RemoteError("the answer names an address instead")
                data = (await download(made.outputs[0], hosts=(), allow_loopback=False)).data
                self._keep(intent, data)
            except RemoteError as exc:
                made = replace(made, phase=Phase.FAILED, error=f"its image: {exc}")
        self.ended, self.bound_s = made, 0.0
        self.client.ledger.finished(intent, made.phase.value, made.cost_usd, ())
        if made.phase is not Phase.SUCCEEDED:
            raise self._ended_badly(made)

    def _check_reachable(self, exc: NotSent, unsent: int) -> None:
        if unsent < self.client.policy.unsent:
            return
        if not self.client.reached:
            raise Paused(f"{self.client.settings.base_url} cannot be reached: {exc}") from exc
        raise PredictionFailed(
            Status.ERROR, f"never left this machine: {exc}", blames_service=True
        ) from exc

    def _refused(self, exc: Refused) -> NoReturn:
        refuse_key(self.client, exc)
        if exc.status == 402:
            raise Paused(f"the balance at the service is used up ({exc}): top it up") from exc
        status = Status.UNSUPPORTED if exc.status in BAD_REQUEST else Status.ERROR
        raise PredictionFailed(status, str(exc)) from exc

    # A lost answer -----------------------------------------------------------------------------

    async def _resolve(self, intent: Intent) -> Intent:
        """Find what became of a create whose answer is not known.

        Raises: PredictionFailed (ambiguous) where the service does not list it.
        """
        self.step, self.resumed = "resolve", True
        lists = self.client.provider.lists
        try:
            for wait_s in self.client.policy.listing_waits_s if lists else ():
                await self.deadline.wait(wait_s, "a lost create is still looked for")
                found = await find_lost(self.client, intent, self.deadline)
                if found is not None:
                    self.client.ledger.created(intent, found, "listed")
                    return intent
        except PredictionFailed as exc:
            raise self._ambiguous(f"the service did not say what became of it ({exc})") from exc
        except RemoteError as exc:
            raise self._ambiguous(f"its list of predictions cannot be read ({exc})") from exc
        if self._may_resubmit():
            return await self._create()
        raise self._ambiguous(f"the service {'does not list it' if lists else 'has no list'}")

    def _may_resubmit(self) -> bool:
        """Whether the user agreed to pay twice; taken up once in a run, or one loss costs ten."""
        if self.client.settings.on_ambiguous != "resubmit" or self.resubmitted:
            return False
        self.resubmitted, self.resumed = True, False
        return True

    def _ambiguous(self, why: str) -> PredictionFailed:
        again = "the same command looks for it again, " if self.client.provider.lists else ""
        return PredictionFailed(
            Status.AMBIGUOUS,
            f"the create's answer was lost and {why}: it may have been made and billed; {again}"
            "remote.on_ambiguous=resubmit creates it again",
            blames_service=True,
        )

    # Poll --------------------------------------------------------------------------------------

    async def _image(self, intent: Intent) -> Outcome:
        """Wait for a created prediction, fetch what it made, look at it."""
        self.prediction_id = intent.prediction
        self.deadline.start()
        if self.client.provider.synchronous:
            data, here_at = await self._checked_answer(intent), self.answered_at
        else:
            data, here_at = await self._accepted_now(intent), 0.0
        if data is None:
            data = await self._download(intent)
            here_at = time.perf_counter()
            self.step = "guard"
            try:
                await self._check(data)
            except InvalidImage:
                self._keep(intent, data)
                raise
        total_s = None if self.resumed else here_at - self.sent_at
        return Outcome(
            status=Status.OK,
            call=self._call(),
            data=data,
            timings=None if total_s is None else Timings(generate_s=total_s, encode_s=0.0),
        )

    async def _download(self, intent: Intent) -> bytes:
        """Wait for the end, and fetch what was made."""
        self.step = "poll"
        prediction = self.ended = self._checked_seed(await self._wait(intent))
        if prediction.phase is not Phase.SUCCEEDED:
            raise self._ended_badly(prediction)
        if not prediction.outputs:
            raise PredictionFailed(Status.ERROR, "the service says it succeeded and names no image")
        self.step = "download"
        got = await self._fetch(prediction.outputs[0])
        self.download_s = got.seconds
        return got.data

    def _ended_badly(self, prediction: Prediction) -> PredictionFailed:
        said = prediction.error if prediction.error else "no reason given"
        return PredictionFailed(Status.ERROR, f"the service ended it as {prediction.phase}: {said}")

    def _checked_seed(self, ended: Prediction) -> Prediction:
        """An image of another seed is no image of this trial."""
        seed = self.trial.request.seed
        if ended.phase is not Phase.SUCCEEDED or ended.seed in (None, seed):
            return ended
        error = f"asked for seed={seed}, the service used {ended.seed}"
        return replace(ended, phase=Phase.FAILED, error=error)

    async def _checked_answer(self, intent: Intent) -> bytes:
        """The image that a synchronous create was answered with, in this run or an earlier one."""
        self.step = "guard"
        try:
            data = (self.refused / f"{intent.kept}").read_bytes()
        except OSError as exc:
            text = f"its image came, and is not in {self.refused} any more ({exc.strerror})"
            raise PredictionFailed(Status.ERROR, text, image_lost=True) from exc
        await self._check(data)
        return data

    def _keep(self, intent: Intent, data: bytes) -> None:
        """Keep what was paid for: another run may take it, and does not fetch it again."""
        sha256 = hashlib.sha256(data).hexdigest()
        write_atomic(self.refused / sha256, data)
        self.client.ledger.kept(intent, sha256)

    async def _accepted_now(self, intent: Intent) -> bytes | None:
        """The image that an earlier run refused, where the settings of this one take it."""
        if intent.kept is None:
            return None
        with contextlib.suppress(OSError, InvalidImage):
            data = (self.refused / intent.kept).read_bytes()
            if hashlib.sha256(data).hexdigest() == intent.kept:
                await self._check(data)
                return data
        return None

    async def _check(self, data: bytes) -> None:
        check = functools.partial(check_file, data, self.trial.request, self.client.settings)
        await asyncio.get_running_loop().run_in_executor(self.client.checks, check)

    async def _wait(self, intent: Intent) -> Prediction:
        """Poll until it is over, and write down how it ended."""
        assert intent.prediction is not None
        latencies, unfinished_at = self.client.latencies, self.answered_at
        missing = 0
        gaps = intervals(latencies.expected_s(self.setting))
        wait_s = 0.0 if self.resumed else max(next(gaps), self._floor_s())
        while True:
            await self.deadline.wait(wait_s, "the service is not done; it will be asked again")
            try:
                reply, prediction = await self._poll(intent.prediction)
            except Refused as exc:
                missing += 1
                if exc.status != 404:
                    raise
                if self.resumed or missing >= self.client.policy.missing:
                    return self._missing(intent, exc)
            else:
                if prediction.phase.is_over:
                    break
                unfinished_at = reply.sent_at
            wait_s = max(next(gaps), self._floor_s())
        self._learn(reply, prediction, unfinished_at)
        self.client.ledger.finished(
            intent, prediction.phase.value, prediction.cost_usd, prediction.outputs
        )
        return prediction

    async def _poll(self, prediction_id: str) -> tuple[Reply, Prediction]:
        provider = self.client.provider
        self.polls += 1

        def read(body: Any) -> Prediction:
            found = provider.read_prediction(body)
            if found.id != prediction_id:
                raise RemoteError(f"asked after prediction {prediction_id}, answered: {found.id}")
            return found

        reply, found = await ask(self.client, provider.poll(prediction_id), read, self.deadline)
        return reply, await self._result(found) if found.phase is Phase.READY else found

    async def _result(self, polled: Prediction) -> Prediction:
        """The outcome of a prediction that is over, where a further question tells it."""
        provider = self.client.provider
        self.polls += 1
        try:
            _, ended = await ask(
                self.client,
                provider.result(polled.id),
                lambda body: provider.read_result(body, polled),
                self.deadline,
                server_failures=self.client.policy.missing,
            )
        except ServerFailed as exc:
            raise PredictionFailed(
                Status.ERROR,
                f"it is over, and its result cannot be had ({exc});"
                " remote.on_ambiguous=resubmit creates it again",
                image_lost=True,
            ) from exc
        except Refused as exc:
            if exc.status == 404:
                raise
            return replace(polled, phase=Phase.FAILED, error=str(exc))
        return ended

    def _floor_s(self) -> float:
        return shortest_gap_s(self.flight.now, self.client.settings.requests_per_minute)

    def _learn(self, reply: Reply, prediction: Prediction, unfinished_at: float) -> None:
        """Keep the times of one that was made and seen by this run; others are no measurement."""
        if self.resumed:
            return
        self.bound_s = reply.received_at - unfinished_at
        seen_s = reply.received_at - self.answered_at
        self.queue_s = prediction.queue_s
        if self.queue_s is None and prediction.predict_s is not None:
            self.queue_s = max(0.0, seen_s - prediction.predict_s)
        if prediction.phase is Phase.SUCCEEDED:
            self.client.latencies.saw(self.setting, seen_s, self.bound_s)

    def _missing(self, intent: Intent, exc: Refused) -> Prediction:
        """The service no longer knows it: what it said last is all there is."""
        if intent.phase == Phase.SUCCEEDED and intent.prediction is not None and intent.outputs:
            return Prediction(id=intent.prediction, phase=Phase.SUCCEEDED, outputs=intent.outputs)
        raise PredictionFailed(
            Status.ERROR,
            f"the service does not know prediction {intent.prediction}, which it had accepted"
            f" ({exc}); remote.on_ambiguous=resubmit creates it again",
            image_lost=True,
        ) from exc

    # Download ----------------------------------------------------------------------------------

    async def _fetch(self, url: str) -> Downloaded:
        """Download the image; a connection that breaks is no reason to lose what was paid for."""
        failures = 0
        while True:
            try:
                return await download(
                    url,
                    hosts=self.hosts,
                    allow_loopback=self.client.settings.allow_loopback,
                    deadline_s=min(DEADLINE_S, self.client.settings.timeout_s),
                )
            except HostNotAllowed as exc:
                raise UnsafeAddress(
                    f"{exc}; if it is the service's, give remote.output_hosts={exc.host}: the image"
                    " was paid for and is then fetched"
                ) from exc
            except UnsafeAddress:
                raise
            except RemoteError as exc:
                failures += 1
                if failures >= self.client.policy.downloads:
                    image_lost = not isinstance(exc, Interrupted)
                    raise PredictionFailed(
                        Status.ERROR, f"its image: {exc}", image_lost=image_lost
                    ) from exc
                wait_s = self.client.policy.wait_s(failures - 1, None)
                await self.deadline.wait(wait_s, f"its image: {exc}")

    # What is left ------------------------------------------------------------------------------

    def _failed(self, status: Status, error: str, blames_service: bool = False) -> Outcome:
        return Outcome(
            status=status,
            call=self._call(),
            error=error,
            phase=self.step,
            blames_service=blames_service,
        )

    def _call(self) -> RemoteCall:
        client, ended = self.client, self.ended
        reported = None if ended is None else ended.cost_usd
        intent = client.ledger.latest(self.trial.key)
        charge_usd = None if intent is None else intent.charge_usd
        fresh = self.prediction_id is not None and not self.resumed
        return RemoteCall(
            provider=client.provider.name,
            prediction_id=self.prediction_id,
            request_id=self.request_id,
            in_flight=self.flight.most,
            attempts=self.attempts,
            polls=self.polls,
            submit_s=self.answered_at - self.sent_at if fresh else None,
            queue_s=self.queue_s,
            predict_s=None if ended is None else ended.predict_s,
            poll_bound_s=self.bound_s,
            download_s=self.download_s,
            cost_usd=charge_usd if reported is None else reported,
            cost_reported=reported is not None,
            unsent=client.provider.not_sent(),
            resumed=self.resumed,
            made_by=None if ended is None else ended.made_by,
        )


def check_file(data: bytes, request: Request, settings: RemoteSettings) -> None:
    """See that an image file is what was asked for, or is accepted for it, by its bytes.

    Raises: InvalidImage, RemoteError.
    """
    found, schema = sniff(data), settings.inputs
    if found != request.output_format and (not schema or takes(schema, "output_format")):
        raise InvalidImage(f"asked for output_format={request.output_format}, got {found}")
    pixels = decode_image(data)
    height, width = pixels.shape[:2]
    sized = not schema or takes_size(schema)
    if sized and (width, height) not in ((request.width, request.height), settings.accept_size):
        raise InvalidImage(
            f"asked for {request.width}x{request.height} px, got {width}x{height}; it is kept, and"
            f" remote.accept_size={width}x{height} takes it"
        )
    check_image(pixels, replace(request, width=width, height=height))
