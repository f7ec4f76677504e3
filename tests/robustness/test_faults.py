"""Faults that a disk, a second process, the memory or the clock bring: each is provoked, and nothing is lost."""

import errno
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from keywords import grouped
from tiny_runs import checkpoint_after, saved_run

import metawrap
from metawrap.cli import main
from metawrap.errors import CheckpointError
from metawrap.execution import executor, parallel
from metawrap.inner_loop import task_solver
from metawrap.training import checkpoints
from metawrap.training.checkpoints import CheckpointFolder, load_checkpoint, write_atomically
from metawrap.training.run_lock import RunLock

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX")
FLAGS = [
    *("--data", "glyphs", "--image-size", "14", "--backbone", "conv4-strided", "--filters", "4", "--ways", "2"),
    *("--inner-steps", "1", "--epochs", "2", "--iterations", "2", "--batch", "2", "--validation-tasks", "2"),
    *("--test-tasks", "2", "--device", "cpu"),
]


def test_any_flipped_bit_is_seen_and_the_one_before_is_taken(tmp_path):
    folder = CheckpointFolder(tmp_path, keep_best=2, keep_newest=2)
    saved_run(folder, [0.1, 0.2])
    newest = tmp_path / "epoch-0002.pt"
    whole, where = newest.read_bytes(), random.Random(0)
    for _ in range(100):
        place = where.randrange(len(whole))
        newest.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << where.randrange(8)]) + whole[place + 1 :])
        heard = []
        assert folder.newest(heard.append).epoch == 1
        assert len(heard) == 1
        assert "epoch-0002.pt' is damaged: its checksum" in str(heard[0])
    newest.write_bytes(whole)
    assert folder.newest(pytest.fail).epoch == 2


def test_the_checksum_is_that_of_sha256sum_and_torch_reads_the_file_as_it_is(tmp_path):
    folder = CheckpointFolder(tmp_path, keep_best=1, keep_newest=1)
    path = folder.save(checkpoint_after([0.5], value=3.0))
    whole = path.read_bytes()
    archive, _, written = whole.rpartition(b"\nmetawrap-sha256 ")
    summed = subprocess.run(["sha256sum"], input=archive, capture_output=True).stdout.split()[0]
    assert written == summed
    assert torch.equal(torch.load(path, weights_only=True)["learner"]["weight"], torch.full((3,), 3.0))


def test_a_checkpoint_of_an_older_version_which_has_no_checksum_still_loads(tmp_path):
    folder = CheckpointFolder(tmp_path, keep_best=1, keep_newest=1)
    content = {"format": checkpoints.FORMAT, "version": 1, **vars(checkpoint_after([0.5], value=3.0))}
    torch.save(content, tmp_path / "epoch-0001.pt")
    assert torch.equal(folder.load(1).learner["weight"], torch.full((3,), 3.0))


class FullDisk(io.FileIO):
    """Takes so many bytes, then none, as a full disk does."""

    room = 0

    def write(self, content):
        if self.tell() + len(content) > self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(content)


@pytest.mark.parametrize("room", [0, 1, 700, 1500])
def test_a_disk_that_is_full_after_some_bytes_leaves_the_old_checkpoint_and_no_leftover(tmp_path, monkeypatch, room):
    folder = CheckpointFolder(tmp_path, keep_best=2, keep_newest=2)
    folder.save(checkpoint_after([0.5], value=1.0))
    monkeypatch.setattr(FullDisk, "room", room)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "open", lambda path, mode: FullDisk(path, mode.replace("b", "")), raising=False)
        with pytest.raises(CheckpointError, match=r"epoch-0002\.pt' could not be written \(No space left.*free some"):
            folder.save(checkpoint_after([0.5, 0.6]))
    assert [entry.name for entry in tmp_path.iterdir()] == ["epoch-0001.pt"]
    assert torch.equal(folder.newest(pytest.fail).learner["weight"], torch.ones(3))


@posix
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_the_kernels_own_disk_full_does_not_end_the_process_in_the_middle_of_torch_save(tmp_path):
    def save(handle):
        with open("/dev/full", "wb", buffering=0) as full:
            checkpoints._save_with_checksum({"a": torch.zeros(100_000)}, full)

    with pytest.raises(CheckpointError, match="No space left on device"):
        write_atomically(tmp_path / "file", save)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("function", ["open", "fsync", "replace"])
