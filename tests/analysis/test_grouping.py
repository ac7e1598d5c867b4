from dataclasses import replace

import pytest

from sd35bench.analysis.grouping import cluster_key, pair_clusters, pair_key, setting_key
from sd35bench.types import BackendSpec, SkipLayerGuidance
from tests.studies.memory import LOAD, record

_OTHER_WEIGHTS = replace(LOAD, model=replace(LOAD.model, weights_digest="e" * 64))
_OTHER_OPTIONS = replace(LOAD, backend=BackendSpec(name="eager", kind="eager", options={"a": 1}))
_SKIP = SkipLayerGuidance(layers=(7, 8), scale=2.5, start=0.01, stop=0.2)


@pytest.mark.parametrize(
    "fields",
    [
        {"steps": 9},
        {"cfg": 4.5},
        {"sampler": "heun"},
        {"shift": 2.0},
        {"max_sequence_length": 8},
        {"width": 72},
        {"height": 72},
        {"output_format": "jpg"},
        {"output_quality": 50},
        {"skip_layer_guidance": _SKIP},
        {"init_image": "i" * 64},
        {"init_image": "i" * 64, "prompt_strength": 0.5},
        {"load": _OTHER_WEIGHTS},
        {"load": _OTHER_OPTIONS},
        {"load": replace(LOAD, threads=1)},
    ],
    ids=lambda f: "-".join(f),
)
def test_setting_key_differs_with_every_field_of_a_setting(fields):
    assert setting_key(record(0, **fields).trial) != setting_key(record(0).trial)


@pytest.mark.parametrize(
    "fields",
    [{"seed": 5}, {"prompt": "another"}, {"negative_prompt": "n"}, {"batch_size": 8}, {"cfg": 4}],
    ids=lambda f: next(iter(f)),
)
def test_setting_key_ignores_what_is_no_part_of_a_setting(fields):
    assert setting_key(record(0, **fields).trial) == setting_key(record(0).trial)


@pytest.mark.parametrize(
    ("fields", "same"),
    [
        ({"steps": 50, "cfg": 1.0, "sampler": "heun", "output_format": "webp"}, True),
        ({"seed": 1}, False),
        ({"negative_prompt": "x"}, False),
        ({"width": 72}, False),
        ({"init_image": "i" * 64}, False),
    ],
    ids=["settings-differ", "seed", "negative", "size", "init"],
)
def test_pair_key_is_prompt_negative_seed_size_and_init(fields, same):
    assert (pair_key(record(0, **fields).trial) == pair_key(record(0).trial)) is same


def test_cluster_key_joins_the_seeds_of_a_prompt():
    assert cluster_key(record(0, seed=1).trial) == cluster_key(record(0, seed=2).trial)
    assert cluster_key(record(0).trial) != cluster_key(record(1).trial)


@pytest.mark.parametrize("spelt", ["A red  circle on white", " a RED circle on\twhite "])
def test_a_prompt_in_other_letters_or_spaces_is_the_same_cluster_but_another_pair(spelt):
    one, other = (record(0, prompt=text).trial for text in ("a red circle on white", spelt))
    assert cluster_key(one) == cluster_key(other)
    assert pair_clusters([pair_key(one), pair_key(other)]).tolist() == [0, 0]
    assert pair_key(one) != pair_key(other)  # mutant: raw prompts as clusters gives [0, 1]
