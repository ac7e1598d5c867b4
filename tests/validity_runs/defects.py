"""The planted defects: where each one sits, and what a reader must know of it.

A defect is either code behind a backend (`plants.PLANTS`, by the same name) or a checkpoint with
one file changed. Neither shows in a request: both sides are asked for the same.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from sd35bench.nano import WEIGHTS

__all__ = ["CONTROL", "DEFECTS", "Defect"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Defect:
    """One defect. `patch` changes a copied checkpoint; without one, a plant of that name acts.

    `subtle` ones get the most images that a gate may ask for. `paired_starts` says that it is a
    matter of seconds: both sides start again and again in turn. `ratio` is what was planted, where
    that is a ratio that is known.
    """

    name: str
    title: str
    how: str
    patch: Callable[[Path], None] | None = None
    backend: str = "eager"
    subtle: bool = False
    paired_starts: bool = False
    ratio: float | None = None

    def checkpoint(self, root: Path) -> Path | None:
        """The changed checkpoint, made below `root`; ``None`` where the code is what is wrong."""
        if self.patch is None:
            return None
        target = root / "checkpoints" / self.name
        if not target.exists():
            half = target.with_name(f"{self.name}.part")
            shutil.rmtree(half, ignore_errors=True)
            shutil.copytree(WEIGHTS, half)
            self.patch(half)
            half.rename(target)
        return target


def _set(file: str, **values: float) -> Callable[[Path], None]:
    def patch(folder: Path) -> None:
        path = folder / file
        config = json.loads(path.read_text())
        assert all(config[name] != value for name, value in values.items())
        path.write_text(json.dumps({**config, **values}))

    return patch


def _zero(part: str) -> Callable[[Path], None]:
    def patch(folder: Path) -> None:
        path = folder / part / "model.safetensors"
        save_file(
            {name: np.zeros_like(tensor) for name, tensor in load_file(path).items()},
            path,
            metadata={"format": "pt"},
        )

    return patch


CONTROL = Defect(
    name="control",
    title="nothing (control)",
    how="the planting itself, with no defect in it",
    subtle=True,
)
DEFECTS = {
    defect.name: defect
    for defect in (
        Defect(
            name="shift",
            title="shift wrong",
            how="1 for 3 in the checkpoint's scheduler",
            patch=_set("scheduler/scheduler_config.json", shift=1.0),
        ),
        Defect(
            name="guidance",
            title="guidance formula wrong",
            how="cond + s (cond - uncond)",
            subtle=True,
        ),
        Defect(
            name="encoder",
            title="one text encoder zeroed",
            how="T5's weights in the checkpoint",
            patch=_zero("text_encoder_3"),
        ),
        Defect(
            name="int4",
            title="int4 where int8 was claimed",
            how="15 levels in int8 storage, after the proof; against an honest int8",
            backend="int8",
        ),
        Defect(name="step", title="one step too few", how="7 of 8"),
        Defect(
            name="vae",
            title="VAE scaling factor dropped",
            how="1 for 0.4545 in the checkpoint's VAE",
            patch=_set("vae/config.json", scaling_factor=1.0),
        ),
        Defect(name="seeds", title="seeds ignored", how="every image from seed 0"),
        Defect(name="jpeg", title="JPEG quality 10", how="on the way to a PNG"),
        Defect(
            name="shuffled",
            title="half the prompts shuffled",
            how="every second image has its neighbour's prompt",
        ),
        Defect(
            name="slower",
            title="10 % slower",
            how="sleeps that long",
            paired_starts=True,
            ratio=1.1,
        ),
        Defect(name="memory", title="20 % more memory", how="a buffer that nobody frees"),
        Defect(name="failures", title="5 % failures", how="every 20th image is black", subtle=True),
    )
}
