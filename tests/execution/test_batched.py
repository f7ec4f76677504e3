"""engine="batched": all tasks at once give what the plain float64 loop gives one by one, or a refusal that says why."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from batched_learners import THREE, VECTORS, batched, unequal, weights_of
from face import (
    as_tasks,
    assert_equals_reference,
    assert_same_state,
    assert_same_values,
    assert_step_equals_oracle,
    gradients_of,
    in_dtype,
    reference_for,
    snapshot,
    spied,
)
from models import Conv4, NormedMlp, TwoInputs, class_tasks, hooked_conv4, seeded
from oracle import Reference
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from metawrap import Task
from metawrap.engines import BatchedEngine


class Net(nn.Module):
    """Layers in a row, then a linear head on what is left of each example."""

    def __init__(self, *layers: nn.Module, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.linear = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.layers(x).flatten(1))


class Words(nn.Module):
    """Token numbers, of which 0 is padding, through an embedding and attention."""

    def __init__(self, padding_idx: int | None = 0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 8, padding_idx=padding_idx)
        self.block = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True)
        self.linear = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = (3 * x).long().clamp(0, 6)
        return self.linear(self.block(self.embedding(tokens)).mean(1))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn = kind(3, 4, batch_first=True, bidirectional=True)
        self.linear = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.rnn(x)[0][:, -1])


class Shared(nn.Module):
    """One layer twice, one norm twice, and one parameter under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.norm, self.again = nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Linear(5, 5)
        self.again.weight = self.mix.weight
        self.linear = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.mix(x)))
        return self.linear(torch.tanh(self.again(self.norm(self.mix(x)))))


def image_net(*layers: Callable[[], nn.Module], width: int = 4 * 6 * 6) -> Callable[[], nn.Module]:
    return lambda: Net(nn.Conv2d(1, 4, 3, padding=1), *(layer() for layer in layers), width=width)


IMAGE = (1, 6, 6)
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Conv4": (partial(Conv4, filters=3), (1, 16, 16)),
    "Conv4 with hooks": (partial(hooked_conv4, filters=3), (1, 16, 16)),
    "BatchNorm1d": (NormedMlp, (4,)),
    "BatchNorm2d without affine": (image_net(partial(nn.BatchNorm2d, 4, affine=False), nn.Tanh), IMAGE),
    "BatchNorm2d without statistics": (image_net(partial(nn.BatchNorm2d, 4, track_running_stats=False)), IMAGE),
    "InstanceNorm with affine": (image_net(partial(nn.InstanceNorm2d, 4, affine=True), nn.Tanh), IMAGE),
    "LayerNorm": (image_net(partial(nn.LayerNorm, (4, 6, 6)), nn.Tanh), IMAGE),
    "GroupNorm": (image_net(partial(nn.GroupNorm, 2, 4), nn.Tanh), IMAGE),
    "transposed convolution": (image_net(partial(nn.ConvTranspose2d, 4, 2, 3, stride=2), width=2 * 13 * 13), IMAGE),
    "depthwise convolution": (image_net(partial(nn.Conv2d, 4, 8, 3, groups=4), nn.SiLU, width=8 * 16), IMAGE),
    "embedding with padding, transformer": (Words, (5,)),
    "GRU": (partial(Recurrent, nn.GRU), (4, 3)),
    "LSTM": (partial(Recurrent, nn.LSTM), (4, 3)),
    "shared modules and parameters": (Shared, (5,)),
}


@cache
def case(name: str) -> tuple[Any, Reference]:
    make, shape = NETS[name]
    batch = class_tasks(shape, tasks=3, shots=2, targets=1)
    learner = batched(seeded(make))
    return batch, reference_for(seeded(make), learner, batch, weights_of(learner))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", NETS)
def test_meta_step_and_forward_equal_the_oracle(name: str) -> None:
    batch, reference = case(name)
    step, whole = batched(seeded(NETS[name][0])), batched(seeded(NETS[name][0]))
    metrics, output = step.meta_step(batch), whole(batch)
    output.loss.backward()
    assert_equals_reference(step, metrics.loss, reference)
    assert_equals_reference(whole, output.loss.detach(), reference)
    expected = torch.stack([torch.stack(losses) for losses in reference.step_losses])
    for losses in (metrics.step_losses, output.step_losses):
        torch.testing.assert_close(losses, expected, rtol=1e-9, atol=0)
    assert_same_values(output.predictions, reference.predictions)
    right = [(p.argmax(1) == y).double().mean() for p, y in zip(reference.predictions, batch[3], strict=True)]
    for accuracy in (metrics.accuracy, output.accuracy):
        assert float(accuracy) == pytest.approx(float(torch.stack(right).mean()), abs=1e-6)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("memory", ["unrolled", "flat"])
