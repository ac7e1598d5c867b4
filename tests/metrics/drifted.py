"""A study of one model's images by several backends, each a known way from the reference's."""

import io
from dataclasses import replace

import numpy as np
from PIL import Image

from sd35bench.study.store import Study
from sd35bench.types import Load
from tests.studies.memory import LOAD, record, session


def load(
    backend: str = "compile",
    *,
    threads: int = 2,
    model: str = "nano",
    weights: str = "checkpoint",
    dtype: str = "fp32",
) -> Load:
    spec = replace(LOAD.backend, name=backend, kind=backend, options={"dtype": dtype})
    return Load(
        model=replace(LOAD.model, name=model, weights=weights), backend=spec, threads=threads
    )


EAGER = load("eager")


def _png(image: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, format="png")
    return out.getvalue()


def put(study: Study, images, where: Load, latents=None, **fields) -> list:
    shard = study.shard(f"shard-{len(list(study.all_records())):04d}")
    if not study.sessions():
        shard.append_session(session())
    rows = []
    for i, image in enumerate(images):
        digest = study.put_image(_png(image), ".png")
        row = record(i, load=where, image=digest, **fields)
        if latents is not None:
            row = replace(row, latents=study.put_latents(*latents[i]))
        rows.append(row)
        shard.append_record(row)
    shard.close()
    return rows


def nudge(image: np.ndarray, by: int = 2) -> np.ndarray:
    return np.where(image < 128, image + by, image - by).astype(np.uint8)
