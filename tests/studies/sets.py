"""Studies whose images are feature vectors of known distribution, scored with set metrics."""

from pathlib import Path
from typing import Any

import numpy as np

from sd35bench.analysis.reference import Reference, write_reference
from sd35bench.stats.frechet import fit
from tests.studies.memory import MemoryStudy, record
from tests.validity.set_figures import World, draw

__all__ = ["EXTRACTOR", "SETS", "set_studies"]

EXTRACTOR = "nano-abc"
SETS: dict[str, dict[str, Any]] = {
    "kid_nano": {"statistic": "kid", "parameters": {"normalise": False}},
    "cmmd_nano": {"statistic": "cmmd", "parameters": {}},
    "fid_nano": {},
}
"""Details that `score` leaves; a Fréchet distance names no statistic."""


def set_studies(
    path: Path, world: World, *, prompts: int, names: tuple[str, ...] = ("kid_nano",), seed: int = 0
) -> tuple[MemoryStudy, MemoryStudy]:
    """A baseline and a candidate on the same prompts, held against the prompts' own renders."""
    twins, renders = draw(world, np.random.default_rng(seed), prompts)
    texts = np.array([f"prompt {i}" for i in range(prompts)])
    reference = Reference(
        name=f"{EXTRACTOR}-r",
        gaussian=fit(renders.features),
        source="true renders of the prompts",
        features=renders.features.astype(np.float32),
        prompts=texts[np.asarray(renders.prompts)],
    )
    sides = []
    for side, rows in (("a", twins.baseline), ("b", twins.candidate)):
        study = MemoryStudy(path / side, name=side)
        kept = {}
        for i, row in enumerate(rows):
            asked = {"seed": i % world.seeds, "image": f"{side}{i:063d}"}
            made = record(int(twins.prompts[i]), **asked)
            study.add(made, prompt_accuracy=1.0)
            kept[str(made.image)] = row.astype(np.float32)
            for name in names:
                about = {"extractor": EXTRACTOR, "reference": reference.name, "min_images": 64}
                study.score(made, name, None, **about, **SETS[name])
        study.kept_features[EXTRACTOR] = kept
        write_reference(study, reference)
        sides.append(study.touch_images())
    return sides[0], sides[1]