@pytest.mark.parametrize("second_order", [True, False], ids=["second order", "first order"])
@pytest.mark.parametrize("norm", ["batch", "running", "support"])
def test_every_norm_policy_order_and_memory_equals_the_oracle(norm: str, second_order: bool, memory: str) -> None:
    batch = class_tasks(IMAGE, tasks=2, shots=2)
    make = image_net(partial(nn.BatchNorm2d, 4), partial(nn.LeakyReLU, 0.01), partial(nn.MaxPool2d, 2), width=4 * 9)
    learner = batched(
        seeded(make), norm=norm, memory=memory, inner_steps=3, first_order_epochs=0 if second_order else 99
    )
    assert_step_equals_oracle(learner, seeded(make), batch, weights_of(learner), norm=norm, second_order=second_order)


@pytest.mark.parametrize("options", [{"adapt_norm": True, "preset": "maml"}, {"keep_norm": "norm"}])
def test_adapted_and_kept_norms_equal_the_oracle(options: dict[str, Any]) -> None:
    learner = batched(seeded(NormedMlp), norm="batch", msl_epochs=None, multi_step_loss=False, **options)
    kept = ("norm",) if "keep_norm" in options else ()
    assert_step_equals_oracle(learner, seeded(NormedMlp), THREE, [0.0, 1.0], kept=kept)


def test_tasks_of_unequal_shapes_equal_the_oracle_in_their_order() -> None:
    tasks = unequal()
    step, whole = batched(seeded(NormedMlp)), batched(seeded(NormedMlp))
    assert_step_equals_oracle(step, seeded(NormedMlp), tasks, weights_of(step))
    reference = reference_for(seeded(NormedMlp), whole, tasks, weights_of(whole))
    output = whole(tasks)
    output.loss.backward()
    assert_same_values(output.predictions, reference.predictions)
    assert_equals_reference(whole, output.loss.detach(), reference)


