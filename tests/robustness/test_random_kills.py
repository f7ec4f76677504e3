"""Killed at random moments, by SIGKILL or SIGTERM, a run resumes and ends with the same bits, on both engines.

Each start is a fork of this process, which has imported torch already: the moments fall into training, not imports.
"""

import io
import os
import random
import signal
import sys
import time

import pytest
from tiny_runs import NETWORK, assert_ended_alike

from metawrap.cli import main

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="forks"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]

EPOCHS = 4


class Runs:
    """Starts runs in `path`. killed, stopped: how many ended by SIGKILL, by SIGTERM."""

    def __init__(self, path, engine):
        (path / "killable_network.py").write_text(NETWORK)
        self.path, self.killed, self.stopped, self.finished = path, 0, 0, 0
        self.flags = [
            *("--model", "killable_network:build", "--image-size", "8", "--inner-steps", "2", "--targets", "2"),
            *("--epochs", str(EPOCHS), "--iterations", "5", "--batch", "2", "--validation-tasks", "4"),
            *("--test-tasks", "2", "--keep", "2", "--device", "cpu", "--seed", "4", "--engine", engine),
        ]

    def start(self, out):
        pid = os.fork()
        if pid:
            return pid
        status = 70
        try:
            os.chdir(self.path)
            quiet = os.open(self.path / f"{out}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(number, "w", closefd=False)) for number in (1, 2))
            status = main(["train", "--out", out, *self.flags, "--resume"])
        finally:
            os._exit(status)

    def finish(self, out):
        assert os.waitpid(self.start(out), 0)[1] == 0, (self.path / f"{out}.txt").read_text()

    def kill(self, out, sent, delay):
        """Whether the run was alive then; one that was not has finished."""
        pid = self.start(out)
        time.sleep(delay)
        os.kill(pid, sent)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        # SIGTERM may come before the handler is there, or after it is gone again.
        assert status in (0, 130, -sent), (self.path / f"{out}.txt").read_text()
        self.killed += status == -signal.SIGKILL
        self.stopped += status != 0 and sent == signal.SIGTERM
        return status != 0

    def assert_ended_alike(self, out):
        assert_ended_alike(self.path / "reference", self.path / out)
        self.finished += 1


@pytest.mark.parametrize(
    ("engine", "kills"),
    [
        ("functional", 2),
        ("higher", 1),
        pytest.param("functional", 60, marks=pytest.mark.trust),
        pytest.param("higher", 60, marks=pytest.mark.trust),
    ],
)
def test_killed_at_random_moments_a_run_ends_with_the_same_bits(tmp_path, engine, kills):
    runs, moments = Runs(tmp_path, engine), random.Random(f"{engine} {kills}")
    begun = time.monotonic()
    runs.finish("reference")
    seconds = time.monotonic() - begun
    number = tries = 0
    while runs.killed + runs.stopped < kills:
        tries += 1
        assert tries < 20 * kills, "the runs were over before they could be killed"
        out, sent = f"run-{number}", signal.SIGKILL if tries % 2 else signal.SIGTERM
        if not runs.kill(out, sent, moments.uniform(0, seconds)):
            runs.assert_ended_alike(out)
            number += 1
    runs.finish(f"run-{number}")
    runs.assert_ended_alike(f"run-{number}")
    print(f"{engine}: {runs.killed} SIGKILL, {runs.stopped} SIGTERM, {runs.finished} runs ended with the same bits")
