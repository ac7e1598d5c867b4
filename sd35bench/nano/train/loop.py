"""What the three trainings share: batches by (seed, step), schedule, checkpoints, progress."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

from sd35bench.nano.train import team
from sd35bench.nano.world import ASPECT_RATIOS, LEVELS, Level, Scene, sample_scene

SQUARE_SHARE = 0.65
LOG_EVERY = 50
_OTHER_SIZES = [size for name, size in ASPECT_RATIOS.items() if name != "1:1"]


@dataclass(frozen=True)
class Run:
    """How one training is run. `folder` holds its checkpoint and log."""

    folder: Path
    steps: int
    batch: int
    lr: float
    seed: int = 0
    device: str = "cpu"
    save_every: int = 250

    @property
    def checkpoint(self) -> Path:
        """The file that a later call resumes from."""
        return self.folder / "checkpoint.pt"


def batch_rng(seed: int, step: int) -> np.random.Generator:
    """The generator of one step's batch; seeds torch's global generator alike."""
    rng = np.random.default_rng([seed, step])
    torch.manual_seed(int(rng.integers(2**62)))
    return rng


def draw_size(rng: np.random.Generator) -> tuple[int, int]:
    """One (width, height) in px for a whole batch: mostly square, else any aspect ratio."""
    if rng.random() < SQUARE_SHARE:
        return ASPECT_RATIOS["1:1"]
    return _OTHER_SIZES[rng.integers(len(_OTHER_SIZES))]


def draw_scenes(
    rng: np.random.Generator, number: int, size: tuple[int, int], weights: dict[Level, float]
) -> list[Scene]:
    """Training scenes of one size, levels drawn by their weights."""
    shares = np.array([weights[level] for level in LEVELS])
    levels = rng.choice(len(LEVELS), number, p=shares / shares.sum())
    return [sample_scene(rng, LEVELS[level], *size) for level in levels]


def to_tensor(images: list[NDArray[np.uint8]], device: str = "cpu") -> torch.Tensor:
    """uint8 images of one size -> [N, 3, H, W] float32 in [-1, 1]."""
    pixels = torch.from_numpy(np.stack(images)).to(device)
    return pixels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def warmup_cosine(step: int, steps: int, warmup: int, floor: float = 0.0) -> float:
    """Learning-rate factor: linear warm-up, then a cosine from 1 to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return floor + (1 - floor) * 0.5 * (1 + float(np.cos(np.pi * done)))


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint so that a kill leaves either the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def load_checkpoint(path: Path, device: str = "cpu") -> dict[str, Any] | None:
    """The checkpoint at `path`, or None where there is none yet."""
    if not path.exists():
        return None
    return torch.load(path, map_location=device, weights_only=True)


def steps_with_progress(run: Run, first: int, describe: Callable[[], str]) -> Iterator[int]:
    """Step numbers from `first`, with a bar on a terminal and a line per `LOG_EVERY` in a log."""
    started = time.monotonic()
    console = Console(stderr=True)
    shown = console.is_terminal and team.rank() == 0
    with Progress(console=console, disable=not shown) as bar:
        task = bar.add_task(run.folder.name, total=run.steps, completed=first)
        for step in range(first, run.steps):
            yield step
            bar.update(task, advance=1, description=describe())
            if (step + 1) % LOG_EVERY == 0 or step + 1 == run.steps:
                elapsed_s = time.monotonic() - started
                append_log(run, f"step {step + 1} elapsed_s {elapsed_s:.0f} {describe()}")


def describe_figures(figures: dict[str, float], form: str = ".4g") -> str:
    """Names and values on one line."""
    return " ".join(f"{name} {value:{form}}" for name, value in figures.items())


def append_log(run: Run, line: str) -> None:
    """Add a line to the training's log file, on rank 0 only; the card's curves come from it."""
    if team.rank() != 0:
        return
    run.folder.mkdir(parents=True, exist_ok=True)
    with (run.folder / "log.txt").open("a") as log:
        log.write(line + "\n")
