"""What every backend must do, whatever it is made of: checks on a loaded one, which need no model.

A check makes a few small images and raises `ContractBroken` where they are not what was asked for.
The package's own backends and `sd35bench contract PACKAGE` run the same ones.
"""

import json
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sd35bench.backends.base import Backend, Generation
from sd35bench.errors import SD35BenchError
from sd35bench.types import Request, Task

APART = 1.0
"""Mean difference in 8-bit levels from which on two images count as different."""
BATCH_LEVELS = 4
"""How far a level may move in a batch: bf16 moves it by up to 4, fp32 by 1."""


class ContractBroken(SD35BenchError):
    """A backend does not do what every backend must."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A loaded backend and a plain text-to-image request that it can make, at few steps."""

    backend: Backend
    request: Request
    batch_levels: int = BATCH_LEVELS

    def ask(self, **changes: Any) -> Request:
        """The request with other fields."""
        return replace(self.request, **changes)

    def make(self, *requests: Request) -> Generation:
        """One batch; requests with an init image start from `init`."""
        inits = [None if r.init_image is None else self.init() for r in requests]
        return self.backend.generate(requests, inits)

    def image(self, **changes: Any) -> np.ndarray:
        """One image, uint8 [H, W, 3]."""
        return self.make(self.ask(**changes)).images[0]

    def init(self) -> np.ndarray:
        """An init image of the request's size: seeded blocks of 8 px."""
        rows, columns = -(-self.request.height // 8), -(-self.request.width // 8)
        blocks = np.random.default_rng(3).integers(0, 256, (rows, columns, 3), np.uint8)
        return blocks.repeat(8, 0).repeat(8, 1)[: self.request.height, : self.request.width]


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Mean absolute difference in 8-bit levels."""
    return float(np.abs(a.astype(int) - b).mean())


def _require(holds: bool, said: str) -> None:
    if not holds:
        raise ContractBroken(said)


def check_image_is_what_was_asked(subject: Subject) -> None:
    """Size and type."""
    image, request = subject.image(), subject.request
    wanted = (request.height, request.width, 3)
    _require(
        image.dtype == np.uint8 and image.shape == wanted,
        f"the image is {image.dtype} {image.shape}, wanted uint8 {wanted}",
    )


def check_same_request_same_bytes(subject: Subject) -> None:
    """Nothing is drawn at random but by the seed."""
    same = subject.image().tobytes() == subject.image().tobytes()
    _require(same, "the same request gave two images")


def check_every_field_acts(subject: Subject) -> None:
    """Seed, prompt, cfg and steps change the image."""
    base, asked = subject.image(), subject.request
    for changes in (
        {"seed": asked.seed + 1},
        {"prompt": "blue star"},
        {"cfg": asked.cfg / 2},
        {"steps": 2 * asked.steps},
    ):
        _require(distance(base, subject.image(**changes)) > APART, f"{changes} changed nothing")


def check_negative_prompt_acts(subject: Subject) -> None:
    """With guidance on, the negative prompt changes the image."""
    apart = distance(subject.image(), subject.image(negative_prompt="ugly"))
    _require(apart > APART, "negative_prompt changed nothing")


def check_batch_has_own_seeds(subject: Subject) -> None:
    """Each request of a batch has its own noise."""
    seed = subject.request.seed
    first, second = subject.make(subject.ask(), subject.ask(seed=seed + 1)).images
    _require(distance(first, second) > APART, "two seeds in one batch gave the same image")


def check_batch_equals_singles(subject: Subject) -> None:
    """Who else is in a batch does not matter."""
    requests = [subject.ask(), subject.ask(prompt="blue star", seed=subject.request.seed + 5)]
    singles = [subject.make(request).images[0] for request in requests]
    pairs = zip(singles, subject.make(*requests).images, strict=True)
    moved = max(int(np.abs(a.astype(int) - b).max()) for a, b in pairs)
    most = subject.batch_levels
    _require(moved <= most, f"in a batch an image moved by {moved} levels, more than {most}")


def check_steps_are_counted(subject: Subject) -> None:
    """Evaluations and steps are counted as they were made."""
    for steps in (8, 7, 3):
        _counted(subject, subject.ask(steps=steps))


def check_strength_leads_away_from_the_init(subject: Subject) -> None:
    """The larger prompt_strength, the farther from the init image."""
    strengths = (0.125, 0.375, 0.75, 1.0)  # 1, 3, 6 and 8 steps of 8
    images = [
        subject.image(steps=8, init_image="digest", prompt_strength=strength)
        for strength in strengths
    ]
    distances = [distance(images[0], other) for other in images]
    _require(
        distances == sorted(distances) and distances[1] > APART,
        f"prompt_strength {strengths}: distances from the first image are {distances}",
    )


def check_an_init_image_acts(subject: Subject) -> None:
    """Another init image is another image."""
    asked = subject.ask(init_image="digest", prompt_strength=0.75)
    dark = subject.backend.generate([asked], [subject.init() // 8]).images[0]
    apart = distance(dark, subject.make(asked).images[0])
    _require(apart > APART, "another init image changed nothing")


def check_steps_from_an_init_are_counted(subject: Subject) -> None:
    """Of N steps at strength s, s N are made."""
    for steps, strength in ((8, 0.5), (7, 0.33), (3, 0.1), (4, 1.0)):
        _counted(subject, subject.ask(steps=steps, init_image="digest", prompt_strength=strength))


def _counted(subject: Subject, request: Request) -> None:
    made, wanted = subject.make(request), request.effective_steps
    for name, found in (
        ("effective_steps", made.effective_steps),
        ("evaluations", made.evaluations),
        ("step_s", len(made.step_s)),
    ):
        at = "" if request.prompt_strength is None else f" at strength {request.prompt_strength}"
        _require(
            found == wanted, f"{request.steps} steps{at}: {name} says {found}, wanted {wanted}"
        )


def check_stages_are_positive_or_unknown(subject: Subject) -> None:
    """No stage took less than no time; unknown is ``None``."""
    made = subject.make(subject.ask())
    for name in ("text_s", "denoise_s", "decode_s"):
        seconds = getattr(made, name)
        _require(seconds is None or seconds >= 0, f"{name} is {seconds}")
    _require(all(seconds >= 0 for seconds in made.step_s), f"step_s is {made.step_s}")
    counts = len(made.truncated_tokens)
    _require(counts in (0, 1), f"truncated_tokens has {counts} counts for one request")


def check_in_force_survives_the_way_to_the_store(subject: Subject) -> None:
    """`in_force` is there, and plain data."""
    found = subject.backend.in_force
    _require(bool(found), "in_force is empty: say device and dtype at least")
    try:
        same = json.loads(json.dumps(found)) == found == pickle.loads(pickle.dumps(found))
    except (TypeError, ValueError, pickle.PickleError) as exc:
        raise ContractBroken(f"in_force cannot be stored: {exc}") from exc
    _require(same, "in_force is another after it was stored: texts, numbers and lists only")


Check = Callable[[Subject], None]
TEXT_CHECKS: tuple[Check, ...] = (
    check_image_is_what_was_asked,
    check_same_request_same_bytes,
    check_every_field_acts,
    check_negative_prompt_acts,
    check_batch_has_own_seeds,
    check_batch_equals_singles,
    check_steps_are_counted,
    check_stages_are_positive_or_unknown,
    check_in_force_survives_the_way_to_the_store,
)
IMAGE_CHECKS: tuple[Check, ...] = (
    check_strength_leads_away_from_the_init,
    check_an_init_image_acts,
    check_steps_from_an_init_are_counted,
)


def run_contract(subject: Subject, tasks: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Check a backend that does `tasks`: each check's name, and what is wrong (``None``: nothing).

    Whatever somebody else's backend raises is what is wrong with it.
    """
    edits = IMAGE_CHECKS if Task.IMAGE_TO_IMAGE.value in tasks else ()
    for check in (*TEXT_CHECKS, *edits):
        name = check.__name__.removeprefix("check_").replace("_", " ")
        try:
            check(subject)
        except ContractBroken as exc:
            yield name, str(exc)
        except Exception as exc:
            yield name, f"raised {type(exc).__name__}: {exc}"
        else:
            yield name, None