def test_whatever_the_system_refuses_while_saving_the_last_good_checkpoint_stays(tmp_path, monkeypatch, function, code):
    folder = CheckpointFolder(tmp_path, keep_best=2, keep_newest=2)
    folder.save(checkpoint_after([0.5], value=1.0))

    def refuse(*_):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        target = checkpoints if function == "open" else os
        patch.setattr(target, function, refuse, raising=function != "open")
        with pytest.raises(CheckpointError, match=rf"{os.strerror(code)}.*before is whole.*--resume"):
            folder.save(checkpoint_after([0.5, 0.6]))
    assert [entry.name for entry in tmp_path.iterdir()] == ["epoch-0001.pt"]
    assert torch.equal(folder.newest(pytest.fail).learner["weight"], torch.ones(3))


@pytest.mark.sampled(1)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_run_whose_disk_fails_ends_with_one_error_and_goes_on_later(tmp_path, monkeypatch, capsys, code):
    out, real = tmp_path / "run", os.replace

    def refuse(source, target):
        if "epoch-0002" in str(target):
            raise OSError(code, os.strerror(code))
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        assert main(["train", *FLAGS, "--out", str(out)]) == 2
    [error] = [line for line in capsys.readouterr().err.splitlines() if "rror" in line]
    assert error.startswith("Error: ")
    assert os.strerror(code) in error
    assert sorted(entry.name for entry in (out / "checkpoints").iterdir()) == ["epoch-0001.pt"]
    assert not list(out.rglob("*.tmp"))
    assert main(["train", "--out", str(out), "--resume"]) == 0
    assert load_checkpoint(out / "checkpoints" / "epoch-0002.pt").epoch == 2


HOLDS = """
import sys
from pathlib import Path
from metawrap.training.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.take()
print(lock.held, flush=True)
sys.stdin.read()
"""


def holder_of(folder, program):
    environment = os.environ | {"PYTHONPATH": str(Path(metawrap.__file__).parents[1])}
    command = [sys.executable, "-c", program, str(folder)]
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@posix
def test_a_second_run_in_a_folder_refuses_and_names_the_first_and_a_killed_one_blocks_nobody(tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", *FLAGS, "--out", str(out)]) == 0
    capsys.readouterr()
    with holder_of(out, HOLDS) as first:
        assert first.stdout.readline() == "True\n"
        assert main(["train", "--out", str(out), "--resume"]) == 2
        assert f"is in use by another run (pid {first.pid} on " in capsys.readouterr().err
        first.send_signal(signal.SIGKILL)
        first.wait()
        assert main(["train", "--out", str(out), "--resume"]) == 0


FORKS = HOLDS.replace(
    "print(lock.held, flush=True)",
    "import os, time\nchild = os.fork()\nif child == 0:\n    time.sleep(60)\n    os._exit(0)\nprint(child, flush=True)",
)


@pytest.mark.slow
@posix
def test_the_lock_is_not_held_by_a_forked_process_that_outlives_its_parent(tmp_path):
    with holder_of(tmp_path, FORKS) as first:
        child = int(first.stdout.readline())
        try:
            first.kill()
            first.wait()
            os.kill(child, 0)  # The child lives.
            again = RunLock(tmp_path)
            again.take()
            assert again.held
            again.release()
        finally:
            os.kill(child, signal.SIGKILL)


@posix
def test_a_lock_that_is_a_symbolic_link_is_refused_and_its_target_unwritten(tmp_path, capsys):
    (tmp_path / "target").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "target")
    assert main(["train", *FLAGS, "--out", str(tmp_path / "run")]) == 2
    assert ".lock' is a symbolic link, which no run writes. Delete it." in capsys.readouterr().err
    assert (tmp_path / "target").read_text() == "mine"


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOLCK])
def test_a_folder_that_takes_no_lock_goes_unlocked(tmp_path, monkeypatch, code):
    def refuse(self, *_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("filelock.FileLock._acquire", refuse)
    lock = RunLock(tmp_path)
    lock.take()
    assert not lock.held
    lock.release()


@posix
def test_of_two_runs_that_begin_at_once_in_a_new_folder_one_refuses(tmp_path, monkeypatch, capsys):
    from metawrap.training import run

    real, out = run.build_experiment, tmp_path / "run"

    def build_while_another_trains(settings):
        monkeypatch.setattr(run, "build_experiment", real)
        assert main(["train", *FLAGS, "--out", str(out)]) == 0
        return real(settings)

    monkeypatch.setattr(run, "build_experiment", build_while_another_trains)
    assert main(["train", *FLAGS, "--out", str(out)]) == 2
    assert "already has a run" in capsys.readouterr().err


def test_a_clock_that_jumps_changes_no_duration(tmp_path, monkeypatch):
    jumps = iter(range(0, 10**12, 10**7))
    monkeypatch.setattr(time, "time", lambda: 1e9 - next(jumps) if random.random() < 0.5 else 1e9 + next(jumps))
    begun = time.monotonic()
    assert main(["train", *FLAGS, "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    passed = time.monotonic() - begun
    assert 0 < result["seconds"] <= passed
    assert 0 < result["test_seconds"] <= passed
    assert 0 <= result["step_seconds"] <= passed


class Small(torch.nn.Module):
    """Draws random numbers, and has statistics: a second try must not be seen in either."""

    def __init__(self, drop=0.4):
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5), torch.nn.Tanh())
        self.drop, self.head = torch.nn.Dropout(drop), torch.nn.Linear(5, 2)

    def forward(self, x):
        return self.head(self.drop(self.body(x)))


class Remembers(torch.nn.Module):
    """Keeps its calls in a list, which nobody can put back."""

    def __init__(self):
        super().__init__()
        self.linear, self.seen = torch.nn.Linear(3, 2), [0]

    def forward(self, x):
        self.seen[0] += 1
        return self.linear(x) / self.seen[0]


def small_tasks(count):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(count, 6, 3, generator=generator, dtype=torch.float64)
    y = torch.arange(6).remainder(2).expand(count, 6)
    return x, y, x.flip(1) * 0.9, y.flip(1)


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: ..."),
]


