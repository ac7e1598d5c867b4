"""Packed weights between two starts: the same images, and anew where anything changed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sd35bench.backends import core, packed
from sd35bench.backends.core import CoreBackend
from sd35bench.backends.packed import recipe_of
from sd35bench.export import artifact
from sd35bench.types import Change
from tests.backends.bare import batch
from tests.backends.conftest import make_load

pytest.importorskip("sd35_kernels.cpu.build")


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that no other test has filled."""
    monkeypatch.setattr(artifact, "artifact_root", lambda: tmp_path / "export")
    return tmp_path / "export" / "core"


def start(path: Path, **options: Any) -> tuple[dict[str, Any], np.ndarray]:
    """Load, make an image, close: what was proven of the packed weights, and the final latents."""
    backend = CoreBackend(make_load(path, "core", device="cpu", **options))
    backend.keep_latents = True
    made = backend.generate(batch(1), [None])
    backend.close()
    assert made.latents_last is not None
    return backend.in_force["packed"], made.latents_last


def test_a_second_start_reads_no_denoiser(
    tiny_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, latents = start(tiny_path)
    assert (first["kept"], first["cached"]) == (True, False)
    monkeypatch.setattr(core, "fuse", lambda *_: pytest.fail("fused again"))
    again, same = start(tiny_path)
    assert again["cached"]
    assert again["digest"] == first["digest"]
    assert np.array_equal(latents, same)


def test_what_is_broken_is_packed_again(tiny_path: Path, own_cache: Path) -> None:
    first, latents = start(tiny_path)
    file = own_cache / first["digest"] / packed.LAYERS
    whole = bytearray(file.read_bytes())
    whole[-100] ^= 255
    file.write_bytes(whole)
    again, same = start(tiny_path)
    assert not again["cached"]
    assert np.array_equal(latents, same)


def test_a_cache_that_cannot_be_written_costs_only_time(tiny_path: Path, own_cache: Path) -> None:
    own_cache.parent.write_text("a file in its place")
    found, _ = start(tiny_path)
    assert not found["kept"]
    assert "cannot be written" in found["why"]


def test_recipes_differ_where_packed_weights_do(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = make_load(tiny_path, "core")
    other = replace(load, model=replace(load.model, weights_digest="another"))
    found = [recipe_of(load, "fp32", "exact"), recipe_of(load, "fp32", "int8")]
    found += [recipe_of(load, "bf16", "bf16"), recipe_of(other, "fp32", "exact")]
    monkeypatch.setattr(packed.mmdit, "layout_digest", lambda: "another CPU")
    found.append(recipe_of(load, "fp32", "exact"))
    assert None not in found
    assert len({recipe.digest for recipe in found if recipe is not None}) == len(found)


def test_noise_and_changed_models_are_not_kept(tiny_path: Path) -> None:
    model = make_load(tiny_path, "core").model
    lora = Change(kind="lora", path="x", digest="y")
    for changed in (replace(model, weights="random"), replace(model, changes=(lora,))):
        load = replace(make_load(tiny_path, "core"), model=changed)
        assert recipe_of(load, "fp32", "exact") is None
