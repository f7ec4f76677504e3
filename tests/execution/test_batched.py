"""engine="batched": all tasks at once give what the plain float64 loop gives one by one, or a refusal that says why."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from face import (
    as_tasks,
    assert_equals_reference,
    assert_same_state,
    assert_same_values,
    build,
    fingerprint,
    gradients_of,
    reference_for,
    snapshot,
)
from models import Conv4, Mlp, NormedMlp, TwoInputs, class_tasks, hooked_conv4, seeded
from oracle import Reference, msl_weights
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from metawrap import ArgumentError, MAMLPlusPlus, Task, UnsupportedModuleError
from metawrap.engines import BatchedEngine

STEPS, EPOCH, ANNEAL_EPOCHS = 2, 1, 5


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


def batched(model: nn.Module, **options: Any) -> Any:
    options = {"inner_steps": STEPS, "msl_epochs": ANNEAL_EPOCHS, "engine": "batched"} | options
    learner = build(model, **options)
    learner.epoch = EPOCH
    return learner


def weights_of(learner: Any) -> list[float]:
    return msl_weights(learner.settings.inner_steps, learner.epoch, ANNEAL_EPOCHS)


@cache
def case(name: str) -> tuple[Any, Reference]:
    make, shape = NETS[name]
    batch = class_tasks(shape, tasks=3, shots=2, targets=1)
    learner = batched(seeded(make))
    return batch, reference_for(seeded(make), learner, batch, weights_of(learner))


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


@pytest.mark.parametrize("memory", ["unrolled", "flat"])
@pytest.mark.parametrize("second_order", [True, False], ids=["second order", "first order"])
@pytest.mark.parametrize("norm", ["batch", "running", "support"])
def test_every_norm_policy_order_and_memory_equals_the_oracle(norm: str, second_order: bool, memory: str) -> None:
    batch = class_tasks(IMAGE, tasks=2, shots=2)
    make = image_net(partial(nn.BatchNorm2d, 4), partial(nn.LeakyReLU, 0.01), partial(nn.MaxPool2d, 2), width=4 * 9)
    learner = batched(
        seeded(make), norm=norm, memory=memory, inner_steps=3, first_order_epochs=0 if second_order else 99
    )
    reference = reference_for(seeded(make), learner, batch, weights_of(learner), norm=norm, second_order=second_order)
    assert_equals_reference(learner, learner.meta_step(batch).loss, reference)


@pytest.mark.parametrize("options", [{"adapt_norm": True, "preset": "maml"}, {"keep_norm": "norm"}])
def test_adapted_and_kept_norms_equal_the_oracle(options: dict[str, Any]) -> None:
    batch = class_tasks((4,), tasks=3, shots=2)
    learner = batched(seeded(NormedMlp), msl_epochs=None, multi_step_loss=False, **options)
    kept = ("norm",) if "keep_norm" in options else ()
    reference = reference_for(seeded(NormedMlp), learner, batch, [0.0, 1.0], kept=kept)
    assert_equals_reference(learner, learner.meta_step(batch).loss, reference)


@pytest.mark.parametrize("name", ["Conv4", "depthwise convolution", "transposed convolution"])
def test_unfolded_convolutions_equal_the_oracle(name: str) -> None:
    batch, reference = case(name)
    learner = batched(seeded(NETS[name][0]))
    learner._batched = BatchedEngine(learner.model, learner._buffer_edits, convolution="unfolded")
    assert_equals_reference(learner, learner.meta_step(batch).loss, reference)


@pytest.mark.parametrize("convolution", ["grouped", "unfolded"])
@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2},
        {"stride": (2, 1), "padding": (0, 2)},
        {"dilation": (1, 2), "bias": False},
        {"kernel_size": 3, "padding": "same"},
    ],
    ids=str,
)
def test_both_forms_of_a_convolution_equal_the_convolution_of_each_task(convolution: Any, options: Any) -> None:
    model = nn.Conv2d(2, 3, **{"kernel_size": (3, 2)} | options).double()
    x = torch.randn(4, 2, 2, 6, 5, dtype=torch.float64)
    weights = {name: torch.randn(4, *p.shape, dtype=torch.float64) for name, p in model.named_parameters()}
    found = BatchedEngine(model, convolution=convolution).call(weights, x)
    for task in range(4):
        own = {name: weight[task] for name, weight in weights.items()}
        torch.testing.assert_close(found[task], torch.func.functional_call(model, own, (x[task],)))


@pytest.mark.parametrize("wanted", ["both", "x", "weight"])
@pytest.mark.parametrize(
    "options", [{}, {"stride": (2, 1), "padding": (0, 1), "dilation": (1, 2), "groups": 2}], ids=str
)
def test_a_grouped_convolution_has_the_three_derivatives_of_each_tasks_own(options: Any, wanted: str) -> None:
    model = nn.Conv2d(2, 4, (3, 2), bias=False, **options).double()
    generator = torch.Generator().manual_seed(0)
    xs = torch.randn(3, 2, 2, 6, 5, generator=generator, dtype=torch.float64, requires_grad=wanted != "weight")
    ws = torch.randn(3, *model.weight.shape, generator=generator, dtype=torch.float64, requires_grad=wanted != "x")
    asked = [tensor for tensor in (xs, ws) if tensor.requires_grad]

    def derivatives(output: Tensor) -> list[Tensor]:
        found, value = [], output.pow(4).sum()
        for _ in range(3):
            found += torch.autograd.grad(value, asked, create_graph=True)
            value = sum(g.pow(2).sum() for g in found[-len(asked) :])  # type: ignore[assignment]
        return found

    ours = derivatives(BatchedEngine(model).call({"weight": ws}, xs))
    each = torch.stack([F.conv2d(x, w, **options) for x, w in zip(xs, ws, strict=True)])
    for found, expected in zip(ours, derivatives(each), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


# --- tasks and chunks ------------------------------------------------------------------------------------------------


def unequal() -> list[Any]:
    shapes = [(2, 1), (1, 2), (2, 1), (3, 1), (1, 2)]
    batches = [class_tasks((4,), tasks=1, shots=s, targets=t, seed=i) for i, (s, t) in enumerate(shapes)]
    return [as_tasks(batch)[0] for batch in batches]


def test_tasks_of_unequal_shapes_equal_the_oracle_in_their_order() -> None:
    tasks = unequal()
    for way in ("meta_step", "forward"):
        learner = batched(seeded(NormedMlp))
        reference = reference_for(seeded(NormedMlp), learner, tasks, weights_of(learner))
        if way == "meta_step":
            loss: Any = learner.meta_step(tasks).loss
        else:
            output = learner(tasks)
            output.loss.backward()
            loss = output.loss.detach()
            assert_same_values(output.predictions, reference.predictions)
        assert_equals_reference(learner, loss, reference)


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


@pytest.mark.parametrize(("chunk", "sizes"), [(None, {5}), (5, {5}), (3, {3, 2}), (1, set())])
def test_tasks_per_backward_says_how_many_run_at_once(
    chunk: int | None, sizes: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[int] = set()
    batch = class_tasks((4,), tasks=5, shots=2)
    learner = batched(seeded(NormedMlp), tasks_per_backward=chunk)
    reference = reference_for(seeded(NormedMlp), learner, batch, weights_of(learner))
    learner._prepare(Task(*as_tasks(batch)[0]))
    call = BatchedEngine.call

    def spy(self: Any, weights: Any, inputs: Any, twice: bool) -> Any:
        seen.add(len(inputs))
        return call(self, weights, inputs, twice)

    monkeypatch.setattr(BatchedEngine, "call", spy)
    assert_equals_reference(learner, learner.meta_step(batch).loss, reference)
    assert seen == sizes


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
    reference = reference_for(seeded(TwoInputs), learner, tasks, weights_of(learner))
    assert_equals_reference(learner, learner.meta_step([Task(*task) for task in tasks]).loss, reference)


def test_a_loss_that_vmap_cannot_run_goes_task_by_task() -> None:
    def loss_fn(prediction: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(prediction, y, torch.tensor([1.0, 2.0, 0.5]).double()) * (1 + int(y[0].item()))

    batch = class_tasks((4,), tasks=3, shots=2)
    learner = batched(seeded(NormedMlp), loss_fn=loss_fn)
    reference = reference_for(seeded(NormedMlp), learner, batch, weights_of(learner), loss_fn=loss_fn)
    assert_equals_reference(learner, learner.meta_step(batch).loss, reference)


def test_a_label_that_the_model_has_no_output_for_is_named_and_nothing_moves() -> None:
    batch = class_tasks((4,), tasks=3, shots=2)
    learner = batched(seeded(NormedMlp))
    learner.meta_step(batch)
    before = snapshot(dict(learner.state_dict()))
    wrong = batch[3].clone()
    wrong[2, 0] = 7
    with pytest.raises(Exception, match=r"target_y holds labels 0\.\.7, but the model has 3 outputs"):
        learner.meta_step((*batch[:3], wrong))
    assert_same_state(dict(learner.state_dict()), before)


def test_evaluation_and_adapt_equal_the_oracle() -> None:
    batch = class_tasks((4,), tasks=2, shots=2)
    learner = batched(seeded(NormedMlp))
    reference = reference_for(seeded(NormedMlp), learner, batch, [0.0, 1.0], training=False)
    assert_same_values(learner.evaluate(batch, keep_predictions=True).predictions, reference.predictions)
    for task, expected in zip(as_tasks(batch), reference.predictions, strict=True):
        torch.testing.assert_close(learner.adapt(*task[:2])(task[2]).detach(), expected, rtol=1e-9, atol=1e-11)
    assert_same_values(learner.eval()(batch).predictions, reference.predictions)


def test_a_copy_goes_on_as_its_original() -> None:
    batch = class_tasks((4,), tasks=2, shots=2)
    learner = batched(seeded(NormedMlp))
    learner.meta_step(batch)
    copied = copy.deepcopy(learner)
    assert copied.meta_step(batch).loss == learner.meta_step(batch).loss
    assert_same_state(gradients_of(copied), gradients_of(learner))
    assert copied.describe().engine == "batched"


def test_a_learner_in_single_precision_is_carried_to_its_precision() -> None:
    batch = class_tasks((1, 16, 16), tasks=2, shots=2)
    make = partial(Conv4, filters=3)
    learner = batched(seeded(make).float())
    reference = reference_for(seeded(make), copy.deepcopy(learner).double(), batch, weights_of(learner))
    metrics = learner.meta_step(tuple(part.float() if part.is_floating_point() else part for part in batch))
    assert learner._batched is not None
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


def test_a_forward_without_gradients_comes_before_the_look() -> None:
    batch = class_tasks((4,), tasks=2, shots=2)
    learner = batched(seeded(NormedMlp))
    with torch.no_grad():
        before = learner(batch)
    reference = reference_for(seeded(NormedMlp), learner, batch, weights_of(learner))
    assert_same_values(before.predictions, reference.predictions)
    assert learner._batched is None
    assert_equals_reference(learner, learner.meta_step(batch).loss, reference)
    with torch.no_grad():
        learner(batch)
    assert learner._batched is not None


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
    batch = class_tasks((4,), tasks=3, shots=2)
    learner = batched(seeded(Dropping), memory=memory, inner_lr=0.05)
    learner(batch)  # The first look is behind: every later call draws the same.

    def loss() -> Any:
        torch.manual_seed(0)
        return learner(batch).loss

    loss().backward()
    for value, entry in [(learner.model.first.weight, (3, 1)), (learner.learning_rates["linear.weight"], (1,))]:
        ends = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                value[entry] += step
                ends.append(loss())
                value[entry] -= step
        assert float(value.grad[entry]) == pytest.approx(float(ends[0] - ends[1]) / 2e-5, rel=1e-5)


# --- what is refused -------------------------------------------------------------------------------------------------


class Body(nn.Module):
    """A network for the ways to break it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.linear = nn.Linear(4, 5), nn.Linear(5, 3)
        self.register_buffer("average", torch.zeros(5))
        self.calls, self.history, self.kept = 0, [], None

    def bend(self, hidden: Tensor) -> Tensor:
        return hidden

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.bend(torch.tanh(self.first(x))))


