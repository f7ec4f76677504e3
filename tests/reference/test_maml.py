"""The six parts of MAML++, each alone; presets and counters; the user's own optimizer, scheduler and clipping."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from face import (
    assert_equals_reference,
    assert_step_equals_oracle,
    build,
    gradients_of,
    last_only,
    rates_of,
    reference_for,
    values_of,
)
from oracle import assert_same_gradients, msl_weights
from small_learners import BATCH, every_engine, normed, small
from torch import Tensor

from metawrap import FOMAML, MAML, MAMLPlusPlus

# --- MSL -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "epoch", "weights"),
    [
        ({}, 0, [0.2, 0.2, 0.2, 0.2, 0.2]),
        ({}, 3, [0.14, 0.14, 0.14, 0.14, 0.44]),
        ({}, 9, [0.02, 0.02, 0.02, 0.02, 0.92]),
        ({}, 10, [0.0, 0.0, 0.0, 0.0, 1.0]),
        ({}, 73, [0.0, 0.0, 0.0, 0.0, 1.0]),
        # 1/3 - 19/60 = 1/60 would be above the floor 0.03/3 = 0.01; 1/3 - 99/300 = 1/300 is below it.
        ({"inner_steps": 3, "msl_epochs": 100}, 99, [0.01, 0.01, 0.98]),
        ({"inner_steps": 1}, 0, [1.0]),
        ({"inner_steps": 2, "multi_step_loss": False, "msl_epochs": None}, 0, [0.0, 1.0]),
    ],
)
def test_step_losses_are_weighted_as_in_the_authors_code(
    options: dict[str, Any], epoch: int, weights: list[float]
) -> None:
    learner = small(**{"inner_steps": 5, "multi_step_loss": True, "msl_epochs": 10} | options)
    learner.epoch = epoch
    output = learner(BATCH)
    kept = [index for index, weight in enumerate(weights) if weight]
    steps = output.step_losses.double()
    assert steps.shape == (2, len(weights))
    expected = sum(weights[index] * steps[:, index].mean() for index in kept)
    torch.testing.assert_close(output.loss.detach(), expected, rtol=1e-12, atol=0)
    assert torch.isfinite(steps[:, kept]).all()


def test_loss_in_eval_mode_is_the_last_steps() -> None:
    learner = small(multi_step_loss=True, msl_epochs=10).eval()
    output = learner(BATCH)
    torch.testing.assert_close(output.loss.detach(), output.step_losses[:, -1].mean(), rtol=1e-12, atol=0)
    assert not learner.training


# --- DA --------------------------------------------------------------------------------------------------------------


@every_engine
@pytest.mark.parametrize(("epoch", "second_order"), [(0, False), (1, False), (2, True), (3, True)])
def test_derivative_order_switches_at_the_set_epoch(epoch: int, second_order: bool, engine: str) -> None:
    model = normed()
    learner = small(first_order_epochs=2, engine=engine)
    learner.epoch = epoch
    reference = reference_for(model, learner, BATCH, last_only(2), second_order=second_order)
    other = reference_for(model, learner, BATCH, last_only(2), second_order=not second_order)
    metrics = learner.meta_step(BATCH)
    assert_equals_reference(learner, metrics.loss, reference)
    with pytest.raises(AssertionError):
        assert_same_gradients(gradients_of(learner), other.gradients)


def test_derivative_order_switches_by_itself_as_epochs_pass() -> None:
    learner = small(first_order_epochs=1, iterations_per_epoch=2, epochs=4)
    orders = []
    for _ in range(4):
        first = reference_for(normed(), learner, BATCH, last_only(2), second_order=False)
        learner.meta_step(BATCH)
        try:
            assert_same_gradients(gradients_of(learner), first.gradients)
            orders.append(1)
        except AssertionError:
            orders.append(2)
    assert orders == [1, 1, 2, 2]


# --- LSLR ------------------------------------------------------------------------------------------------------------


def test_one_rate_per_adapted_tensor_and_step() -> None:
    learner = MAMLPlusPlus(normed(), inner_steps=3, inner_lr=0.25)
    assert set(learner.learning_rates) == {"first.weight", "first.bias", "linear.weight", "linear.bias"}
    for _, rate in learner.learning_rates.items():
        torch.testing.assert_close(rate.detach(), torch.full((3,), 0.25, dtype=torch.float64))


def test_learned_rates_move_and_fixed_rates_do_not() -> None:
    for learned in (True, False):
        learner = small(learn_inner_lr=learned)
        before = rates_of(learner)
        learner.meta_step(BATCH)
        moved = {name for name, rate in learner.learning_rates.items() if not torch.equal(before[name], rate)}
        # A bias before a norm has no effect, so its rate has no gradient.
        assert moved - {"first.bias"} == ({"first.weight", "linear.weight", "linear.bias"} if learned else set())


@every_engine
def test_fixed_rates_leave_the_other_gradients_as_the_oracle_has_them(engine: str) -> None:
    learner = small(learn_inner_lr=False, engine=engine)
    assert_step_equals_oracle(learner, normed(), BATCH, last_only(2))


def test_a_negative_rate_is_kept_and_used() -> None:
    learner = small()
    with torch.no_grad():
        learner.learning_rates["linear.weight"].fill_(-0.3)
    assert_step_equals_oracle(learner, normed(), BATCH, last_only(2))


# --- CA --------------------------------------------------------------------------------------------------------------


def test_cosine_annealing_per_epoch_holds_the_minimum_after_the_last() -> None:
    learner = small(cosine_annealing=True, meta_lr=1e-2, min_meta_lr=1e-4, epochs=4, iterations_per_epoch=2)
    seen = [learner.meta_step(BATCH).meta_lr for _ in range(16)]
    by_epoch = [1e-4 + (1e-2 - 1e-4) * (1 + math.cos(math.pi * min(epoch, 4) / 4)) / 2 for epoch in range(8)]
    expected = [value for value in by_epoch for _ in range(2)]
    assert seen == pytest.approx(expected, rel=1e-9)
    assert seen[-1] == pytest.approx(1e-4, rel=1e-9)


def test_cosine_annealing_off_keeps_the_rate() -> None:
    learner = small(cosine_annealing=False, meta_lr=3e-3, epochs=2, iterations_per_epoch=1)
    assert [learner.meta_step(BATCH).meta_lr for _ in range(4)] == pytest.approx([3e-3] * 4)


def test_the_rate_reported_is_the_rate_used() -> None:
    learner = small(cosine_annealing=True, meta_lr=0.1, min_meta_lr=0.02, epochs=2, iterations_per_epoch=1)
    for _ in range(3):
        metrics = learner.meta_step(BATCH)
        assert {group["lr"] for group in learner.optimizer.param_groups} == {metrics.meta_lr}
    learner = small(cosine_annealing=True, meta_lr=0.1, min_meta_lr=0.02, epochs=2, iterations_per_epoch=1)
    before = learner.model.linear.bias.detach().clone()
    learner.meta_step(BATCH)
    # Adam's first step has the size of the rate.
    torch.testing.assert_close((learner.model.linear.bias.detach() - before).abs(), torch.full((3,), 0.1).double())


# --- counters, presets, methods --------------------------------------------------------------------------------------


def test_epoch_counts_iterations_and_can_be_set() -> None:
    learner = small(iterations_per_epoch=3)
    seen = []
    for _ in range(7):
        seen.append(learner.epoch)
        learner.meta_step(BATCH)
    assert seen == [0, 0, 0, 1, 1, 1, 2]
    learner.epoch = 9
    assert learner.epoch == 9


def test_presets_differ_in_the_norm_policy_and_an_argument_wins() -> None:
    paper, code = MAMLPlusPlus(normed(), preset="paper"), MAMLPlusPlus(normed(), preset="authors_code")
    assert paper.describe().settings["norm"] == "running"
    assert code.describe().settings["norm"] == "batch"
    assert MAMLPlusPlus(normed()).describe().settings["norm"] == "support"
    assert MAMLPlusPlus(normed()).settings == MAMLPlusPlus(normed(), preset="authors_code", norm="support").settings
    assert MAMLPlusPlus(normed(), preset="paper", norm="support").describe().settings["norm"] == "support"


def test_paper_preset_is_first_order_for_its_first_fifty_epochs() -> None:
    learner = build(normed(), preset="paper", multi_step_loss=False, engine="functional")
    for epoch, second_order in ((49, False), (50, True)):
        learner.epoch = epoch
        reference = reference_for(normed(), learner, BATCH, last_only(2), second_order=second_order, norm="running")
        learner.zero_grad()
        learner(BATCH).loss.backward()
        assert_same_gradients(gradients_of(learner), reference.gradients)


def test_authors_code_preset_is_second_order_from_the_start() -> None:
    learner = build(normed(), preset="authors_code", engine="functional")
    reference = reference_for(normed(), learner, BATCH, msl_weights(2, 0, 10))
    learner(BATCH).loss.backward()
    assert_same_gradients(gradients_of(learner), reference.gradients)


def test_adam_betas_follow_the_preset_and_an_argument_wins() -> None:
    def betas(**options: Any) -> tuple[float, float]:
        learner = small(**options)
        learner.meta_step(BATCH)
        return tuple(learner.optimizer.param_groups[0]["betas"])

    assert betas(preset="authors_code") == (0.9, 0.999)
    assert betas(preset="paper") == (0.9, 0.99)
    assert betas(betas=(0.8, 0.95)) == (0.8, 0.95)


@every_engine
def test_maml_and_fomaml_gradients_equal_the_oracle(engine: str) -> None:
    for method, second_order in ((MAML, True), (FOMAML, False)):
        learner = build(normed(), method=method, engine=engine, inner_lr=0.2)
        reference = reference_for(normed(), learner, BATCH, last_only(2), second_order=second_order)
        loss = learner.meta_step(BATCH).loss
        assert_equals_reference(learner, loss, reference)


def test_maml_has_fixed_rates_and_no_per_step_norms() -> None:
    learner = MAML(normed(), inner_steps=3)
    assert learner.model.norm.weight.shape == (6,)
    assert not any(rate.requires_grad for _, rate in learner.learning_rates.items())


def test_first_order_still_trains_the_rates() -> None:
    learner = small(first_order_epochs=5, inner_steps=3, multi_step_loss=True, msl_epochs=3)
    before = rates_of(learner)
    learner.meta_step(BATCH)
    for name, rate in learner.learning_rates.items():
        assert rate.grad is not None
        if name != "first.bias":  # a bias before a norm: its gradient is zero
            assert (rate.grad != 0).all(), name
            assert not torch.equal(before[name], rate), name


# --- the user's own optimizer, scheduler, clipping -------------------------------------------------------------------


def test_users_optimizer_gets_every_learned_parameter_once_and_is_used() -> None:
    given: list[Tensor] = []

    def optimizer(params: Any) -> torch.optim.Optimizer:
        groups = list(params)
        given.extend(p for g in groups for p in (g["params"] if isinstance(g, dict) else [g]))
        return torch.optim.SGD(groups, lr=0.25)

    learner = small(optimizer=optimizer, cosine_annealing=False)
    before = values_of(learner)
    learner.meta_step(BATCH)
    assert isinstance(learner.optimizer, torch.optim.SGD)
    assert len({id(p) for p in given}) == len(given)
    assert {id(p) for p in given} == {id(p) for p in learner.parameters() if p.requires_grad}
    for name, parameter in learner.named_parameters():
        moved = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(parameter.detach(), before[name] - 0.25 * moved)


def test_users_scheduler_is_stepped_once_per_epoch() -> None:
    learner = small(
        optimizer=lambda params: torch.optim.SGD(params, lr=1.0),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5),
        iterations_per_epoch=2,
    )
    rates = []
    for _ in range(6):
        learner.meta_step(BATCH)
        rates.append(learner.optimizer.param_groups[0]["lr"])
    used = [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]
    # The step to the next epoch may come at the end of the old one or at the start of the new one.
    assert rates in (used, [*used[1:], 0.125])


def _raw_gradients(**options: Any) -> dict[str, Tensor]:
    learner = small(optimizer=lambda params: torch.optim.SGD(params, lr=1.0), cosine_annealing=False, **options)
    before = values_of(learner)
    learner.meta_step(BATCH)
    return {name: before[name] - p.detach() for name, p in learner.named_parameters()}


def test_gradient_norm_and_values_are_clipped_before_the_update() -> None:
    raw = _raw_gradients()
    norm = float(torch.cat([g.flatten() for g in raw.values()]).norm())
    clipped = _raw_gradients(max_grad_norm=norm / 4)
    for name, gradient in raw.items():
        torch.testing.assert_close(clipped[name], gradient / 4, rtol=1e-4, atol=1e-9)
    largest = max(float(g.abs().max()) for g in raw.values())
    by_value = _raw_gradients(max_grad_value=largest / 3)
    for name, gradient in raw.items():
        torch.testing.assert_close(by_value[name], gradient.clamp(-largest / 3, largest / 3))
    unclipped = _raw_gradients(max_grad_norm=norm * 4, max_grad_value=largest * 3)
    for name, gradient in raw.items():
        torch.testing.assert_close(unclipped[name], gradient)
