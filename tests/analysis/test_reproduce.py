"""The printed snippet, run as it is, makes the very image that the backend made."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from sd35bench.analysis.reproduce import snippet
from sd35bench.backends.base import load_backend
from sd35bench.types import BackendSpec, SkipLayerGuidance
from tests.analysis.synthetic import LOAD, record
from tests.tiny import TOKENS, write_tiny_sd3

SKIPPING = SkipLayerGuidance(layers=(1,), scale=2.8, start=0.01, stop=0.6)


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    path = write_tiny_sd3(tmp_path_factory.mktemp("weights") / "it's tiny")
    model = replace(LOAD.model, path=str(path), max_sequence_length=TOKENS)
    backend = BackendSpec(name="eager", kind="eager", options={"dtype": "fp32"})
    return replace(LOAD, model=model, backend=backend, threads=1)


@pytest.mark.parametrize(
    "fields",
    [
        {"negative_prompt": "blur"},
        {"shift": 1.5, "seed": 7, "width": 48, "max_sequence_length": 8},
        {"skip_layer_guidance": SKIPPING, "output_format": "jpg"},
        {"init_image": "i" * 64, "prompt_strength": 0.6, "seed": 3},
    ],
    ids=["text-to-image", "shift-and-size", "skip-layer-guidance-jpg", "image-to-image"],
)
def test_snippet_makes_the_backends_image(load, fields, tmp_path, monkeypatch):
    row = record(0, load=load, prompt="a 'red' \"fox\"\\", **{"steps": 4, "height": 32, **fields})
    request = row.trial.request
    init = None
    if request.init_image is not None:
        init = np.random.default_rng(0).integers(0, 256, (32, 64, 3), np.uint8)
        Image.fromarray(init).save(tmp_path / "init.png")
    backend = load_backend(load)
    expected = backend.generate([request], [init]).images[0]
    backend.close()
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet(row, tmp_path / "init.png"), "snippet", "exec"), {})
    if request.output_format == "png":
        assert np.array_equal(np.asarray(Image.open("image.png")), expected)
    else:
        Image.fromarray(expected).save("expected.jpg", quality=request.output_quality)
        assert (tmp_path / "image.jpg").read_bytes() == (tmp_path / "expected.jpg").read_bytes()
