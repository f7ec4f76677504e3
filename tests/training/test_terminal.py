"""What a person sees: one line for a bar and for an error, nothing that only a terminal understands elsewhere."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
from pathlib import Path

import pytest
from forked import Forked

import metawrap
from metawrap.cli import main
from metawrap.cli.arguments import build_parser
from metawrap.training.progress import quiet, say

TINY = ["train", "--image-size", "16", "--filters", "4", "--inner-steps", "1", "--batch", "1", "--device", "cpu"]
TINY += ["--validation-tasks", "2", "--test-tasks", "2", "--test-norms", "own", "--epochs", "2", "--iterations", "3"]


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "NO_COLOR", "COLUMNS")}
    return kept | {"PYTHONPATH": str(Path(metawrap.__file__).parents[1]), "TERM": "xterm-256color"} | more


def in_terminal(arguments: list[str], folder: Path, columns: int) -> str:
    """All that the command writes to a terminal of that width."""
    import fcntl
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    # So that the bar is drawn at every step of so short a run.
    program = (
        "import metawrap.training.progress as p; p.REFRESH_SECONDS = 0; from metawrap.cli import main; import sys;"
    )
    command = [sys.executable, "-c", f"{program} sys.exit(main(sys.argv[1:]))", *arguments]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=folder, env=environment())
    os.close(theirs)
    parts = []
    while select.select([ours], [], [], 120)[0]:
        try:
            part = os.read(ours, 65536)
        except OSError:  # Linux: the other end is closed.
            break
        if not part:
            break
        parts.append(part)
    os.close(ours)
    assert process.wait(60) == 0
    return b"".join(parts).decode()


@pytest.mark.slow
@pytest.mark.parametrize("columns", [80, 40])
def test_the_bar_stays_on_one_line_of_a_terminal(tmp_path, columns):
    written = in_terminal([*TINY, "--out", "run"], tmp_path, columns)
    [line] = [line for line in written.split("\r\n") if "epoch 1/2" in line]  # A bar that wraps or repeats has two.
    drawn = [each for each in line.split("\r") if each.strip()]
    assert len(drawn) > 3
    assert max(map(len, drawn)) < columns
    assert drawn[-1].startswith("epoch 2/2 100% |")
    assert columns < 80 or min(len(each.split("|")[1]) for each in drawn) >= 10
    assert "\x1b" not in line


def test_nothing_that_only_a_terminal_understands_reaches_a_file(tmp_path):
    command = [sys.executable, "-m", "metawrap", *TINY, "--out", "run"]
    process = Forked(command, cwd=tmp_path, env=environment())
    printed, progress = process.communicate()
    assert process.returncode == 0
    assert "epoch 2/2: " in progress
    assert not re.search(r"[\r\x1b\x08]", progress + printed)


def test_quiet_leaves_the_result_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*TINY, "--out", "run", "--quiet"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "after adaptation" in printed.out
    assert main([*TINY, "--out", "run", "-q"]) == 2
    assert capsys.readouterr().err.startswith("Error: 'run' already has a run.")


def test_quiet_ends_with_its_block(capsys):
    with quiet():
        with quiet(False):
            say("still nothing")
        say("an error", error=True)
    say("again")
    assert capsys.readouterr().err == "an error\nagain\n"


def test_an_interrupt_while_the_lock_of_all_bars_is_made_stays_an_interrupt(monkeypatch):
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.delattr("tqdm.std.tqdm._lock", raising=False)
    monkeypatch.setattr("tqdm.std.TqdmDefaultWriteLock", interrupted)
    with pytest.raises(KeyboardInterrupt):
        say("something")


def test_an_error_that_nobody_foresaw_is_one_line_and_the_traceback_is_asked_for(monkeypatch, capsys):
    def fails(*_: object, **__: object) -> None:
        raise KeyError("first\nsecond")

    monkeypatch.setattr("metawrap.cli.commands.evaluate_run", fails)
    assert main(["evaluate", "run"]) == 1
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("Error: unexpected KeyError: ")
    assert "run again with -v for the traceback, and report it" in line
    assert main(["evaluate", "run", "-v"]) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--epocs", "3"], "metawrap train has no '--epocs'. Did you mean --epochs?"),
        (["train", "--tain-ways=3"], "metawrap train has no '--tain-ways'. Did you mean --train-ways?"),
        (["evaluate", "run", "--task-count", "3"], "metawrap evaluate has no '--task-count'."),
        (["train", "--method", "mamml"], "--method: invalid choice 'mamml'. Did you mean maml?"),
        (["trian"], "command: invalid choice 'trian'. Did you mean train?"),
        (["inspect"], "the following arguments are required: --model. See metawrap inspect --help."),
        (["train", "--seeds", "0,x"], "expected whole numbers such as 0,1,2, but got '0,x'"),
        (["train", "--seeds", "1,1"], "expected different numbers"),
        (["train", "--seeds", "0,1", "--seed", "3"], "not allowed with"),
        (["train", "--set", "colour"], "expected NAME=VALUE"),
        (["train", "--method", "magic"], "invalid choice"),
        *(
            (["inspect", "--model", "a:b", "--input-shape", shape], "expected positive whole numbers such as 3,84,84")
            for shape in ("3,x", "3,0", "")
        ),
    ],
)
def test_a_flag_that_cannot_be_read_is_one_line_with_the_nearest_or_the_form(arguments, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("Error: ")
    assert words in line


@pytest.mark.parametrize("command", ["", *build_parser().commands, "data check"])
def test_help_fits_on_a_screen_of_100_columns(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([*command.split(), "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= (40 if command == "data check" else 50)
    assert max(map(len, lines)) <= 100
