"""`run from=recommended.yaml profile=balanced`: the command that the file holds, and what is added.

Words of one's own win over the file's; own prompts (`prompts=`, `prompts.path=`) replace all that
the file says of prompts.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sd35bench.cli.parser import Given, name_of
from sd35bench.disk import read_yaml
from sd35bench.errors import ConfigError, nearest

_FROM, _PROFILE, _TASK = "from", "profile", "task"
_SWEEP = "-m"
_OWN_PROMPTS = ("prompts", "prompts.path")


def with_recommended(given: Given) -> Given:
    """The same arguments with `from=FILE profile=NAME [task=NAME]` written out.

    Raises: ConfigError where the file, the profile or the task is not there.
    """
    own = {name: text for name, _, text in (word.partition("=") for word in given.settings)}
    if _FROM not in own:
        return given
    words = [w for w in given.settings if name_of(w) not in (_FROM, _PROFILE, _TASK)]
    command = _command(Path(own[_FROM]), own.get(_PROFILE), own.get(_TASK))
    names = {name_of(word) for word in words}
    replaced = names & set(_OWN_PROMPTS)
    found = shlex.split(command)[2:]
    # Flags are of the command line alone: no file may name a folder of code.
    kept = [
        word
        for word in found
        if not word.startswith("-")
        and name_of(word) not in names
        and not (replaced and word.startswith(("prompts=", "prompts.")))
    ]
    # A choice made on several seeds is a sweep over them.
    flags = {**given.flags, **({_SWEEP: ""} if _SWEEP in found else {})}
    return replace(given, settings=[*kept, *words], flags=flags)


def _command(path: Path, profile: str | None, task: str | None) -> str:
    """The command of one answer of a recommended.yaml."""
    found = _profiles(path)
    tasks = _chosen(path, found, _PROFILE, profile)
    answer = _chosen(path, tasks, _TASK, task)
    command = answer.get("command")
    if not isinstance(command, str):
        raise ConfigError(f"from={path}: this profile has no setting: {answer.get('answer')}")
    return command


def _profiles(path: Path) -> Mapping[str, Any]:
    try:
        document = read_yaml(path)
    except ValueError as exc:
        raise ConfigError(f"from={path}: cannot be read: {exc}") from exc
    found = document.get("profiles") if isinstance(document, dict) else None
    if not isinstance(found, dict) or not found:
        raise ConfigError(f"from={path}: not a recommended.yaml; sd35bench recommend writes one")
    return found


def _chosen(
    path: Path, found: Mapping[str, Any], field: str, name: str | None
) -> Mapping[str, Any]:
    """One of several by its name, or the only one."""
    if name is None:
        if len(found) > 1:
            raise ConfigError(f"from={path}: give {field}=, one of {', '.join(found)}")
        (name,) = found
    if name not in found:
        near: Sequence[str] = list(found)
        raise ConfigError(
            f"{field}={name}: not in {path}{nearest(name, near)}; there: {', '.join(near)}"
        )
    return found[name]
