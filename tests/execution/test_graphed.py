"""Recorded and replayed meta-gradients. On a CPU the recorder is one that runs the work again, into the same memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from engine_cases import CASES, POLICIES
from face import assert_same_values, build, tensors, unchanged
from models import Conv4, NormedMlp, class_tasks, seeded
from stateful import Late
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from metawrap import ArgumentError, MAMLPlusPlus, Task, TaskBatch, UnsupportedModuleError
from metawrap.execution import cuda_graphs as graphed
from metawrap.results import TaskOutcome

PLAIN: dict[str, dict[str, Any]] = {
    "functional": {"engine": "functional"},
    "batched": {"engine": "batched"},
    "multi-step loss": {"engine": "batched", "multi_step_loss": True, "msl_epochs": 3, "iterations_per_epoch": 2},
    "order changes": {
        "engine": "functional",
        "first_order_epochs": 1,
        "iterations_per_epoch": 2,
        "multi_step_loss": False,
    },
    "zero heads": {"engine": "functional", "head_init": "zeros", "head": "linear"},
    "prototypes": {"engine": "functional", "head_init": "prototypes", "head": "linear"},
}


class Recorder:
    """Runs the work again at every replay, and writes the outcome where the first one lies."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0
        self.wrong = False

    def __call__(self, run: Callable[[], Any]) -> Any:
        self.recorded += 1
        first = run()

        def replay() -> None:
            self.replayed += 1
            solved, gradients = run()
            with torch.no_grad():
                for mine, new in zip(first[1], gradients, strict=True):
                    if mine is not None:
                        mine.copy_(new * 2 if self.wrong else new)
                for mine, new in zip(first[0], solved, strict=True):
                    for old, other in zip(parts(mine), parts(new), strict=True):
                        old.copy_(other)

        return replay, first


def parts(solved: Any) -> list[Tensor]:
    moments = [value for m in solved.moments for value in (m.mean, m.variance)]
    return [solved.loss, solved.step_losses, solved.prediction, solved.accuracy, *moments]


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    made = Recorder()
    monkeypatch.setitem(graphed.RECORDERS, "cpu", made)
    return made


def batches(count: int) -> list[Any]:
    return [class_tasks((1, 16, 16), seed=seed) for seed in range(count)]


def both(make: Any, **options: Any) -> list[Any]:
    """A plain learner and one that records."""
    return [build(seeded(make), cuda_graphs=graphs, **options) for graphs in (False, True)]


@pytest.mark.sampled(1)
@pytest.mark.parametrize("way", PLAIN)
def test_training_by_replays_is_training(way: str, recorder: Recorder) -> None:
    plain, replaying = both(Conv4, **PLAIN[way])
    for batch in batches(6):
        one, other = plain.meta_step(batch), replaying.meta_step(batch)
        assert_same_values([other.step_losses.nan_to_num()], [one.step_losses.nan_to_num()])
        assert (other.loss, other.accuracy) == pytest.approx((one.loss, one.accuracy), rel=1e-9)
    assert_same_values(tensors(replaying), tensors(plain))
    assert recorder.recorded == {"multi-step loss": 3, "order changes": 2}.get(way, 1)
    assert recorder.replayed == 6 + recorder.recorded


@pytest.mark.parametrize("norm", POLICIES)
def test_replays_store_the_statistics_of_every_policy(norm: str, recorder: Recorder) -> None:
    plain, replaying = both(NormedMlp, engine="functional", norm=norm)
    for batch in [class_tasks((4,), seed=seed) for seed in range(3)]:
        plain.meta_step(batch)
        replaying.meta_step(batch)
    assert recorder.recorded == 1
    assert_same_values(tensors(replaying), tensors(plain))


