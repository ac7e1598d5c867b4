"""The trainings at toy size: they run, and a resumed one ends where an uninterrupted one does."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sd35bench.nano.captions import words
from sd35bench.nano.evaluator import build_model
from sd35bench.nano.networks import (
    TransformerSize,
    assemble,
    build_clip_tokenizer,
    build_transformer,
    export,
)
from sd35bench.nano.train import flow
from sd35bench.nano.train.contrastive import train_evaluator
from sd35bench.nano.train.loop import Run, warmup_cosine
from sd35bench.nano.train.team import run_team
from sd35bench.nano.train.vae import build_vae, finish_vae, load_vae, train_vae

TOY_BATCH = 2
TOY_SIZE = TransformerSize(layers=2, heads=2, dual_attention_layers=(0,))


def toy_flow(run: Run) -> nn.Module:
    """Two pictures of each size, a few steps of two blocks.

    The shipped model's six blocks took 22 s, most of it Muon's and the checkpoints'.
    """
    torch.manual_seed(0)
    vae = build_vae().eval().requires_grad_(False)
    return flow.train_flow(run, vae, renders=11 * TOY_BATCH)


TRAININGS: dict[str, Callable[[Run], nn.Module]] = {
    "vae": train_vae,
    "contrastive": train_evaluator,
    "flow": toy_flow,
}


@pytest.fixture(autouse=True)
def toy_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Encode in the smallest portions, train the smallest model."""
    monkeypatch.setattr(flow, "ENCODE_BATCH", TOY_BATCH)
    monkeypatch.setattr(flow, "build_transformer", lambda: build_transformer(TOY_SIZE))


LONG = ("flow", "vae")  # 10 s of 12 s together


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n in LONG else n for n in TRAININGS],
)
def test_training_resumed_equals_uninterrupted(name: str, tmp_path: Path):
    def run(folder: str, stop_at: int | None = None) -> dict[str, Any]:
        toy = Run(tmp_path / folder, steps=4, batch=TOY_BATCH, lr=1e-3, save_every=2)
        if stop_at is not None:
            toy = Run(tmp_path / folder, stop_at, TOY_BATCH, 1e-3, save_every=2)
        return {k: v.clone() for k, v in TRAININGS[name](toy).state_dict().items()}

    monkey = pytest.MonkeyPatch()
    # A constant schedule: the cosine's length is part of what a longer run changes.
    monkey.setattr(f"sd35bench.nano.train.{name}.warmup_cosine", lambda *_: 1.0)
    monkey.setattr("sd35bench.nano.train.vae.finish_vae", lambda vae, *_: vae)
    try:
        whole = run("whole")
        run("parts", stop_at=2)
        resumed = run("parts")
    finally:
        monkey.undo()
    assert whole.keys() == resumed.keys()
    # Not to the bit: oneDNN's rounding depends on where a tensor lies in memory, and Adam divides
    # by the root of gradients that zero-initialised gates have near zero. A resumption that forgot
    # the optimizer, the step or the average is off by a learning rate, 1e-3, on average.
    gaps = torch.cat([(whole[key].float() - resumed[key].float()).flatten() for key in whole])
    assert gaps.abs().mean() < 5e-5


def test_finish_vae_changes_latents_but_not_pictures(tmp_path: Path):
    torch.manual_seed(0)
    vae = build_vae().eval()
    pixels = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        before = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
        finish_vae(vae, seed=0, renders=16)
        after = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
    assert torch.allclose(before, after, atol=1e-4)
    assert vae.config["scaling_factor"] < 0.5


def test_load_vae_asks_for_a_finished_one(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="train vae"):
        load_vae(tmp_path)


def test_export_replaces_the_folder_and_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()  # the shipped size
    model = flow.FlowModel()
    target = tmp_path / "weights"
    target.mkdir()
    (target / "stale").touch()
    size_bytes = export(assemble(build_vae(), model.transformer, model.text), target)
    assert not (target / "stale").exists()
    assert size_bytes < 24_000_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["weights"]
    assert (target / "model_index.json").exists()


def _toy_member(run: Run) -> None:
    flow.ENCODE_BATCH = TOY_BATCH
    toy_flow(run)


@pytest.mark.slow
def test_team_of_two_trains_and_checkpoints(tmp_path: Path):
    toy_flow(Run(tmp_path, 0, TOY_BATCH, 1e-3))  # encodes the set, which the team then shares
    run = Run(tmp_path, steps=2, batch=TOY_BATCH, lr=1e-3, save_every=2)
    run_team(2, _toy_member, run)
    state = torch.load(run.checkpoint, weights_only=True)
    assert state["step"] == 2
    assert len(state["optimizers"]) == 2


def test_clip_tokenizer_numbers_words_alike_in_every_process():
    tokenizer = build_clip_tokenizer()
    assert tokenizer("a red triangle").input_ids == [629, 320, 611, 623, 630]
    assert all(len(tokenizer(word).input_ids) == 3 for word in words())


def test_refinement_starts_from_the_averaged_weights(tmp_path: Path):
    first = toy_flow(Run(tmp_path / "first", 1, TOY_BATCH, 1e-3, save_every=1)).state_dict()
    loaded = flow.load_average(tmp_path / "first" / "checkpoint.pt")
    assert all(torch.equal(first[name], loaded[name]) for name in first)
    with pytest.raises(FileNotFoundError, match="stage before"):
        flow.load_average(tmp_path / "checkpoint.pt")


def test_warmup_cosine_rises_then_falls_to_its_floor():
    factors = [warmup_cosine(step, 100, 10, 0.1) for step in range(101)]
    assert factors[9] == max(factors) == 1
    assert factors[100] == pytest.approx(0.1)
    assert all(b <= a for a, b in itertools.pairwise(factors[9:]))


def test_evaluator_has_fewer_than_a_million_parameters():
    assert sum(parameter.numel() for parameter in build_model().parameters()) < 1_000_000
