"""A run on two processes, of which one is killed at random moments, goes on in two or in one, and ends as it would."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import metawrap
from metawrap.training.checkpoints import load_checkpoint

EPOCHS, KILLS, SECONDS_TO_WAIT = 40, 4, 300
FLAGS = [
    *("--model", "distributed_learners:plain_net", "--image-size", "8", "--inner-steps", "2", "--targets", "2"),
    *("--epochs", str(EPOCHS), "--iterations", "3", "--batch", "4", "--validation-tasks", "4", "--test-tasks", "4"),
    *("--keep", "2", "--device", "cpu", "--seed", "4", "--engine", "functional", "--out"),
]


def start(place: Path, processes: int, out: str, *more: str) -> subprocess.Popen[str]:
    command = ["-m", "metawrap", "train", *FLAGS, out, *more]
    if processes > 1:
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *command]
    tests = Path(__file__).parents[1]
    folders = (Path(metawrap.__file__).parents[1], tests / "support", tests / "reference")
    own = {"PYTHONPATH": os.pathsep.join(map(str, folders)), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *command], cwd=place, env=os.environ | own, **pipes)  # type: ignore[call-overload,no-any-return]


def end(process: subprocess.Popen[str], well: bool) -> str:
    printed, complaints = process.communicate(timeout=SECONDS_TO_WAIT)
    assert (process.returncode == 0) == well, complaints
    return printed


def newest(run: Path) -> int:
    return max((int(file.stem[6:]) for file in run.glob("checkpoints/epoch-*.pt")), default=0)


def ranks_of(launcher: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()]


@pytest.mark.trust
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes in /proc")
@pytest.mark.timeout(1_800)
def test_a_rank_that_is_killed_ends_the_run_which_goes_on_at_another_world_size(tmp_path: Path) -> None:
    end(start(tmp_path, 1, "alone"), well=True)
    generator = random.Random(time.time_ns())
    for _ in range(KILLS):
        begun = newest(tmp_path / "killed")
        process = start(tmp_path, 2, "killed", "--resume")
        target = begun + generator.randint(1, 6)
        deadline = time.monotonic() + SECONDS_TO_WAIT
        while newest(tmp_path / "killed") < target:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(generator.random() * 0.1)
        os.kill(generator.choice(ranks_of(process.pid)), signal.SIGKILL)
        end(process, well=False)
        assert newest(tmp_path / "killed") < EPOCHS, "it ended before it was killed: use more epochs"
    assert "after adaptation" in end(start(tmp_path, 1, "killed", "--resume"), well=True)
    found, wanted = (
        load_checkpoint(tmp_path / run / f"checkpoints/epoch-{EPOCHS:04d}.pt") for run in ("killed", "alone")
    )
    assert found.learner["_extra_state"] == wanted.learner["_extra_state"]
    for name, value in wanted.learner.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(found.learner[name], value, rtol=1e-9, atol=1e-9)
