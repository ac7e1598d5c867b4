"""Seeds from 0 to 2^64 - 1: the same noise as diffusers', exact in files and pages, never bought
where a service does not take them."""

import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor
from hypothesis import given
from hypothesis import strategies as st

from sd35bench.backends.pipeline import generator
from sd35bench.config.freeze import _refuse_same_noise
from sd35bench.config.models import check_field
from sd35bench.errors import ConfigError
from sd35bench.plan import Plan, expand
from sd35bench.plan import Sweep as PlannedSweep
from sd35bench.prompts import PromptItem
from sd35bench.remote.drive import HostedService
from sd35bench.remote.providers import PROVIDERS, provider_class
from sd35bench.remote.providers.base import _text
from sd35bench.study.store import Score, Study, _table
from sd35bench.types import Load, PromptRef
from tests.remote.contract import remote_settings
from tests.studies.fakes import fake_load
from tests.study.test_store import make_record, request

MOST = 2**64 - 1
LONG = 2**63 + 2**53 + 12345
"""Beyond signed integers, and no whole number of JavaScript's."""


@pytest.mark.parametrize("seed", [0, 2**32, LONG, MOST])
def test_every_seed_is_taken_and_is_diffusers_noise(seed):
    assert check_field("seed", seed) == seed
    shape = (1, 16, 8, 8)
    ours = torch.randn(shape, generator=generator(seed))
    theirs = randn_tensor(shape, generator=[torch.Generator("cpu").manual_seed(seed)])
    assert torch.equal(ours, theirs)
    clipped = torch.randn(shape, generator=generator(min(seed, 2**32 - 1)))  # a mutant
    assert torch.equal(ours, clipped) == (seed in (0, MOST))  # MOST's lower 32 bits are all ones


@pytest.mark.parametrize(
    ("seed", "said"),
    [
        (-1, r"from 0 to 18446744073709551615; none is drawn at random.*seed=0,1,2"),
        (2**64, r"seed=18446744073709551616: must be an integer from 0 to 18446744073709551615$"),
    ],
)
def test_other_seeds_are_refused_with_what_to_do(seed, said):
    with pytest.raises(ConfigError, match=said):
        check_field("seed", seed)


def test_seeds_of_one_noise_are_refused_where_torch_draws_it():
    _refuse_same_noise({"seed": (0, 1, 1, 2**32 - 1)})
    with pytest.raises(ConfigError, match=r"seed=4294967297: the same noise as seed=1"):
        _refuse_same_noise({"seed": (0, 1, 2**32 + 1)})
    first, second = (torch.randn(9, generator=generator(seed)) for seed in (1, 2**32 + 1))
    assert torch.equal(first, second)  # should this fail one day, the refusal may go


def test_long_seeds_are_exact_in_the_store_and_in_sql(tmp_path):
    study = Study.open(tmp_path, "t", create=True)
    study.shard("1").append_record(make_record(request(LONG)))
    study.shard("1").append_record(make_record(request(7)))
    study.append_scores("m", [Score(metric="m", key="k", image="i", value=1.0)])
    found = study.sql("SELECT request_seed FROM records ORDER BY 1")
    assert f"{found.schema.types[0]}" == "uint64"
    assert found.to_pydict() == {"request_seed": [7, LONG]}
    assert _table([{"metric": "m"}]).to_pydict() == {"metric": ["m"]}
    assert _table([]).num_rows == 0


def _hosted_plan(seed: int) -> Plan:
    local = fake_load()
    load = Load(model=local.model, backend=local.backend, threads=1)
    item = PromptItem(ref=PromptRef(id="0", set="t"), prompt="a red circle")
    axes = {"steps": (4,), "cfg": (5.0,), "seed": (seed,)}
    return expand(PlannedSweep(load=load, prompts=(item,), axes=axes, sizes=((88, 48),)))


@pytest.mark.parametrize("name", PROVIDERS)
def test_a_seed_beyond_a_services_range_is_refused_before_money(name):
    most = provider_class(name).most_seed
    service = HostedService(settings=remote_settings(name, "http://127.0.0.1:1"))
    with pytest.raises(ConfigError, match=rf"seed={most + 1}: the service takes 0 to {most}"):
        service.prepare(_hosted_plan(most + 1), dry=True)


@given(st.integers(0, MOST), st.integers(0, MOST))
def test_a_listed_prediction_is_told_apart_by_its_seed(first, second):
    assert (_text(first) == _text(str(second))) == (first == second)
