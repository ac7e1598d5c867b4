"""A service that takes money and gives nothing of use, in dozens of ways: what does it sell?

The fault server misbehaves in one mode at a time, first from its beginning, then after some good
images. It counts creates by their input, which no two trials share.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from sd35bench.errors import InvalidImage, SD35BenchError
from sd35bench.remote.ledger import MOST_UNUSABLE
from sd35bench.study.store import Study, decode_rgb
from sd35bench.types import Status
from tests.reliability.experiment import Experiment, Figure
from tests.remote.fault_server import FaultServer, serving
from tests.remote.faults import Answer, Fault, picture
from tests.remote.hosted import PRICE_USD, hosted_plan
from tests.remote.hosted import run as run_hosted

COUNT = 14
GOOD = 4
WIDTH = 2
RERUNS = 3
TIMEOUT_S = 0.6
MODES = 40

_IMAGE = (
    *("empty-body", "html-200", "html-502", "lost-answer", "reset-mid-head", "reset-mid-body"),
    *("short-body", "no-http", "endless-head", "huge-body", "gzip-bomb", "redirect-loop"),
    *("redirect-private", "redirect-file", "image-bomb", "image-truncated", "image-wrong-size"),
    *("image-black", "401", "402", "404", "500", "503", "not-utf8", "silence"),
)
_POLL = (
    *("truncated-json", "invalid-json", "nan-json", "deep-json", "wrong-types", "missing-fields"),
    *("a-list", "null", "unknown-status", "empty-output", "404", "500", "html-502"),
)
_CREATE = ("lost-answer", "wrong-types", "missing-fields", "invalid-json", "empty-body", "a-list")

Mode = Callable[[FaultServer], None]


def _route(route: str, fault: str | Fault) -> Mode:
    return lambda server: server.always(route, fault)


def _set(**values: Any) -> Mode:
    def change(server: FaultServer) -> None:
        for name, value in values.items():
            setattr(server, name, value)

    return change


_JPEG = Fault(lambda _: Answer.of(picture("x", (64, 64), "jpg"), "image/jpeg"))
MISBEHAVIOURS: dict[str, Mode] = {
    **{f"image: {fault}": _route("image", fault) for fault in _IMAGE},
    **{f"poll: {fault}": _route("poll", fault) for fault in _POLL},
    **{f"create: {fault}": _route("create", fault) for fault in _CREATE},
    "image: jpeg for png": _route("image", _JPEG),
    "output: another host": _set(output_shape=lambda url: "https://cdn.moved.example/image.png"),
    "output: no address": _set(output_shape=lambda url: "image.png"),
    "prediction: billed failure": _set(fails=True),
    "prediction: never ends": _set(never_ends=True),
    "prediction: one id for all": _set(same_id=True),
    "charge: a thousand times the price": _set(cost_usd=1000 * PRICE_USD),
}


@dataclass(slots=True)
class Sold:
    """What all modes sold, and what must not be."""

    modes: int = 0
    runs: int = 0
    most_from_start: int = 0
    most_beyond: int = 0
    twice: int = 0
    believed: int = 0
    untyped: int = 0
    seen: list[str] = field(default_factory=list)


def run(scale: float, folder: Path) -> tuple[Sequence[Figure], Sequence[str]]:
    """Every mode from the start and after good images; a share of them at a smaller scale."""
    names = list(MISBEHAVIOURS)[:: max(1, round(1 / scale))]
    sold = Sold()
    surroundings = {"XDG_STATE_HOME": str(folder / "state"), "EACHLABS_API_KEY": ""}
    decoder = mock.patch("sd35bench.remote.prediction.decode_image", _decode)
    with mock.patch.dict(os.environ, surroundings), decoder:
        for number, name in enumerate(names):
            sold.modes += 1
            from_start(name, folder / f"{number}-start", sold)
            after_good_ones(name, folder / f"{number}-turned", sold)
    return _figures(sold, scale), sold.seen


def _decode(data: bytes) -> Any:
    """The decoder, in this process: its child processes are what another experiment tests."""
    try:
        return decode_rgb(data)
    except Exception as exc:
        raise InvalidImage(f"cannot be decoded: {exc}") from exc


def from_start(name: str, root: Path, sold: Sold) -> None:
    """Bad from its first prediction: one is bought, and reruns buy none of these again."""
    study = Study.open(root, "study", create=True)
    with serving() as server:
        MISBEHAVIOURS[name](server)
        _run(study, server, sold, name)
        usable = len(study.done_keys())  # some ways of failing are put right
        unusable = _creates(server) - usable
        for _ in range(RERUNS):
            _run(study, server, sold, name)
        if usable:
            sold.most_beyond = max(sold.most_beyond, unusable)
        else:
            sold.most_from_start = max(sold.most_from_start, unusable)
        if unusable > (MOST_UNUSABLE + WIDTH if usable else 1):
            sold.seen.append(f"{name}: {unusable} bought for nothing, {usable} usable")
        _audit(study, server, sold, name)


def after_good_ones(name: str, root: Path, sold: Sold) -> None:
    """Good at first: what is bought beyond the last usable image is bounded."""
    study = Study.open(root, "study", create=True)
    with serving() as server:
        _run(study, server, sold, name, max_cost_usd=GOOD * PRICE_USD)
        MISBEHAVIOURS[name](server)
        _run(study, server, sold, name)
        beyond = _creates(server) - len(study.done_keys())
        sold.most_beyond = max(sold.most_beyond, beyond)
        if beyond > MOST_UNUSABLE + WIDTH:
            sold.seen.append(f"{name}: {beyond} bought beyond the last usable image")
        for _ in range(RERUNS):
            _run(study, server, sold, name)
        _audit(study, server, sold, name)


def _run(study: Study, server: FaultServer, sold: Sold, name: str, **changes: Any) -> None:
    wanted = {"single_stream": 0, "concurrency": WIDTH, "timeout_s": TIMEOUT_S, **changes}
    sold.runs += 1
    try:
        run_hosted(study, hosted_plan(server.url, COUNT), server.url, **wanted)
    except SD35BenchError:
        return
    except Exception as exc:
        sold.untyped += 1
        sold.seen.append(f"{name}: {type(exc).__name__}: {exc}")


def _creates(server: FaultServer) -> int:
    return sum(server.creates.values())


def _audit(study: Study, server: FaultServer, sold: Sold, name: str) -> None:
    """Count what was paid twice, and images that are not what the service made of their input."""
    twice = sum(count - 1 for count in server.creates.values())
    own = {
        picture(text, server.sizes["1:1"], "png")
        for text in server.creates  # the input as text is what the picture is drawn from
    }
    ok = [r for r in study.records() if r.status is Status.OK]
    believed = sum(study.read_image_file(str(r.image)) not in own for r in ok)
    sold.twice += twice
    sold.believed += believed
    if twice or believed:
        sold.seen.append(f"{name}: {twice} paid twice, {believed} images that are not its own")


def _figures(sold: Sold, scale: float) -> list[Figure]:
    return [
        Figure(name="modes", value=sold.modes, least=MODES * min(1.0, scale)),
        Figure(name="runs", value=sold.runs),
        Figure(
            name="most purchases of a first run that had nothing usable",
            value=sold.most_from_start,
            most=1,
        ),
        Figure(
            name="most purchases beyond the last usable image",
            value=sold.most_beyond,
            most=MOST_UNUSABLE + WIDTH,
        ),
        Figure(name="paid twice over all reruns", value=sold.twice, most=0, out_of="runs"),
        Figure(name="unusable images kept as results", value=sold.believed, most=0),
        Figure(name="runs that ended in an untyped exception", value=sold.untyped, most=0),
    ]


SERVICES = Experiment(
    name="services",
    title="A service that sells nothing of use",
    did=(
        f"`HostedService.run` works on {COUNT} trials, {WIDTH} at once, while the server misbehaves"
        f" in one of {len(MISBEHAVIOURS)} modes: in what it sends as an image, says of a"
        " prediction, answers to a create, charges, or names as an output's address. Each mode is"
        f" met twice: from the server's start, and after {GOOD} good images; then come {RERUNS}"
        " reruns. The server counts creates by their input."
    ),
    fails_if=(
        "a first run with nothing usable buys more than one image; more than"
        f" {MOST_UNUSABLE} + concurrency are bought beyond the last usable one; an input is bought"
        " twice; an image is kept that is not, byte for byte, what the server made of its input."
    ),
    shows_not=(
        "Images that are of the right size and format and show something else: only metrics can"
        " tell. A service that lies about what it charges."
    ),
    run=run,
)
