"""On which workers images are scored: the words of `run` for them, given to `score`."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from sd35bench.config.models import FIELDS, check_field
from sd35bench.config.overrides import RAY_OPTIONS, WORKERS, parse
from sd35bench.config.remote import threads_of
from sd35bench.errors import ConfigError, nearest
from sd35bench.workers.features import Spread, local_spread


def spread_of(overrides: Sequence[str]) -> AbstractContextManager[Spread | None]:
    """The workers that `workers=`, `threads=`, `engine=` and `ray.…=` ask for; none where none do.

    Raises: ConfigError for a wrong value, and for Ray's options without `engine=ray`. Entered:
    ConfigError for more workers than fit, and where no Ray answers.
    """
    words = [text for text in overrides if text.startswith(WORKERS)]
    given: dict[str, Any] = {}
    for text in words:
        override = parse(text)
        name, value = override.get_key_element(), override.value()
        if name not in FIELDS and not name.startswith(RAY_OPTIONS):
            raise ConfigError(f"{text}: unknown field {name!r}{nearest(name, [*FIELDS])}")
        given[name] = value if name.startswith(RAY_OPTIONS) else check_field(name, value)
    if not given:
        return nullcontext()
    workers, threads = given.get("workers"), given.get("threads")
    threads_of(threads)
    if given.get("engine", "processes") != "ray":
        unread = [name for name in given if name.startswith("ray.")]
        if unread:
            raise ConfigError(f"{unread[0]}: it acts with engine=ray only; add engine=ray")
        return local_spread(1 if workers is None else workers, threads)
    from sd35bench.workers.cluster import RaySettings, ray_spread

    init, actor = (
        {name.removeprefix(head): v for name, v in given.items() if name.startswith(head)}
        for head in RAY_OPTIONS
    )
    settings = RaySettings(address=given.get("ray.address"), init=init, actor=actor)
    return ray_spread("auto" if workers is None else workers, threads, settings)