@pytest.mark.parametrize("chunk", [None, 2, 3])
def test_random_heads_of_unequal_tasks_are_those_that_one_after_another_would_draw(chunk: int | None) -> None:
    tasks, found = unequal(), {}
    for engine in ("functional", "batched"):
        options = {"head_init": "random", "head": "linear", "engine": engine, "tasks_per_backward": chunk}
        learner = batched(seeded(NormedMlp), **options)
        torch.manual_seed(3)
        metrics = learner.meta_step(tasks)
        found[engine] = (metrics.step_losses, gradients_of(learner), torch.get_rng_state())
    (losses, gradients, state), (expected, own, behind) = found["batched"], found["functional"]
    torch.testing.assert_close(losses, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(gradients, own, rtol=1e-9, atol=1e-11)
    assert torch.equal(state, behind)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tasks each call of the batched engine runs."""
    return spied(monkeypatch, BatchedEngine, "call", lambda engine, weights, inputs, *_: len(inputs))


@pytest.mark.parametrize(("chunk", "sizes"), [(None, {5}), (5, {5}), (3, {3, 2}), (1, set())])
def test_tasks_per_backward_says_how_many_run_at_once(chunk: int | None, sizes: set[int], at_once: list[int]) -> None:
    batch = class_tasks((4,), tasks=5, shots=2)
    learner = batched(seeded(NormedMlp), tasks_per_backward=chunk)
    learner(as_tasks(batch)[:1])  # The first look is over.
    at_once.clear()
    assert_step_equals_oracle(learner, seeded(NormedMlp), batch, weights_of(learner))
    assert set(at_once) == sizes


@pytest.mark.parametrize("form", [tuple, dict])
def test_inputs_of_several_tensors_equal_the_oracle(form: type) -> None:
    support, target = class_tasks((5,), tasks=2)[:2], class_tasks((5,), tasks=2, seed=1)[2:]
    tasks = []
    for index in range(2):
        (sx, tx), (sy, ty) = (support[0][index], target[0][index]), (support[1][index], target[1][index])
        parts = [{"left": x[:, :2], "right": x[:, 2:]} for x in (sx, tx)]
        x = parts if form is dict else [tuple(part.values()) for part in parts]
        tasks.append((x[0], sy, x[1], ty))
    learner = batched(seeded(TwoInputs))
    assert_step_equals_oracle(learner, seeded(TwoInputs), tasks, weights_of(learner))


def test_a_loss_that_vmap_cannot_run_goes_task_by_task() -> None:
    def loss_fn(prediction: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(prediction, y, torch.tensor([1.0, 2.0, 0.5]).double()) * (1 + int(y[0].item()))

    learner = batched(seeded(NormedMlp), loss_fn=loss_fn)
    assert_step_equals_oracle(learner, seeded(NormedMlp), THREE, weights_of(learner), loss_fn=loss_fn)


def test_a_label_that_the_model_has_no_output_for_is_named_and_nothing_moves() -> None:
    learner = batched(seeded(NormedMlp))
    learner.meta_step(THREE)
    before = snapshot(dict(learner.state_dict()))
    wrong = THREE[3].clone()
    wrong[2, 0] = 7
    with pytest.raises(Exception, match=r"target_y holds labels 0\.\.7, but the model has 3 outputs"):
        learner.meta_step((*THREE[:3], wrong))
    assert_same_state(dict(learner.state_dict()), before)


def test_evaluation_and_adapt_equal_the_oracle() -> None:
    learner = batched(seeded(NormedMlp))
    reference = reference_for(seeded(NormedMlp), learner, VECTORS, [0.0, 1.0], training=False)
    assert_same_values(learner.evaluate(VECTORS, keep_predictions=True).predictions, reference.predictions)
    for task, expected in zip(as_tasks(VECTORS), reference.predictions, strict=True):
        torch.testing.assert_close(learner.adapt(*task[:2])(task[2]).detach(), expected, rtol=1e-9, atol=1e-11)
    assert_same_values(learner.eval()(VECTORS).predictions, reference.predictions)


def test_a_copy_goes_on_as_its_original() -> None:
    learner = batched(seeded(NormedMlp))
    learner.meta_step(VECTORS)
    copied = copy.deepcopy(learner)
    assert copied.meta_step(VECTORS).loss == learner.meta_step(VECTORS).loss
    assert_same_state(gradients_of(copied), gradients_of(learner))
    assert copied.describe().engine == "batched"


def test_a_learner_in_single_precision_is_carried_to_its_precision(at_once: list[int]) -> None:
    batch = class_tasks((1, 16, 16), tasks=2, shots=2)
    make = partial(Conv4, filters=3)
    learner = batched(seeded(make).float())
    reference = reference_for(seeded(make), copy.deepcopy(learner).double(), batch, weights_of(learner))
    metrics = learner.meta_step(in_dtype(batch))
    assert at_once[-1] == 2
    assert all(parameter.dtype == torch.float32 for parameter in learner.parameters())
    assert_equals_reference(learner, metrics.loss, reference, tolerance=1e-3)


class _Reads(TorchDispatchMode):
    """Notes what waits for the device: a tensor's value on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("memory", ["unrolled", "flat"])
def test_nothing_is_read_from_the_device_once_a_task_was_looked_at(memory: str) -> None:
    batch = class_tasks((1, 16, 16), tasks=2, shots=2)
    learner = batched(seeded(partial(Conv4, filters=3)), memory=memory, inner_max_grad_norm=1.0)
    learner(batch)
    with _Reads() as reads:
        learner(batch).loss.backward()
    assert reads.found == []


def assert_looked_at_next(learner: Any, forwards: list[Any]) -> None:
    """The next meta-step calls the model for a look as well, and equals the oracle."""
    forwards.clear()
    assert_step_equals_oracle(learner, seeded(NormedMlp), VECTORS, weights_of(learner))
    with_a_look = len(forwards)
    forwards.clear()
    learner.meta_step(VECTORS)
    assert len(forwards) < with_a_look


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    return spied(monkeypatch, NormedMlp, "forward", lambda *_: None)


def test_a_forward_without_gradients_comes_before_the_look(forwards: list[Any], at_once: list[int]) -> None:
    learner = batched(seeded(NormedMlp))
    with torch.no_grad():
        before = learner(VECTORS)
    reference = reference_for(seeded(NormedMlp), learner, VECTORS, weights_of(learner))
    assert_same_values(before.predictions, reference.predictions)
    assert_looked_at_next(learner, forwards)
    at_once.clear()
    with torch.no_grad():
        learner(VECTORS)
    assert set(at_once) == {2}


def test_a_first_task_without_a_finite_gradient_shows_nothing_and_the_next_is_looked_at(forwards: list[Any]) -> None:
    learner = batched(seeded(NormedMlp))
    assert learner.meta_step((VECTORS[0] * torch.inf, *VECTORS[1:])).skipped
    assert_looked_at_next(learner, forwards)


# --- dropout ---------------------------------------------------------------------------------------------------------


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.linear = nn.Linear(4, 12), nn.Dropout(0.5), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(F.dropout(torch.tanh(self.drop(self.first(x))), 0.2, self.training))


def test_dropout_differs_between_tasks() -> None:
    task = as_tasks(class_tasks((4,), tasks=1, shots=2))[0]
    learner = batched(seeded(Dropping))
    first, second = learner([Task(*task), Task(*task)]).predictions
    assert float((first - second).abs().max()) > 1e-3


@pytest.mark.parametrize("memory", ["unrolled", "flat"])
def test_the_gradient_through_dropout_is_that_of_finite_differences(memory: str) -> None:
    learner = batched(seeded(Dropping), memory=memory, inner_lr=0.05)
    learner(THREE)  # The first look is behind: every later call draws the same.

    def loss() -> Any:
        torch.manual_seed(0)
        return learner(THREE).loss

    loss().backward()
    for value, entry in [(learner.model.first.weight, (3, 1)), (learner.learning_rates["linear.weight"], (1,))]:
        ends = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                value[entry] += step
                ends.append(loss())
                value[entry] -= step
        assert float(value.grad[entry]) == pytest.approx(float(ends[0] - ends[1]) / 2e-5, rel=1e-5)
