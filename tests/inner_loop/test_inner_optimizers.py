"""Inner momentum, Adam and clipping: values against torch.optim, meta-gradients against a loop written by hand."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from face import as_tasks, assert_same_values, build, gradients_of, rates_of
from keywords import grouped
from models import Mlp, class_tasks, seeded
from oracle import assert_same_gradients
from torch import Tensor, nn

from metawrap import ArgumentError, MAMLPlusPlus, Task

ENGINES = ("functional", "higher")
STEPS = 3
BATCH = class_tasks((4,), tasks=2, shots=2, seed=3)
RULES: dict[str, dict[str, Any]] = {
    "sgd": {},
    "momentum": {"inner_momentum": 0.8},
    "adam": {"inner_optimizer": "adam", "inner_lr": 0.03, "inner_betas": (0.7, 0.9), "inner_eps": 1e-3},
    "norm clipped": {"inner_max_grad_norm": 0.3},
    "value clipped": {"inner_max_grad_value": 0.05},
    "momentum, both clipped": {"inner_momentum": 0.5, "inner_max_grad_norm": 0.2, "inner_max_grad_value": 0.1},
    "adam, norm clipped": {"inner_optimizer": "adam", "inner_lr": 0.02, "inner_max_grad_norm": 0.3, "inner_eps": 1e-4},
}


def network() -> nn.Module:
    return seeded(lambda: Mlp(4, 6, 3))


def learner_of(rule: str, engine: str, model: nn.Module | None = None, **options: Any) -> Any:
    options = {"inner_steps": STEPS, "multi_step_loss": False, "first_order_epochs": 0} | RULES[rule] | options
    return build(network() if model is None else model, engine=engine, **options)


class ByHand:
    """One inner loop with nothing but tensors, from the formulas."""

    def __init__(self, options: dict[str, Any], second_order: bool) -> None:
        self.options, self.second_order = options, second_order
        self.velocity: dict[str, Tensor] = {}
        self.mean: dict[str, Tensor] = {}
        self.square: dict[str, Tensor] = {}

    def loss(self, values: dict[str, Tensor], rates: dict[str, Tensor], task: Any) -> Tensor:
        support_x, support_y, target_x, target_y = task
        for step in range(STEPS):
            names = list(values)
            support = F.cross_entropy(self.network(values, support_x), support_y)
            gradients = torch.autograd.grad(support, list(values.values()), create_graph=self.second_order)
            gradients = self.clip(dict(zip(names, gradients, strict=True)))
            values = {name: values[name] - rates[name][step] * self.direction(name, gradients[name], step + 1)
                      for name in names}  # fmt: skip
        return F.cross_entropy(self.network(values, target_x), target_y)

    @staticmethod
    def network(values: dict[str, Tensor], x: Tensor) -> Tensor:
        hidden = torch.tanh(x @ values["first.weight"].T + values["first.bias"])
        return hidden @ values["second.weight"].T + values["second.bias"]

    def clip(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        if (limit := self.options.get("inner_max_grad_value")) is not None:
            gradients = {n: torch.where(g.abs() > limit, g.detach().sign() * limit, g) for n, g in gradients.items()}
        if (limit := self.options.get("inner_max_grad_norm")) is not None:
            norm = sum((g**2).sum() for g in gradients.values()) ** 0.5
            if float(norm.detach()) + 1e-6 > limit:
                gradients = {n: g * limit / (norm + 1e-6) for n, g in gradients.items()}
        return gradients

    def direction(self, name: str, g: Tensor, t: int) -> Tensor:
        if self.options.get("inner_optimizer") == "adam":
            b1, b2 = self.options.get("inner_betas", (0.9, 0.999))
            self.mean[name] = b1 * self.mean.get(name, 0) + (1 - b1) * g
            self.square[name] = b2 * self.square.get(name, 0) + (1 - b2) * g**2
            scale = math.sqrt(1 - b2**t) / (1 - b1**t)
            return scale * self.mean[name] / (self.square[name].sqrt() + self.options["inner_eps"])
        if momentum := self.options.get("inner_momentum"):
            self.velocity[name] = momentum * self.velocity[name] + g if name in self.velocity else g
            return self.velocity[name]
        return g


def by_hand(learner: Any, rule: str, second_order: bool) -> tuple[Tensor, dict[str, Tensor | None]]:
    start = {n: p.detach().clone().requires_grad_() for n, p in learner.model.named_parameters()}
    rates = {name: rate.requires_grad_() for name, rate in rates_of(learner).items()}
    losses = [
        ByHand(RULES[rule], second_order).loss({n: v.clone() for n, v in start.items()}, rates, task)
        for task in as_tasks(BATCH)
    ]
    loss = torch.stack(losses).mean()
    leaves = start | {f"lr/{name}": rate for name, rate in rates.items()}
    return loss.detach(), dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


@pytest.mark.parametrize("second_order", [True, False], ids=["second order", "first order"])
@pytest.mark.parametrize("engine", [*ENGINES, "batched"])
@pytest.mark.parametrize("rule", RULES)
def test_meta_gradient_equals_the_loop_by_hand(rule: str, engine: str, second_order: bool) -> None:
    learner = learner_of(rule, engine, first_order_epochs=0 if second_order else 99, msl_epochs=None)
    loss, expected = by_hand(learner, rule, second_order)
    metrics = learner.meta_step(BATCH)
    assert metrics.loss == pytest.approx(float(loss), rel=1e-12)
    assert_same_gradients(gradients_of(learner), expected)


@pytest.mark.parametrize("rule", RULES)
def test_clipping_and_momentum_do_change_the_gradient(rule: str) -> None:
    if rule != "sgd":
        plain, other = (by_hand(learner_of("sgd", "functional"), name, True)[1] for name in ("sgd", rule))
        assert max(float((plain[name] - other[name]).abs().max()) for name in plain) > 1e-4


def torch_optimizer(rule: str, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    options = RULES[rule]
    groups = [{"params": [parameter]} for parameter in parameters]
    if options.get("inner_optimizer") == "adam":
        return torch.optim.Adam(groups, betas=options.get("inner_betas", (0.9, 0.999)), eps=1e-10)
    return torch.optim.SGD(groups, lr=1.0, momentum=options.get("inner_momentum", 0.0))


def fitted_by_torch(model: nn.Module, rule: str, rates: dict[str, Tensor], steps: int, task: Any) -> nn.Module:
    model, options = copy.deepcopy(model), RULES[rule]
    named = dict(model.named_parameters())
    optimizer = torch_optimizer(rule, list(named.values()))
    for step in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(task[0]), task[1]).backward()
        if (limit := options.get("inner_max_grad_value")) is not None:
            nn.utils.clip_grad_value_(named.values(), limit)
        if (limit := options.get("inner_max_grad_norm")) is not None:
            nn.utils.clip_grad_norm_(named.values(), limit)
        for group, name in zip(optimizer.param_groups, named, strict=True):
            group["lr"] = float(rates[name][min(step, STEPS - 1)])
        optimizer.step()
    return model


@pytest.mark.parametrize("steps", [1, STEPS, STEPS + 2])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("rule", RULES)
def test_adapted_weights_equal_those_of_torch_optim(rule: str, engine: str, steps: int) -> None:
    # With an eps far below the gradients, where torch adds it no longer matters.
    options = {"inner_eps": 1e-10} if "inner_eps" in RULES[rule] else {}
    model = network()
    learner = learner_of(rule, engine, model, **options)
    task = as_tasks(BATCH)[0]
    adapted = learner.adapt(task[0], task[1], steps=steps)
    expected = fitted_by_torch(model, rule, rates_of(learner), steps, task)
    assert_same_values(adapted.parameters(), expected.parameters(), 1e-7 if "adam" in rule else 1e-12)
    evaluated = learner.evaluate([Task(*task)], steps=steps, keep_predictions=True).predictions[0]
    torch.testing.assert_close(evaluated, adapted(task[2]).detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "sgd"])
def test_meta_gradient_equals_finite_differences_through_torch_optim(rule: str, engine: str) -> None:
    options = {"inner_eps": 1e-10} if "inner_eps" in RULES[rule] else {}
    model = network()
    learner = learner_of(rule, engine, model, **options)
    generator = torch.Generator().manual_seed(0)
    direction = {n: torch.randn(p.shape, generator=generator, dtype=torch.float64) for n, p in model.named_parameters()}
    rates, task = rates_of(learner), as_tasks(BATCH)[0]

    def loss(distance: float) -> float:
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for name, parameter in moved.named_parameters():
                parameter.add_(distance * direction[name])
        return float(F.cross_entropy(fitted_by_torch(moved, rule, rates, STEPS, task)(task[2]), task[3]).detach())

    learner.meta_step([Task(*task)])
    found = sum(float((gradients_of(learner)[name] * direction[name]).sum()) for name in direction)
    assert found == pytest.approx((loss(1e-5) - loss(-1e-5)) / 2e-5, rel=1e-5)


class PartlyDead(nn.Module):
    """One unit never fires and one parameter is not used: gradients of exactly zero, and none at all."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)
        self.unused = nn.Parameter(torch.ones(2))
        nn.init.constant_(self.first.bias, 0.1)
        self.first.bias.data[0] = -1e6

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