class Branches(Body):
    def bend(self, hidden: Tensor) -> Tensor:
        return hidden if hidden.sum() > 0 else 2 * hidden


class Averages(Body):
    def bend(self, hidden: Tensor) -> Tensor:
        self.average.mul_(0.9).add_(0.1 * hidden.detach().mean(0))
        return hidden - self.average


class Ticks(Body):
    def bend(self, hidden: Tensor) -> Tensor:
        self.average += 1
        return hidden


class Counts(Body):
    def bend(self, hidden: Tensor) -> Tensor:
        self.calls += 1
        return hidden


class Keeps(Body):
    def bend(self, hidden: Tensor) -> Tensor:
        self.kept = hidden.detach()
        return hidden


class Lists(Body):
    def bend(self, hidden: Tensor) -> Tensor:
        self.history.append(len(self.history))
        return hidden


class Throws(Body):
    def bend(self, hidden: Tensor) -> Tensor:
        return hidden + torch.randn_like(hidden)


class ThrowsInPython(Body):
    def bend(self, hidden: Tensor) -> Tensor:
        return hidden * random.random()


class Watched(Body):
    """A forward hook that keeps what it sees outside of the model."""

    def __init__(self) -> None:
        super().__init__()
        seen: list[Tensor] = []
        self.first.register_forward_hook(lambda module, args, output: seen.append(output))


