"""`doctor` asks every backend and every model, and says what to do about each."""

from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from sd35bench import cli
from sd35bench.backends import base
from sd35bench.backends.base import Backend, Generation, Probe
from sd35bench.cli import doctor as module
from sd35bench.cli.doctor import Check
from sd35bench.errors import ConfigError
from sd35bench.metrics.lpips import cached_weights
from sd35bench.types import Request, Scalar

HOSTED = [("eachlabs", "EACHLABS_API_KEY"), ("replicate", "REPLICATE_API_TOKEN")]


class Probed(Backend):
    """A backend whose probe gives what a test wants."""

    answer: Probe | Exception

    @classmethod
    def probe(cls, options: Mapping[str, Scalar]) -> Probe:
        if isinstance(cls.answer, Exception):
            raise cls.answer
        return cls.answer

    def generate(
        self, requests: Sequence[Request], inits: Sequence[np.ndarray | None]
    ) -> Generation:
        raise AssertionError("doctor loads no model")


@pytest.fixture
def fake_kind(monkeypatch: pytest.MonkeyPatch) -> type[Probed]:
    """The YAML `fake` implemented by `Probed`."""
    monkeypatch.setitem(base.KINDS, "fake", f"{__name__}:Probed")
    return Probed


def found(name: str) -> dict[str, object]:
    document = cli.answer("doctor", [name]).document
    return next(check for check in document["checks"] if check["name"] == name)


@pytest.mark.parametrize(
    ("answer", "ok", "said"),
    [
        (Probe(ok=True, detail="CPU, fp32"), True, "CPU, fp32"),
        (Probe(ok=None, detail="openvino is not installed", remedy="pip install it"), None, "open"),
        (Probe(ok=False, detail="no compiler", remedy="apt install g++"), False, "no compiler"),
        (ImportError("libfoo.so is missing"), False, "libfoo.so"),
    ],
    ids=["works", "extra", "broken", "raises"],
)
def test_doctor_tells_what_a_backend_says_of_itself(
    fake_kind: type[Probed], answer: Probe | Exception, ok: bool | None, said: str
) -> None:
    fake_kind.answer = answer
    check = found("backend fake")
    assert check["ok"] is ok
    assert said in str(check["detail"])
    assert (check["remedy"] is None) == (ok is True)
    assert cli.answer("doctor", ["backend fake"]).document["ok"] is (ok is not False)


def test_doctor_names_a_kind_that_nobody_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(base.KINDS, "fake")
    check = found("backend fake")
    assert check["ok"] is False
    assert "fake.yaml" in str(check["remedy"])


@pytest.mark.parametrize(("name", "variable"), HOSTED)
@pytest.mark.parametrize(
    ("value", "ok"), [(None, None), ("canary-key", True), ("canary key", False)]
)
def test_doctor_says_where_a_hosted_backends_key_is_and_never_the_key(
    monkeypatch: pytest.MonkeyPatch, name: str, variable: str, value: str | None, ok: bool | None
) -> None:
    monkeypatch.delenv(variable, raising=False)
    if value is not None:
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr("socket.socket.connect", None)  # nobody is called
    check = found(f"backend {name}")
    assert check["ok"] is ok
    assert variable in f"{check['detail']}{check['remedy']}"
    assert "canary" not in str(check)


def test_doctor_gives_the_steps_to_a_models_weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    check = found("model sd35-medium")
    assert check["ok"] is None
    assert "hf download" in str(check["remedy"])
    assert "weights=random" in str(check["detail"])
    assert found("model nano")["ok"] is True
    assert "hosted only" in str(found("model ideogram-v2-turbo")["detail"])


def test_doctor_refuses_what_names_nothing() -> None:
    with pytest.raises(ConfigError, match="nothing is named so"):
        cli.answer("doctor", ["backend nosuch"])
    with pytest.raises(ConfigError, match="unknown flag"):
        cli.answer("doctor", ["--deep"])


CHECKS = [
    Check(group="backends", name="backend a", ok=True, detail="CPU, [fp32]"),
    Check(group="backends", name="backend b", ok=None, detail="no extra", remedy="pip install x"),
    Check(group="backends", name="backend c", ok=None, detail="no extra", remedy="pip install x"),
    Check(group="backends", name="backend d", ok=False, detail="broke", remedy="make setup"),
    Check(group="models", name="model m", ok=None, detail="no weights", remedy="x (1) step " * 40),
]


@pytest.mark.parametrize("width", [80, 120])
def test_doctor_prints_state_and_each_remedy_once(width: int) -> None:
    out = Console(width=width, record=True, file=StringIO())
    module._print(out, CHECKS, in_full=False)
    text = out.export_text()
    rows = {line.split()[0]: line for line in text.splitlines() if line.startswith("  ")}
    assert "ok" in rows["a"]
    assert "[fp32]" in rows["a"]  # not eaten as markup
    assert "absent" in rows["b"]
    assert "broken" in rows["d"]
    assert text.count("pip install x") == 1
    assert "b, c: pip install x" in text
    assert "m: steps: sd35bench doctor NAME" in text
    assert "1 of 4 backends run here. Broken: d." in text
    module._print(out, CHECKS[-1:], in_full=True)
    assert out.export_text().count("\n    1. step") == 40


def test_doctor_says_how_to_get_what_metrics_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    remedies = {
        "inception": "torch-fidelity",
        "clip": "hf download",
        "dinov2": "hf download facebook/dinov2-large config.json model.safetensors",
        "lpips": "alexnet-owt-7be5be79.pth",
    }
    for name, remedy in remedies.items():
        check = found(f"metric {name}")
        assert check["ok"] is None
        assert remedy in str(check["remedy"])
    weights = cached_weights()
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"x")
    assert found("metric lpips")["ok"] is True
    assert "alexnet-2d711642b726" in str(found("metric lpips")["detail"])
