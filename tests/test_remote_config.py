"""From overrides to how a service is called: what is refused, what is filled in, what it costs."""

from typing import Any

import pytest

from sd35bench.config import compose, freeze
from sd35bench.config.model_weights import NO_WEIGHTS
from sd35bench.errors import ConfigError
from sd35bench.remote.drive import HostedService
from sd35bench.workers.process import LocalProcesses

HOSTED = ("model=sd35-medium", "backend=eachlabs")
LOCAL = (
    "backend=eachlabs",
    "remote.base_url=http://127.0.0.1:8000",
    "remote.allow_loopback=true",
)
ELSEWHERE = ("backend=eachlabs", "remote.base_url=https://example.org/api/", "remote.slug=mine")


def frozen(*overrides: str) -> Any:
    return freeze(compose([*overrides]))


def test_the_hosted_service_has_its_own_name_price_and_patience():
    job = frozen(*HOSTED)
    remote = job.engine.settings
    assert remote.base_url == "https://api.eachlabs.ai"
    assert remote.slug == "stable-diffusion-3-5-medium"
    assert (remote.usd_per_image, job.engine.price.usd_per_image) == (0.035, 0.035)
    assert remote.expected_latency_s == 8.0
    assert (remote.concurrency, remote.requests_per_minute, remote.single_stream) == (10, 60, 8)
    assert remote.aspect_ratios[1344, 768] == "16:9"
    load = job.sweep.load
    assert load.backend.options == {"base_url": remote.base_url, "slug": remote.slug}
    assert (load.threads, load.model.weights_digest) == (1, NO_WEIGHTS)


def test_a_service_on_this_machine_is_free_and_knows_the_model_by_its_name():
    remote = frozen(*LOCAL).engine.settings
    assert (remote.slug, remote.usd_per_image) == ("nano", 0.0)
    assert remote.expected_latency_s < 1


def test_local_and_hosted_trials_never_mix():
    keys = {frozen(*HOSTED).sweep.load.key}
    keys.add(frozen("model=sd35-medium", *LOCAL).sweep.load.key)
    keys.add(frozen("model=sd35-medium", *LOCAL, "remote.slug=other").sweep.load.key)
    assert len(keys) == 3


def test_calling_changes_how_and_not_what():
    """Limits, budgets and threads are no part of a trial's identity."""
    plain = frozen(*LOCAL).sweep.load.key
    changed = frozen(*LOCAL, "remote.concurrency=2", "remote.max_cost_usd=1", "threads=1")
    assert changed.sweep.load.key == plain
    slash = frozen(*LOCAL[::2], "remote.base_url=http://127.0.0.1:8000/")
    assert slash.sweep.load.key == plain


def test_local_backends_have_no_remote_settings():
    job = frozen("backend=fake", *LOCAL[1:])
    assert isinstance(job.engine, LocalProcesses)
    assert "base_url" not in job.sweep.load.backend.options


def test_another_service_needs_a_price():
    with pytest.raises(ConfigError, match=r"remote\.usd_per_image.*give it \(0 where it is free\)"):
        frozen(*ELSEWHERE)
    remote = frozen(*ELSEWHERE, "remote.usd_per_image=0.01").engine.settings
    assert (remote.base_url, remote.usd_per_image) == ("https://example.org/api", 0.01)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("backend=eachlabs",),
            r"model=nano backend=eachlabs: eachlabs has no known name for it.*remote\.slug",
        ),
        (
            ("backend=replicate",),
            r"model=nano backend=replicate: replicate has no known name for it",
        ),
        (LOCAL[:2], r"base_url=http://127\.0\.0\.1:8000: is on this machine; add remote\.allow"),
        (("backend=eachlabs", "remote.base_url=https://localhost"), "is on this machine"),
        (("backend=eachlabs", "remote.base_url=http://example.org"), "in the clear"),
        (("backend=eachlabs", "remote.base_url=ftp://example.org"), "must be https://HOST"),
        (("backend=eachlabs", "remote.base_url=example.org"), "must be https://HOST"),
        (("backend=eachlabs", "remote.base_url=https://h:port"), "is no URL"),
        (
            ("backend=eachlabs", "remote.base_url='https://u:secret@example.org'"),
            r"//…@example\.org: holds a user or a password",
        ),
        (
            ("backend=eachlabs", "remote.base_url='https://example.org?key=secret'"),
            r"example\.org\?…: leave out",
        ),
        (("backend=eachlabs", "remote.base_url='https://example.org/#a'"), "leave out"),
        ((*LOCAL, "width=64", "height=72"), "width=64 height=72: .* knows aspect ratios only"),
        ((*LOCAL, "batch_size=4"), r"batch_size=4: .* one image a request"),
        ((*LOCAL, "sampler=heun"), "sampler=heun"),
        ((*LOCAL, "skip_layer_guidance=stability"), "cannot leave layers out"),
        ((*LOCAL, "remote.init_image_url='file:///etc/passwd'"), "must be a URL"),
        ((*LOCAL, "remote.concurrency=0"), "remote.concurrency=0: must be an integer"),
        ((*LOCAL, "remote.on_ambiguous=again"), "remote.on_ambiguous=again: must be one of keep"),
    ],
)
def test_what_cannot_be_called_is_refused_in_one_line(overrides, message):
    with pytest.raises(ConfigError, match=message) as caught:
        frozen(*overrides)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "field",
    [
        *("threads=2", "starts=2", "keep_latents=true", "deadline_s=5", "memory_limit_gb=1"),
        "contention=warn",
    ],
)
def test_what_acts_on_this_machine_only_is_said(field):
    notes = frozen(*LOCAL, field).sweep.notes
    assert (
        f"{field.partition('=')[0]} has no effect: backend=eachlabs makes its images elsewhere"
        in (notes)
    )


def test_timed_limit_says_how_many_run_alone():
    job = frozen(*LOCAL, "timed_limit=7")
    assert isinstance(job.engine, HostedService)
    assert job.engine.settings.single_stream == 7
    assert not job.sweep.notes


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("http://localhost:8000", "http://127.0.0.1:8000"),
        ("http://LOCALHOST:8000/", "http://127.0.0.1:8000"),
        ("http://127.0.0.1:80/v", "http://127.0.0.1/v"),
        ("https://Example.org:443/api/", "https://example.org/api"),
        ("http://[0:0::1]:8000", "http://[::1]:8000"),
    ],
)
def test_spellings_of_one_address_are_one_service(one: str, other: str):
    """Another spelling would buy everything again."""
    more = ("backend=eachlabs", "remote.allow_loopback=true", "remote.slug=x")
    keys = {
        frozen(*more, f"remote.base_url='{url}'", "remote.usd_per_image=1").sweep.load.key
        for url in (one, other)
    }
    assert len(keys) == 1


def test_further_hosts_and_another_size_are_read_and_checked():
    settings = frozen(
        *LOCAL, "remote.output_hosts='cdn.example.org .b.org'", "remote.accept_size=8x16"
    ).engine.settings
    assert settings.output_hosts == ("cdn.example.org", ".b.org")
    assert settings.accept_size == (8, 16)
    for wrong in ("remote.output_hosts=https://a.org/", "remote.accept_size=8"):
        with pytest.raises(ConfigError, match="must be"):
            frozen(*LOCAL, wrong)


def test_mutant_that_takes_an_address_as_it_is_written_knows_two_services(monkeypatch):
    monkeypatch.setattr("sd35bench.config.place._netloc", lambda parts: parts.netloc)
    with pytest.raises(AssertionError):
        test_spellings_of_one_address_are_one_service(
            "http://localhost:8000", "http://127.0.0.1:8000"
        )
