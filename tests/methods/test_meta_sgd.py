"""Meta-SGD: a rate for each weight, against the oracle's plain loop, torch, and a step in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from engine_cases import ALL_ENGINES, ENGINES
from face import as_tasks, assert_step_equals_oracle, build, gradients_of, last_only, rates_of
from inner_rules import BATCH, RULES, STEPS, ByHand, ComplexNet, by_hand, network
from models import Conv4, Mlp, NormedMlp, class_tasks, seeded
from oracle import assert_same_gradients, meta_gradient
from torch import Tensor, nn

from metawrap import MAML, ArgumentError, MAMLPlusPlus, MetaSGD, Task


def learner_of(model: nn.Module, **options: Any) -> Any:
    return build(model, method=MetaSGD, **options)


def test_a_rate_for_each_weight_and_one_inner_step() -> None:
    learner = MetaSGD(seeded(NormedMlp), inner_lr=0.3)
    shapes = {name: tuple(rate.shape) for name, rate in learner.learning_rates.items()}
    assert shapes == {
        "first.weight": (1, 6, 4),
        "first.bias": (1, 6),
        "linear.weight": (1, 3, 6),
        "linear.bias": (1, 3),
    }
    assert all(bool((rate == 0.3).all()) and rate.requires_grad for _, rate in learner.learning_rates.items())
    assert learner.settings.inner_steps == 1
    with torch.no_grad():
        learner.learning_rates["first.bias"][0, 2] = -0.5
    told = learner.describe()
    assert told.rates == 24 + 6 + 18 + 3
    assert told.rate_range == (-0.5, 0.3)
    assert [row.rates for row in told.modules if row.name == "first"] == [30]


@pytest.mark.sampled(5)
@pytest.mark.parametrize("engine", ALL_ENGINES)
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("options", [{}, {"memory": "flat"}, {"first_order_epochs": 99}], ids=str)
def test_meta_gradient_with_unlike_rates_equals_the_oracle(options: Any, steps: int, engine: str) -> None:
    model, batch = seeded(NormedMlp), class_tasks((4,), tasks=3)
    learner = learner_of(model, inner_steps=steps, engine=engine, **options)
    assert len(torch.cat([rate.flatten() for _, rate in learner.learning_rates.items()]).unique()) == 51
    second = not options.get("first_order_epochs")
    assert_step_equals_oracle(learner, model, batch, last_only(steps), second_order=second)


@pytest.mark.parametrize("options", [{"engine": "functional", "workers": 2}, {"engine": "batched"}], ids=str)
def test_a_convolutional_network_equals_the_oracle(options: Any) -> None:
    model, batch = seeded(Conv4), class_tasks((1, 16, 16), tasks=2)
    learner = learner_of(model, inner_steps=2, **options)
    assert_step_equals_oracle(learner, model, batch, last_only(2))


@pytest.mark.parametrize("engine", ALL_ENGINES)
def test_equal_rates_give_mamls_gradient_and_their_gradients_add_up_to_its_rates(engine: str) -> None:
    model, batch = seeded(NormedMlp), class_tasks((4,), tasks=2)
    learner = MetaSGD(model, inner_steps=3, inner_lr=0.2, engine=engine, norm="batch")
    learner.meta_step(batch)
    rates = {name: torch.full((3,), 0.2, dtype=torch.float64) for name in learner.learning_rates}
    plain = meta_gradient(model, as_tasks(batch), rates=rates, step_weights=last_only(3)).gradients
    found = gradients_of(learner)
    summed = {name: g.sum() if name.startswith("lr/") and g is not None else g for name, g in found.items()}
    expected = {name: g.sum() if name.startswith("lr/") and g is not None else g for name, g in plain.items()}
    assert_same_gradients(summed, expected)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("engine", ALL_ENGINES)
@pytest.mark.parametrize("memory", ["unrolled", "flat"])
@pytest.mark.parametrize("rule", ["momentum", "adam", "norm clipped"])
def test_every_update_rule_equals_the_loop_by_hand(rule: str, memory: str, engine: str) -> None:
    learner = learner_of(network(), inner_steps=STEPS, engine=engine, memory=memory, **RULES[rule])
    loss, expected = by_hand(learner, rule)
    assert learner.meta_step(BATCH).loss == pytest.approx(float(loss), rel=1e-12)
    assert_same_gradients(gradients_of(learner), expected)


class Weighted(nn.Module):
    """(examples, 2) -> (examples,): two weights, and no more."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5, -1.0], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


