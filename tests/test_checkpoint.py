import json
import os
from pathlib import Path

import pytest

import sd35bench.checkpoint as checkpoint
from sd35bench.checkpoint import NANO_WEIGHTS, find_checkpoint, weights_digest
from sd35bench.errors import ConfigError


@pytest.fixture
def folder(tmp_path) -> Path:
    """A model folder with one component, one that is absent, and things beside it."""
    root = tmp_path / "model"
    (root / "vae").mkdir(parents=True)
    index = {"_class_name": "X", "vae": ["diffusers", "V"], "image_encoder": [None, None]}
    (root / "model_index.json").write_text(json.dumps(index))
    (root / "vae" / "config.json").write_text("{}")
    (root / "vae" / "model.safetensors").write_bytes(b"weights")
    (root / "README.md").write_text("card")
    return root


def test_weights_digest_is_the_same_wherever_the_folder_is(folder, tmp_path):
    before = weights_digest(folder)
    moved = folder.rename(tmp_path / "elsewhere")
    assert weights_digest(moved) == before
    assert len(before) == 64


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("vae/model.safetensors", b"Weights"),
        ("vae/config.json", b"{ }"),
        ("vae/more.json", b"{}"),
        ("model_index.json", b'{"vae": ["diffusers", "V"]}'),
    ],
)
def test_weights_digest_changes_with_what_is_loaded(folder, path, content):
    before = weights_digest(folder)
    (folder / path).write_bytes(content)
    assert weights_digest(folder) != before


def test_weights_digest_changes_when_a_file_is_renamed(folder):
    before = weights_digest(folder)
    (folder / "vae" / "model.safetensors").rename(folder / "vae" / "other.safetensors")
    assert weights_digest(folder) != before


@pytest.mark.parametrize("path", ["README.md", "evaluator/model.safetensors", "vae/.cache/x"])
def test_weights_digest_ignores_what_is_not_loaded(folder, path):
    before = weights_digest(folder)
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    (folder / path).write_text("changed")
    assert weights_digest(folder) == before


def test_weights_digest_of_large_files_is_cached_until_they_change(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(checkpoint, "CACHE_ABOVE_BYTES", 5)
    hashed = []
    real = checkpoint._hash_file
    monkeypatch.setattr(
        checkpoint, "_hash_file", lambda path: hashed.append(path.name) or real(path)
    )
    first = weights_digest(folder)
    assert "model.safetensors" in hashed
    hashed.clear()
    assert weights_digest(folder) == first
    assert "model.safetensors" not in hashed
    weights = folder / "vae" / "model.safetensors"
    stat = weights.stat()
    weights.write_bytes(b"WEIGHTS")  # same size, and the same time below: the inode's change tells
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert weights_digest(folder) != first
    assert (tmp_path / "cache" / "sd35bench" / "digests.json").is_file()


def test_weights_digest_survives_a_broken_cache(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(checkpoint, "CACHE_ABOVE_BYTES", 0)
    before = weights_digest(folder)
    (tmp_path / "cache" / "sd35bench" / "digests.json").write_text("{torn")
    assert weights_digest(folder) == before


def test_weights_digest_refuses_a_broken_index(folder):
    (folder / "model_index.json").write_text("{")
    with pytest.raises(ConfigError, match=r"model_index\.json cannot be read"):
        weights_digest(folder)


def test_find_checkpoint_takes_the_given_folder(folder):
    assert find_checkpoint("nano", str(folder), None) == folder.resolve()


def test_find_checkpoint_finds_the_packages_nano():
    assert find_checkpoint("nano", None, None) == NANO_WEIGHTS


def test_find_checkpoint_refuses_a_folder_without_index(tmp_path):
    with pytest.raises(ConfigError, match=r"model\.path=.*no model_index\.json there"):
        find_checkpoint("nano", str(tmp_path), None)


def test_find_checkpoint_takes_what_the_hubs_cache_holds(monkeypatch, folder):
    import huggingface_hub

    def found(repo_id, filename):
        return str(folder / filename) if repo_id == "org/model" else None

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", found)
    assert find_checkpoint("big", None, "org/model") == folder
    with pytest.raises(ConfigError, match="hf download org/other"):
        find_checkpoint("big", None, "org/other")
