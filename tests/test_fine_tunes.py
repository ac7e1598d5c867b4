"""docs/fine-tunes.md as it stands there: nano really fine-tuned, and every command executed."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sd35bench.cli import compare, main
from sd35bench.cli.parser import parse
from sd35bench.config import check_overrides, compose, freeze
from sd35bench.config.overrides import written
from sd35bench.loading.checkpoint import NANO_WEIGHTS, path_digest
from sd35bench.loading.sources import load_model
from sd35bench.nano.train.card import load_pipeline
from sd35bench.nano.train.lora import FineTune, adapt, train
from sd35bench.types import Change, ModelSpec
from tests.studies.in_process import compute_here

TEXT = (Path(__file__).parents[1] / "docs" / "fine-tunes.md").read_text()
LINES = [
    line
    for block in re.findall(r"^```bash\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
    for line in block.splitlines()
]


def commands(program: str) -> Iterator[list[str]]:
    """Arguments of each of a program's commands on the page."""
    for line in LINES:
        words = shlex.split(line.partition("||")[0], comments=True)
        if words[0] == program:
            yield words[1:]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's fine-tune, after a few of its steps."""
    path = tmp_path_factory.mktemp("tunes") / "dark.safetensors"
    losses = train(FineTune(steps=4, batch=4, background="black"), path)
    assert all(0 < loss < 2 for loss in losses)
    return path


def spec(*changes: Change) -> ModelSpec:
    return ModelSpec(
        name="nano",
        path=str(NANO_WEIGHTS),
        weights_digest="tests",
        max_sequence_length=16,
        changes=changes,
    )


def velocity(transformer: Any) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return transformer(
            hidden_states=torch.randn(1, 16, 8, 8, generator=g),
            timestep=torch.tensor([500.0]),
            encoder_hidden_states=torch.randn(1, 32, 192, generator=g),
            pooled_projections=torch.randn(1, 160, generator=g),
            return_dict=False,
        )[0]


def test_what_was_trained_is_what_is_merged(tuned: Path) -> None:
    change = Change(kind="lora", path=str(tuned), digest=path_digest(tuned))
    pipe = load_model(spec(change), torch.float32)
    base = load_pipeline(NANO_WEIGHTS).transformer
    plain = velocity(base)
    factors = adapt(base, rank=FineTune().rank)
    assert pipe.facts["lora"][0]["layers"] == len(factors) > 40
    weights = load_file(tuned)
    for name, each in factors.items():
        each.down.data = weights[f"transformer.{name}.lora_A.weight"]
        each.up.data = weights[f"transformer.{name}.lora_B.weight"]
    merged = velocity(pipe.transformer)
    assert float((merged - velocity(base)).abs().max()) < 1e-4
    assert float((merged - plain).abs().max()) > 1e-2  # it was trained


def test_every_command_of_the_page_is_one_that_there_is(tuned: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tuned.parent)
    runs = [words for words in commands("sd35bench") if words[0] == "run"]
    compares = [words for words in commands("sd35bench") if words[0] == "compare"]
    assert (len(runs), len(compares), len(list(commands("python")))) == (3, 2, 1)
    digests = set()
    for verb, *rest in runs:
        assert verb == "run"
        check_overrides(rest, multirun=False)
        digests.add(freeze(compose(written(rest))).sweep.load.model.weights_digest)
    assert len(digests) == len(runs)
    for verb, *rest in compares:
        parse(verb, compare.COMMANDS[verb], rest, as_json=False)


def test_did_my_fine_tune_regress_is_one_command(tuned: Path, monkeypatch: Any) -> None:
    """The page's first two runs and their comparison, with 4 steps of 7 prompts.

    A fine-tune of 4 steps changes little, so that it is taken 40 times over: nothing is right then.
    """
    monkeypatch.chdir(tuned.parent)
    compute_here(monkeypatch)
    fewer = {"steps=8": "steps=4", "prompts.limit=64": "prompts.limit=7"}
    fewer |= {"model.lora=dark.safetensors": "model.lora=dark.safetensors:40"}
    base, dark, verdict, *_ = commands("sd35bench")
    for words in (base, dark):
        assert main([fewer.get(word, word) for word in [*words, "threads=1"]]) == 0
    assert verdict[0] == "compare"
    assert main(verdict) == 1


@pytest.mark.slow
def test_the_page_s_commands_say_what_the_page_says(tmp_path: Path) -> None:
    own = {"python": sys.executable, "sd35bench": f"{sys.executable} -m sd35bench"}
    for line in LINES:
        code = re.search(r"# exit code (\d)", line)
        program, _, rest = line.partition(" ")
        done = subprocess.run(["bash", "-c", f"{own[program]} {rest}"], cwd=tmp_path)
        assert done.returncode == (0 if code is None else int(code[1])), line