@pytest.mark.parametrize("engine", ALL_ENGINES)
def test_one_step_equals_numpy(engine: str) -> None:
    # Mean squares are quadratic: g(w) = 2/n X'(Xw - y), H = 2/n X'X, and w1 = w - a * g(w).
    x, y = np.array([[1.0, 2.0], [3.0, -1.0], [0.5, 1.5]]), np.array([1.0, -2.0, 0.3])
    tx, ty = np.array([[-1.0, 1.0], [2.0, 0.5]]), np.array([0.7, 1.1])
    w, a = np.array([0.5, -1.0]), np.array([0.2, -0.05])
    g, h = 2 / 3 * x.T @ (x @ w - y), 2 / 3 * x.T @ x
    w1 = w - a * g
    target = tx.T @ (tx @ w1 - ty)
    learner = MetaSGD(Weighted(), engine=engine, loss_fn=F.mse_loss)
    with torch.no_grad():
        learner.learning_rates["weight"].copy_(torch.from_numpy(a)[None])
    task = Task(*map(torch.from_numpy, (x, y, tx, ty)))
    adapted = learner.adapt(task.support_x, task.support_y)
    np.testing.assert_allclose(adapted.weight.detach().numpy(), w1, rtol=1e-12)
    metrics = learner.meta_step([task, task])
    assert metrics.loss == pytest.approx(float(np.mean((tx @ w1 - ty) ** 2)), rel=1e-12)
    found = gradients_of(learner)
    np.testing.assert_allclose(found["weight"], target - h @ (a * target), rtol=1e-12)  # type: ignore[arg-type]
    np.testing.assert_allclose(found["lr/weight"][0], -g * target, rtol=1e-12)  # type: ignore[index]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_complex_entry_has_two_rates(engine: str) -> None:
    torch.manual_seed(0)
    model = ComplexNet()
    learner = learner_of(model, inner_steps=1, engine=engine)
    x, y, *_ = as_tasks(BATCH)[0]
    rate = rates_of(learner)["weight"]
    assert rate.shape == (1, 3, 4, 2)
    weight = model.weight.detach().clone().requires_grad_()
    [g] = torch.autograd.grad(F.cross_entropy((x.to(weight.dtype) @ weight.T).abs(), y), weight)
    moved = torch.complex(weight.real - rate[0, ..., 0] * g.real, weight.imag - rate[0, ..., 1] * g.imag)
    torch.testing.assert_close(learner.adapt(x, y).weight.detach(), moved.detach(), rtol=1e-12, atol=1e-12)
    learner.meta_step(BATCH)
    assert float(gradients_of(learner)["lr/weight"].abs().max()) > 0  # type: ignore[union-attr]


def test_a_scalar_parameter_has_one_rate() -> None:
    class Scaled(Mlp):
        def __init__(self) -> None:
            super().__init__(4, 6, 3)
            self.scale = nn.Parameter(torch.tensor(1.5))

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * super().forward(x)

    for engine in ALL_ENGINES:
        model = seeded(Scaled)
        learner = learner_of(model, inner_steps=2, engine=engine)
        assert_step_equals_oracle(learner, model, BATCH, last_only(2))


def test_more_steps_than_in_training_take_the_same_rates() -> None:
    learner = learner_of(network(), inner_steps=1)
    x, y, *_ = as_tasks(BATCH)[0]
    rates, values = rates_of(learner), dict(learner.model.named_parameters())
    for _ in range(3):
        gradients = torch.autograd.grad(F.cross_entropy(ByHand.network(values, x), y), list(values.values()))
        values = {n: v - rates[n][0] * g for (n, v), g in zip(values.items(), gradients, strict=True)}
    for name, parameter in learner.adapt(x, y, steps=3).named_parameters():
        torch.testing.assert_close(parameter, values[name], rtol=1e-12, atol=1e-12)


def test_what_makes_it_another_method_is_refused() -> None:
    model = seeded(NormedMlp)
    with pytest.raises(ArgumentError, match=r"learn_inner_lr.*MAML"):
        MetaSGD(model, learn_inner_lr=False)
    with pytest.raises(ArgumentError, match=r"preset: 'paper' is no preset of MetaSGD"):
        MetaSGD(model, preset="paper")
    for method in (MAML, MAMLPlusPlus):
        with pytest.raises(ArgumentError, match=r"preset: 'meta_sgd' is no preset of"):
            method(model, preset="meta_sgd")
