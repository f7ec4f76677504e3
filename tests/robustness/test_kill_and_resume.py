"""A run that is killed at any moment resumes and ends with bit-identical weights: real processes, real SIGKILLs."""

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_runs import NETWORK, assert_ended_alike

import metawrap
from metawrap.training.checkpoints import CheckpointFolder

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")

EPOCHS = 6
SECONDS_TO_WAIT = 400  # a busy machine takes its time to import torch


class Workplace:
    """A folder with the user's network, where commands run as a user would type them."""

    def __init__(self, path):
        self.path = path
        (path / "killable_network.py").write_text(NETWORK)
        package = Path(metawrap.__file__).parents[1]
        self.environment = os.environ | {"PYTHONPATH": str(package), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def start(self, *arguments, **environment):
        return subprocess.Popen(
            [sys.executable, "-m", "metawrap", "train", *arguments],
            cwd=self.path,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A shell's background job, as CI may be, ignores Ctrl-C and hands that down; a user's terminal does not.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def finish(self, *arguments):
        process = self.start(*arguments)
        printed, complaints = process.communicate(timeout=SECONDS_TO_WAIT)
        assert process.returncode == 0, complaints
        return printed

    def assert_ended_alike(self, out):
        assert max(CheckpointFolder(self.path / out / "checkpoints", 1, 1).epochs()) == EPOCHS
        assert_ended_alike(self.path / "uninterrupted", self.path / out)


FLAGS = [
    *("--model", "killable_network:build", "--image-size", "8", "--inner-steps", "2", "--targets", "2"),
    *("--epochs", str(EPOCHS), "--iterations", "12", "--batch", "2", "--validation-tasks", "4", "--test-tasks", "2"),
    *("--keep", "2", "--device", "cpu", "--seed", "4"),
]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    place = Workplace(tmp_path_factory.mktemp("workplace"))
    place.finish("--out", "uninterrupted", *FLAGS)
    return place


def wait_for(condition):
    deadline = time.monotonic() + SECONDS_TO_WAIT
    while not condition():
        assert time.monotonic() < deadline, "the run did not get there in time"
        time.sleep(0.005)


def kill_during_training(workplace, out, epochs, delay):
    """Starts or resumes the run and kills it `delay` seconds after that many epochs; returns whether it was alive."""
    log = workplace.path / out / "log.jsonl"
    before = log.stat().st_mtime_ns if log.exists() else None

    def is_there():
        begun = log.exists() and log.stat().st_mtime_ns != before
        return process.poll() is not None or (begun and log.read_text().count("\n") >= epochs)

    process = workplace.start("--out", out, *FLAGS, "--resume")
    wait_for(is_there)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    complaints = process.communicate()[1]
    assert process.returncode in (0, -signal.SIGKILL), complaints
    return process.returncode != 0


def test_killed_at_random_moments_it_ends_with_the_same_bits(workplace):
    seconds = json.loads((workplace.path / "uninterrupted" / "result.json").read_text())["seconds"]
    moments = random.Random(0)
    killed = [
        kill_during_training(workplace, "random", epochs, moments.uniform(0, seconds / EPOCHS))
        for epochs in (0, 1, 2, 4)
    ]
    assert sum(killed) >= 2, "the run was over before it could be killed"
    workplace.finish("--out", "random", *FLAGS, "--resume")
    workplace.assert_ended_alike("random")


def test_killed_while_saving_it_ends_with_the_same_bits(workplace):
    # Each start writes run.json, the log, the insight if there is any yet, and then a checkpoint per epoch: an fsync, a
    # replace and an fsync for each.
    for moment in ("replace:4:before", "replace:3:before", "replace:5:after", "fsync:7:before"):
        process = workplace.start("--out", "saving", *FLAGS, "--resume", KILL_AT=moment)
        process.communicate(timeout=SECONDS_TO_WAIT)
        assert process.returncode == -signal.SIGKILL, moment
    workplace.finish("--out", "saving", *FLAGS, "--resume")
    workplace.assert_ended_alike("saving")


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_says_in_one_line_how_to_continue_and_that_line_works(workplace, sent):
    out = f"stopped by {sent.name}"  # the blank has to be quoted in the hint
    process = workplace.start("--out", out, *FLAGS)
    log = workplace.path / out / "log.jsonl"
    wait_for(lambda: process.poll() is not None or (log.exists() and log.read_text().count("\n") >= 2))
    process.send_signal(sent)
    printed, complaints = process.communicate(timeout=SECONDS_TO_WAIT)
    assert process.returncode == 130, complaints
    assert "Traceback" not in complaints
    assert not printed
    hint = complaints.strip().splitlines()[-1]
    assert hint.startswith("Stopped. ")
    assert f"of {EPOCHS} epochs are saved" in hint
    command = shlex.split(hint.partition("continue with: ")[2])
    assert command[1:] == ["-m", "metawrap", "train", "--out", out, "--resume"]
    if sent == signal.SIGTERM:  # what follows does not depend on the signal
        return
    assert "after adaptation" in workplace.finish(*command[4:])
    workplace.assert_ended_alike(out)
