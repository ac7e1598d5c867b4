"""The MMDiT-X and its three text encoders, trained jointly by rectified flow on cached latents.

x_sigma = (1 - sigma) x + sigma noise; the network predicts noise - x at logit-normal sigma, as
SD3 does (Esser et al. 2024, equation 19). Hidden matrices are trained by Muon, all else by AdamW.
One caption in eight is replaced by the empty text, for classifier-free guidance.
"""

import hashlib
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from torch import Tensor, nn

from sd35bench.nano.networks import TextEncoders, build_transformer
from sd35bench.nano.train import team
from sd35bench.nano.train.loop import (
    Run,
    append_log,
    batch_rng,
    describe_figures,
    draw_scenes,
    draw_size,
    load_checkpoint,
    save_checkpoint,
    steps_with_progress,
    to_tensor,
    warmup_cosine,
)
from sd35bench.nano.world import ASPECT_RATIOS, Level, caption, render

BROAD_LEVELS: dict[Level, float] = {
    "single": 0.35,
    "relation": 0.35,
    "count": 0.12,
    "several": 0.10,
    "overlap": 0.08,
}
RELATION_LEVELS: dict[Level, float] = {
    "single": 0.17,
    "relation": 0.60,
    "count": 0.09,
    "several": 0.08,
    "overlap": 0.06,
}
CAPTION_DROPOUT = 0.125
EMA_DECAY = 0.9985
MUON_LR_RATIO = 1.6
ENCODE_BATCH = 128
WARMUP_STEPS = 150
LR_FLOOR = 0.02
PROBE_EVERY = 250

Probe = Callable[["FlowModel"], str]


@dataclass(frozen=True)
class Recipe:
    """What a stage shows: levels, and the mean of sigma's logit (0 as in SD3)."""

    levels: dict[Level, float]
    sigma_logit_mean: float = 0.0


BROAD = Recipe(BROAD_LEVELS)
REFINE = Recipe(RELATION_LEVELS, sigma_logit_mean=0.8)
"""The second stage. After the first, two objects were right but their order was at chance: which
one is left of the other is decided at high noise, where few samples of the first stage lie."""


@dataclass(frozen=True)
class LatentSet:
    """Encoded renders by (width, height): posterior mean and deviation, and token ids.

    `mean`, `std`: [N, 16, H/8, W/8] float16, before scaling and shift; `ids`: [N, 3, tokens].
    """

    mean: dict[tuple[int, int], Tensor]
    std: dict[tuple[int, int], Tensor]
    ids: dict[tuple[int, int], Tensor]


class FlowModel(nn.Module):
    """The transformer with its text encoders: everything that this training changes."""

    def __init__(self) -> None:
        super().__init__()
        self.text = TextEncoders()
        self.transformer: SD3Transformer2DModel = build_transformer()

    def forward(self, latents: Tensor, sigma: Tensor, ids: Tensor) -> Tensor:
        """The predicted velocity for latents [N, 16, h, w] at sigma [N] in (0, 1)."""
        embeddings, pooled = self.text(ids)
        return self.transformer(
            hidden_states=latents,
            timestep=sigma * 1000,
            encoder_hidden_states=embeddings,
            pooled_projections=pooled,
            return_dict=False,
        )[0]


def flow_loss(
    model: FlowModel, latents: Tensor, ids: Tensor, sigma_logit_mean: float = 0.0
) -> Tensor:
    """Mean squared error of the velocity on scaled latents [N, 16, h, w]."""
    logit = torch.randn(len(latents), device=latents.device) + sigma_logit_mean
    sigma = torch.sigmoid(logit)
    noise = torch.randn_like(latents)
    mix = sigma[:, None, None, None]
    velocity = model((1 - mix) * latents + mix * noise, sigma, ids)
    return (velocity.float() - (noise - latents)).square().mean()


