"""Inner momentum, Adam and clipping: values against torch.optim, meta-gradients against a loop written by hand."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from engine_cases import ALL_ENGINES, ENGINES
from face import as_tasks, assert_same_values, gradients_of, in_dtype, rates_of
from higher.optim import DifferentiableSGD
from inner_rules import BATCH, RULES, STEPS, ComplexNet, by_hand, learner_of, network
from keywords import grouped
from models import class_tasks, seeded
from oracle import assert_same_gradients
from torch import Tensor, nn

from metawrap import ArgumentError, MAMLPlusPlus, Task
from metawrap.inner_loop.update_rules import HigherInnerOptimizer, InnerOptimizer, OwnInnerOptimizer
from metawrap.settings.groups import InnerOptions

every_engine = pytest.mark.parametrize("engine", ENGINES)


@pytest.mark.sampled(12)
@pytest.mark.parametrize("second_order", [True, False], ids=["second order", "first order"])
@pytest.mark.parametrize("engine", ALL_ENGINES)
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
        plain, other = (by_hand(learner_of("sgd", "functional"), name)[1] for name in ("sgd", rule))
        assert max(float((plain[name] - other[name]).abs().max()) for name in plain) > 1e-4


def small_eps(rule: str) -> dict[str, Any]:
    """An eps of Adam far below the gradients, so that it does not matter where torch adds it."""
    return {"inner_eps": 1e-10} if "inner_eps" in RULES[rule] else {}


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
@every_engine
@pytest.mark.parametrize("rule", RULES)
def test_adapted_weights_equal_those_of_torch_optim(rule: str, engine: str, steps: int) -> None:
    model = network()
    learner = learner_of(rule, engine, model, **small_eps(rule))
    task = as_tasks(BATCH)[0]
    adapted = learner.adapt(task[0], task[1], steps=steps)
    expected = fitted_by_torch(model, rule, rates_of(learner), steps, task)
    assert_same_values(adapted.parameters(), expected.parameters(), 1e-7 if "adam" in rule else 1e-12)
    evaluated = learner.evaluate([Task(*task)], steps=steps, keep_predictions=True).predictions[0]
    torch.testing.assert_close(evaluated, adapted(task[2]).detach(), rtol=1e-12, atol=1e-12)


@every_engine
@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "sgd"])
def test_meta_gradient_equals_finite_differences_through_torch_optim(rule: str, engine: str) -> None:
    model = network()
    learner = learner_of(rule, engine, model, **small_eps(rule))
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
@every_engine
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


@every_engine
@pytest.mark.parametrize("rule", ["adam", "momentum", "norm clipped"])
def test_a_complex_entry_is_two_numbers_as_in_torch_optim(rule: str, engine: str) -> None:
    torch.manual_seed(0)
    model = ComplexNet()
    learner = learner_of(rule, engine, model, **small_eps(rule))
    task = as_tasks(BATCH)[0]
    adapted = learner.adapt(task[0], task[1])
    expected = fitted_by_torch(model, rule, rates_of(learner), STEPS, task)
    torch.testing.assert_close(adapted.weight.detach(), expected.weight.detach(), rtol=1e-7, atol=1e-9)


@every_engine
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
        ({"inner_optimizer": "adam", "inner_momentum": 0.9}, r"inner_update\.momentum"),
        ({"inner_betas": (0.9, 0.99)}, r"inner_update\.betas"),
        ({"inner_eps": 1e-5}, r"inner_update\.eps"),
        ({"inner_optimizer": "adam", "inner_betas": (0.9, 1.0)}, r"inner_update\.betas"),
        ({"inner_max_grad_value": -1.0}, r"inner_update\.max_grad_value"),
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


def test_higher_is_judged_by_the_module_not_by_adams_rounding() -> None:
    # In float32 Adam makes rounding, above all of a bias before a norm, as large as a gradient.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 3))
    learner = MAMLPlusPlus(model, engine="higher", inner_update={"rule": "adam"}, inner_lr=0.01)
    learner.meta_step(in_dtype(class_tasks((1, 8, 8), targets=3)))
    assert learner.describe().engine == "higher"
    assert learner.settings.inner_update.rule == "adam"


@pytest.mark.parametrize("rule", ["sgd", "adam"])
@pytest.mark.parametrize("optimizer", [OwnInnerOptimizer, HigherInnerOptimizer])
def test_a_rule_keeps_no_tensor_of_a_step(optimizer: type[InnerOptimizer], rule: str) -> None:
    tensors = {name: torch.ones(3, requires_grad=True) * 2 for name in ("weight", "gradient", "rate")}
    kept = [weakref.ref(tensor) for tensor in tensors.values()]
    step: Any = optimizer(InnerOptions(rule=rule)).step
    weight, gradient, rate = ({"w": tensor} for tensor in tensors.values())
    updated, state = step(weight, gradient, rate, torch.zeros(()), {})
    again, _ = step(updated, gradient, rate, torch.zeros(()), state)
    assert again["w"].requires_grad
    kept += map(weakref.ref, (updated["w"], again["w"]))
    del tensors, weight, gradient, rate, updated, state, again, _
    assert [reference() for reference in kept] == [None] * 5


def test_a_step_that_fails_keeps_no_tensor_either(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(DifferentiableSGD, "_update", fail)
    weight = {"w": torch.ones(3, requires_grad=True) * 2}
    kept = weakref.ref(weight["w"])
    with pytest.raises(torch.OutOfMemoryError):
        HigherInnerOptimizer(InnerOptions()).step(weight, weight, weight, torch.zeros(()), {})
    del weight
    assert kept() is None
