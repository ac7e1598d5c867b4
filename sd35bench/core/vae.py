"""The autoencoder around the denoising loop: init images in, pixels out.

Decoding 512 px is 2.5 TFLOP of convolutions, about one denoising step. How fast they are depends
on the memory layout, and on whether a compiler fuses the norms and activations between them; who
wins depends on the shape and the machine. So the ways are timed on the first image of a shape, and
the answer is kept on disk for the next process. Compiling takes a minute for each shape, so it is
among the ways only where that is asked for.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

EAGER = ("contiguous", "channels_last")
WAYS = (*EAGER, "compiled")
"""How the decoder runs: two memory layouts as they are, and compiled in the second."""
FORMATS = {"contiguous": "contiguous_format", "channels_last": "channels_last"}
CHOOSE = {"auto": EAGER, "tuned": WAYS}
"""Words for "the fastest of these"."""
TIMED = 3
"""Runs of each way; the shortest counts, the first pays for the compiler."""
LONG_S = 2.0
"""After a run this long that no compiler had a part in, a way is known well enough: decoding 512 px
takes 25 s on two cores, and three runs of two layouts made the first image wait for 150 s."""


class Vae:
    """An `AutoencoderKL`; `way` is one of `WAYS`, or a word of `CHOOSE`."""

    def __init__(
        self, module: Any, way: str, choices: "Choices", compiled: Callable[[Any], Any]
    ) -> None:
        """Wrap the loaded autoencoder; `compiled` is torch.compile, or what stands in for it."""
        self._module, self._way, self._choices = module, way, choices
        self._layout = "contiguous"
        can_compile = way in ("compiled", "tuned")
        self._compiled = compiled(module.decoder.forward) if can_compile else None
        self.chosen: dict[str, str] = {}

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode scaled latents [B, C, h, w] into pixels [B, 3, H, W], about -1 to 1."""
        config = self._module.config
        z = (latents / config.scaling_factor) + config.shift_factor
        z = z.to(self._module.dtype)
        return self._decode(z, self._choose(z))

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

    def _decode(self, z: torch.Tensor, way: str) -> torch.Tensor:
        module = self._module
        if way == "contiguous":
            self._lay(way)
            return module.decode(z.contiguous()).sample
        self._lay("channels_last")
        z = z.contiguous(memory_format=torch.channels_last)
        if way == "channels_last":
            return module.decode(z).sample
        assert self._compiled is not None
        last = module.post_quant_conv
        return self._compiled(z if last is None else last(z))

    def _lay(self, layout: str) -> None:
        if layout != self._layout:
            self._module.decoder.to(memory_format=getattr(torch, FORMATS[layout]))
            self._layout = layout

    def _choose(self, z: torch.Tensor) -> str:
        shape = "x".join(map(str, z.shape))
        if shape not in self.chosen:
            name, chosen = f"vae {self._way} {shape}", self._way
            if self._way in CHOOSE:
                chosen = self._choices.get(name) or self._time(z)
                self._choices.set(name, chosen)
            self.chosen[shape] = chosen
        return self.chosen[shape]

    def _time(self, z: torch.Tensor) -> str:
        took_s = {}
        for way in CHOOSE[self._way]:
            runs: list[float] = []
            compiles = way == "compiled"
            while len(runs) < TIMED and (len(runs) <= compiles or runs[-1] < LONG_S):
                started = time.perf_counter()
                self._decode(z, way)
                if z.is_cuda:
                    torch.cuda.synchronize()
                runs.append(time.perf_counter() - started)
            took_s[way] = min(runs)
        return min(took_s, key=lambda way: took_s[way])


class Choices:
    """What was found out by timing, in one small JSON file.

    A folder that cannot be written costs only the time to find it out again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, str] = {}
        with contextlib.suppress(OSError, ValueError, TypeError):
            self._known = dict(json.loads(path.read_text()))

    def get(self, name: str) -> str | None:
        """Return what is known under `name`."""
        return self._known.get(name)

    def set(self, name: str, choice: str) -> None:
        """Keep a choice."""
        if self._known.get(name) == choice:
            return
        self._known[name] = choice
        temporary = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(self._known, sort_keys=True, indent=1))
            os.replace(temporary, self._path)
