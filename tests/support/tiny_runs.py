"""Small runs for tests: their settings, their files, and the comparison of two runs."""

import json

import torch
from face import MEASURED

from metawrap.cli import main
from metawrap.training.checkpoints import Checkpoint, load_checkpoint
from metawrap.training.run_settings import RunSettings

TINY = RunSettings(
    image_size=16,
    filters=4,
    inner_steps=2,
    epochs=3,
    iterations_per_epoch=2,
    tasks_per_batch=2,
    validation_tasks=4,
    test_tasks=4,
    device="cpu",
)

# Dropout draws from torch's global generator, and batch norm has buffers: both must survive a kill. The module can also
# kill its own process at the n-th call of a function of `os`, to hit the moments that a clock would miss.
NETWORK = """
import os, signal
from torch import nn

def build(ways):
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.3), nn.Linear(12, ways)
    )

def kill_at(name, count, after):
    real = getattr(os, name)
    def counting(*args, **keywords):
        counting.calls += 1
        if counting.calls == count and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args, **keywords)
        if counting.calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    counting.calls = 0
    setattr(os, name, counting)

if "KILL_AT" in os.environ:
    name, count, when = os.environ["KILL_AT"].split(":")
    kill_at(name, int(count), when == "after")
"""


def refusal(capsys, arguments):
    """The one line that a refused command prints, with exit code 2."""
    assert main(list(map(str, arguments))) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    [line] = printed.err.strip().splitlines()
    assert line.startswith("Error: ")
    return line.removeprefix("Error: ")


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def log_of(folder):
    return lines_of(folder / "log.jsonl")


def without_time(records):
    return [record | dict.fromkeys(MEASURED) for record in records]


def assert_same(left, right):
    """Equal bits, in any nesting."""
    assert type(left) is type(right)
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert list(left) == list(right)
        for name in left:
            assert_same(left[name], right[name])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    else:
        assert left == right


def assert_same_checkpoint(left, right):
    for part in ("epoch", "settings", "learner", "optimizer", "scheduler", "rng"):
        assert_same(getattr(left, part), getattr(right, part))


def assert_ended_alike(reference, resumed):
    """Two finished runs have the same files and bits, but for measured times."""
    kept = [sorted(path.name for path in (folder / "checkpoints").iterdir()) for folder in (reference, resumed)]
    assert kept[0] == kept[1]
    assert_same_checkpoint(*(load_checkpoint(folder / "checkpoints" / kept[0][-1]) for folder in (reference, resumed)))
    assert without_time(log_of(resumed)) == without_time(log_of(reference))
    for name in ("insight.jsonl", "final_insight.json"):
        assert (resumed / name).read_text() == (reference / name).read_text()
    results = [json.loads((folder / "result.json").read_text()) for folder in (reference, resumed)]
    assert results[0]["test"] == results[1]["test"]
    assert not list(resumed.rglob("*.tmp"))


def interrupt_call(monkeypatch, owner, name, call):
    """Lets the `call`-th call of a function raise KeyboardInterrupt, as Ctrl-C does."""
    real, calls = getattr(owner, name), []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(owner, name, interrupted)


def history_of(accuracies):
    return [{"epoch": epoch, "validation_accuracy": value} for epoch, value in enumerate(accuracies, start=1)]


def checkpoint_after(accuracies, value=0.0):
    return Checkpoint(
        settings={"seed": 0, "options": {"msl_epochs": 3}},
        learner={"weight": torch.full((3,), value), "_extra_state": {"epoch": len(accuracies)}},
        optimizer={"state": {0: {"step": torch.tensor(4.0)}}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999)}]},
        scheduler=None,
        rng={"cpu": torch.get_rng_state(), "cuda": []},
        history=history_of(accuracies),
        seconds=1.5,
    )


def saved_run(folder, accuracies):
    for epoch in range(1, len(accuracies) + 1):
        folder.save(checkpoint_after(accuracies[:epoch], value=epoch))
