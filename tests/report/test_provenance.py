"""How to run a study again: the batch sizes of its command line."""

import shlex
from dataclasses import replace

import pytest

from sd35bench.config.overrides import parse
from sd35bench.report.provenance import rerun_commands
from tests.studies.memory import record


def command(images: dict[int, int]) -> str:
    """The command that made so many images at each batch size."""
    records = [record(p, batch_size=size) for size, count in images.items() for p in range(count)]
    (found,) = rerun_commands("s", records)
    return found["command"]


@pytest.mark.parametrize(
    ("images", "wanted"),
    [
        ({1: 8, 2: 8, 4: 8}, ["batch_size=1,2,4"]),
        ({1: 8, 4: 8}, ["batch_size=1,4"]),
        ({1: 2, 4: 8}, ["batch_size=4", "timed_limit=2"]),
        ({1: 2, 4: 8, 8: 8}, ["batch_size=4,8", "timed_limit=2"]),
        ({4: 8}, ["batch_size=4", "timed_limit=0"]),
        ({1: 8}, []),
    ],
    ids=["swept", "one-and-one", "timed-besides", "swept-and-timed", "untimed", "lone"],
)
def test_command_has_the_batch_sizes_that_were_asked_for(images, wanted):
    words = command(images).split()
    assert [w for w in words if w.startswith(("batch_size", "timed_limit"))] == wanted


@pytest.mark.parametrize(
    ("name", "source", "wanted"),
    [
        ("nano", {}, {"prompts": "nano"}),
        ("starter.txt", {}, {"prompts": "starter"}),
        ("geneval", {}, {"prompts": "geneval", "prompts.path": "GENEVAL_FILE"}),
        ("mine.csv", {}, {"prompts": "file", "prompts.path": "mine.csv"}),
        ("mine.csv", {"path": "my/mine.csv"}, {"prompts": "file", "prompts.path": "my/mine.csv"}),
        (
            "mine.csv",
            {"columns.prompt": "text"},
            {"prompts": "file", "prompts.path": "mine.csv", "prompts.columns.prompt": "text"},
        ),
    ],
)
def test_command_reads_the_same_prompts(name, source, wanted):
    row = record(0, prompt_set=name)
    ref = replace(row.trial.prompt, source=source)
    (found,) = rerun_commands("s", [replace(row, trial=replace(row.trial, prompt=ref))])
    words = dict(w.split("=", 1) for w in shlex.split(found["command"]) if "=" in w)
    own = {n: v for n, v in words.items() if n.partition(".")[0] == "prompts"}
    assert {n: v for n, v in own.items() if n not in ("prompts.split", "prompts.limit")} == wanted


def test_each_of_nanos_prompt_sets_has_a_command():
    """Mutant: one command a split, which asked for the first set's prompts alone."""
    rows = [record(n) for n in range(3)]
    overlap = replace(rows[2].trial.prompt, id="tune-overlap-0-0002")
    rows[2] = replace(rows[2], trial=replace(rows[2].trial, prompt=overlap))
    found = [command["command"] for command in rerun_commands("s", rows)]
    assert sorted("prompts.task=overlap" in command for command in found) == [False, True]


@pytest.mark.parametrize("path", ["my prompts.csv", "a, b.csv", "it's {1}.csv", 'say "no".csv'])
def test_a_path_reaches_hydra_as_it_is(path):
    """Mutant: the shell's quotes alone; Hydra then refuses the space, or reads the comma."""
    row = record(0, prompt_set="mine.csv")
    ref = replace(row.trial.prompt, source={"path": path})
    (found,) = rerun_commands("s", [replace(row, trial=replace(row.trial, prompt=ref))])
    (word,) = (w for w in shlex.split(found["command"]) if w.startswith("prompts.path="))
    value = parse(word).value()
    assert getattr(value, "text", value) == path