@pytest.mark.filterwarnings("ignore:.*does not depend on unused")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("rule", ["adam", "momentum", "adam, norm clipped"])
def test_zero_and_missing_gradients_do_no_harm(rule: str, engine: str) -> None:
    learner = learner_of(rule, engine, seeded(PartlyDead))
    assert not learner.meta_step(BATCH).skipped
    gradients = gradients_of(learner)
    assert all(bool(g.isfinite().all()) for g in gradients.values() if g is not None)
    assert float(gradients["second.weight"].abs().max()) > 0
    assert float(gradients["first.weight"][0].abs().max()) == 0
    adapted = learner.adapt(BATCH[0][0], BATCH[1][0])
    assert torch.equal(adapted.unused, dict(learner.model.named_parameters())["unused"])


class ComplexNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        return (x.to(self.weight.dtype) @ self.weight.T).abs()

    def double(self) -> ComplexNet:  # nn.Module.double leaves complex parameters alone, with a warning.
        return self


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("rule", ["adam", "momentum", "norm clipped"])
def test_a_complex_entry_is_two_numbers_as_in_torch_optim(rule: str, engine: str) -> None:
    options = {"inner_eps": 1e-10} if "inner_eps" in RULES[rule] else {}
    torch.manual_seed(0)
    model = ComplexNet()
    learner = learner_of(rule, engine, model, **options)
    task = as_tasks(BATCH)[0]
    adapted = learner.adapt(task[0], task[1])
    expected = fitted_by_torch(model, rule, rates_of(learner), STEPS, task)
    torch.testing.assert_close(adapted.weight.detach(), expected.weight.detach(), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("engine", ENGINES)
def test_state_does_not_pass_from_task_to_task(engine: str) -> None:
    learner = learner_of("momentum", engine)
    first, second = as_tasks(BATCH)
    alone = learner.evaluate([Task(*second)]).loss
    assert learner.evaluate([Task(*first), Task(*second)]).loss == pytest.approx(
        (learner.evaluate([Task(*first)]).loss + alone) / 2, rel=1e-12
    )


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"inner_optimizer": "rmsprop"}, "inner_update.rule"),
        ({"inner_optimizer": "adam", "inner_momentum": 0.9}, "inner_update.momentum"),
        ({"inner_betas": (0.9, 0.99)}, "inner_update.betas"),
        ({"inner_eps": 1e-5}, "inner_update.eps"),
        ({"inner_momentum": 1.0}, "inner_update.momentum"),
        ({"inner_optimizer": "adam", "inner_betas": (0.9, 1.0)}, "inner_update.betas"),
        ({"inner_max_grad_norm": 0.0}, "inner_update.max_grad_norm"),
        ({"inner_max_grad_value": -1.0}, "inner_update.max_grad_value"),
    ],
)
def test_an_option_that_has_no_effect_or_no_sense_is_refused(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ArgumentError, match=name):
        MAMLPlusPlus(network(), **grouped(**options))


def test_learned_rates_of_adam_move() -> None:
    learner = learner_of("adam", "higher", meta_lr=0.01)
    before = rates_of(learner)
    for _ in range(3):
        learner.meta_step(BATCH)
    assert all(bool((rate != before[name]).any()) for name, rate in rates_of(learner).items())


@pytest.mark.parametrize("engine", ["auto", "higher"])
def test_higher_is_judged_by_the_module_not_by_adams_rounding(engine: str) -> None:
    # In float32 Adam makes rounding, above all of a bias before a norm, as large as a gradient.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 3))
    learner = MAMLPlusPlus(model, engine=engine, inner_update={"rule": "adam"}, inner_lr=0.01)
    learner.meta_step(tuple(p.float() if p.is_floating_point() else p for p in class_tasks((1, 8, 8), targets=3)))
    assert learner.describe().engine == "higher"
    assert learner.settings.inner_update.rule == "adam"
