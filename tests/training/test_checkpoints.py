import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_runs import checkpoint_after, history_of, saved_run

from metawrap.errors import CheckpointError
from metawrap.training.checkpoints import CheckpointFolder, best_epochs, load_checkpoint, write_atomically


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    folder = CheckpointFolder(tmp_path / "checkpoints", keep_best=1, keep_newest=1)
    saved = checkpoint_after([0.5], value=2.0)
    folder.save(saved)
    loaded = folder.load(1)
    assert torch.equal(loaded.learner["weight"], torch.full((3,), 2.0))
    assert torch.equal(loaded.rng["cpu"], saved.rng["cpu"])
    assert (loaded.settings, loaded.history, loaded.seconds) == (saved.settings, saved.history, 1.5)
    assert loaded.optimizer["param_groups"] == saved.optimizer["param_groups"]
    assert loaded.epoch == 1


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_crash_before_the_rename_leaves_the_old_checkpoint_loadable(tmp_path, monkeypatch, moment):
    folder = CheckpointFolder(tmp_path, keep_best=1, keep_newest=2)
    folder.save(checkpoint_after([0.5], value=1.0))

    def crash(*_):
        raise OSError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(os, moment, crash)
        with pytest.raises(CheckpointError, match="power cut"):
            folder.save(checkpoint_after([0.5], value=9.0))
    assert torch.equal(folder.load(1).learner["weight"], torch.ones(3))
    assert [entry.name for entry in tmp_path.iterdir()] == ["epoch-0001.pt"]


def test_a_process_that_dies_while_writing_leaves_the_old_file_and_its_leftover_is_cleaned_up(tmp_path):
    folder = CheckpointFolder(tmp_path, keep_best=1, keep_newest=1)
    path = folder.save(checkpoint_after([0.5], value=1.0))
    before = path.read_bytes()
    program = (
        "import os, sys; from pathlib import Path; from metawrap.training.checkpoints import write_atomically\n"
        "def half(handle): handle.write(b'half'); handle.flush(); os._exit(9)\n"
        "write_atomically(Path(sys.argv[1]), half)"
    )
    assert subprocess.run([sys.executable, "-c", program, str(path)]).returncode == 9
    assert path.read_bytes() == before
    assert list(tmp_path.glob(".*.tmp"))
    folder.save(checkpoint_after([0.5, 0.6]))
    assert not list(tmp_path.glob(".*.tmp"))


def test_content_reaches_the_disk_before_its_name_and_the_name_before_the_return(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (calls.append(name), real(*args))[1])
    write_atomically(tmp_path / "file", lambda handle: handle.write(b"x"))
    assert calls == ["fsync", "replace", "fsync"]
    assert (tmp_path / "file").read_bytes() == b"x"


@pytest.fixture
def listens_to_ctrl_c():
    # In a shell's background job, as CI may be, Ctrl-C is ignored from the start.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
@pytest.mark.usefixtures("listens_to_ctrl_c")
def test_an_interrupt_while_saving_waits_until_the_file_is_whole(tmp_path):
    class Interrupts:
        def __reduce__(self):
            signal.raise_signal(signal.SIGINT)
            return (dict, ())

    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "file.pt", lambda handle: torch.save({"a": Interrupts()}, handle))
    assert torch.load(tmp_path / "file.pt", weights_only=False) == {"a": {}}
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


@pytest.mark.parametrize(
    ("accuracies", "kept"),
    [
        ([0.1, 0.2, 0.3, 0.4, 0.5], [4, 5]),
        ([0.9, 0.8, 0.1, 0.1, 0.1], [1, 2, 5]),
        ([0.5, 0.5, 0.5, 0.5, 0.5], [1, 2, 5]),
        ([0.2, 0.9, 0.3, 0.9, 0.1], [2, 4, 5]),
        ([0.7], [1]),
    ],
)
def test_the_best_and_the_newest_are_kept_and_of_equals_the_earliest(tmp_path, accuracies, kept):
    folder = CheckpointFolder(tmp_path, keep_best=2, keep_newest=1)
    saved_run(folder, accuracies)
    assert folder.epochs() == kept


def test_best_epochs_are_ranked_and_count_from_one():
    assert best_epochs(history_of([0.2, 0.9, 0.3, 0.9]), 3) == [2, 4, 3]
    assert best_epochs([], 3) == []


def test_old_checkpoints_go_only_after_the_new_one_is_in_place(tmp_path, monkeypatch):
    folder = CheckpointFolder(tmp_path, keep_best=1, keep_newest=1)
    folder.save(checkpoint_after([0.1]))
    real, present = Path.unlink, []
    monkeypatch.setattr(
        Path, "unlink", lambda self, **kw: (present.append((self.name, folder.epochs())), real(self, **kw))[1]
    )
    folder.save(checkpoint_after([0.1, 0.2]))
    assert ("epoch-0001.pt", [1, 2]) in present
    assert folder.epochs() == [2]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1, 2], "not a metawrap checkpoint"),
        ({"weight": torch.ones(1)}, "not a metawrap checkpoint"),
        ({"format": "metawrap-checkpoint", "version": 99}, "version 99.*reads version 1"),
        ({"format": "metawrap-checkpoint", "version": 1, "history": []}, "lacks learner, optimizer"),
    ],
)
def test_other_files_are_named_for_what_they_are(tmp_path, content, words):
    path = tmp_path / "file.pt"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(path)


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint '.*epoch-0003\.pt'"):
        CheckpointFolder(tmp_path, 1, 1).load(3)


@pytest.mark.parametrize("length", [0, 1, 100, 0.5, 0.95, 0.99])
def test_a_torn_newest_checkpoint_is_skipped_for_the_one_before(tmp_path, length):
    folder = CheckpointFolder(tmp_path, keep_best=2, keep_newest=2)
    saved_run(folder, [0.1, 0.2])
    newest = tmp_path / "epoch-0002.pt"
    whole = newest.read_bytes()
    newest.write_bytes(whole[: length if isinstance(length, int) else int(length * len(whole))])
    skipped = []
    found = folder.newest(skipped.append)
    assert found.epoch == 1
    assert len(skipped) == 1
    assert "epoch-0002.pt" in str(skipped[0])


def test_a_folder_where_nothing_can_be_read_is_an_error_and_an_empty_one_is_not(tmp_path):
    folder = CheckpointFolder(tmp_path / "checkpoints", 1, 1)
    assert folder.newest(lambda error: None) is None
    folder.path.mkdir()
    (folder.path / "epoch-0001.pt").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"None of the 1 checkpoints.*--out"):
        folder.newest(lambda error: None)
