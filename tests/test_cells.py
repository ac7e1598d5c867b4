"""Every model on every backend: it works, or is refused by name before money or loading.

Configurations are made of the YAML files themselves: two hundred of Hydra's would take minutes.
"""

from itertools import product
from typing import Any

import pytest

from sd35bench.config import choices
from sd35bench.config.freeze import frozen
from sd35bench.config.model_weights import _without_weights
from sd35bench.config.models import RUN, PromptsConf, RemoteConf
from sd35bench.errors import ConfigError
from sd35bench.plan import expand
from sd35bench.remote.providers import PROVIDERS
from tests.remote.faults import picture
from tests.studies.page import backend_conf, model_conf

MODELS, BACKENDS = choices("model"), choices("backend")
OURS = {"nano", "sd35-medium", "sd35-large", "sd35-large-turbo"}
"""Stable Diffusion 3.5 and what is shaped like it: every local backend runs these."""
OTHERS = {"pixart-xl-2", "sana"}
ON_EACHLABS = {"sd35-medium", *OTHERS, "ideogram-v2-turbo", "omni-zero-couples"}
RUNS_OTHERS = {
    *("eager", "eager-bf16", "eager-offload", "compile", "compile-bf16", "fake"),
    *("int8", "int8-bf16", "int8-w8a8", "int8-w8a8-bf16"),
}
NEEDED: dict[str, Any] = {
    "omni-zero-couples": {"images": {"identity_1": "one.png", "identity_2": "two.png"}},
}
"""What a model cannot do without."""
CELLS = [(m, b) for m, b in product(MODELS, BACKENDS)]


def works(model: str, backend: str) -> bool:
    """What is promised of a cell."""
    kind = BACKEND[backend].kind
    if kind == "eachlabs":
        return model in ON_EACHLABS
    if kind in PROVIDERS:
        return model == "sd35-medium"
    return model in OURS or (model in OTHERS and backend in RUNS_OTHERS)


MODEL = {name: model_conf(name) for name in MODELS}
BACKEND = {name: backend_conf(name) for name in BACKENDS}
PROMPTS = PromptsConf(kind="given", texts=["a pier"])
PRICED = RemoteConf(usd_per_image=0.05)


def config(model: str, backend: str) -> Any:
    """What a command line that names the two asks for; seed 0 is a random one at Stability."""
    groups = {"model": MODEL[model], "backend": BACKEND[backend], "prompts": PROMPTS}
    return RUN(**groups, remote=PRICED, seed=1, **NEEDED.get(model, {}))


@pytest.fixture(scope="module", autouse=True)
def _as_if_installed(tmp_path_factory):
    """All checkpoints there, and two pictures; nothing is loaded."""
    folder = tmp_path_factory.mktemp("cells")
    for name in ("one", "two"):
        (folder / f"{name}.png").write_bytes(picture(name, (64, 64), "png"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setitem(frozen.__globals__, "model_spec", lambda model, _: _without_weights(model))
        yield


@pytest.mark.parametrize(("model", "backend"), CELLS, ids=["-on-".join(cell) for cell in CELLS])
def test_a_cell_works_or_is_refused_by_name(model, backend):
    if not works(model, backend):
        with pytest.raises(ConfigError) as caught:
            frozen(config(model, backend))
        said = str(caught.value)
        assert "\n" not in said
        assert model in said
        assert f"backend={backend}" in said or "; take backend=eachlabs" in said
        return
    job = frozen(config(model, backend))
    plan = expand(job.sweep)
    assert len(plan.trials) == 1
    if BACKEND[backend].kind in PROVIDERS:
        job.engine.prepare(plan, dry=True)  # the provider can put it into its input
        assert plan.load.backend.options["slug"]
        assert job.engine.price.usd_per_image == 0.05
