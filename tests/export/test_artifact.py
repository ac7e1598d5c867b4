"""The cache of exported models: named by what went in, whole or not there."""

import json
import multiprocessing
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import sd35bench.export.artifact as artifact
from sd35bench.errors import BackendError
from sd35bench.export.artifact import Recipe, artifact_root, find_artifact, make_artifact

RECIPE = Recipe(runtime="onnx", model="m", weights_digest="w", dtype="fp32")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "cache"
    monkeypatch.setattr(artifact, "artifact_root", lambda: root)
    return root


def build(folder: Path) -> dict[str, Any]:
    (folder / "model.onnx").write_bytes(b"graph")
    (folder / "model.onnx.data").write_bytes(b"weights" * 100)
    return {"opset": 23}


def never(folder: Path) -> dict[str, Any]:
    raise AssertionError("built again")


def test_artifact_is_made_once_and_then_found() -> None:
    assert find_artifact(RECIPE) is None
    made = make_artifact(RECIPE, build)
    found = make_artifact(RECIPE, never)
    assert (made.cached, found.cached) == (False, True)
    assert made.folder == found.folder
    assert found.facts == {"opset": 23}
    assert found.bytes == 5 + 700
    assert found.manifest["versions"]["torch"]


@pytest.mark.parametrize(
    "change",
    [
        {"weights_digest": "other"},
        {"model": "other"},
        {"dtype": "bf16"},
        {"layers": 3},
        {"quantisation": "int8"},
        {"excluded": "proj_out"},
        {"runtime": "openvino"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_digest_covers_the_recipe(change: dict[str, Any]) -> None:
    assert replace(RECIPE, **change).digest != RECIPE.digest


def test_digest_covers_code_and_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    before = RECIPE.digest
    monkeypatch.setattr(artifact, "_code_digest", lambda: "edited")
    edited = RECIPE.digest
    monkeypatch.setattr(artifact, "library_versions", lambda runtime: {"torch": "9"})
    assert len({before, edited, RECIPE.digest}) == 3


def break_shorter(folder: Path) -> None:
    path = folder / "model.onnx.data"
    path.write_bytes(path.read_bytes()[:-1])


def break_same_size(folder: Path) -> None:
    path = folder / "model.onnx.data"
    path.write_bytes(b"x" + path.read_bytes()[1:])


def break_missing(folder: Path) -> None:
    (folder / "model.onnx").unlink()


def break_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("{")


@pytest.mark.parametrize(
    "spoil",
    [break_shorter, break_same_size, break_missing, break_manifest],
    ids=lambda f: f.__name__,
)
def test_broken_artifact_is_noticed_and_made_again(spoil: Any) -> None:
    made = make_artifact(RECIPE, build)
    spoil(made.folder)
    assert find_artifact(RECIPE) is None
    assert not make_artifact(RECIPE, build).cached
    assert find_artifact(RECIPE) is not None


def test_untouched_file_is_not_hashed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    make_artifact(RECIPE, build)
    monkeypatch.setattr(artifact, "file_digest", lambda path: pytest.fail("hashed again"))
    assert find_artifact(RECIPE) is not None


def test_failed_build_leaves_nothing(own_cache: Path) -> None:
    def fail(folder: Path) -> dict[str, Any]:
        build(folder)
        raise BackendError("no")

    with pytest.raises(BackendError, match="no"):
        make_artifact(RECIPE, fail)
    assert find_artifact(RECIPE) is None
    assert [p.suffix for p in (own_cache / "onnx").iterdir()] == [".lock"]


def test_remains_of_a_killed_process_are_cleared(own_cache: Path) -> None:
    stale = own_cache / "onnx" / f"{RECIPE.digest}.abc.tmp"
    stale.mkdir(parents=True)
    make_artifact(RECIPE, build)
    assert not stale.exists()


def _slow_maker(root: Path, log: Path) -> None:
    artifact.artifact_root = lambda: root

    def slow(folder: Path) -> dict[str, Any]:
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.3)
        return build(folder)

    make_artifact(RECIPE, slow)


def test_second_process_waits_for_the_first(own_cache: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    context = multiprocessing.get_context("fork")
    makers = [context.Process(target=_slow_maker, args=(own_cache, log)) for _ in range(2)]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join()
    assert [maker.exitcode for maker in makers] == [0, 0]
    assert len(log.read_text().split()) == 1


def test_unwritable_cache_is_our_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setattr(artifact, "artifact_root", lambda: tmp_path / "file")
    with pytest.raises(BackendError, match=r"cannot be written.*XDG_CACHE_HOME"):
        make_artifact(RECIPE, build)


def test_root_is_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert artifact_root() == tmp_path / "sd35bench" / "export"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert artifact_root() == Path.home() / ".cache" / "sd35bench" / "export"


def test_manifest_says_what_is_inside() -> None:
    made = make_artifact(RECIPE, build)
    manifest = json.loads((made.folder / "manifest.json").read_text())
    assert manifest["recipe"]["weights_digest"] == "w"
    assert set(manifest["files"]) == {"model.onnx", "model.onnx.data"}
    assert len(manifest["files"]["model.onnx"]["sha256"]) == 64
