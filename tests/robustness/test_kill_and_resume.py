"""A run that is killed or stopped at any moment resumes and ends with bit-identical weights: real signals."""

import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forked import Forked
from tiny_runs import NETWORK, assert_ended_alike

import metawrap
from metawrap.data import load_glyphs
from metawrap.training.checkpoints import CheckpointFolder

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")

EPOCHS = 4
SECONDS_TO_WAIT = 400  # for a new interpreter on a busy machine


class Workplace:
    """A folder with the user's network and a run without interruption, where commands run as a user would type them."""

    def __init__(self, path, engine="functional", iterations=5):
        (path / "killable_network.py").write_text(NETWORK)
        load_glyphs(image_size=8)  # Forks inherit the drawings.
        self.path = path
        self.model = ["--model", "killable_network:build"]
        self.flags = [
            *(*self.model, "--image-size", "8", "--inner-steps", "2", "--targets", "2"),
            *("--epochs", str(EPOCHS), "--iterations", str(iterations), "--batch", "2", "--validation-tasks", "4"),
            *("--test-tasks", "2", "--keep", "2", "--device", "cpu", "--seed", "4", "--engine", engine),
        ]
        begun = time.monotonic()
        self.finish("uninterrupted", *self.flags)
        self.seconds = time.monotonic() - begun

    def start(self, out, *more, popen=Forked, **environment):
        package = Path(metawrap.__file__).parents[1]
        own = {"PYTHONPATH": str(package), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        return popen(
            [sys.executable, "-m", "metawrap", "train", "--out", out, *more],
            cwd=self.path,
            env=os.environ | own | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # As in `Forked`.
        )

    def finish(self, out, *more):
        process = self.start(out, *more)
        printed, complaints = process.communicate(timeout=SECONDS_TO_WAIT)
        assert process.returncode == 0, complaints
        return printed

    def kill(self, out, sent, delay):
        """Starts or resumes the run, and signals it so many seconds later; its exit code."""
        process = self.start(out, *self.flags, "--resume")
        time.sleep(delay)
        process.send_signal(sent)
        complaints = process.communicate(timeout=SECONDS_TO_WAIT)[1]
        # SIGTERM may come before the handler is there, or after it is gone again.
        assert process.returncode in (0, 130, -sent), complaints
        return process.returncode

    def assert_ended_alike(self, out):
        assert max(CheckpointFolder(self.path / out / "checkpoints", 1, 1).epochs()) == EPOCHS
        assert_ended_alike(self.path / "uninterrupted", self.path / out)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    return Workplace(tmp_path_factory.mktemp("workplace"), iterations=12)


@pytest.mark.parametrize(
    ("engine", "kills"),
    [
        ("functional", 2),
        ("higher", 1),
        pytest.param("functional", 60, marks=pytest.mark.trust),
        pytest.param("higher", 60, marks=pytest.mark.trust),
    ],
)
def test_killed_at_random_moments_it_ends_with_the_same_bits(tmp_path, engine, kills):
    place, moments = Workplace(tmp_path, engine), random.Random(f"{engine} {kills}")
    ended, number = [], 0
    while sum(code != 0 for code in ended) < kills:
        assert len(ended) < 20 * kills, "the runs were over before they could be killed"
        out, sent = f"run-{number}", signal.SIGTERM if len(ended) % 2 else signal.SIGKILL
        ended.append(place.kill(out, sent, moments.uniform(0, place.seconds)))
        if ended[-1] == 0:
            place.assert_ended_alike(out)
            number += 1
    place.finish(f"run-{number}", *place.flags, "--resume")
    place.assert_ended_alike(f"run-{number}")
    killed, all_killed = ended.count(-signal.SIGKILL), sum(code != 0 for code in ended)
    print(f"{engine}: {killed} SIGKILL, {all_killed - killed} SIGTERM, {number + 1} runs ended with the same bits")


def test_killed_while_saving_it_ends_with_the_same_bits(workplace):
    # Each start writes run.json, the log, the insight if there is any yet, and then a checkpoint per epoch: an fsync, a
    # replace and an fsync for each.
    for moment in ("replace:4:before", "replace:3:before", "replace:5:after", "fsync:7:before"):
        process = workplace.start("saving", *workplace.flags, "--resume", KILL_AT=moment)
        process.communicate(timeout=SECONDS_TO_WAIT)
        assert process.returncode == -signal.SIGKILL, moment
    workplace.finish("saving", *workplace.flags, "--resume")
    workplace.assert_ended_alike("saving")


@pytest.mark.sampled(1)
@pytest.mark.parametrize(("sent", "popen"), [(signal.SIGINT, subprocess.Popen), (signal.SIGTERM, Forked)])
def test_a_stopped_run_says_in_one_line_how_to_continue_and_that_line_works(workplace, sent, popen):
    out = f"stopped by {sent.name}"  # the blank has to be quoted in the hint
    process = workplace.start(out, *workplace.flags, popen=popen)
    log, deadline = workplace.path / out / "log.jsonl", time.monotonic() + SECONDS_TO_WAIT
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= 2):
        assert time.monotonic() < deadline, "the run did not get there in time"
        time.sleep(0.005)
    process.send_signal(sent)
    printed, complaints = process.communicate(timeout=SECONDS_TO_WAIT)
    assert process.returncode == 130, complaints
    assert "Traceback" not in complaints
    assert not printed
    hint = complaints.strip().splitlines()[-1]
    assert hint.startswith("Stopped. ")
    assert f"of {EPOCHS} epochs are saved" in hint
    command = shlex.split(hint.partition("continue with: ")[2])
    assert command[1:] == ["-m", "metawrap", "train", "--out", out, "--resume", *workplace.model]
    assert "after adaptation" in workplace.finish(out, "--resume", *workplace.model)
    workplace.assert_ended_alike(out)
