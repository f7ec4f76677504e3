"""The LSTM meta-learner, against the equations written out, entry by entry, in numpy and in plain tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from engine_cases import ALL_ENGINES, ENGINES
from face import as_tasks, assert_same_values, gradients_of, in_dtype
from inner_rules import ComplexNet
from keywords import grouped
from models import Conv4, NormedMlp, class_tasks, seeded
from oracle import assert_same_gradients
from torch import Tensor, nn

from metawrap import MAML, ArgumentError, LSTMMetaLearner, Task
from metawrap.layers.learned_update import preprocessed
from metawrap.settings.keywords import nested

STEPS = 3


def learner_of(model: nn.Module, **options: Any) -> Any:
    """A learner whose LSTM is far from its quiet beginning, so that every term of it counts."""
    options = {"inner_steps": STEPS, "max_grad_norm": None, "hidden_size": 4, "norm": "batch"} | options
    learner = LSTMMetaLearner(model, **grouped(**options))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in learner.update.parameters():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.3 * drawn.to(parameter.dtype))
    return learner


class Line(nn.Module):
    """y = a x + b: two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
        self.b = nn.Parameter(torch.tensor([-0.2], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.a * x + self.b


def lines(tasks: int = 2) -> list[Task]:
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(tasks, 4, 5, generator=generator, dtype=torch.float64)
    return [Task(*parts) for parts in drawn.unbind()]


def numbers_of(learner: Any) -> dict[str, Any]:
    return {name: p.detach().numpy().copy() for name, p in learner.update.named_parameters()}


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def two_numbers(x: float) -> list[float]:
    if abs(x) >= math.exp(-10):
        return [math.log(abs(x)) / 10, math.copysign(1, x)]
    return [-1.0, math.exp(10) * x]


class Coordinate:
    """One entry of one tensor, and its state, in numpy."""

    def __init__(self, theta: float, hidden_size: int) -> None:
        self.theta, self.h, self.c = theta, np.zeros(hidden_size), np.zeros(hidden_size)
        self.forget = self.rate = 0.0

    def move(self, p: Mapping[str, Any], gradient: float, loss: float) -> None:
        x = np.array(two_numbers(gradient) + two_numbers(loss))
        gates = (
            p["first.weight_ih"] @ x + p["first.bias_ih"] + p["first.weight_hh"] @ self.h + p["first.bias_hh"]
        ).reshape(4, -1)
        self.c = sigmoid(gates[1]) * self.c + sigmoid(gates[0]) * np.tanh(gates[2])
        self.h = sigmoid(gates[3]) * np.tanh(self.c)
        self.forget = sigmoid(p["forget_weight"] @ [*self.h, self.theta, self.forget] + p["forget_bias"])
        self.rate = sigmoid(p["input_weight"] @ [*self.h, self.theta, self.rate] + p["input_bias"])
        self.theta = self.forget * self.theta - self.rate * gradient


Record = list[tuple[float, float, float]]


def line_by_hand(
    a: float, b: float, p: Mapping[str, Any], task: Task, record: Record, replay: bool = False
) -> tuple[float, float, float]:
    """Target loss, a and b after STEPS steps. A replay takes losses and gradients, which are constants, as recorded."""
    x, y, tx, ty = (part.numpy() for part in task.parts())  # type: ignore[union-attr]
    entries = [Coordinate(value, len(p["forget_weight"]) - 2) for value in (a, b)]
    for step in range(STEPS):
        off = entries[0].theta * x + entries[1].theta - y
        if not replay:
            record.append((np.mean(off**2), np.mean(2 * off * x), np.mean(2 * off)))
        loss, *gradients = record[step]
        for entry, gradient in zip(entries, gradients, strict=True):
            entry.move(p, gradient, loss)
    a, b = (entry.theta for entry in entries)
    return float(np.mean((a * tx + b - ty) ** 2)), a, b


def test_preprocessing_by_hand() -> None:
    small = math.exp(-10)
    values = torch.tensor([1.0, -math.e, 0.5, small, -small / 2, 0.0, 1e-30], dtype=torch.float64)
    wanted = [[0, 1], [0.1, -1], [math.log(0.5) / 10, 1], [-1, 1], [-1, -0.5], [-1, 0], [-1, 1e-30 / small]]
    torch.testing.assert_close(preprocessed(values), torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=1e-15)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("memory", ["unrolled", "flat"])
@pytest.mark.parametrize("engine", ALL_ENGINES)
def test_two_parameters_equal_the_loop_in_numpy_and_its_finite_differences(engine: str, memory: str) -> None:
    learner = learner_of(Line(), engine=engine, memory=memory, loss_fn=F.mse_loss)
    tasks, p = lines(), numbers_of(learner)
    records: list[Record] = [[] for _ in tasks]
    by_hand = [line_by_hand(0.7, -0.2, p, task, record) for task, record in zip(tasks, records, strict=True)]
    for task, (_, a, b) in zip(tasks, by_hand, strict=True):
        adapted = learner.adapt(task.support_x, task.support_y)
        assert float(adapted.a.detach()) == pytest.approx(a, rel=1e-12)
        assert float(adapted.b.detach()) == pytest.approx(b, rel=1e-12)
    metrics = learner.meta_step(tasks)
    assert metrics.loss == pytest.approx(np.mean([loss for loss, _, _ in by_hand]), rel=1e-12)

    def loss(a: float, b: float, p: Mapping[str, Any]) -> float:
        pairs = zip(tasks, records, strict=True)
        return float(np.mean([line_by_hand(a, b, p, task, record, replay=True)[0] for task, record in pairs]))

    h = 1e-5
    slopes = {"a": (loss(0.7 + h, -0.2, p) - loss(0.7 - h, -0.2, p)) / (2 * h)}
    slopes["b"] = (loss(0.7, -0.2 + h, p) - loss(0.7, -0.2 - h, p)) / (2 * h)
    for name, value in slopes.items():
        assert float(dict(learner.model.named_parameters())[name].grad) == pytest.approx(value, rel=1e-6, abs=1e-9)
    for name, parameter in learner.update.named_parameters():
        for place in np.ndindex(*parameter.shape):
            ends = []
            for sign in (1, -1):
                moved = {key: value.copy() for key, value in p.items()}
                moved[name][place] += sign * h
                ends.append(loss(0.7, -0.2, moved))
            slope = (ends[0] - ends[1]) / (2 * h)
            assert float(parameter.grad[place]) == pytest.approx(slope, rel=1e-6, abs=1e-8), (name, place)


def lstm_by_hand(
    start: dict[str, Tensor], p: Mapping[str, Tensor], task: Any, network: Any, weights: list[float]
) -> Tensor:
    """The same for any network, in plain tensors with autograd: the weighted sum of target losses."""

    def pair(x: Tensor) -> tuple[Tensor, Tensor]:
        tiny = x.abs() < math.exp(-10)
        size = torch.where(tiny, torch.full_like(x, -1), x.abs().clamp_min(1e-300).log() / 10)
        return size, torch.where(tiny, math.exp(10) * x, x.sign())

    x, y, tx, ty = task
    fast, state, total = dict(start), {}, torch.zeros((), dtype=torch.float64)
    for weight in weights:
        support = F.cross_entropy(network(fast, x), y)
        gradients = dict(zip(fast, torch.autograd.grad(support, list(fast.values())), strict=True))
        for name, gradient in gradients.items():
            theta = fast[name]
            size = p["forget_weight"].numel() - 2
            zero = torch.zeros(*theta.shape, dtype=torch.float64)
            h, c, forget, rate = state.get(name, (zero[..., None].expand(*zero.shape, size),) * 2 + (zero, zero))
            inputs = torch.stack([*pair(gradient), *(v.expand_as(theta) for v in pair(support.detach()))], -1)
            gates = inputs @ p["first.weight_ih"].T + h @ p["first.weight_hh"].T
            i, f, g, o = (gates + p["first.bias_ih"] + p["first.bias_hh"]).split(size, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            forget, rate = (
                (torch.cat([h, theta[..., None], before[..., None]], -1) @ p[f"{kind}_weight"] + p[f"{kind}_bias"])
                for kind, before in (("forget", forget), ("input", rate))
            )
            state[name] = (h, c, forget.sigmoid(), rate.sigmoid())
            fast[name] = forget.sigmoid() * theta - rate.sigmoid() * gradient
        if weight:
            total = total + weight * F.cross_entropy(network(fast, tx), ty)
    return total


def normed_mlp(norm: dict[str, Tensor]) -> Any:
    def network(fast: dict[str, Tensor], x: Tensor) -> Tensor:
        hidden = x @ fast["first.weight"].T + fast["first.bias"]
        centred = hidden - hidden.mean(0)
        hidden = centred / (centred.pow(2).mean(0) + 1e-5).sqrt() * norm["norm.weight"] + norm["norm.bias"]
        return torch.tanh(hidden) @ fast["linear.weight"].T + fast["linear.bias"]

    return network


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "options",
    [
        *({"engine": engine, "memory": memory} for engine in ALL_ENGINES for memory in ("unrolled", "flat")),
        {"engine": "functional", "workers": 2},
        {"engine": "functional", "multi_step_loss": True, "msl_epochs": 10},
        {"engine": "batched", "multi_step_loss": True, "msl_epochs": 10, "memory": "flat"},
    ],
    ids=str,
)
def test_meta_gradient_equals_the_loop_by_hand(options: Any) -> None:
    learner = learner_of(seeded(NormedMlp), **options)
    batch = class_tasks((4,), tasks=3, seed=2)
    leaves = {n: p.detach().clone().requires_grad_() for n, p in learner.named_parameters()}
    model = {n.removeprefix("model."): v for n, v in leaves.items() if n.startswith("model.")}
    update = {n.removeprefix("update."): v for n, v in leaves.items() if n.startswith("update.")}
    start = {n: v for n, v in model.items() if not n.startswith("norm.")}
    weights = [1 / STEPS] * STEPS if options.get("multi_step_loss") else [0.0] * (STEPS - 1) + [1.0]
    losses = [lstm_by_hand(start, update, task, normed_mlp(model), weights) for task in as_tasks(batch)]
    loss = torch.stack(losses).mean()
    expected = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    metrics = learner.meta_step(batch)
    assert metrics.loss == pytest.approx(float(loss.detach()), rel=1e-12)
    # A bias before a norm moves nothing, but by its gradient of rounding, magnified in the first layer's inputs.
    found: dict[str, Any] = {n: p.grad for n, p in learner.named_parameters()}
    assert_same_gradients(found, expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_complex_entry_is_two_coordinates(engine: str) -> None:
    torch.manual_seed(0)
    learner = learner_of(ComplexNet(), engine=engine)
    p = {n: v.detach() for n, v in learner.update.named_parameters()}
    task = as_tasks(class_tasks((4,)))[0]
    start = {"w": torch.view_as_real(learner.model.weight.detach()).clone().requires_grad_()}

    def network(fast: dict[str, Tensor], x: Tensor) -> Tensor:
        return (x.to(torch.complex128) @ torch.view_as_complex(fast["w"]).T).abs()

    expected = lstm_by_hand(start, p, task, network, [0.0] * (STEPS - 1) + [1.0])
    assert learner.evaluate([Task(*task)]).loss == pytest.approx(float(expected.detach()), rel=1e-9)


def test_it_begins_as_gradient_descent_with_little_forgetting() -> None:
    learner = LSTMMetaLearner(seeded(lambda: Line()), inner_steps=1, inner_lr=0.05, loss_fn=F.mse_loss)
    assert learner.settings.hidden_size == 20
    task = lines()[0]
    [a, b] = torch.autograd.grad(F.mse_loss(learner.model(task.support_x), task.support_y), learner.model.parameters())
    adapted = learner.adapt(task.support_x, task.support_y)
    assert float(adapted.a.detach()) == pytest.approx(float(0.7 - 0.05 * a), abs=0.02)
    assert float(adapted.b.detach()) == pytest.approx(float(-0.2 - 0.05 * b), abs=0.02)


def test_the_learned_parts_are_the_lstm_and_where_its_cell_starts() -> None:
    learner = learner_of(seeded(NormedMlp))
    before = {name: p.detach().clone() for name, p in learner.named_parameters()}
    learner.meta_step(class_tasks((4,)))
    assert all(bool((p != before[name]).any()) for name, p in learner.named_parameters())
    told = learner.describe()
    count = sum(p.numel() for p in learner.update.parameters())
    assert any(f"LSTM with {count:,} numbers" in note for note in told.notes)
    assert told.rates == 0


def test_it_runs_in_single_precision_on_images() -> None:
    torch.manual_seed(0)
    learner = LSTMMetaLearner(Conv4(), inner_steps=2, engine="batched")
    batch = in_dtype(class_tasks((1, 16, 16)))
    assert not learner.meta_step(batch).skipped
    assert {p.dtype for p in learner.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 0}, "hidden_size: expected a whole number of at least 1"),
        ({"inner_lr": 1.0}, "inner_lr: expected a number between 0 and 1"),
        ({"inner_lr": -0.1}, "inner_lr: expected a number between 0 and 1"),
    ],
)
def test_a_wrong_value_is_named(options: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        LSTMMetaLearner(seeded(NormedMlp), **grouped(**options))


@pytest.mark.parametrize(
    "option",
    [
        "preset",
        "learn_inner_lr",
        "first_order_epochs",
        "inner_update.rule",
        "inner_update.momentum",
        "inner_update.betas",
    ],
)
def test_what_does_not_apply_is_not_taken(option: str) -> None:
    with pytest.raises(TypeError, match=f"argument '{option.rpartition('.')[2]}'"):
        LSTMMetaLearner(seeded(NormedMlp), **nested({option: None}))
    with pytest.raises(ArgumentError, match="no preset of MAML"):
        MAML(seeded(NormedMlp), preset="lstm")


def test_state_does_not_pass_from_task_to_task() -> None:
    learner, tasks = learner_of(Line(), loss_fn=F.mse_loss), lines()
    together = learner.evaluate(tasks).loss
    assert together == pytest.approx(sum(learner.evaluate([task]).loss for task in tasks) / 2, rel=1e-12)
    assert_same_values(
        learner.adapt(tasks[0].support_x, tasks[0].support_y).parameters(),
        learner.adapt(tasks[0].support_x, tasks[0].support_y).parameters(),
        tolerance=0.0,
    )
    assert all(g is None for g in gradients_of(learner).values())
