"""What stands in for models, GPUs and services when the documents' commands are executed.

The fake backend makes patterns in place of images, nano is the model, few prompts stand for many.
Drift is from a real backend, so nano runs there, one step of two prompts.
"""

import csv
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

from tests.documents import Shell, blocks

SERVICES = ("eachlabs", "replicate", "fal", "stability", "deepinfra")
ELSEWHERE = ("docs/ci.md", "docs/fine-tunes.md")
"""Executed by tests of their own: `test_ci_example`, `test_fine_tunes`."""
NEVER = {
    "judge_vqa": "asks a server of a model",
    "page": "needs the vendor, or its stand-in: tests/server",
    "ray": "starts a cluster: tests/workers",
    "served": "needs a server beside it: the test of the served protocol",
}
"""What is parsed and no more, by a word of the command."""
OF_THE_MODEL = (
    *("model=", "model.", "width=", "height="),
    *("noise_floor=", "keep_latents=", "starts="),
)
FEW = 4
DRIFTING = ("backend=", "steps=1", "prompts.limit=2", "threads=1")
DECIDED = ("backend=eager", "steps=2,4", "margin=0.5", "threads=1")
"""What `prompts.limit=auto` plans from: patterns differ in no score, so that nothing is planned."""
INSTEAD = {"diffusers": "command", "clip_score": "clip_score_nano"}
"""Other words: no pipeline of diffusers' made the patterns, and nano has its own evaluator."""


def refusal(shell: Shell) -> str | None:
    """Why a command is not executed here; ``None`` where it is."""
    for word, why in NEVER.items():
        if any(word in re.split(r"[=,]", text) for text in shell.words):
            return why
    asked = next((w for w in shell.words if w.startswith("backend=")), "")
    if any(service in asked for service in SERVICES):
        return "asks a hosted service"
    return None


def drifts(found: Iterable[Shell]) -> dict[str, str]:
    """The studies whose drift is scored, and the backend that they drift from."""
    own = "metric.drift.reference="
    return {
        c.words[2]: next((w.removeprefix(own) for w in c.words if w.startswith(own)), "eager")
        for c in found
        if c.words[1] == "score" and "drift" in c.words
    }


def arguments(shell: Shell, drifting: Mapping[str, str] = MappingProxyType({})) -> list[str]:
    """A command's arguments with the stand-ins; `drifting`: what `drifts` finds on its page."""
    verb, *rest = shell.words[1:]
    if verb not in ("run", "tune"):
        return [verb, *(INSTEAD.get(w, _fewer(w)) for w in _no_model(rest))]
    words = [_fewer(w) for w in rest if not w.startswith(OF_THE_MODEL)]
    study = next((w for w in rest if w.startswith("study=")), "study=")[6:]
    if study in drifting:
        return [verb, *_without(words, DRIFTING), f"backend={drifting[study]},fake", *DRIFTING[1:]]
    if "prompts.limit=auto" in words:
        return [verb, *_without(words, DECIDED), *DECIDED]
    if not any(w.startswith("from=") for w in words):
        words = [*_without(words, ("backend=",)), "backend=fake"]
    if any(w.startswith("experiment=") for w in words):
        words.append("noise_floor=fake")
    if not any(w.startswith(("prompts.limit=", "prompt=")) for w in words):
        words.append(f"prompts.limit={FEW}")
    if verb == "tune":
        words.append(f"first={FEW}")
    return [verb, *words]


def _without(words: list[str], replaced: tuple[str, ...]) -> list[str]:
    """The words but those whose name another word replaces."""
    names = {w.partition("=")[0] for w in replaced}
    return [w for w in words if w.partition("=")[0] not in names]


def _no_model(words: list[str]) -> list[str]:
    return [w for w in words if not w.startswith(("model.path=", "model.weights="))]


def _fewer(word: str) -> str:
    """Fewer prompts, and as many workers and threads as two cores hold."""
    name, _, value = word.partition("=")
    if name == "prompts.limit" and value.isdigit():
        return f"{name}={min(int(value), FEW)}"
    return {"workers": "workers=2", "threads": "threads=1"}.get(name, word)


def write_files(folder: Path, page: Path) -> None:
    """The files that commands name: prompts, and a page's own YAML files."""
    with open(folder / "prompts.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["prompt", "category"])
        rows.writerows([f"a {c} circle, number {i}", c] for i in range(9) for c in COLOURS)
    (folder / "mine.txt").write_text("".join(f"a {c} square\n" for c in COLOURS))
    for text in blocks(page, "yaml"):
        found = re.match(r"# ([\w.-]+\.yaml):", text)
        if found:
            (folder / found[1]).write_text(text)


COLOURS = ("red", "green", "blue", "white")
