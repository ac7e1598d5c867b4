"""The autoencoder around the denoising loop: init images in, pixels out.

Decoding 512 px is 2.5 TFLOP of convolutions, about one denoising step. Their speed depends on the
memory layout, and which one wins on the shape and the machine: both are timed on the first image of
a shape, and the answer is kept on disk for the next process.
"""

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
TIMED = 3
"""Runs of each layout; the shortest counts. The first of a layout pays for oneDNN's primitives."""


class Vae:
    """An `AutoencoderKL`; `layout` is a key of `LAYOUTS`, or "auto": the faster one by timing."""

    def __init__(self, module: Any, layout: str, choices: "Choices") -> None:
        """Wrap the loaded autoencoder."""
        self._module, self._layout, self._choices = module, layout, choices
        self._current = "contiguous"
        self.chosen: dict[str, str] = {}

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode scaled latents [B, C, h, w] into pixels [B, 3, H, W], about -1 to 1."""
        config = self._module.config
        z = (latents / config.scaling_factor) + config.shift_factor
        return self._decode(z.to(self._module.dtype), self._choose(z))

    @torch.inference_mode()
    def encode(
        self, images: Sequence[np.ndarray], generators: Sequence[torch.Generator]
    ) -> torch.Tensor:
        """Encode uint8 RGB images [H, W, 3] into scaled latents, each sampled by its generator."""
        config, module = self._module.config, self._module
        self._lay("contiguous")
        found = []
        for image, generator in zip(images, generators, strict=True):
            pixels = torch.from_numpy(image.astype(np.float32) / 255.0).permute(2, 0, 1)[None]
            pixels = (2.0 * pixels - 1.0).to(module.device, module.dtype)
            found.append(module.encode(pixels).latent_dist.sample(generator))
        return (torch.cat(found) - config.shift_factor) * config.scaling_factor

    def _decode(self, z: torch.Tensor, layout: str) -> torch.Tensor:
        self._lay(layout)
        return self._module.decode(z.contiguous(memory_format=LAYOUTS[layout])).sample

    def _lay(self, layout: str) -> None:
        if layout != self._current:
            self._module.decoder.to(memory_format=LAYOUTS[layout])
            self._current = layout

    def _choose(self, z: torch.Tensor) -> str:
        shape = "x".join(map(str, z.shape))
        if shape not in self.chosen:
            chosen = self._layout
            if chosen == "auto":
                chosen = self._choices.get(f"vae {shape}") or self._time(z.to(self._module.dtype))
                self._choices.set(f"vae {shape}", chosen)
            self.chosen[shape] = chosen
        return self.chosen[shape]

    def _time(self, z: torch.Tensor) -> str:
        took_s = {}
        for layout in LAYOUTS:
            runs = []
            for _ in range(TIMED):
                started = time.perf_counter()
                self._decode(z, layout)
                if z.is_cuda:
                    torch.cuda.synchronize()
                runs.append(time.perf_counter() - started)
            took_s[layout] = min(runs)
        return min(took_s, key=lambda layout: took_s[layout])


class Choices:
    """What was found out by timing, in one small JSON file.

    A folder that cannot be written costs only the time to find it out again.
    """

    def __init__(self, path: Path | None) -> None:
        """`path` ``None``: nothing is kept."""
        self._path = path
        self._known: dict[str, str] = {}
        if path is not None:
            try:
                self._known = dict(json.loads(path.read_text()))
            except (OSError, ValueError, TypeError):
                self._known = {}

    def get(self, name: str) -> str | None:
        """Return what is known under `name`."""
        return self._known.get(name)

    def set(self, name: str, choice: str) -> None:
        """Keep a choice."""
        if self._known.get(name) == choice or self._path is None:
            return
        self._known[name] = choice
        temporary = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(self._known, sort_keys=True, indent=1))
            os.replace(temporary, self._path)
        except OSError:
            return