def with_room_for(room, error, monkeypatch):
    """From now on more than `room` tasks at once fail, behind the first of them, as they do when memory runs out."""
    real, sizes = executor.chunk_gradient, []

    def chunk_gradient(solver, chunk, *more):
        sizes.append(len(chunk))
        if len(chunk) > room:
            if room:
                real(solver, chunk[:room], *more)  # Draws dropout, and changes statistics.
            raise error
        return real(solver, chunk, *more)

    for module in (executor, parallel):
        monkeypatch.setattr(module, "chunk_gradient", chunk_gradient)
    return sizes


@pytest.mark.sampled(2)
@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["gpu", "cpu"])
@pytest.mark.parametrize("engine", ["functional", "higher"])
def test_tasks_that_do_not_fit_are_split_with_the_same_update_and_one_warning(monkeypatch, error, engine):
    def learner():
        torch.manual_seed(1)
        options = {"inner_steps": 2, "engine": engine, "tasks_per_backward": 7, "memory": "unrolled"}
        return metawrap.MAMLPlusPlus(Small().double(), **grouped(**options))

    roomy, tight = learner(), learner()
    torch.manual_seed(2)
    for _ in range(2):
        roomy.meta_step(small_tasks(7))
    torch.manual_seed(2)
    sizes = with_room_for(2, error, monkeypatch)
    with pytest.warns(metawrap.MetaWrapWarning) as heard:
        tight.meta_step(small_tasks(7))
    tight.meta_step(small_tasks(7))
    assert [str(each.message).partition(".")[0] for each in heard] == [
        "Out of memory: from now on 4 tasks at a time",
        "Out of memory: from now on 2 tasks at a time",
    ]
    assert sizes == [7, 4, 2, 2, 2, 1, 2, 2, 2, 1]
    same_values(roomy, tight)


def same_values(one, other):
    for name, value in one.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.allclose(value.double(), other.state_dict()[name].double(), rtol=1e-9, atol=1e-12), name


