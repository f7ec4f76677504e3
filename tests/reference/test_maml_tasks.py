"""MAML++ on what users bring: losses, inputs, task forms, selected parameters, state, precision."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from engine_cases import ENGINES, vision_transformer
from face import (
    as_tasks,
    assert_equals_reference,
    assert_same_state,
    assert_step_equals_oracle,
    build,
    gradients_of,
    in_dtype,
    last_only,
    reference_for,
    snapshot,
    statistics_of,
    values_of,
)
from models import Conv4, LSTMClassifier, Mlp, TwoInputs, class_tasks, seeded
from oracle import assert_same_gradients, meta_gradient
from small_learners import BATCH, every_engine, losses_of, normed, small

from metawrap import Task, TaskBatch

# --- what a task may look like ---------------------------------------------------------------------------------------


@every_engine
def test_regression_with_a_custom_loss_equals_the_oracle(engine: str) -> None:
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randn(2, 2, 6, 1, generator=generator, dtype=torch.float64) for _ in range(2))
    batch = (x[0], y[0], x[1], y[1])
    model = seeded(Mlp)
    learner = build(model, loss_fn=F.mse_loss, engine=engine, multi_step_loss=False, inner_lr=0.05)
    reference = reference_for(model, learner, batch, last_only(2), loss_fn=F.mse_loss)
    output = learner(batch)
    assert output.accuracy is None
    metrics = learner.meta_step(batch)
    assert metrics.accuracy is None
    assert_equals_reference(learner, metrics.loss, reference)
    result = learner.evaluate(batch)
    assert result.accuracy is None
    assert math.isfinite(result.loss)


@every_engine
@pytest.mark.parametrize("kind", ["tuple", "dict"])
def test_tuple_and_dict_inputs_reach_the_model_as_arguments(kind: str, engine: str) -> None:
    left, right = class_tasks((2,), seed=1), class_tasks((3,), seed=2)

    def inputs(index: int) -> Any:
        return (left[index], right[index]) if kind == "tuple" else {"left": left[index], "right": right[index]}

    model = seeded(TwoInputs)
    learner = build(model, engine=engine, multi_step_loss=False)
    batch = (inputs(0), left[1], inputs(2), left[3])
    tasks = TaskBatch.stacked(*batch)
    reference = reference_for(model, learner, [task.parts() for task in tasks], last_only(2))
    assert_equals_reference(learner, learner.meta_step(batch).loss, reference)
    adapted = learner.adapt(tasks[0].support_x, tasks[0].support_y)
    target = tasks[0].target_x
    assert (adapted(**target) if isinstance(target, dict) else adapted(*target)).shape == (6, 3)


@every_engine
def test_tasks_of_different_sizes_equal_the_oracle(engine: str) -> None:
    tasks = [
        as_tasks(class_tasks((4,), tasks=1, shots=shots, targets=targets, seed=shots))[0]
        for shots, targets in ((1, 2), (3, 1), (2, 4))
    ]
    learner = small(engine=engine)
    assert_step_equals_oracle(learner, normed(), tasks, last_only(2))


def test_all_forms_of_a_task_batch_mean_the_same() -> None:
    forms = [BATCH, TaskBatch.stacked(*BATCH), [Task(*task) for task in as_tasks(BATCH)], as_tasks(BATCH)]
    losses = {losses_of(small(), form) for form in forms}
    assert len(losses) == 1


# --- which parameters are adapted ------------------------------------------------------------------------------------


@every_engine
def test_adapted_norm_affine_is_one_vector_and_equals_the_oracle(engine: str) -> None:
    learner = small(adapt_norm=True, engine=engine)
    assert learner.model.norm.weight.shape == (6,)
    assert learner.model.norm.running_mean.shape == (2, 6)
    assert {"norm.weight", "norm.bias"} <= set(learner.learning_rates)
    assert_step_equals_oracle(learner, normed(), BATCH, last_only(2))


@every_engine
def test_only_the_selected_parameters_are_adapted_and_all_are_learned(engine: str) -> None:
    learner = small(adapt=["linear.*"], engine=engine)
    assert set(learner.learning_rates) == {"linear.weight", "linear.bias"}
    assert_step_equals_oracle(learner, normed(), BATCH, last_only(2))
    support_x, support_y, *_ = as_tasks(BATCH)[0]
    adapted = learner.adapt(support_x, support_y)
    assert torch.equal(adapted.first.weight, learner.model.first.weight)
    assert not torch.equal(adapted.linear.weight, learner.model.linear.weight)


# --- state -----------------------------------------------------------------------------------------------------------


def _trained(steps: int, **options: Any) -> Any:
    learner = small(iterations_per_epoch=2, epochs=4, first_order_epochs=1, multi_step_loss=True, **options)
    for seed in range(steps):
        learner.meta_step(class_tasks((4,), seed=seed))
    return learner


def test_state_dict_round_trips_with_counters() -> None:
    old, new = _trained(5), _trained(0)
    buffer = io.BytesIO()
    torch.save(old.state_dict(), buffer)
    buffer.seek(0)
    new.load_state_dict(torch.load(buffer, weights_only=True))
    assert new.epoch == old.epoch == 2
    assert_same_state(dict(new.state_dict()), dict(old.state_dict()))
    assert losses_of(new, BATCH) == losses_of(old, BATCH)
    new.optimizer.load_state_dict(snapshot(old.optimizer.state_dict()))
    one, other = old.meta_step(BATCH), new.meta_step(BATCH)
    assert (one.loss, one.meta_lr, one.epoch, one.iteration) == (
        other.loss,
        other.meta_lr,
        other.epoch,
        other.iteration,
    )
    assert_same_state(dict(new.state_dict()), dict(old.state_dict()))


@pytest.mark.sampled(5)
@pytest.mark.parametrize("engine", ["auto", *ENGINES])
@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
@pytest.mark.parametrize("steps", [0, 3])
def test_learner_can_be_copied_and_goes_on_like_the_original(steps: int, how: str, engine: str) -> None:
    old = _trained(steps, engine=engine)
    new = pickle.loads(pickle.dumps(old)) if how == "pickle" else copy.deepcopy(old)
    weights = values_of(old)
    loss = new.meta_step(BATCH).loss
    assert_same_state(values_of(old), weights)
    assert old.meta_step(BATCH).loss == loss
    assert_same_state(dict(new.state_dict()), dict(old.state_dict()))


def test_learner_follows_to_another_dtype() -> None:
    learner = small(engine="functional").float()
    batch = in_dtype(BATCH)
    loss = learner.meta_step(batch).loss
    assert loss == pytest.approx(small().meta_step(BATCH).loss, rel=1e-4)
    assert all(p.dtype == torch.float32 for p in learner.parameters())


# --- precision and fused kernels -------------------------------------------------------------------------------------


@every_engine
def test_bfloat16_autocast_on_the_cpu_runs_and_is_close(engine: str) -> None:
    batch = class_tasks((1, 16, 16))
    batch32 = in_dtype(batch)
    learner = build(seeded(Conv4).float(), engine=engine, multi_step_loss=False, first_order_epochs=0)
    exact = losses_of(learner, batch32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        metrics = learner.meta_step(batch32)
    assert metrics.loss == pytest.approx(exact, rel=0.1)
    assert not metrics.skipped
    assert all(p.dtype == torch.float32 for p in learner.parameters())
    assert all(torch.isfinite(p).all() for p in learner.parameters())


@pytest.mark.sampled(2)
@every_engine
@pytest.mark.parametrize(("make", "shape"), [(LSTMClassifier, (4, 3)), (vision_transformer, (3, 16, 16))])
def test_float32_second_order_equals_the_float64_oracle(make: Any, shape: tuple[int, ...], engine: str) -> None:
    batch = class_tasks(shape)
    batch32 = in_dtype(batch)
    model = seeded(make)
    learner = build(copy.deepcopy(model).float(), engine=engine, multi_step_loss=False, first_order_epochs=0)
    reference = meta_gradient(
        model,
        as_tasks(batch),
        rates={name: rate.detach().double() for name, rate in learner.learning_rates.items()},
        step_weights=last_only(2),
    )
    metrics = learner.meta_step(batch32)
    assert metrics.loss == pytest.approx(float(reference.loss), rel=1e-5)
    found = {name: None if g is None else g.double() for name, g in gradients_of(learner).items()}
    assert_same_gradients(found, reference.gradients, tolerance=2e-3)


def test_statistics_of_a_float32_learner_stay_finite_and_in_their_rows() -> None:
    learner = small(inner_steps=3)
    before = statistics_of(learner)
    learner.meta_step(BATCH)
    after = statistics_of(learner)
    for name, rows in after.items():
        assert rows.shape == before[name].shape == (3, 6)
        assert (rows != before[name]).any(dim=1).all()
