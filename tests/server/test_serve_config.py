"""What `sd35bench serve` takes and refuses, before anything is loaded."""

import contextlib
import json

import pytest

from sd35bench.cli import main
from sd35bench.config.serve import SERVE_FIELDS, compose_serve, freeze_serve
from sd35bench.errors import ConfigError
from sd35bench.server.generation import Generator
from sd35bench.server.serving import bind, serve
from tests.server.live import make_settings


def frozen(*overrides: str):
    return freeze_serve(compose_serve(["backend=fake", "no_auth=true", *overrides]))


def test_defaults():
    settings = frozen()
    assert (settings.host, settings.port) == ("127.0.0.1", 8000)
    assert (settings.requests_per_minute, settings.concurrency) == (60, 10)
    assert settings.state_dir.as_posix() == "results/serve-nano-fake"
    assert settings.model.sizes["1:1"] == (64, 64)
    assert settings.model.sizes["16:9"] == (88, 48)
    assert next(iter(settings.model.sizes)) == "1:1"
    assert len(settings.model.sizes) == 11
    assert {"nano", "stable-diffusion-3.5-medium", "stable-diffusion-3-5-medium"} <= set(
        settings.model.slugs
    )
    assert settings.model.takes_images


def test_load_is_what_run_would_load():
    from sd35bench.config import compose, freeze

    served = frozen("backend.delay_s=0.5", "threads=1").load
    assert served.backend.options["delay_s"] == 0.5
    point = freeze(compose(["backend=fake", "backend.options.delay_s=0.5", "threads=1"]))
    assert served.key == point.sweep.load.key


def test_threads_are_checked_as_by_run():
    with pytest.raises(ConfigError, match="threads=1024: this process sees"):
        frozen("threads=1024")


def test_the_results_folder_holds_the_state_unless_that_is_given():
    assert frozen("results_dir=/data").state_dir.as_posix() == "/data/serve-nano-fake"
    assert frozen("results_dir=/data", "state_dir=/s").state_dir.as_posix() == "/s"


def test_values_arrive(tmp_path):
    settings = frozen(
        "port=0",
        "host=localhost",
        f"state_dir={tmp_path}",
        "requests_per_minute=null",
        "concurrency=3",
        "usd_per_image=0.035",
        "balance_usd=1",
        "output_lifetime_s=60",
        "keep_days=30",
        "deadline_s=5",
        "memory_limit_gb=2",
        "allow_loopback=true",
    )
    assert (settings.port, settings.host, settings.state_dir) == (0, "localhost", tmp_path)
    assert (settings.requests_per_minute, settings.concurrency) == (None, 3)
    assert (settings.usd_per_image, settings.balance_usd) == (0.035, 1.0)
    assert settings.keep_days == 30
    assert settings.limits.memory_limit_bytes == 2_000_000_000
    assert settings.allow_loopback


def test_model_that_takes_no_images_says_so():
    assert not frozen("model=pixart-xl-2").model.takes_images


def test_model_without_ratios_has_its_own_size():
    config = compose_serve(["backend=fake", "no_auth=true"])
    config.model.aspect_ratios = {}
    assert freeze_serve(config).model.sizes == {"1:1": (64, 64)}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["no_auth=false"], "make_key=NAME key_file=FILE"),
        (["host=0.0.0.0"], "only on a loopback host"),
        (["host=::"], "only on a loopback host"),
        (["host=example.org"], "only on a loopback host"),
        (["key_file=k.txt"], "contradict"),
        (["port=70000"], "port=70000"),
        (["port=x"], "port=x"),
        (["prot=1"], "did you mean port"),
        (["prompts=nano"], "serve takes no 'prompts'"),
        (["steps=4"], "serve takes no 'steps'"),
        (["port=1,2"], "one value"),
        (["+port=1"], "neither added"),
        (["backend=nope"], "must be one of"),
        (["model=ideogram-v2-turbo"], "ideogram"),
        (["backend.nope=1"], "backend.nope: unknown field"),
        (["concurrency=0"], "concurrency=0"),
        (["requests_per_minute=0"], "requests_per_minute=0"),
        (["output_lifetime_s=0"], "output_lifetime_s=0"),
        (["keep_days=0"], "keep_days=0"),
        (["balance_usd=1"], "usd_per_image"),
        (["usd_per_image=-1"], "usd_per_image=-1"),
    ],
)
def test_wrong_input_is_refused_in_one_line(overrides, words):
    with pytest.raises(ConfigError) as caught:
        frozen(*overrides)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_hosted_backend_is_refused():
    from sd35bench.config.files import choices

    if "eachlabs" not in choices("backend"):
        pytest.skip("there is no hosted backend")
    with pytest.raises(ConfigError, match="runs here"):
        freeze_serve(compose_serve(["model=sd35-medium", "backend=eachlabs", "no_auth=true"]))


def test_port_in_use_is_said(tmp_path, capsys):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        given = ["backend=fake", "no_auth=true", f"port={port}", f"state_dir={tmp_path}"]
        assert main(["serve", "--json", *given]) == 2
    assert "port=0 for a free one" in json.loads(capsys.readouterr().out)["error"]["message"]


@pytest.mark.parametrize("listens", [True, False], ids=["serving", "still-loading"])
def test_a_port_that_is_taken_is_found_before_the_model_loads(tmp_path, monkeypatch, listens):
    """The other one may be loading as well: it holds the port, and does not listen yet."""
    monkeypatch.setattr(Generator, "start", lambda _: pytest.fail("a model is loaded"))
    with contextlib.closing(bind(make_settings(tmp_path / "a"))) as taken:
        if listens:
            taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port={port}: cannot be served on"):
            serve(make_settings(tmp_path / "b", port=port), on_ready=print)
    bind(make_settings(tmp_path / "b", port=port)).close()


def test_make_key_prints_it_once(tmp_path, capsys):
    path = tmp_path / "keys.txt"
    assert main(["serve", "make_key=alice", f"key_file={path}", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["name"], made["key_file"]) == ("alice", str(path))
    assert made["key"] not in path.read_text()
    settings = freeze_serve(compose_serve(["backend=fake", f"key_file={path}", "host=0.0.0.0"]))
    assert settings.key_file == path
    assert main(["serve", "make_key=alice"]) == 2


def test_help_names_every_field(capsys):
    assert main(["serve", "--help"]) == 0
    text = capsys.readouterr().out
    for name in (*SERVE_FIELDS, "make_key=alice", "backend.OPTION", "exit codes"):
        assert name.lower() in text.lower()
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("flag", ["--jsn", "-m", "--config-dir=/nowhere/at/all"])
def test_wrong_flag_is_refused(flag, capsys):
    assert main(["serve", flag]) == 2
    assert flag.partition("=")[0] in capsys.readouterr().err