class _WrongUnderVmap(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor) -> Any:
        return x + x.detach(), in_dims[0]


class WrongGradient(Body):
    """The right value, and half of its gradient under vmap alone."""

    def bend(self, hidden: Tensor) -> Tensor:
        return _WrongUnderVmap.apply(hidden)


REFUSED = {
    Branches: r"data-dependent",
    Averages: r"edits the buffer 'average'",
    Ticks: r"edits the buffer 'average'",
    Counts: r"changes 'calls'",
    Keeps: r"keeps values of one task in 'kept'",
    Lists: r"changes a container of 'the model itself'",
    Throws: r"draws random numbers",
    ThrowsInPython: r"draws from random or numpy",
    Watched: r"changes a container that a hook writes to",
    WrongGradient: r"its meta-gradient for two tasks at once is not that of one after the other",
}


@pytest.mark.parametrize("single", [False, True], ids=["double", "single"])
@pytest.mark.parametrize("model", REFUSED)
def test_what_cannot_be_carried_is_refused_by_name_each_time_and_nothing_moves(
    model: type[nn.Module], single: bool
) -> None:
    user, batch = seeded(model), class_tasks((4,), tasks=2, shots=2)
    if single:
        user, batch = user.float(), tuple(part.float() if part.is_floating_point() else part for part in batch)
    before = fingerprint(user)
    learner = batched(user)
    own, state = fingerprint(learner, ids=False), snapshot(dict(learner.state_dict()))
    for call in (learner.meta_step, learner, learner.meta_step):
        with pytest.raises(UnsupportedModuleError, match=rf'engine="batched".*{REFUSED[model]}.*engine="functional"'):
            call(batch)
        assert fingerprint(learner, ids=False) == own
        assert_same_state(dict(learner.state_dict()), state)
        assert learner.model.calls == 0
        assert learner.model.kept is None
        assert learner.model.history == []
    assert fingerprint(user) == before


