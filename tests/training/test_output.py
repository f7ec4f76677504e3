"""Output that fails after the work is done does not turn a finished run into a failed one."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bird_runs import FLAGS, write_birds

from metawrap.cli import main


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    write_birds(tmp_path / "birds")
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        yield tmp_path


def full() -> Any:
    return open("/dev/full", "w", encoding="utf-8")


def ascii_terminal() -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict", write_through=True)


NOWHERE: dict[str, Callable[[], Any]] = {"closed": lambda: None, "ascii": ascii_terminal}
if os.path.exists("/dev/full"):
    NOWHERE["full"] = full


@pytest.mark.sampled(1)
@pytest.mark.parametrize("make", NOWHERE.values(), ids=NOWHERE)
def test_a_finished_run_stays_finished_where_nothing_can_be_printed(
    place: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[], Any]
) -> None:
    for name in ("stdout", "stderr"):
        stream = make()
        monkeypatch.setattr(sys, name, stream)
        assert main(["train", *FLAGS, "--epochs", "1", "--out", name]) == 0
        assert json.loads(Path(name, "result.json").read_text())["test"]["tasks"] == 2
        assert getattr(sys, name) is stream
        assert main(["evaluate", name, "--out", "again.json"]) == 0
        assert main(["report", name]) == 0
        if stream is not None:
            assert stream.errors == "strict"
            stream.close()  # As Python does at its end: raises if the stream still holds what it could not write.
        monkeypatch.undo()
        monkeypatch.chdir(place)
    assert json.loads(Path("again.json").read_text())["test"]["tasks"] == 2


@pytest.mark.skipif("full" not in NOWHERE, reason="needs /dev/full")
def test_a_result_that_only_a_full_disk_would_have_is_a_failure_in_words(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *FLAGS, "--epochs", "1", "--out", "run"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream := full())
        assert main(["train", *FLAGS, "--epochs", "1", "--out", "run", "--resume"]) == 0
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said == "The output could not be printed (No space left on device). The work is done: run/result.json"
        stream.close()
        patch.setattr(sys, "stdout", stream := full())
        assert main(["evaluate", "run"]) == 2
        stream.close()
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("Error: the output cannot be used (No space left on device).")


def test_what_ascii_cannot_say_is_printed_as_escapes(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", stream := ascii_terminal())
    assert main(["train", *FLAGS, "--epochs", "1", "--out", "run"]) == 0
    assert b"\\xb1" in stream.buffer.getvalue()
