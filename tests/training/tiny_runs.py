"""Small runs for tests: their settings, their files, and the comparison of two runs."""

import json

import torch
from face import MEASURED

from metawrap.cli import main
from metawrap.training.checkpoints import load_checkpoint
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
