"""What nobody reads is refused, before anything is loaded; what somebody reads is not."""

import pytest
from omegaconf import OmegaConf

import sd35bench.config.unread as unread
from sd35bench.config import compose
from sd35bench.config.models import FIELDS
from sd35bench.config.overrides import written
from sd35bench.errors import ConfigError

LOCAL = "backend.kind=fake"
HOSTED = "backend.kind=eachlabs"
VALUES = {
    "remote.": ("remote.concurrency=2", LOCAL, HOSTED),
    "threads": ("threads=1", HOSTED, LOCAL),
    "starts": ("starts=2", HOSTED, LOCAL),
    "workers": ("workers=2", HOSTED, LOCAL),
    "max_failures": ("max_failures=2", HOSTED, LOCAL),
    "deadline_s": ("deadline_s=9", HOSTED, LOCAL),
    "memory_limit_gb": ("memory_limit_gb=9", HOSTED, LOCAL),
    "keep_latents": ("keep_latents=true", HOSTED, LOCAL),
    "contention": ("contention=warn", HOSTED, LOCAL),
    "noise_floor": ("noise_floor=fake", HOSTED, LOCAL),
    "prompts.path": ("prompts.path=mine.txt", "prompts.kind=nano", "prompts.kind=geneval"),
    "prompts.columns.": ("prompts.columns.prompt=x", "prompts.kind=coco", "prompts.kind=file"),
    "prompts.skip_empty": ("prompts.skip_empty=true", LOCAL, "prompts.kind=file"),
    "prompts.task": ("prompts.task=edit", "prompts.kind=file", LOCAL),
    "prompts.seed": ("prompts.seed=1", "prompts.kind=file", LOCAL),
    "output_quality": ("output_quality=50", LOCAL, "output_format=webp"),
}
"""What is asked, where nothing reads it, and where something does."""


@pytest.fixture(scope="module")
def composed():
    base = compose(written(["backend=fake"]))
    return lambda text: OmegaConf.merge(base, OmegaConf.from_dotlist([text]))


def test_every_entry_has_a_case_and_names_a_field():
    assert VALUES.keys() == unread.READS.keys()
    for name in unread.READS:
        assert any(field == name or field.startswith(name) for field in FIELDS)


@pytest.mark.parametrize("name", unread.READS)
def test_a_field_that_nothing_reads_is_refused(name, composed):
    asked, nowhere, somewhere = VALUES[name]
    with pytest.raises(ConfigError, match="nothing in this run reads it"):
        unread.refuse_unread([asked], [composed(nowhere)])
    unread.refuse_unread([asked], [composed(nowhere), composed(somewhere)])
    unread.refuse_unread([], [composed(nowhere)])


def test_mutant_that_asks_only_the_first_job_refuses_what_another_reads(composed):
    asked, nowhere, somewhere = VALUES["threads"]
    with pytest.raises(ConfigError):
        unread.refuse_unread([asked], [composed(nowhere), composed(somewhere)][:1])