def test_a_step_keeps_what_it_returned_when_the_next_one_is_replayed(recorder: Recorder) -> None:
    learner = build(seeded(Conv4), cuda_graphs=True)
    first = learner.meta_step(batches(1)[0])
    kept = [first.step_losses, *[p.grad for p in learner.parameters() if p.grad is not None]]
    before = [tensor.clone() for tensor in kept]
    learner.meta_step(batches(2)[1])
    assert_same_values(kept, before, tolerance=0)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a plain attribute": lambda model: setattr(model, "scale", 2.0),
    "a frozen parameter": lambda model: next(model.parameters()).requires_grad_(False),
    "a replaced submodule": lambda model: setattr(model.conv0, "pool", nn.AvgPool2d(2)),
    "a submodule's mode": lambda model: model.conv0.norm.eval(),
    "values in new memory": lambda model: setattr(
        next(model.parameters()), "data", next(model.parameters()).data.clone()
    ),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_is_recorded_anew(change: str, recorder: Recorder) -> None:
    plain, replaying = both(Scaled, engine="functional")
    for step, batch in enumerate(batches(3)):
        for learner in (plain, replaying):
            if step == 1:
                with torch.no_grad():
                    CHANGES[change](learner.model)
            learner.meta_step(batch)
    assert_same_values(tensors(replaying), tensors(plain))
    assert recorder.recorded == 2


class Scaled(Conv4):
    scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


def test_batches_of_other_shapes_are_recorded_beside_each_other(recorder: Recorder) -> None:
    plain, replaying = both(NormedMlp, engine="functional")
    for tasks in (2, 3, 2, 3):
        for learner in (plain, replaying):
            learner.meta_step(class_tasks((4,), tasks=tasks))
    assert_same_values(tensors(replaying), tensors(plain))
    assert recorder.recorded == 2


def test_a_replay_that_is_wrong_is_refused(recorder: Recorder) -> None:
    recorder.wrong = True
    learner = build(seeded(NormedMlp), cuda_graphs=True, engine="functional")
    refused = pytest.raises(UnsupportedModuleError, match=r"cuda_graphs=True.*not the gradient")
    with unchanged(learner), refused:
        learner.meta_step(class_tasks((4,)))
    with pytest.raises(UnsupportedModuleError, match="cuda_graphs=True"):
        learner.meta_step(class_tasks((4,)))


@pytest.mark.parametrize("now", ["drops", "counts", "averages"])
def test_a_model_with_state_is_refused_by_name(now: str, recorder: Recorder) -> None:
    learner = build(seeded(partial(Late, now)), cuda_graphs=True, engine="functional")
    with pytest.raises(UnsupportedModuleError, match=r"cuda_graphs=True cannot carry this model: (it|forward)"):
        learner.meta_step(class_tasks((4,)))
    assert recorder.recorded == 0


def test_a_learner_on_the_cpu_is_told_where_to_go() -> None:
    with pytest.raises(ArgumentError, match=r"cuda_graphs: expected the learner on a GPU.*learner\.to"):
        build(seeded(NormedMlp), cuda_graphs=True).meta_step(class_tasks((4,)))
    with pytest.raises(ArgumentError, match='memory: expected "unrolled" with cuda_graphs=True, but got "flat"'):
        build(seeded(NormedMlp), cuda_graphs=True, memory="flat")
    with pytest.raises(ArgumentError, match="cuda_graphs: expected True or False"):
        MAMLPlusPlus(seeded(NormedMlp), execution={"cuda_graphs": "yes"})


def test_a_recorded_run_takes_over_no_autocast_of_an_earlier_run(recorder: Recorder) -> None:
    weight, casts = nn.Parameter(torch.ones(3, 4)), []

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            casts[-1] += func is torch.ops.aten._to_copy.default and args[0].shape == weight.shape
            return func(*args, **(kwargs or {}))

    def run(batch: Any) -> Any:
        casts.append(0)
        with Casts():
            made = nn.functional.linear(batch[0].support_x, weight).detach()
        return [TaskOutcome(loss=made.sum(), step_losses=made[0], prediction=made, accuracy=y.sum())], [made]

    x, y = torch.ones(2, 4), torch.zeros(2)
    with torch.autocast("cpu", torch.bfloat16):
        graphed.Recordings().run(run, TaskBatch((Task(x, y, x, y),)), "form")
    assert casts[:2] == [1, 1], "the plain run, and the recorded one"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("engine", ["functional", "batched"])
def test_replays_on_a_gpu_train_as_the_plain_run(engine: str) -> None:
    batch = tuple(t.cuda() for t in CASES["conv4"].batch())
    plain, replaying = (build(seeded(Conv4).cuda(), cuda_graphs=g, engine=engine) for g in (False, True))
    for _ in range(4):
        plain.meta_step(batch)
        replaying.meta_step(batch)
    assert_same_values([t.cpu() for t in tensors(replaying)], [t.cpu() for t in tensors(plain)])
