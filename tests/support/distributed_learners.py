"""Networks, shares of tasks and learners for the two processes of distributed_cases.py."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from face import MEASURED, build, gradients_of, snapshot, statistics_of
from models import NormedMlp, class_tasks, seeded
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from metawrap import Task
from metawrap.training.checkpoints import load_checkpoint
from metawrap.training.run_settings import RunSettings

TASKS = [Task(*parts, id=number) for number, parts in enumerate(zip(*class_tasks((4,), tasks=4), strict=True))]
SHARES = {"equal": (TASKS[:2], TASKS[2:]), "unequal": (TASKS[:1], TASKS[1:])}


class PartlyUsed(NormedMlp):
    """`never` is in no graph; `some` only in that of the last task, whose first input is marked."""

    def __init__(self) -> None:
        super().__init__()
        self.never = nn.Linear(2, 2)
        self.some = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        output = super().forward(x)
        return output * self.some if float(x[0, 0]) > 50 else output


class Counting(NormedMlp):
    """Its forward edits a buffer, as a running statistic of one's own does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += x.detach().sum()
        return super().forward(x)


class SparseEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4, sparse=True)
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.table(x.abs().long().clamp(max=8)).mean(1))


class TwoPrecisions(NormedMlp):
    """A parameter in single precision among double ones."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def double(self) -> nn.Module:
        super().double()
        self.scale.data = self.scale.data.float()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class Float64Net(nn.Module):
    """In double precision inside, so that two worlds can be compared to 1e-9. Its norm stands behind an activation:
    what shifts the input of a norm has a gradient of zero up to rounding, and Adam makes steps of that."""

    def __init__(self, ways: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.BatchNorm1d(8), nn.Dropout(dropout), nn.Linear(8, ways)
        ).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.double())


def plain_net(ways: int) -> nn.Module:
    return Float64Net(ways)


def dropout_net(ways: int) -> nn.Module:
    return Float64Net(ways, 0.3)


RUN = RunSettings(
    model="distributed_learners:plain_net",
    image_size=8,
    inner_steps=2,
    targets=2,
    epochs=3,
    ensemble=2,
    iterations_per_epoch=3,
    tasks_per_batch=3,
    validation_tasks=4,
    test_tasks=4,
    device="cpu",
)
DROPOUT_RUN = replace(RUN, model="distributed_learners:dropout_net")


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def fresh(model: type[nn.Module] = NormedMlp, seed: int = 0, **options: Any) -> Any:
    return build(seeded(model, seed), **{"optimizer": sgd, "cosine_annealing": None} | options)


def state_of(learner: Any) -> dict[str, Any]:
    return {
        "gradients": gradients_of(learner),
        "statistics": statistics_of(learner),
        "state": snapshot(learner.state_dict()),
    }


def stepped(learner: Any, tasks: Any) -> dict[str, Any]:
    m = learner.meta_step(tasks)
    metrics = {"loss": m.loss, "accuracy": m.accuracy, "gradient_norm": m.gradient_norm, "skipped": m.skipped}
    return metrics | {"step_losses": m.step_losses} | state_of(learner)


def in_ddp(learner: Any, **options: Any) -> DistributedDataParallel:
    # The newer name of broadcast_buffers.
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return DistributedDataParallel(learner, **{name: False}, **options)


def backward(ddp: Any, learner: Any, tasks: Any) -> dict[str, Any]:
    learner.zero_grad()
    output = ddp(tasks)
    output.loss.backward()
    found = {"loss": float(output.loss.detach()), "accuracy": float(output.accuracy)}
    return found | {"own": len(output.predictions)} | state_of(learner)


def failure(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def marked(tasks: list[Task]) -> list[Task]:
    """The last task, marked in every part's first input, for PartlyUsed."""

    def mark(x: Tensor) -> Tensor:
        x = x.clone()
        x[0, 0] = 100
        return x

    last = tasks[-1]
    return [*tasks[:-1], replace(last, support_x=mark(last.support_x), target_x=mark(last.target_x))]


def as_after(run: Path, epoch: int, copy: Path) -> None:
    """The run as it was when that epoch ended."""
    (copy / "checkpoints").mkdir(parents=True)
    for name in ("run.json", *(f"checkpoints/epoch-{number + 1:04d}.pt" for number in range(epoch))):
        shutil.copy(run / name, copy / name)


def assert_same_run(one: Path, other: Path, tolerance: float) -> None:
    """The same weights, statistics, optimizer state and log, but for the time it took."""
    first, second = (load_checkpoint(path / "checkpoints" / "epoch-0003.pt") for path in (one, other))
    for found, wanted in ((first.learner, second.learner), *zip(_moments(first), _moments(second), strict=True)):
        for name, value in wanted.items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance)
    assert first.learner["_extra_state"] == second.learner["_extra_state"] == {"iteration": 9}
    for record, reference in zip(_log(one), _log(other), strict=True):
        assert record == pytest.approx(reference, rel=max(tolerance, 1e-12), abs=1e-6)


def _moments(checkpoint: Any) -> list[dict[str, Any]]:
    return list(checkpoint.optimizer["state"].values())


def _log(run: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name not in MEASURED} for record in records]