@torch.no_grad()
def encode_set(
    vae: AutoencoderKL, text: TextEncoders, seed: int, renders: int, levels: dict[Level, float]
) -> LatentSet:
    """Render and encode a training set; sizes are drawn as `draw_size` does."""
    device = next(vae.parameters()).device
    parts: dict[tuple[int, int], list[tuple[Tensor, Tensor, Tensor]]] = {}
    for chunk in range(-(-renders // ENCODE_BATCH)):
        rng = batch_rng(seed, chunk)
        size = list(ASPECT_RATIOS.values())[chunk] if chunk < 11 else draw_size(rng)
        scenes = draw_scenes(rng, ENCODE_BATCH, size, levels)
        pixels = to_tensor([render(scene) for scene in scenes], str(device))
        mean, log_variance = vae.encoder(pixels).chunk(2, dim=1)
        std = torch.exp(0.5 * log_variance.clamp(-30, 20))
        ids = text.tokenize([caption(scene) for scene in scenes])
        parts.setdefault(size, []).append((mean.half().cpu(), std.half().cpu(), ids))
    joined = {
        size: [torch.cat(column) for column in zip(*rows, strict=True)]
        for size, rows in parts.items()
    }
    return LatentSet(*({size: columns[i] for size, columns in joined.items()} for i in range(3)))


def cached_set(
    vae: AutoencoderKL, text: TextEncoders, run: Run, renders: int, levels: dict[Level, float]
) -> LatentSet:
    """`encode_set`, kept in a file named after what it depends on."""
    digest = hashlib.sha256(f"{run.seed}/{renders}/{sorted(levels.items())}".encode())
    for name, weight in sorted(vae.state_dict().items()):
        digest.update(name.encode() + weight.cpu().numpy().tobytes())
    path = run.folder / f"latents-{digest.hexdigest()[:16]}.pt"
    if not path.exists():
        made = encode_set(vae, text, run.seed, renders, levels)
        save_checkpoint(path, {"mean": made.mean, "std": made.std, "ids": made.ids})
    return LatentSet(**torch.load(path, weights_only=True))


def flow_batch(
    data: LatentSet, empty_ids: Tensor, vae: AutoencoderKL, run: Run, step: int
) -> tuple[Tensor, Tensor]:
    """Scaled latents and token ids of one step, captions dropped at random."""
    rng = batch_rng(run.seed, step)
    size = draw_size(rng)
    rows = torch.from_numpy(rng.integers(len(data.mean[size]), size=run.batch))
    mean, std = data.mean[size][rows].float(), data.std[size][rows].float()
    latents = mean + std * torch.randn_like(mean)
    latents = (latents - vae.config["shift_factor"]) * vae.config["scaling_factor"]
    ids = data.ids[size][rows].clone()
    ids[torch.from_numpy(rng.random(run.batch) < CAPTION_DROPOUT)] = empty_ids
    mine = slice(team.rank(), None, team.size())
    torch.manual_seed(int(rng.integers(2**62)) + team.rank())
    return latents[mine].to(run.device), ids[mine].to(run.device)


def hidden_shards(model: FlowModel) -> list[list[nn.Parameter]]:
    """The MMDiT-X's attention and feed-forward matrices, dealt to the members of the team."""
    hidden = [
        parameter
        for name, parameter in model.named_parameters()
        if "transformer_blocks" in name and "norm" not in name and parameter.ndim == 2
    ]
    return [hidden[member :: team.size()] for member in range(team.size())]


def build_optimizers(model: FlowModel, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for this member's shard of the hidden matrices, AdamW for all else.

    The modulations (a third of the parameters) stay with AdamW: on a CPU, orthogonalising them
    costs as much as a fifth of a step.
    """
    shards = hidden_shards(model)
    hidden = {id(parameter) for shard in shards for parameter in shard}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in hidden]
    muon = torch.optim.Muon(
        shards[team.rank()],
        lr=lr * MUON_LR_RATIO,
        weight_decay=0.01,
        adjust_lr_fn="match_rms_adamw",
    )
    adamw = torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    for optimizer in (muon, adamw):
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return [muon, adamw]


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, step: int) -> None:
    """Exponential moving average of the weights, shorter at the start."""
    decay = min(EMA_DECAY, (step + 1) / (step + 10))
    for ours, theirs in zip(average.parameters(), model.parameters(), strict=True):
        ours.lerp_(theirs, 1 - decay)


def train_flow(
    run: Run,
    vae: AutoencoderKL,
    renders: int,
    probe: Probe | None = None,
    recipe: Recipe = BROAD,
    start: Path | None = None,
) -> FlowModel:
    """Train or resume; returns the averaged model, which the checkpoint also holds.

    `start` is the checkpoint of an earlier stage, whose averaged weights this one starts from.

    `probe` is called with the averaged model every `PROBE_EVERY` steps; its line goes to the log.
    """
    torch.manual_seed(run.seed)
    model = FlowModel().to(run.device)
    if start is not None:
        model.load_state_dict(load_average(start))
    average = deepcopy(model).requires_grad_(False)
    optimizers = build_optimizers(model, run.lr)
    first = _resume(run, model, average, optimizers)
    with team.in_turn():
        data = cached_set(vae, model.text, run, renders, recipe.levels)
    empty_ids = model.text.tokenize([""])[0]
    figures = {"loss": 0.0}
    for step in steps_with_progress(run, first, lambda: describe_figures(figures)):
        latents, ids = flow_batch(data, empty_ids, vae, run, step)
        factor = warmup_cosine(step, run.steps, WARMUP_STEPS, LR_FLOOR)
        with torch.autocast(run.device, torch.bfloat16):
            loss = flow_loss(model, latents, ids, recipe.sigma_logit_mean)
        update(model, optimizers, loss, factor)
        value = loss.item()
        figures["loss"] = value if step == first else 0.98 * figures["loss"] + 0.02 * value
        update_average(average, model, step)
        if (step + 1) % run.save_every == 0 or step + 1 == run.steps:
            _save(run, model, average, optimizers, step + 1)
        if probe is not None and (step + 1) % PROBE_EVERY == 0 and team.rank() == 0:
            append_log(run, f"probe {step + 1} {probe(average)}")
    return average


def update(
    model: FlowModel, optimizers: list[torch.optim.Optimizer], loss: Tensor, lr_factor: float
) -> None:
    """One step down the gradient, averaged over the team."""
    loss.backward()
    team.average_gradients(list(model.parameters()))
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * lr_factor
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    team.share([list[Tensor](shard) for shard in hidden_shards(model)])


def load_average(checkpoint: Path) -> dict[str, Tensor]:
    """The averaged weights that a stage ended with. Raises: FileNotFoundError."""
    state = load_checkpoint(checkpoint)
    if state is None:
        raise FileNotFoundError(f"no checkpoint at {checkpoint}: run the stage before this one")
    return state["average"]


def _resume(
    run: Run, model: FlowModel, average: FlowModel, optimizers: list[torch.optim.Optimizer]
) -> int:
    state = load_checkpoint(run.checkpoint, run.device)
    if state is None:
        return 0
    model.load_state_dict(state["model"])
    average.load_state_dict(state["average"])
    if len(state["optimizers"]) == team.size():  # else a team of another size made it: no momenta
        for optimizer, saved in zip(optimizers, state["optimizers"][team.rank()], strict=True):
            optimizer.load_state_dict(saved)
    return state["step"]


def _save(
    run: Run,
    model: FlowModel,
    average: FlowModel,
    optimizers: list[torch.optim.Optimizer],
    done: int,
) -> None:
    states = team.gather([optimizer.state_dict() for optimizer in optimizers])
    if states is None:
        return
    state = {
        "model": model.state_dict(),
        "average": average.state_dict(),
        "optimizers": states,
        "step": done,
    }
    save_checkpoint(run.checkpoint, state)