@pytest.mark.sampled(2)
@pytest.mark.parametrize("options", [{}, {"engine": "batched"}, {"workers": 2}, {"tasks_per_backward": 3}], ids=str)
def test_flat_memory_is_taken_where_memory_runs_out_with_the_same_update_and_one_warning(monkeypatch, options):
    def learner():
        torch.manual_seed(1)
        return metawrap.MAMLPlusPlus(Small(drop=0).double(), inner_steps=3, **grouped(**options))

    roomy, tight = learner(), learner()
    for _ in range(3):
        roomy.meta_step(small_tasks(4))
    tight.meta_step(small_tasks(4))
    real = task_solver.unrolled

    def without_room(loop, start, weights):
        if loop.differentiable and len(weights) > 2:
            real(loop, start, weights)  # Changes statistics.
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(loop, start, weights)

    monkeypatch.setattr(task_solver, "unrolled", without_room)
    with pytest.warns(metawrap.MetaWrapWarning, match="graph of one inner step at a time") as heard:
        tight.meta_step(small_tasks(4))
    assert len(heard) == 1
    tight.meta_step(small_tasks(4))
    assert "as memory ran out" in tight.describe().speed
    same_values(roomy, tight)
    resumed = learner()
    resumed.load_state_dict(tight.state_dict())
    resumed.meta_step(small_tasks(4))
    assert resumed.executor.memory == "flat"


def test_flat_memory_is_not_taken_where_the_model_cannot_repeat_a_pass(monkeypatch):
    learner = metawrap.MAMLPlusPlus(Remembers().double(), inner_steps=2, execution={"workers": 1})
    learner.meta_step(small_tasks(2))
    with_room_for(0, OUT_OF_MEMORY[0], monkeypatch)
    with pytest.raises(metawrap.OutOfMemoryError, match=r'Use execution={"memory": "flat"}'):
        learner.meta_step(small_tasks(2))
    assert learner.executor.memory == "unrolled"


@pytest.mark.filterwarnings("ignore:Out of memory")
@pytest.mark.parametrize(
    ("execution", "words"),
    [
        ({"memory": "unrolled"}, r'1 task at a time \(CUDA.*Use execution={"memory": "flat"}.*fewer inner_st'),
        ({}, r"1 task and the graph of one inner step at a time \(CUDA.*Use fewer or smaller images"),
    ],
)
def test_one_task_that_does_not_fit_is_an_error_that_names_what_takes_less_and_changes_nothing(
    monkeypatch, execution, words
):
    learner = metawrap.MAMLPlusPlus(Small().double(), inner_steps=2, execution=execution)
    before = {name: str(value) for name, value in learner.state_dict().items()}
    with_room_for(0, OUT_OF_MEMORY[0], monkeypatch)
    with pytest.raises(metawrap.OutOfMemoryError, match=words):
        learner.meta_step(small_tasks(2))
    assert {name: str(value) for name, value in learner.state_dict().items()} == before
    assert learner.iteration == 0


def test_another_failure_is_not_taken_for_a_lack_of_memory(monkeypatch):
    learner = metawrap.MAMLPlusPlus(Small().double(), inner_steps=2, execution={"tasks_per_backward": 2})
    sizes = with_room_for(0, RuntimeError("shapes do not fit"), monkeypatch)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        learner.meta_step(small_tasks(2))
    assert sizes == [2]


@posix
def test_the_words_of_torchs_own_cpu_allocator_are_known(monkeypatch):
    from metawrap.execution.out_of_memory import is_out_of_memory

    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 58, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may mount")
def test_a_real_full_and_a_real_read_only_file_system(tmp_path):
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        folder = CheckpointFolder(place, keep_best=9, keep_newest=9)
        folder.save(checkpoint_after([0.5], value=1.0))
        with open(place / "filler", "wb", buffering=0) as filler:
            filler.truncate(0)
            for _ in range(9):
                filler.write(b"x" * 6000)
        with pytest.raises(CheckpointError, match="No space left on device"):
            [folder.save(checkpoint_after([0.5] * epoch, value=1.0)) for epoch in range(2, 40)]
        assert not list(place.glob(".*.tmp"))
        assert torch.equal(folder.newest(pytest.fail).learner["weight"], torch.ones(3))
        (place / "filler").unlink()
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        with pytest.raises(CheckpointError, match=r"Read-only file system.*make the folder writable"):
            folder.save(checkpoint_after([0.5] * 50))
        assert torch.equal(folder.newest(pytest.fail).learner["weight"], torch.ones(3))
    finally:
        subprocess.run(["umount", str(place)], check=True)
