"""`sd35bench export`: what it prints, copies and refuses."""

import json
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest
import yaml

from sd35bench.cli import main
from sd35bench.config import config_dir
from sd35bench.export.artifact import Artifact
from sd35bench.export.denoiser import OUTPUT
from tests.studies.tiny import TOKENS


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / ".hub"))


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, the one JSON document on stdout, and stderr."""
    code = main(["export", *arguments, "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out), err


TINY = ("model=tiny", "--config-dir", "own", "threads=1", "backend.device=cpu")


@pytest.fixture
def own_model(tiny_path: Path, tiny_graph: Artifact, tmp_path: Path) -> None:
    """The tiny checkpoint as a model of one's own; its graph is there already."""
    found = yaml.safe_load((config_dir() / "model" / "nano.yaml").read_text())
    changes = {"name": "tiny", "path": str(tiny_path), "max_sequence_length": TOKENS}
    (tmp_path / "own" / "model").mkdir(parents=True)
    (tmp_path / "own" / "model" / "tiny.yaml").write_text(yaml.safe_dump(found | changes))


@pytest.mark.usefixtures("own_model")
def test_export_makes_what_run_would_load(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_graph: Artifact
) -> None:
    code, document, _ = call(capsys, *TINY, "output=out")
    assert code == 0
    assert document["backend"] == "onnx"
    assert document["opset"] == 23
    assert document["parity"]["relative_max"] <= 1e-4
    assert document["folder"] == str(tiny_graph.folder)
    assert document["bytes"] == sum(document["files"].values()) > 500_000
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(document["files"])
    session = ort.InferenceSession(
        tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"]
    )
    assert [o.name for o in session.get_outputs()] == [OUTPUT]
    again = call(capsys, *TINY)[1]
    assert again["cached"] is True
    assert again["made_s"] is None
    assert again["folder"] == document["folder"]
    assert again["output"] is None


@pytest.mark.usefixtures("own_model")
def test_export_prints_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "backend=onnx-int8", *TINY]) == 0
    out, err = capsys.readouterr()
    assert "tiny for onnx-int8" in out
    assert "model.onnx.data" in out
    assert "layers in int8" in out
    assert "largest relative difference from PyTorch" in out
    assert err == ""


def test_export_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--help"]) == 0
    assert "sd35bench export model=nano backend=onnx-int8 output=" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["backend=eager"], "backend=eager: it exports nothing"),
        (["backend=onyx"], "did you mean onnx?"),
        (["model=sana"], "it runs models of the family sd3 only, sana is of sana"),
        (["--fast"], "unknown flag --fast"),
        (["nano"], "'nano': expected NAME=VALUE"),
        (["output="], "give a folder"),
        (["output=full"], "new or empty"),
        (["backend.dtyp=fp32"], "backend.dtyp: unknown field"),
        (["backend.provider=directml"], "must be one of auto, cpu, cuda, tensorrt"),
        (["model=sd35-medium"], "its weights are not on this machine"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_export_refuses_in_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    code, document, err = call(capsys, *arguments)
    assert code == 2
    assert message in document["error"]["message"]
    assert err.count("\n") == 1
