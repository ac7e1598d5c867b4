"""The core's packed weights between two starts: read whole where they are kept, else packed.

Fusing and packing read every weight twice and write it twice: for SD3.5-Medium's 9 GB in float32
some 15 s, in 8 bits as long for a quarter of what is left. So the packed layers and the embedders'
weights are kept as an artifact (`sd35bench.export.artifact`), named by the digests of weights,
code, libraries and CPU. A start that finds it does not read the denoiser's checkpoint at all: a
module without weights stands in for it while diffusers puts the other parts together.

Kept is what a checkpoint on disk brings, unchanged: seeded noise is nobody's to start quickly, and
a model with LoRAs is put together anew.
"""

import hashlib
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn

from sd35_kernels import KernelUnavailable, mmdit
from sd35bench.core import model, weights
from sd35bench.core.model import Embedder, Weights
from sd35bench.errors import BackendError
from sd35bench.export.artifact import Artifact, Recipe, find_artifact, make_artifact
from sd35bench.loading.empty import build_empty
from sd35bench.types import Load

LAYERS, EMBEDDERS = "denoiser.bin", "embedders.safetensors"


def recipe_of(load: Load, dtype: str, tier: str) -> Recipe | None:
    """Return what a load's packed weights depend on; ``None`` where nothing is kept.

    `dtype`: that of the weights that are packed.
    """
    if load.model.weights != "checkpoint" or load.model.changes or load.model.family != "sd3":
        return None
    try:
        digest = hashlib.sha256(mmdit.layout_digest().encode())
    except KernelUnavailable:
        return None
    for module in (model, weights):
        digest.update(Path(str(module.__file__)).read_bytes())
    return Recipe(
        runtime="core",
        model=load.model.name,
        weights_digest=load.model.weights_digest,
        layers=load.model.layers,
        dtype=dtype,
        quantisation=tier if tier == "int8" else "none",
        made_for=digest.hexdigest()[:24],
    )


def find_packed(recipe: Recipe | None) -> Artifact | None:
    """Return what is kept for a recipe, if it is whole."""
    return None if recipe is None else find_artifact(recipe)


def stand_in(packed: Artifact) -> nn.Module:
    """Return the denoiser's module without weights, for those who read its configuration."""
    return build_empty(dict(packed.facts["config"]))


def read_embedders(packed: Artifact) -> Weights:
    """Return the embedders' weights, mapped: pages are read where they are used."""
    return load_file(packed.folder / EMBEDDERS)


def keep(recipe: Recipe, config: Any, embedder: Embedder, executor: Any) -> Artifact | str:
    """Keep what was packed; the reason where it cannot be, which costs only the next start's time.

    `config`: of diffusers' transformer. `executor`: of `sd35_kernels.mmdit`.
    """

    def build(folder: Path) -> dict[str, Any]:
        executor.store(folder / LAYERS)
        save_file(embedder.weights, folder / EMBEDDERS)
        return {"config": {**config, "_class_name": "SD3Transformer2DModel"}}

    try:
        return make_artifact(recipe, build)
    except BackendError as exc:
        return str(exc)


def facts_of(packed: Artifact | str | None) -> dict[str, Any]:
    """What `in_force` says of them: whether they were there, what keeping them took."""
    if not isinstance(packed, Artifact):
        return {"kept": False, "why": packed or "only checkpoints that C++ packs are kept"}
    return {
        "kept": True,
        "digest": packed.manifest["digest"],
        "bytes": packed.bytes,
        "cached": packed.cached,
        "made_s": packed.seconds,
    }
