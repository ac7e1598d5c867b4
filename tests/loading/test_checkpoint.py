import json
import os
import shlex
import struct
from pathlib import Path

import pytest

import sd35bench.loading.checkpoint as checkpoint
from sd35bench.errors import ConfigError
from sd35bench.loading.checkpoint import (
    NANO_WEIGHTS,
    find_checkpoint,
    find_components,
    parts_in_file,
    revision_of,
    settled_variant,
    variant_of,
    weights_digest,
)


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
    real = checkpoint.file_digest
    monkeypatch.setattr(
        checkpoint, "file_digest", lambda path: hashed.append(path.name) or real(path)
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


@pytest.mark.parametrize(("settled_ns", "again"), [(-1, 0), (checkpoint.SETTLED_NS, 1)])
def test_a_small_file_that_has_not_just_changed_is_hashed_once(
    folder, monkeypatch, settled_ns, again
):
    """One that has may change once more within a tick of the file system's clock, unseen."""
    hashed = []
    real = checkpoint.file_digest
    monkeypatch.setattr(checkpoint, "SETTLED_NS", settled_ns)
    monkeypatch.setattr(
        checkpoint, "file_digest", lambda path: hashed.append(path.name) or real(path)
    )
    first = weights_digest(folder)
    assert weights_digest(folder) == first
    assert hashed.count("model.safetensors") == 1 + again
    (folder / "vae" / "model.safetensors").write_bytes(b"other weights")
    assert weights_digest(folder) != first


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


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "open"])
def test_find_checkpoint_gives_the_steps_that_the_model_needs(gated):
    with pytest.raises(ConfigError) as caught:
        find_checkpoint("big", None, "org/big", gated=gated)
    steps = str(caught.value)
    assert ("accept the licence at https://huggingface.co/org/big" in steps) is gated
    assert ("hf auth login" in steps) is gated
    last = 4 if gated else 2
    assert f"({last}) add model.path=models/big" in steps
    assert f"({last + 1})" not in steps


def test_find_checkpoint_gives_a_download_command_that_hf_takes():
    """`--exclude A B` would exclude A only and take B for the one file to fetch."""
    with pytest.raises(ConfigError) as caught:
        find_checkpoint("big", None, "org/big")
    words = shlex.split(str(caught.value).split("(3) ")[1].split(" (4)")[0])
    assert words[:3] == ["hf", "download", "org/big"]
    options = words[3:]
    assert len(options) % 2 == 0
    assert set(options[::2]) == {"--exclude", "--local-dir"}


@pytest.mark.parametrize("breaking", ["part", "empty-part", "shard"])
def test_find_checkpoint_refuses_a_download_that_ended_early(folder, breaking):
    weights = folder / "vae" / "model.safetensors"
    if breaking == "shard":
        shards = {"weight_map": {"a": "model.safetensors", "b": "model-00002.safetensors"}}
        (folder / "vae" / "model.safetensors.index.json").write_text(json.dumps(shards))
    else:
        weights.unlink()
        (folder / "vae" / "config.json").unlink()
        if breaking == "part":
            (folder / "vae").rmdir()
    with pytest.raises(ConfigError, match=r"vae/ is missing or incomplete"):
        find_checkpoint("big", str(folder), None)


KEYS = ("model.diffusion_model.pos_embed", "first_stage_model.decoder.conv_in.bias")
CLIPS = (
    "text_encoders.clip_l.transformer.text_projection.weight",
    "text_encoders.clip_g.transformer.text_projection.weight",
)
PARTS = ("vae", "scheduler", "tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2")


def write_file(path: Path, keys: tuple[str, ...]) -> Path:
    """A safetensors file of one byte per key."""
    entry = {"dtype": "U8", "shape": [1]}
    header = {
        key: {**entry, "data_offsets": [number, number + 1]} for number, key in enumerate(keys)
    }
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(len(keys)))
    return path


@pytest.fixture
def single(tmp_path) -> Path:
    return write_file(tmp_path / "model.safetensors", KEYS)


@pytest.fixture
def components(tmp_path) -> Path:
    """A folder with all that a file can lack; its T5 is left out."""
    root = tmp_path / "components"
    index = {"_class_name": "StableDiffusion3Pipeline", "text_encoder_3": [None, None]}
    for part in PARTS:
        (root / part).mkdir(parents=True)
        (root / part / "config.json").write_text("{}")
        (root / part / "more.json").write_text("{}")
        index[part] = ["library", "Class"]
    (root / "model_index.json").write_text(json.dumps(index))
    return root


def test_parts_in_file_are_those_whose_keys_it_has(tmp_path, single):
    assert parts_in_file(single).keys() == {"transformer", "vae"}
    more = write_file(tmp_path / "more.safetensors", KEYS + CLIPS)
    assert parts_in_file(more).keys() == {
        "transformer",
        "vae",
        "text_encoder",
        "text_encoder_2",
    }


