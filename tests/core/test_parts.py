"""What stands around the denoiser: kept texts, the decoder's layout, the package's borders."""

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from sd35bench.core.text import CachedText, DiskCache, Embeddings
from sd35bench.core.vae import WAYS, Choices, Vae
from tests.forked import forget, in_fork
from tests.studies.tiny import build_tiny_sd3


def eager(function: Any) -> Any:
    """Stands in for torch.compile."""
    return function


class Counting:
    """Embeds a prompt as its length, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def encode(self, prompts: Sequence[str], max_sequence_length: int) -> Embeddings:
        self.asked.append(list(prompts))
        lengths = torch.tensor([float(len(p)) for p in prompts])
        return lengths.view(-1, 1, 1).expand(-1, max_sequence_length, 2), lengths[:, None]


def test_kept_prompts_are_encoded_once() -> None:
    encoder = Counting()
    text = CachedText(encoder)
    first = text.encode(["ab", "c", "ab"], 3, keep=True)
    again = text.encode(["c", "ab"], 3, keep=True)
    assert encoder.asked == [["ab", "c"]]
    assert first[1][:, 0].tolist() == [2, 1, 2]
    assert again[1][:, 0].tolist() == [1, 2]
    assert (text.hits, text.misses) == (3, 2)


def test_another_length_is_another_text_and_others_are_not_kept() -> None:
    encoder = Counting()
    text = CachedText(encoder, kept=1)
    text.encode(["a"], 3, keep=True)
    text.encode(["a"], 4, keep=False)
    text.encode(["a"], 4, keep=True)
    text.encode(["a"], 3, keep=True)
    assert encoder.asked == [["a"], ["a"], ["a"], ["a"]]


def test_what_is_on_disk_outlives_the_process(tmp_path: Path) -> None:
    first, second = Counting(), Counting()
    kept = CachedText(first, disk=DiskCache(tmp_path)).encode(["ab", "c"], 3, keep=True)
    text = CachedText(second, disk=DiskCache(tmp_path))
    again = text.encode(["c", "ab", "new"], 3, keep=True)
    assert second.asked == [["new"]]
    assert (text.hits, text.read, text.misses) == (0, 2, 1)
    assert torch.equal(again[0][:2], kept[0].flip(0))
    text.encode(["c"], 4, keep=True)
    text.encode(["d"], 3, keep=False)
    assert second.asked[1:] == [["c"], ["d"]]  # another length is another text


def test_a_broken_file_is_as_good_as_none(tmp_path: Path) -> None:
    CachedText(Counting(), disk=DiskCache(tmp_path)).encode(["ab"], 3, keep=True)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:40])
    encoder = Counting()
    CachedText(encoder, disk=DiskCache(tmp_path)).encode(["ab"], 3, keep=True)
    assert encoder.asked == [["ab"]]
    (tmp_path / "file").write_text("")
    CachedText(encoder, disk=DiskCache(tmp_path / "file")).encode(["ab"], 3, keep=True)
    assert encoder.asked == [["ab"], ["ab"]]


def test_the_layout_is_timed_once_for_a_shape_and_kept(tmp_path: Path) -> None:
    module, path = build_tiny_sd3().vae, tmp_path / "choices.json"
    latents = torch.randn(1, 16, 4, 8)
    vae = Vae(module, "auto", Choices(path), eager)
    pixels = vae.decode(latents)
    assert list(vae.chosen) == ["1x16x4x8"]
    again = Vae(module, "auto", Choices(path), eager)
    again._time = lambda z: pytest.fail("timed again")  # type: ignore[method-assign]
    assert torch.allclose(again.decode(latents), pixels, atol=1e-5)
    assert again.chosen == vae.chosen


@pytest.mark.parametrize(("long_s", "runs"), [(0.0, 4), (60.0, 9)], ids=["slow", "fast"])
def test_a_slow_decoder_is_timed_once_a_layout(long_s, runs, tmp_path, monkeypatch) -> None:
    """Two layouts once each and the compiled form twice, as its first run pays for the compiler."""
    vae = Vae(build_tiny_sd3().vae, "tuned", Choices(tmp_path / "none"), eager)
    ways: list[str] = []
    monkeypatch.setattr("sd35bench.core.vae.LONG_S", long_s)
    monkeypatch.setattr(vae, "_decode", lambda _, way: ways.append(way))
    vae._time(torch.zeros(1, 16, 2, 2))
    assert len(ways) == runs
    assert set(ways) == set(WAYS)


def test_every_way_makes_the_same_pixels(tmp_path: Path) -> None:
    module, latents = build_tiny_sd3().vae, torch.randn(1, 16, 4, 8)
    choices = Choices(tmp_path / "none")
    made = [Vae(module, way, choices, eager).decode(latents) for way in WAYS]
    assert all(torch.allclose(made[0], other, atol=1e-5) for other in made[1:])


def _load_the_core() -> list[str]:
    forget("sd35bench")
    importlib.import_module("sd35bench.core.generate")
    importlib.import_module("sd35bench.core.weights")
    return [each for each in sys.modules if each.startswith("sd35bench.")]


def test_the_core_loads_nothing_else_of_ours() -> None:
    loaded = in_fork(_load_the_core)
    assert "sd35bench.core.weights" in loaded
    assert [each for each in loaded if not each.startswith("sd35bench.core")] == []