# --- what starts after the first look --------------------------------------------------------------------------------


class Late(Body):
    """Does something more once it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.rng, self.table, self.done = "", np.random.default_rng(0), {}, []

    def bend(self, hidden: Tensor) -> Tensor:
        FORWARDS.append(self.now)
        return getattr(self, self.now)(hidden) if self.now else hidden

    def counts(self, hidden: Tensor) -> Tensor:
        self.calls += 1
        return hidden

    def counts_in_a_table(self, hidden: Tensor) -> Tensor:
        self.table["calls"] = self.table.get("calls", 0) + 1
        return hidden

    def draws_in_python(self, hidden: Tensor) -> Tensor:
        return hidden * random.random()

    def draws_in_numpy(self, hidden: Tensor) -> Tensor:
        return hidden * np.random.rand()

    def draws_from_its_own(self, hidden: Tensor) -> Tensor:
        return hidden * self.rng.random()

    def draws_in_torch(self, hidden: Tensor) -> Tensor:
        return hidden + torch.randn_like(hidden)

    def averages(self, hidden: Tensor) -> Tensor:
        self.average.add_(hidden.detach().mean(0))
        return hidden - self.average

    def ticks(self, hidden: Tensor) -> Tensor:
        self.average += 1
        return hidden - self.average

    def keeps(self, hidden: Tensor) -> Tensor:
        self.kept = hidden.detach()
        return hidden

    def appends(self, hidden: Tensor) -> Tensor:
        self.done.append(hidden.detach())
        return hidden

    def deletes(self, hidden: Tensor) -> Tensor:
        self.__dict__.pop("history", None)
        self.__dict__["again"] = object()
        return hidden

    def branches(self, hidden: Tensor) -> Tensor:
        return hidden if hidden.sum() > 0 else 2 * hidden

    def reads_numpy(self, hidden: Tensor) -> Tensor:
        return hidden * float(hidden.detach().numpy().max())

    def looks_at_memory(self, hidden: Tensor) -> Tensor:
        if torch._C._functorch.is_batchedtensor(hidden):
            raise KeyError("only alone")
        return hidden

    def caches(self, hidden: Tensor) -> Tensor:
        if len(hidden) not in self.table:
            self.table[len(hidden)] = torch.arange(len(hidden), dtype=hidden.dtype).unsqueeze(1)
        if self.kept is None or len(self.kept) != len(hidden):
            self.kept, self.calls = self.table[len(hidden)], len(hidden)
        return hidden + 0.1 * self.kept


FORWARDS: list[str] = []
LATE = {
    "counts": r"changes 'calls', once for all tasks",
    "counts_in_a_table": r"changes a container of 'the model itself'",
    "draws_in_python": r"draws from random or numpy",
    "draws_in_numpy": r"draws from random or numpy",
    "draws_from_its_own": r"draws from random or numpy",
    "draws_in_torch": r"draws random numbers",
    "averages": r"edits the buffer 'average', once for all tasks",
    "ticks": r"edits the buffer 'average', once for all tasks",
    "keeps": r"keeps values of one task in 'kept'",
    "appends": r"keeps values of one task in a container of 'the model itself'",
    "deletes": r"changes 'again'",
    "branches": r"data-dependent",
    "reads_numpy": r"it fails with \w+: ",
    "looks_at_memory": r"it fails with KeyError: 'only alone'",
}


def randomness(learner: Any) -> list[Any]:
    state = np.random.get_state()
    numbers: Any = [random.getstate(), state[1].tolist(), state[2], learner.model.rng.bit_generator.state]
    return [*numbers, torch.get_rng_state().tolist()]


def late(**options: Any) -> Any:
    learner = batched(seeded(Late), **options)
    learner.meta_step(class_tasks((4,), tasks=3, shots=2))
    assert learner._batched is not None
    return learner


@pytest.mark.parametrize("way", ["meta_step", "forward"])
@pytest.mark.parametrize("now", LATE)
def test_what_begins_after_the_first_look_is_refused_by_name_and_nothing_moves(now: str, way: str) -> None:
    batch = class_tasks((4,), tasks=3, shots=2)
    learner, other = late(), late()
    learner.model.now = now
    own, state, drawn = fingerprint(learner, ids=False), snapshot(dict(learner.state_dict())), randomness(learner)
    table = dict(learner.model.table)
    for _ in range(2):
        with pytest.raises(UnsupportedModuleError, match=rf'engine="batched".*{LATE[now]}.*engine="functional"'):
            getattr(learner, way)(batch)
        assert fingerprint(learner, ids=False) == own
        assert_same_state(dict(learner.state_dict()), state)
        assert randomness(learner) == drawn
        held = (learner.model.calls, learner.model.kept, learner.model.history, learner.model.done)
        assert held == (0, None, [], [])
        assert learner.model.table == table
    learner.model.now = ""
    assert learner.meta_step(batch).loss == other.meta_step(batch).loss


def test_a_cache_that_begins_after_the_first_look_is_carried_and_costs_no_more_calls_once_it_is_known() -> None:
    tasks = unequal()
    learner = late()
    learner.model.now = "caches"
    reference = reference_for(copy.deepcopy(learner.model), learner, tasks, weights_of(learner))
    assert_equals_reference(learner, learner.meta_step(tasks).loss, reference)
    FORWARDS.clear()
    learner.meta_step(tasks)
    groups, passes = 3, 2
    assert len(FORWARDS) == groups * passes * STEPS


def test_a_draw_by_another_thread_during_a_call_is_not_the_models() -> None:
    batch = class_tasks((4,), tasks=3, shots=2)
    learner, other = late(), late()
    draws: Any = iter([random.random, None, np.random.rand, None, partial(torch.rand, 1)])

    def elsewhere(module: Any, args: Any) -> None:
        if draw := next(draws, None):  # In every second call: the model draws in none.
            draw()

    learner.model.first.register_forward_pre_hook(elsewhere)
    assert learner.meta_step(batch).loss == other.meta_step(batch).loss
    assert next(draws, None) is None


def test_an_error_of_one_task_is_raised_as_it_is_and_nothing_moves() -> None:
    class Picky(Body):
        limit = 1e9

        def bend(self, hidden: Tensor) -> Tensor:
            self.average += 1
            if hidden.shape[-1] > self.limit:
                raise ValueError("the user's own")
            return hidden

    batch = class_tasks((4,), tasks=2, shots=2)
    learner = batched(seeded(Body))
    learner.meta_step(batch)
    learner.model.__class__ = Picky
    learner.model.limit = 2
    own, state = fingerprint(learner, ids=False), snapshot(dict(learner.state_dict()))
    for call in (learner.meta_step, learner):
        with pytest.raises(ValueError, match="the user's own"):
            call(batch)
        assert fingerprint(learner, ids=False) == own
        assert_same_state(dict(learner.state_dict()), state)


def test_evaluation_may_edit_a_buffer_and_training_goes_on() -> None:
    batch = class_tasks((4,), tasks=2, shots=2)
    learner, other = late(), late()
    learner.model.now = "ticks"
    learner.evaluate(batch)
    learner.model.now = ""
    assert learner.meta_step(batch).loss == other.meta_step(batch).loss


def test_a_loss_that_draws_later_draws_for_each_task() -> None:
    drawn: list[float] = []

    def loss_fn(prediction: Tensor, y: Tensor) -> Tensor:
        if not draws:
            return F.cross_entropy(prediction, y)
        drawn.append(random.random())
        return F.cross_entropy(prediction, y) * drawn[-1]

    batch, draws = class_tasks((4,), tasks=3, shots=2), False
    learner = batched(seeded(NormedMlp), loss_fn=loss_fn, inner_steps=1)
    learner(batch)
    draws = True
    random.seed(1)
    learner(batch)
    expected = random.Random(1)
    # One for each task's support loss, then its target loss; the draw of each try under vmap was taken back.
    support, target = ([expected.random() for _ in range(3)] for _ in range(2))
    assert drawn == [support[0], *support, target[0], *target]


def test_masks_are_refused_at_construction_but_not_in_evaluation() -> None:
    with pytest.raises(ArgumentError, match=r'mask_unused_outputs.*engine="batched".*functional'):
        MAMLPlusPlus(Mlp(4, 6, 5), engine="batched", outputs={"mask_unused_outputs": True})
    learner = MAMLPlusPlus(Mlp(4, 6, 5).double(), engine="batched")
    plain = MAMLPlusPlus(Mlp(4, 6, 5).double(), engine="functional")
    plain.load_state_dict(learner.state_dict())
    batch = class_tasks((4,), tasks=2, shots=2)
    found, expected = (one.evaluate(batch, mask_unused_outputs=True).loss for one in (learner, plain))
    assert found == pytest.approx(expected, rel=1e-12)


class Caches(Body):
    """Keeps positions from call to call, anew for each length: it is the same after each call."""

    def bend(self, hidden: Tensor) -> Tensor:
        if self.kept is None or len(self.kept) != len(hidden):
            self.kept = torch.arange(len(hidden), dtype=hidden.dtype).unsqueeze(1)
        return hidden + 0.1 * self.kept


def test_a_cache_is_carried() -> None:
    tasks = unequal()
    learner = batched(seeded(Caches))
    reference = reference_for(seeded(Caches), learner, tasks, weights_of(learner))
    assert_equals_reference(learner, learner.meta_step(tasks).loss, reference)


def test_a_first_task_without_a_finite_gradient_shows_nothing_and_the_next_is_looked_at() -> None:
    batch = class_tasks((4,), tasks=2, shots=2)
    learner = batched(seeded(NormedMlp))
    assert learner.meta_step((batch[0] * torch.inf, *batch[1:])).skipped
    assert learner._batched is None
    reference = reference_for(seeded(NormedMlp), learner, batch, weights_of(learner))
    assert_equals_reference(learner, learner.meta_step(batch).loss, reference)
    assert learner._batched is not None