def test_find_checkpoint_takes_a_single_file(single):
    assert find_checkpoint("big", str(single), "org/big") == single


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no readable safetensors file"),
        (b"PK" * 100, "no readable safetensors file"),
        (struct.pack("<Q", 2) + b"{}", "no key begins with 'model.diffusion_model.'"),
        (struct.pack("<Q", 2) + b"{", "no readable safetensors file"),
    ],
    ids=["empty", "zip", "other-layout", "torn"],
)
def test_find_checkpoint_refuses_other_files(tmp_path, content, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        find_checkpoint("big", str(path), None)


def test_find_components_names_everything_that_is_missing(single, components):
    assert find_components(single, str(components), None) == components
    (components / "vae" / "config.json").unlink()  # its weights are in the file
    for name in ("config.json", "more.json"):
        (components / "tokenizer_2" / name).unlink()
    with pytest.raises(ConfigError, match=r"lacks (vae/config.json, tokenizer_2/|tokenizer_2/, v)"):
        find_components(single, str(components), None)


def test_find_components_asks_for_a_folder_where_none_is_known(single):
    with pytest.raises(ConfigError, match=r"give model\.components=FOLDER"):
        find_components(single, None, None)


def test_find_components_refuses_an_encoder_that_would_be_dropped(tmp_path, components):
    t5 = "text_encoders.t5xxl.transformer.shared.weight"
    path = write_file(tmp_path / "t5.safetensors", (*KEYS, t5))
    with pytest.raises(ConfigError, match=r"leaves text_encoder_3 out, but t5\.safetensors has it"):
        find_components(path, str(components), None)


@pytest.mark.parametrize(
    ("path", "matters"),
    [
        ("scheduler/more.json", True),
        ("tokenizer/more.json", True),
        ("text_encoder/more.json", True),
        ("vae/config.json", True),
        ("vae/more.json", False),
        ("transformer/config.json", False),
        ("README.md", False),
    ],
)
def test_weights_digest_of_a_file_covers_what_is_taken_from_its_components(
    single, components, path, matters
):
    before = weights_digest(single, components)
    (components / path).parent.mkdir(exist_ok=True)
    (components / path).write_text("[]")
    assert (weights_digest(single, components) != before) is matters


def test_weights_digest_of_a_file_covers_its_content_and_not_its_name(single, components):
    before = weights_digest(single, components)
    renamed = single.rename(single.with_name("renamed.safetensors"))
    assert weights_digest(renamed, components) == before
    renamed.write_bytes(renamed.read_bytes()[:-1] + b"x")
    assert weights_digest(renamed, components) != before


def test_revision_of_reads_the_traces_of_the_hubs_tools(tmp_path, folder, single):
    assert revision_of(folder) is None
    assert revision_of(single) is None
    snapshot = tmp_path / "models--org--big" / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    assert revision_of(snapshot) == "abc123"
    traces = folder / ".cache" / "huggingface" / "download"
    traces.mkdir(parents=True)
    (traces / "model_index.json.metadata").write_text("def456\netag\n1700000000.0\n")
    assert revision_of(folder) == "def456"
    traces = single.parent / ".cache" / "huggingface" / "download"
    traces.mkdir(parents=True)
    (traces / "model.safetensors.metadata").write_text("fed987\netag\n1700000000.0\n")
    assert revision_of(single) == "fed987"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.ckpt", "a pickled checkpoint may run code and is not read; convert it"),
        ("model.gguf", r"give it as model\.transformer="),
    ],
)
def test_find_checkpoint_refuses_files_that_hold_no_whole_model_safely(tmp_path, name, message):
    path = tmp_path / name
    path.write_bytes(b"x")
    with pytest.raises(ConfigError, match=message):
        find_checkpoint("sd35-medium", str(path), None)


def test_a_file_without_prefixes_brings_the_denoiser_alone(tmp_path):
    path = write_file(tmp_path / "bare.safetensors", ["joint_blocks.0.x_block.attn.qkv.weight"])
    assert parts_in_file(path) == {"transformer": ""}
    assert find_checkpoint("sd35-medium", str(path), None) == path


def test_a_variant_is_asked_for_only_where_it_changes_what_is_loaded(folder):
    part = next(each for each in folder.iterdir() if each.is_dir())
    with pytest.raises(ConfigError, match=r"no part of .* has files such as model\.fp16"):
        settled_variant(folder, "fp16")
    (part / "model.fp16.safetensors").write_bytes(b"half")
    for plain in part.glob("*.safetensors"):
        if ".fp16." not in plain.name:
            plain.unlink()
    assert settled_variant(folder, "fp16") is None  # there is nothing else
    (part / "model.safetensors").write_bytes(b"whole")
    assert settled_variant(folder, "fp16") == "fp16"
    assert (variant_of(part), variant_of(part, "fp16")) == (None, "fp16")
