"""From a model's YAML and its overrides to what is loaded."""

import pytest

from sd35bench.config import compose, freeze
from sd35bench.config.model_weights import NO_WEIGHTS
from sd35bench.errors import ConfigError
from sd35bench.types import ModelSpec


def spec_of(*overrides: str) -> ModelSpec:
    return freeze(compose([*overrides])).sweep.load.model


RANDOM = ("model=sd35-medium", "model.weights=random")


def test_random_model_says_so_in_its_name_and_needs_no_checkpoint():
    spec = spec_of(*RANDOM)
    assert (spec.name, spec.path, spec.weights) == ("sd35-medium-random", "", "random")
    assert (spec.layers, spec.text_encoders) == (None, False)


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ((*RANDOM, "model.layers=8"), "sd35-medium-random-8-layers"),
        ((*RANDOM, "model.text_encoders=true"), "sd35-medium-random-text-encoders"),
        (
            (*RANDOM, "model.layers=1", "model.text_encoders=true"),
            "sd35-medium-random-1-layers-text-encoders",
        ),
        (("model=sd35-large-turbo", "model.weights=random"), "sd35-large-turbo-random"),
        (("model=nano", "model.weights=random"), "nano-random"),
    ],
)
def test_random_models_are_never_mixed(overrides, name):
    spec = spec_of(*overrides)
    assert spec.name == name
    assert spec.weights_digest != spec_of(*RANDOM).weights_digest


def test_random_model_with_the_models_own_number_of_layers_is_the_whole_one():
    assert spec_of(*RANDOM, "model.layers=24") == spec_of(*RANDOM)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((*RANDOM, "model.layers=25"), r"model\.layers=25: sd35-medium has 24"),
        ((*RANDOM, "model.path=here"), r"model\.path=here: weights=random reads no checkpoint"),
        ((*RANDOM, "model.components=here"), r"model\.components=here: weights=random"),
        (("model.layers=2",), r"model\.layers=2: it acts only with model\.weights=random"),
        (("model.text_encoders=true",), r"model\.text_encoders=true: it acts only with"),
        (("model.components=here",), r"it acts only with model\.path=FILE\.safetensors"),
        (("model=sana", "model.weights=random"), "sana: its shapes are not packaged"),
    ],
)
def test_model_fields_that_would_not_act_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        freeze(compose([*overrides]))


@pytest.mark.parametrize("model", ["ideogram-v2-turbo", "omni-zero-couples"])
@pytest.mark.parametrize("backend", ["eager", "fake"])
def test_hosted_only_models_say_so_in_one_line(model, backend):
    with pytest.raises(ConfigError, match=f"model={model}: it has no local pipeline") as caught:
        freeze(compose([f"model={model}", f"backend={backend}"]))
    message = str(caught.value)
    assert message.endswith("; take backend=eachlabs")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("model", "defaults"),
    [
        ("sd35-large", ("sd3", 40, 4.5, "starter")),
        ("sd35-large-turbo", ("sd3", 4, 1.0, "starter")),
        ("sana", ("sana", 18, 5.0, "starter")),
        ("pixart-xl-2", ("pixart", 14, 4.5, "starter")),
    ],
)
def test_models_have_their_own_defaults(model, defaults):
    conf = compose([f"model={model}"])
    own = conf.model
    assert (own.family, own.steps, own.cfg) == defaults[:3]
    assert "starter" in conf.prompts.path
    assert own.name == model


@pytest.mark.parametrize(
    ("model", "multiple"),
    [("nano", 8), ("sd35-medium", 16), ("sd35-large", 16), ("sana", 32), ("pixart-xl-2", 16)],
)
def test_sizes_are_multiples_of_the_vaes_factor_and_the_patch(model, multiple):
    assert compose([f"model={model}"]).model.size_multiple == multiple


@pytest.mark.parametrize("model", ["sana", "pixart-xl-2"])
def test_models_without_a_licence_to_accept_ask_for_none(model):
    with pytest.raises(ConfigError, match="hf download") as caught:
        freeze(compose([f"model={model}"]))
    assert "licence" not in str(caught.value)


def test_backend_without_weights_reads_none_and_says_what_was_asked_in_vain():
    job = freeze(compose(["backend=fake", *RANDOM]))
    assert job.sweep.load.model.weights_digest == NO_WEIGHTS
    assert job.sweep.load.model.name == "sd35-medium"
    assert "model.weights has no effect: this backend reads no weights" in job.sweep.notes


def test_single_file_of_another_family_is_refused(tmp_path):
    header = b'{"model.diffusion_model.x": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}'
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"x")
    with pytest.raises(ConfigError, match="sana loads from a diffusers folder only"):
        freeze(compose(["model=sana", f"model.path={path}"]))
    with pytest.raises(ConfigError, match=r"give model\.components=FOLDER"):
        freeze(compose([f"model.path={path}"]))
