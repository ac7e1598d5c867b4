"""The evaluator's training: CLIP's contrastive loss on true renders of the whole world.

It sees the held-out combinations too: it is the judge, not the one that is judged. Its batches
have their own seed, and no picture of the generator is among them.
"""

from dataclasses import replace

import numpy as np
import torch
from open_clip.model import CLIP
from torch import Tensor, nn

from sd35bench.nano.captions import Spec, parse
from sd35bench.nano.evaluator import build_model, normalise, to_square, tokenize
from sd35bench.nano.train.loop import (
    LEVELS,
    Run,
    batch_rng,
    describe_figures,
    draw_size,
    load_checkpoint,
    save_checkpoint,
    steps_with_progress,
    warmup_cosine,
)
from sd35bench.nano.world import (
    BACKGROUNDS,
    COLOURS,
    SIZE_BOUNDARY,
    Background,
    Colour,
    Partition,
    Scene,
    caption,
    holds,
    in_place,
    render,
    sample_scene,
)

SEED_OFFSET = 1_000_003
EASY_STEPS = 300
FROZEN_NORM_STEPS = 2200
"""From here on batch norm uses its running statistics, as it will in use.

Batches that share a background have statistics of their own: with the same weights the best
caption held for 0.76 of a hard batch's images in training mode and for 0.47 in evaluation mode.
"""
PARTITIONS: tuple[Partition, ...] = ("train", "train", "train", "train", "tune", "heldout")
LEVEL_SHARES = (0.35, 0.3, 0.12, 0.15, 0.08)


def evaluator_batch(run: Run, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images [N, 3, 64, 64], token ids [N, 16] and truth [N, N] of one step.

    `truth[i, j]` is whether caption j holds of image i: "a red circle on white" holds of every
    small one. Later batches share a background and three colours, so that shape, number, size and
    place decide.
    """
    rng = batch_rng(run.seed + SEED_OFFSET, step)
    size = draw_size(rng)
    palette = _draw_palette(rng)
    scenes: dict[str, Scene] = {}
    while len(scenes) < run.batch:
        level = LEVELS[rng.choice(len(LEVELS), p=LEVEL_SHARES)]
        scene = sample_scene(rng, level, *size, PARTITIONS[rng.integers(len(PARTITIONS))])
        if rng.random() < hardness(step):
            scene = _recoloured(rng, scene, palette)
        scenes[caption(scene)] = scene
    specs = [parse(text) for text in scenes]
    truth = [[describes(spec, scene) for spec in specs] for scene in scenes.values()]
    images = [normalise(to_square(render(scene))) for scene in scenes.values()]
    ids = tokenize(list(scenes))
    return torch.stack(images).to(run.device), ids.to(run.device), torch.tensor(truth)


def hardness(step: int) -> float:
    """The share of a batch's scenes that are brought to its palette; none of them at first."""
    return 0.8 * min(1.0, max(0.0, (step - EASY_STEPS) / 300))


def _draw_palette(rng: np.random.Generator) -> tuple[Background, list[Colour]]:
    colours = [tuple(COLOURS)[hue] for hue in rng.permutation(len(COLOURS))[:3]]
    return tuple(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))], colours


def _recoloured(
    rng: np.random.Generator, scene: Scene, palette: tuple[Background, list[Colour]]
) -> Scene:
    """The scene in a few colours; equal objects stay equal, unlike ones unlike."""
    ground, colours = palette
    hues = list(dict.fromkeys(thing.colour for thing in scene.things))
    order = rng.permutation(len(colours))
    fresh = {hue: colours[order[index]] for index, hue in enumerate(hues)}
    things = tuple(replace(thing, colour=fresh[thing.colour]) for thing in scene.things)
    return replace(scene, things=things, background=ground)


def describes(spec: Spec, scene: Scene) -> bool:
    """Whether a caption holds of a scene, including captions other than the scene's own."""
    kinds = [(thing.shape, thing.colour) for thing in scene.things]
    asked = list(spec.kinds) * (spec.count if spec.level == "count" else 1)
    if spec.background != scene.background or sorted(kinds) != sorted(asked):
        return False
    first = scene.things[0]
    large = first.radius > SIZE_BOUNDARY * min(scene.width, scene.height)
    if spec.size is not None and large != (spec.size == "large"):
        return False
    if spec.place is not None:
        return in_place(spec.place, first.x / scene.width, first.y / scene.height)
    if spec.relation is None:
        return True
    if spec.level == "overlap" or scene.level == "overlap":
        in_order = kinds == asked
        return spec.level == scene.level and in_order == (spec.relation == scene.relation)
    a, b = scene.things if kinds == asked else scene.things[::-1]
    return holds(spec.relation, a, b)


def contrastive_loss(
    model: CLIP, images: Tensor, ids: Tensor, truth: Tensor
) -> tuple[Tensor, Tensor]:
    """CLIP's symmetric loss, and the share of images whose best caption holds.

    Captions that hold of an image without being its own count neither for nor against it.
    """
    image, text, scale = model(images, ids)
    logits = scale * image.float() @ text.float().T
    target = torch.arange(len(images), device=images.device)
    others = truth.to(images.device) & ~torch.eye(len(images), dtype=torch.bool, device=ids.device)
    masked = logits.masked_fill(others, -1e4)
    entropy = nn.functional.cross_entropy
    loss = (entropy(masked, target) + entropy(masked.T, target)) / 2
    return loss, truth.to(images.device)[target, logits.argmax(1)].float().mean()


def set_norms(model: CLIP, training: bool) -> None:
    """Let batch norm use and collect each batch's statistics, or use the collected ones."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train(training)


def train_evaluator(run: Run) -> CLIP:
    """Train or resume; returns the network, which the checkpoint also holds."""
    torch.manual_seed(run.seed + SEED_OFFSET)
    model = build_model().to(run.device)
    optimizer = torch.optim.AdamW(model.parameters(), run.lr, betas=(0.9, 0.98), weight_decay=0.02)
    state = load_checkpoint(run.checkpoint, run.device)
    first = 0
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    figures = {"loss": 0.0, "top1": 0.0}
    for step in steps_with_progress(run, first, lambda: describe_figures(figures)):
        for group in optimizer.param_groups:
            group["lr"] = run.lr * warmup_cosine(step, run.steps, 100)
        set_norms(model, training=step < FROZEN_NORM_STEPS)
        loss, accuracy = contrastive_loss(model, *evaluator_batch(run, step))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for name, value in (("loss", loss), ("top1", accuracy)):
            figures[name] = 0.95 * figures[name] + 0.05 * value.item()
        if (step + 1) % run.save_every == 0 or step + 1 == run.steps:
            held = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            save_checkpoint(run.checkpoint, held | {"step": step + 1})
    return model.eval()
