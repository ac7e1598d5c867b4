"""Terminals and pipes of every kind: encodings without our characters, readers that leave."""

import io
import subprocess
import sys
import time

import pytest

from sd35bench.cli import main, output


def test_a_terminal_without_our_characters_gets_the_nearest(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    output.write_plainly(sys.stdout)
    print("0.5 × 2 → [–] é ≥ 語")
    sys.stdout.flush()
    assert raw.getvalue() == b"0.5 x 2 -> [-] e >= ?\n"


def test_mutant_that_leaves_the_stream_as_it_is_fails(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    with pytest.raises(UnicodeEncodeError):
        print("×", flush=True)


PIPED = """
import sys
import time
from sd35bench.cli import main, output
sys.stdin.read()  # until nobody reads what is printed
out = output.console()
for _ in range(2):
    out.print("x" * 100_000, soft_wrap=True)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), (["nosuch", "--json"], 2)])
def test_a_closed_pipe_is_no_verdict(arguments, code):
    command = [sys.executable, "-c", PIPED, *arguments]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stderr is not None
        process.stdout.close()
        process.stdin.close()
        said = process.stderr.read().decode()
        assert process.wait(60) == code
    assert "Traceback" not in said
    assert "BrokenPipe" not in said


def test_help_goes_to_a_stream_that_cannot_be_reconfigured(capsys):
    assert main(["--help"]) == 0
    assert "Usage" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("total", "done", "minutes", "said"),
    [
        (None, 0, 0.5, "nano: starting (loading, warming up), 0.5 min"),
        (8, 0, 0.5, "nano: 0 of 8, 0.5 min"),
        (8, 2, 0.5, "nano: 2 of 8, 4.0/min, about 1.5 min left"),
    ],
)
def test_a_line_of_progress_has_rate_and_rest(total, done, minutes, said):
    bar = output.ProgressBar(disable=True)
    bar.add_task("nano", total=total, completed=done)
    assert output.progress_line(bar.tasks[0], minutes) == said


def test_a_log_file_gets_lines_until_the_work_is_done(monkeypatch, tmp_path):
    monkeypatch.setattr(output, "LINE_S", 0.01)
    path = tmp_path / "log"
    with path.open("w", buffering=1) as log, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", log)
        with output.show_progress() as bar:
            task = bar.add_task("nano", total=4, completed=1)
            until = time.monotonic() + 60
            while "nano: 1 of 4" not in path.read_text() and time.monotonic() < until:
                time.sleep(0.01)
            bar.update(task, completed=4)
    assert "nano: 1 of 4" in path.read_text()
    assert "\x1b" not in path.read_text()


# As loud as asked ---------------------------------------------------------------------------------

FAKE = ["run", "backend=fake", "prompts.limit=2", "steps=2", "study=t"]


@pytest.mark.usefixtures("empty_folder", "fakes_here")
def test_quiet_says_only_what_failed_and_verbose_a_line_at_every_change(capsys):
    assert main([*FAKE, "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert main([*FAKE, "seed=1", "--verbose"]) == 0
    said = capsys.readouterr()
    assert "nano on fake: 2 of 2" in said.err
    assert "next: sd35bench show t" in said.out
    assert main([*FAKE, "seed=2", "backend.fail_every=1", "--quiet"]) == 3
    assert "2 failed, of 2 planned" in capsys.readouterr().out


def test_quiet_and_verbose_together_are_refused(capsys):
    assert main(["run", "--quiet", "--verbose"]) == 2
    assert "contradict" in capsys.readouterr().err
