"""Reptile, against plain torch optimizers on a copy of the network."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from engine_cases import ALL_ENGINES
from face import as_tasks, assert_same_values, gradients_of, norm_values
from keywords import grouped
from models import Mlp, NormedMlp, class_tasks, seeded
from reptile_by_hand import BATCH, LR, fitted, moved, whole
from torch import nn

from metawrap import MAML, ArgumentError, MetaWrapWarning, Reptile, Task


@pytest.mark.sampled(6)
@pytest.mark.parametrize("engine", ALL_ENGINES)
@pytest.mark.parametrize("rate", [1.0, 0.3])
@pytest.mark.parametrize("count", [1, 3], ids=["serial", "batched"])
def test_the_update_equals_plain_sgd_by_hand(count: int, rate: float, engine: str) -> None:
    model = seeded(NormedMlp)
    learner = Reptile(model, inner_steps=4, inner_lr=LR, meta_lr=rate, engine=engine, norm="batch")
    tasks = as_tasks(BATCH)[:count]
    metrics = learner.meta_step([Task(*task) for task in tasks])
    ends = [fitted(model, [whole(task)] * 4) for task in tasks]
    assert_same_values(learner.model.parameters(), moved(model, ends, rate))
    losses = [float(F.cross_entropy(end(task[2]), task[3]).detach()) for end, task in zip(ends, tasks, strict=True)]
    assert metrics.loss == pytest.approx(sum(losses) / count, rel=1e-9)


def test_one_task_at_rate_one_ends_at_its_weights() -> None:
    model = seeded(NormedMlp)
    learner = Reptile(model, inner_steps=3, inner_lr=LR)
    learner.meta_step([Task(*as_tasks(BATCH)[0])])
    assert_same_values(
        learner.model.parameters(), fitted(model, [whole(as_tasks(BATCH)[0])] * 3).parameters(), tolerance=1e-12
    )


@pytest.mark.parametrize("engine", ALL_ENGINES)
def test_with_one_step_it_is_joint_training(engine: str) -> None:
    # Nichol et al. 2018, section 3: for k = 1 it is SGD on the expected loss of all tasks.
    model = seeded(NormedMlp)
    learner = Reptile(model, inner_steps=1, inner_lr=LR, meta_lr=0.5, engine=engine)
    joint = copy.deepcopy(model).train()
    outer = torch.optim.SGD(joint.parameters(), lr=0.5 * LR)
    for seed in range(3):
        batch = class_tasks((4,), tasks=3, seed=seed)
        learner.meta_step(batch)
        outer.zero_grad()
        torch.stack([F.cross_entropy(joint(x), y) for x, y in map(whole, as_tasks(batch))]).mean().backward()
        outer.step()
    assert_same_values(learner.model.parameters(), joint.parameters())


@pytest.mark.parametrize("engine", ALL_ENGINES)
@pytest.mark.parametrize(
    ("options", "optimizer", "theirs"),
    [
        ({"inner_momentum": 0.9}, torch.optim.SGD, {"momentum": 0.9}),
        (
            {"inner_optimizer": "adam", "inner_betas": (0.0, 0.999), "inner_eps": 1e-15},
            torch.optim.Adam,
            {"betas": (0.0, 0.999), "eps": 1e-15},
        ),
    ],
    ids=["momentum", "adam"],
)
def test_other_inner_optimizers_equal_those_of_torch(options: Any, optimizer: Any, theirs: Any, engine: str) -> None:
    # Without the norm: Adam makes a step of the rounding in a bias before it.
    model = seeded(lambda: Mlp(4, 6, 3))
    learner = Reptile(model, inner_steps=4, inner_lr=0.05, engine=engine, **grouped(**options))
    learner.meta_step(BATCH)
    ends = [fitted(model, [whole(task)] * 4, optimizer, lr=0.05, **theirs) for task in as_tasks(BATCH)]
    assert_same_values(learner.model.parameters(), moved(model, ends, 1.0), tolerance=1e-9)


@pytest.mark.parametrize("engine", ALL_ENGINES)
def test_forward_leaves_exactly_this_gradient(engine: str) -> None:
    model = seeded(NormedMlp)
    learner = Reptile(model, inner_steps=3, inner_lr=LR, engine=engine)
    output = learner(BATCH)
    (2 * output.loss).backward()
    ends = [fitted(model, [whole(task)] * 3) for task in as_tasks(BATCH)]
    expected = [2 * (p - q) for p, q in zip(model.parameters(), moved(model, ends, 1.0), strict=True)]
    assert_same_values([g for g in gradients_of(learner).values() if g is not None], expected)
    assert float(output.loss.detach()) == pytest.approx(
        Reptile(model, inner_steps=3, inner_lr=LR).meta_step(BATCH).loss
    )


def test_running_statistics_are_those_of_ordinary_training() -> None:
    model, task = seeded(NormedMlp), as_tasks(BATCH)[0]
    learner = Reptile(model, inner_steps=3, inner_lr=LR, norm="support")
    learner.meta_step([Task(*task)])
    end = fitted(model, [whole(task)] * 3)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(learner.model.norm, name), getattr(end.norm, name), rtol=1e-9, atol=1e-9)
    plain = learner.unwrap().eval()
    assert torch.equal(plain.norm.running_mean, learner.model.norm.running_mean)


def test_evaluation_and_adapt_fit_the_support_set_alone_for_their_own_number_of_steps() -> None:
    model = seeded(NormedMlp)
    learner = Reptile(model, inner_steps=2, inner_lr=LR, inner_batch_size=3, evaluation_steps=7, norm="batch")
    assert Reptile(model).settings.evaluation_steps == 50
    tasks = as_tasks(BATCH)
    ends = [fitted(model, [(task[0], task[1])] * 7) for task in tasks]
    result = learner.evaluate(BATCH, keep_predictions=True)
    for end, task, prediction in zip(ends, tasks, result.predictions, strict=True):
        torch.testing.assert_close(prediction, end(task[2]).detach(), rtol=1e-9, atol=1e-9)
        adapted = learner.adapt(task[0], task[1])
        assert_same_values(adapted.parameters(), end.parameters())
        assert_same_values(
            learner.adapt(task[0], task[1], steps=2).parameters(), fitted(model, [(task[0], task[1])] * 2).parameters()
        )
    assert result.steps == 7
    assert float(learner.eval()(BATCH).loss.detach()) == pytest.approx(
        sum(float(F.cross_entropy(end(t[2]), t[3]).detach()) for end, t in zip(ends, tasks, strict=True)) / 3, rel=1e-9
    )


def test_the_norms_scale_and_shift_move() -> None:
    learner = Reptile(seeded(NormedMlp), inner_lr=LR)
    before = [value.detach().clone() for value in norm_values(learner)]
    learner.meta_step(BATCH)
    assert all(bool((now != then).all()) for now, then in zip(norm_values(learner), before, strict=True))
    assert {"norm.weight", "norm.bias"} <= set(learner.describe().adapted)


def test_the_outer_rate_goes_down_to_zero_by_epochs() -> None:
    learner = Reptile(seeded(NormedMlp), inner_lr=LR, meta_lr=0.8, epochs=4, iterations_per_epoch=2)
    rates = [learner.meta_step(BATCH).meta_lr for _ in range(10)]
    assert rates == pytest.approx([0.8, 0.8, 0.6, 0.6, 0.4, 0.4, 0.2, 0.2, 0.0, 0.0], abs=1e-12)
    learner.epoch = 1
    assert learner.meta_step(BATCH).meta_lr == pytest.approx(0.6)
    steady = Reptile(seeded(NormedMlp), inner_lr=LR, linear_annealing=False, epochs=1, iterations_per_epoch=1)
    assert [steady.meta_step(BATCH).meta_lr for _ in range(3)] == [1.0] * 3
    learner.optimizer.param_groups[0]["lr"] = 0.123
    with pytest.warns(MetaWrapWarning, match=r"0\.123 is not one of the linear schedule.*linear_annealing=False"):
        learner.meta_step(BATCH)


def test_the_users_own_optimizer_gets_the_same_gradient() -> None:
    model = seeded(NormedMlp)
    learner = Reptile(model, inner_steps=3, inner_lr=LR, optimizer=lambda ps: torch.optim.Adam(ps, lr=0.01))
    learner.meta_step(BATCH)
    plain = copy.deepcopy(model)
    ends = [fitted(model, [whole(task)] * 3) for task in as_tasks(BATCH)]
    for p, end in zip(plain.parameters(), moved(model, ends, 1.0), strict=True):
        p.grad = (p - end).detach()
    torch.optim.Adam(plain.parameters(), lr=0.01).step()
    # Where the gradient is rounding, as of a bias before a norm, Adam's step is, too.
    named = dict(plain.named_parameters())
    for name, parameter in learner.model.named_parameters():
        if name != "first.bias":
            torch.testing.assert_close(parameter, named[name], rtol=1e-7, atol=1e-7)
    with pytest.raises(ArgumentError, match=r"meta_lr: belongs to the built-in optimizer"):
        Reptile(model, meta_lr=0.5, optimizer=lambda ps: torch.optim.Adam(ps, lr=0.01))
    with pytest.raises(ArgumentError, match=r"linear_annealing: belongs to the built-in optimizer"):
        Reptile(model, linear_annealing=True, optimizer=lambda ps: torch.optim.Adam(ps, lr=0.01))


def test_a_head_that_starts_at_zero_is_not_learned_and_the_body_is() -> None:
    model = seeded(NormedMlp)
    learner = Reptile(model, inner_steps=3, inner_lr=LR, outputs={"head_init": "zeros"})
    learner.meta_step(BATCH)
    zeroed = copy.deepcopy(model)
    nn.init.zeros_(zeroed.linear.weight), nn.init.zeros_(zeroed.linear.bias)
    ends = [fitted(zeroed, [whole(task)] * 3) for task in as_tasks(BATCH)]
    expected = dict(zip(dict(model.named_parameters()), moved(zeroed, ends, 1.0), strict=True))
    for name, parameter in learner.model.named_parameters():
        wanted = dict(model.named_parameters())[name] if name.startswith("linear") else expected[name]
        torch.testing.assert_close(parameter, wanted, rtol=1e-9, atol=1e-9)


def test_frozen_later_it_is_adapted_and_its_start_stays() -> None:
    model = seeded(NormedMlp)
    learner = Reptile(model, inner_steps=3, inner_lr=LR)
    learner.model.first.weight.requires_grad_(False)
    learner.meta_step(BATCH)
    assert torch.equal(learner.model.first.weight, model.first.weight)
    ends = [fitted(model, [whole(task)] * 3) for task in as_tasks(BATCH)]
    expected = dict(zip(dict(model.named_parameters()), moved(model, ends, 1.0), strict=True))
    torch.testing.assert_close(learner.model.linear.weight, expected["linear.weight"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "option",
    [
        *("preset", "multi_step_loss", "first_order_epochs", "learn_inner_lr", "per_step_norm_affine", "memory"),
        *("cosine_annealing", "adapt_norm", "adapt", "cuda_graphs", "betas"),
    ],
)
def test_what_does_not_apply_is_not_taken(option: str) -> None:
    with pytest.raises(TypeError, match=option):
        Reptile(seeded(NormedMlp), **grouped(**{option: True}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner_batch_size": 0}, "inner_batch_size: expected a whole number of at least 1"),
        ({"evaluation_steps": 0}, "evaluation_steps: expected a whole number of at least 1"),
        ({"linear_annealing": 3}, "linear_annealing: expected True or False"),
        ({"inner_betas": (0.0, 0.9)}, 'inner_update.betas: has no effect with rule="sgd"'),
        ({"loss_fn": nn.Sequential(nn.Linear(1, 1))}, "loss_fn: Sequential has parameters"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_wrong_value_is_named(options: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Reptile(seeded(NormedMlp), **grouped(**options))


def test_mamls_learner_has_no_reptile_preset() -> None:
    with pytest.raises(ArgumentError, match="no preset of MAML"):
        MAML(seeded(NormedMlp), preset="reptile")
