"""A key is read from the environment or a private file, and nothing that a run writes holds it."""

import copy
import io
import json
import pickle
import traceback
from pathlib import Path

import pytest
from rich.console import Console
from rich.traceback import Traceback

from sd35bench.cli import main
from sd35bench.errors import ConfigError
from sd35bench.remote.drive import HostedService
from sd35bench.remote.key import Key, read_key
from sd35bench.study.store import Study
from tests.remote.fault_server import serving
from tests.remote.hosted import HASTY, hosted_plan, hosted_settings

CANARY = "canary-7f3a9c51-sings-in-no-file"


def private(path: Path, text: str = CANARY + "\n", mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def test_a_key_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("SOME_KEY", f" {CANARY}\n")
    assert read_key("SOME_KEY", None).reveal() == CANARY


def test_a_key_file_is_read_instead(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "another")
    assert read_key("SOME_KEY", str(private(tmp_path / "key"))).reveal() == CANARY


@pytest.mark.parametrize(
    ("text", "mode", "message"),
    [
        (CANARY, 0o640, "others on this machine can read it; run chmod 600"),
        (CANARY, 0o604, "others on this machine can read it"),
        ("\n", 0o600, "is empty"),
        (f"{CANARY}\n{CANARY}\n", 0o600, "one line"),
        (f"KEY {CANARY}", 0o600, "without spaces"),
        (f"{CANARY}\N{SNOWMAN}", 0o600, "holds no key"),
        ("x" * 5000, 0o600, "holds no key"),
    ],
)
def test_a_file_that_is_no_private_key_is_refused(tmp_path, text, mode, message):
    path = private(tmp_path / "key", text, mode)
    with pytest.raises(ConfigError, match=message) as caught:
        read_key("SOME_KEY", str(path))
    assert CANARY not in "".join(traceback.format_exception(caught.value))


def test_no_key_says_where_it_goes(monkeypatch, tmp_path):
    monkeypatch.delenv("SOME_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"SOME_KEY is not set.*remote\.key_file=FILE"):
        read_key("SOME_KEY", None)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_key("SOME_KEY", str(tmp_path / "nowhere"))


def test_a_key_shows_itself_to_nobody():
    key = Key(CANARY)
    shown = [repr(key), f"{key}", f"{key!s:>40}", repr([key]), str(vars(Key)), repr(dir(key))]
    shown += [json.dumps({"key": key}, default=str), repr(key.reveal)]
    assert not any(CANARY in text for text in shown)
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(key)
    with pytest.raises(TypeError):
        copy.deepcopy(key)


# The canary ---------------------------------------------------------------------------------------


def sung(folder: Path) -> list[str]:
    """Files below a folder that hold the canary, in their bytes or their names."""
    found = [p for p in folder.rglob("*") if p.is_file()]
    return [f"{p}" for p in found if CANARY.encode() in p.read_bytes() or CANARY in f"{p}"]


@pytest.mark.model
@pytest.mark.parametrize("auth", ["x-api-key", pytest.param("bearer", marks=pytest.mark.slow)])
def test_nothing_that_a_whole_run_writes_holds_the_key(tmp_path, monkeypatch, capfd, auth):
    """Run, retry after failures, score, report: through the command line, as a user does."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("EACHLABS_API_KEY", raising=False)
    key_file = private(tmp_path.parent / f"{tmp_path.name}-key")
    with serving(keys=(CANARY,), cost_usd=0.0) as server:
        server.script("create", None, "429-soon", "400", "lost-answer")
        command = [
            *("run", "-m", "--json", "backend=eachlabs", f"remote.base_url={server.url}"),
            *("remote.allow_loopback=true", "remote.requests_per_minute=100000", "steps=4,8"),
            *("prompts.limit=2", f"remote.auth={auth}", f"remote.key_file={key_file}"),
        ]
        assert main(command) == 3
        assert main(command) == 0
        assert server.count("create") == 6
        assert all(CANARY in json.dumps(s.headers) for s in server.seen if s.route == "create")
    assert main(["report", "default"]) == 0
    out, err = capfd.readouterr()
    assert CANARY not in out + err
    assert (tmp_path / "results" / "default" / "report.html").exists()
    Study.open(tmp_path / "results", "default").export_parquet()
    key_file.unlink()
    assert sung(tmp_path) == []


@pytest.mark.parametrize("fault", ["401", "truncated-json", "no-http"])
def test_no_traceback_holds_the_key_not_even_in_its_locals(tmp_path, monkeypatch, fault):
    """Whatever goes wrong on the wire, and however deep: with every frame's variables shown."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("EACHLABS_API_KEY", CANARY)
    study = Study.open(tmp_path, "study", create=True)
    with serving() as server:
        server.always("create", fault)
        server.always("list", "401")
        settings = hosted_settings(server.url)
        with pytest.raises(ConfigError) as caught:
            HostedService(settings=settings, policy=HASTY).run(hosted_plan(server.url, 1), study)
        assert server.count("create") == 1
    shown = everything_of(caught.value)
    assert "drive.py" in shown
    assert "prediction.py" in shown
    assert CANARY not in shown
    assert sung(tmp_path) == []


def everything_of(exc: BaseException) -> str:
    """The exception and all that it came from, with the variables of every frame but the test's.

    The test's own hold the server, which has seen the key.
    """
    out = io.StringIO()
    assert exc.__traceback__ is not None
    shown = Traceback.from_exception(
        type(exc),
        exc,
        exc.__traceback__.tb_next,
        show_locals=True,
        locals_max_length=None,
        locals_max_string=None,
    )
    Console(file=out, width=400).print(shown)
    return out.getvalue()
