"""The planted defects: where each one sits, and what a reader must know of it.

A defect is either code behind a backend (`plants.PLANTS`, by the same name) or a checkpoint with
one file changed. Neither shows in a request: both sides are asked for the same.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import load_file, save_file

from sd35bench.nano import WEIGHTS
from sd35bench.nano.world import render, sample_scene

__all__ = ["CONTROL", "DEFECTS", "SYSTEMATIC", "Defect"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Defect:
    """One defect. `patch` changes a copied checkpoint; without one, a plant of that name acts.

    `subtle` ones get the most images that a gate may ask for. `paired_starts` says that it is a
    matter of seconds: both sides start again and again in turn. `ratio` is what was planted, where
    that is a ratio that is known. `systematic` ones are held to 64 images, and `words` says what
    both sides are asked then.
    """

    name: str
    title: str
    how: str
    patch: Callable[[Path], None] | None = None
    backend: str = "eager"
    subtle: bool = False
    paired_starts: bool = False
    ratio: float | None = None
    systematic: bool = False
    words: Callable[[Path], list[str]] | None = None

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


def _weights(file: str, change: Callable[[str, Any], Any]) -> Callable[[Path], None]:
    def patch(folder: Path) -> None:
        path = folder / file
        changed = {name: change(name, tensor) for name, tensor in load_file(path).items()}
        save_file(changed, path, metadata={"format": "pt"})

    return patch


def _four_bit_output(name: str, weight: np.ndarray) -> np.ndarray:
    """`proj_out` with the 15 levels per output that symmetric int4 has."""
    if name != "proj_out.weight":
        return weight
    step = np.abs(weight).max(axis=1, keepdims=True) / 7
    return (np.round(weight / step) * step).astype(weight.dtype)


def _edits(root: Path) -> list[str]:
    """Image-to-image with an init image half as large again as what is made of it."""
    path = root / "init.png"
    if not path.exists():
        root.mkdir(parents=True, exist_ok=True)
        scene = sample_scene(np.random.default_rng(3), "several", 96, 96)
        Image.fromarray(render(scene)).save(path)
    return [f"init_image={path}", "prompt_strength=0.6", "width=64", "height=64"]


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
            patch=_weights("text_encoder_3/model.safetensors", lambda _, w: np.zeros_like(w)),
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
_TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
_SCALE, _SHIFT = 0.4545, 0.7639
"""Of nano's autoencoder."""
SYSTEMATIC = {
    defect.name: replace(defect, systematic=True)
    for defect in (
        CONTROL,
        Defect(name="red", title="red + 3 of 255", how="on the way to the file"),
        Defect(name="gamma", title="gamma 1.02", how="on the way to the file"),
        Defect(
            name="scale",
            title="VAE scale x 1.02",
            how="scaling_factor in the checkpoint's VAE",
            patch=_set("vae/config.json", scaling_factor=1.02 * _SCALE),
        ),
        Defect(
            name="offset",
            title="VAE shift x 1.05",
            how="shift_factor in the checkpoint's VAE",
            patch=_set("vae/config.json", shift_factor=1.05 * _SHIFT),
        ),
        Defect(name="bf16", title="bf16 noise", how="the transformer's outputs rounded to bf16"),
        Defect(name="sigma", title="last sigma not 0", how="0.02 in the schedule"),
        Defect(
            name="proj",
            title="4-bit proj_out",
            how="15 levels per output of the transformer's last layer",
            patch=_weights(_TRANSFORMER, _four_bit_output),
        ),
        Defect(
            name="nearest",
            title="nearest-neighbour init resize",
            how="96 px to 64 px, image-to-image at strength 0.6",
            words=_edits,
        ),
    )
}
"""Changes of everything by a little, which a mean absolute difference below 1 level lets pass."""
