"""Under Lightning and under Accelerate a learner trains as it does by itself, and what it hands out is exported."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from example_modules import load
from face import assert_same_state, assert_same_values
from keywords import grouped
from models import Conv4
from torch import Tensor, nn

from metawrap import MAMLPlusPlus, TaskBatch

EPOCHS, ITERATIONS = 3, 2


class Small(nn.Module):
    """No bias before the norm: its gradient would be zero but for rounding, of which Adam makes whole steps."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6, bias=False)
        self.norm = nn.BatchNorm1d(6)
        self.linear = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.tanh(self.norm(self.first(x))))


class Noise:
    """A sampler: batch number i is a function of i alone."""

    def batch(self, index: int) -> TaskBatch:
        generator = torch.Generator().manual_seed(index)
        labels = torch.arange(3).repeat(2, 2)
        x = torch.randn(2, 2, 6, 4, generator=generator, dtype=torch.float64) + labels[0, :, None]
        return TaskBatch.stacked(x[0], labels, x[1], labels)

    def batches(self, count: int, start: int = 0) -> Any:
        return (self.batch(index) for index in range(start, start + count))

    def __getitem__(self, place: slice) -> list[TaskBatch]:
        return list(self.batches(place.stop - place.start, place.start))


def make_learner() -> MAMLPlusPlus:
    """All that depends on the epoch moves within three: step weights, derivative order and the outer rate."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Small().double()
    schedules = {"msl_epochs": 2, "first_order_epochs": 1, "epochs": EPOCHS, "iterations_per_epoch": ITERATIONS}
    return MAMLPlusPlus(model, inner_steps=2, meta_lr=0.01, **grouped(**schedules))


def trained_alone(epochs: int = EPOCHS) -> MAMLPlusPlus:
    learner = make_learner()
    for task_batch in Noise().batches(epochs * ITERATIONS):
        learner.meta_step(task_batch)
    return learner


def assert_same_learner(found: Any, expected: Any) -> None:
    state, wanted = found.state_dict(), expected.state_dict()
    names = [name for name, value in wanted.items() if isinstance(value, Tensor)]
    moved = [name for name in names if not torch.equal(wanted[name], make_learner().state_dict()[name])]
    assert len(moved) > len(names) // 2
    assert_same_values([state[name] for name in names], [wanted[name] for name in names])


def fit(monkeypatch: pytest.MonkeyPatch, epochs: int, folder: Path, resume: Path | None = None) -> Any:
    example = load("examples/lightning_module.py", monkeypatch)
    module = example.MetaLearning(make_learner(), Noise(), Noise(), ITERATIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's own: about workers, and torch names that it should leave
        trainer = example.trainer(epochs, accelerator="cpu", enable_progress_bar=False, default_root_dir=folder)
        trainer.fit(module, ckpt_path=resume, weights_only=True if resume else None)
        trainer.save_checkpoint(folder / "last.ckpt")
    return module.learner


def test_lightning_ends_with_the_weights_of_meta_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    assert_same_learner(fit(monkeypatch, EPOCHS, tmp_path), trained_alone())


def test_a_lightning_checkpoint_resumes_to_the_same_bits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    whole = fit(monkeypatch, EPOCHS, tmp_path)
    fit(monkeypatch, 1, tmp_path)
    resumed = fit(monkeypatch, EPOCHS, tmp_path, resume=tmp_path / "last.ckpt")
    assert_same_state(resumed.state_dict(), whole.state_dict())
    assert_same_state(resumed.optimizer.state_dict(), whole.optimizer.state_dict())


def test_accelerate_ends_with_the_weights_of_meta_step(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    example = load("examples/accelerate_loop.py", monkeypatch)
    accelerator = example.make_accelerator(cpu=True)
    learner = make_learner()
    prepared, optimizer = accelerator.prepare(learner, learner.optimizer)
    for epoch in range(EPOCHS):
        batches = Noise().batches(ITERATIONS, start=epoch * ITERATIONS)
        example.train_epoch(accelerator, prepared, optimizer, epoch, batches)
    assert_same_learner(accelerator.unwrap_model(prepared), trained_alone())


def test_accelerates_gradients_are_those_of_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    accelerator = load("examples/accelerate_loop.py", monkeypatch).make_accelerator(cpu=True)
    plain, learner = make_learner(), make_learner()
    prepared, _ = accelerator.prepare(learner, learner.optimizer)
    accelerator.backward(prepared(Noise().batch(0)).loss)
    plain(Noise().batch(0)).loss.backward()
    pairs = list(zip(learner.parameters(), plain.parameters(), strict=True))
    trained = [(one, other) for one, other in pairs if other.grad is not None]
    assert len(trained) > len(pairs) // 2
    assert_same_values([one.grad for one, _ in trained], [other.grad for _, other in trained])  # type: ignore[misc]


def test_the_examples_with_a_loop_of_their_own_run(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    learner = load("examples/accelerate_loop.py", monkeypatch).main(epochs=1, iterations=1, filters=4, tasks_to_test=2)
    assert learner.epoch == 0
    pytest.importorskip("lightning")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = load("examples/lightning_module.py", monkeypatch).main(
            epochs=1, iterations=1, filters=4, tasks_to_test=2
        )
    assert type(adapted).__name__ == "Conv4"


def test_the_exported_program_predicts_as_the_adapted_module_for_any_number(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    example = load("examples/export_adapted.py", monkeypatch)
    adapted, target_x = example.main(meta_steps=1, out=str(tmp_path / "adapted.pt2"))
    loaded = torch.export.load(tmp_path / "adapted.pt2").module()
    for count in (1, 2, 25):
        torch.testing.assert_close(loaded(target_x[:count]), adapted(target_x[:count]))


def test_a_float64_program_is_the_adapted_module_to_the_last_digits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Conv4(blocks=2, size=8).double()
    learner = MAMLPlusPlus(copy.deepcopy(model), inner_steps=2, norm="support")
    x = torch.randn(6, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    adapted = learner.adapt(x, torch.arange(3).repeat(2))
    load("examples/export_adapted.py", monkeypatch).export(adapted, x, str(tmp_path / "adapted.pt2"))
    found = torch.export.load(tmp_path / "adapted.pt2").module()(2 * x)
    assert_same_values([found], [adapted(2 * x)])
