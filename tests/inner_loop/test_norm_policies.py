"""Which statistics normalise: "batch", "running", "support"; their rows; what adapt and unwrap return."""

from __future__ import annotations

import math
import pickle
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from engine_cases import ALL_ENGINES, ENGINES, POLICIES
from face import (
    as_tasks,
    assert_same_gradients,
    assert_same_values,
    assert_step_equals_oracle,
    build,
    gradients_of,
    last_only,
    reference_for,
    statistics_of,
)
from models import ActNormNet, BatchNormAct2d, Conv4, Mlp, NormedMlp, class_tasks, seeded
from oracle import msl_weights
from torch import Tensor, nn

from metawrap import MAML, ArgumentError, MAMLPlusPlus, MetaWrapWarning

STEPS = 3
MODELS: dict[str, tuple[Any, tuple[int, ...], dict[type, Any]]] = {
    "vectors": (NormedMlp, (4,), {}),
    "images": (partial(Conv4, blocks=2, size=8), (1, 8, 8), {}),
    "norm with activation": (ActNormNet, (1, 6, 6), {BatchNormAct2d: torch.relu}),
}


every_policy = pytest.mark.parametrize("norm", POLICIES)
every_model = pytest.mark.parametrize("name", MODELS)


def wrapped(name: str = "vectors", **options: Any) -> tuple[nn.Module, Any, Any, dict[type, Any]]:
    make, shape, after_norm = MODELS[name]
    model = seeded(make)
    options = {"inner_steps": STEPS, "multi_step_loss": False, "first_order_epochs": 0} | options
    return model, build(model, **options), class_tasks(shape, shots=2), after_norm


# --- training against the oracle -------------------------------------------------------------------------------------


@pytest.mark.sampled(5)
@pytest.mark.parametrize("engine", ALL_ENGINES)
@every_policy
@every_model
def test_training_under_each_policy_equals_the_oracle(name: str, norm: str, engine: str) -> None:
    model, learner, batch, after_norm = wrapped(name, norm=norm, engine=engine, multi_step_loss=True, msl_epochs=4)
    weights = msl_weights(STEPS, 0, 4)
    assert_step_equals_oracle(learner, model, batch, weights, norm=norm, after_norm=after_norm)


@pytest.mark.sampled(12)
@pytest.mark.parametrize("engine", ALL_ENGINES)
@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@every_policy
def test_parts_alone_and_together_equal_the_oracle(norm: str, affine: bool, statistics: bool, engine: str) -> None:
    model, learner, batch, _ = wrapped(
        norm=norm, engine=engine, per_step_norm_affine=affine, per_step_norm_statistics=statistics
    )
    assert learner.model.norm.weight.shape == ((STEPS, 6) if affine else (6,))
    rows = learner.model.norm.running_mean
    assert rows.shape == (STEPS, 6) if statistics else rows.numel() == 6
    assert_step_equals_oracle(learner, model, batch, last_only(STEPS), norm=norm)


def test_gradients_flow_through_the_support_statistics() -> None:
    model, learner, batch, _ = wrapped(norm="support")
    by_batch = reference_for(model, learner, batch, last_only(STEPS), norm="batch")
    learner.meta_step(batch)
    with pytest.raises(AssertionError):
        assert_same_gradients(gradients_of(learner), by_batch.gradients)


def test_each_pass_folds_its_moments_into_its_own_row_once() -> None:
    _, learner, batch, _ = wrapped(multi_step_loss=False)
    with torch.no_grad():
        learner.model.norm.running_mean.zero_()
        learner.model.norm.running_var.fill_(1.0)
        for _, rate in learner.learning_rates.items():
            rate.zero_()  # so that every step sees the same weights
    tasks = as_tasks(batch)
    mean, var = torch.zeros(STEPS, 6).double(), torch.ones(STEPS, 6).double()
    with torch.no_grad():
        for support_x, _, target_x, _ in tasks:
            for row in range(STEPS):
                for x in [support_x, target_x] if row == STEPS - 1 else [support_x]:
                    hidden = learner.model.first(x)
                    mean[row] = 0.9 * mean[row] + 0.1 * hidden.mean(0)
                    var[row] = 0.9 * var[row] + 0.1 * hidden.var(0, correction=1)
    learner.meta_step(batch)
    assert_same_values([learner.model.norm.running_mean, learner.model.norm.running_var], [mean, var])


@every_policy
def test_a_network_without_batch_norms_runs_no_more_passes_than_under_batch(norm: str) -> None:
    learner = MAML(seeded(lambda: Mlp(4, 6, 3)), inner_steps=2, norm=norm)
    support_x, support_y, *_ = as_tasks(class_tasks((4,)))[0]
    learner.meta_step(class_tasks((4,)))  # The first looks.
    learner.adapt(support_x, support_y)
    sizes: list[int] = []
    learner.model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    learner.meta_step(class_tasks((4,), tasks=1, targets=5))
    assert sizes == [3, 3, 15]
    sizes.clear()
    learner.adapt(support_x, support_y)
    assert sizes == [3, 3]


# --- evaluation and adapt against the oracle -------------------------------------------------------------------------


@pytest.mark.sampled(8)
@pytest.mark.parametrize("steps", [1, STEPS, STEPS + 4])
@every_policy
@every_model
def test_evaluation_and_adapted_module_equal_the_oracle(name: str, norm: str, steps: int) -> None:
    model, learner, batch, after_norm = wrapped(name, norm=norm)
    reference = reference_for(model, learner, batch, last_only(steps), norm=norm, training=False, after_norm=after_norm)
    result = learner.evaluate(batch, steps=steps, keep_predictions=True)
    assert (result.norm, result.steps, result.tasks) == (norm, steps, 2)
    assert result.loss == pytest.approx(float(reference.loss), rel=1e-9)
    assert_same_values(result.predictions, reference.predictions)
    right = [float((p.argmax(1) == y).double().mean()) for p, y in zip(reference.predictions, batch[3], strict=True)]
    assert result.accuracy == pytest.approx(sum(right) / 2, abs=1e-6)
    for index, (support_x, support_y, target_x, _) in enumerate(as_tasks(batch)):
        adapted = learner.adapt(support_x, support_y, steps=steps)
        assert_same_values([adapted(target_x)], [reference.predictions[index]])
        assert_same_values([adapted.eval()(target_x)], [reference.predictions[index]])
        fast = {n: p for n, p in adapted.named_parameters() if n in learner.learning_rates}
        assert_same_values(fast.values(), [reference.fast_weights[index][n] for n in fast])


@every_policy
def test_forward_in_eval_mode_is_the_evaluation_policy(norm: str) -> None:
    model, learner, batch, _ = wrapped(norm=norm)
    learner.eval()
    reference = reference_for(model, learner, batch, last_only(STEPS), norm=norm, training=False)
    output = learner(batch)
    torch.testing.assert_close(output.loss.detach(), reference.loss, rtol=1e-9, atol=0)
    assert_same_values(output.predictions, reference.predictions)


@pytest.mark.parametrize("norm", ["batch", "running", "support"])
def test_evaluating_under_another_policy_than_trained_warns_and_says_which(norm: str) -> None:
    model, learner, batch, _ = wrapped(norm="batch")
    reference = reference_for(model, learner, batch, last_only(STEPS), norm=norm, training=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = learner.evaluate(batch, norm=norm)
    assert [w.category for w in caught] == ([] if norm == "batch" else [MetaWrapWarning])
    assert result.norm == norm
    assert norm in str(result)
    assert result.loss == pytest.approx(float(reference.loss), rel=1e-9)


@pytest.mark.parametrize("norm", ["task", "task_layer"])
def test_a_blend_that_was_not_learned_is_refused(norm: str) -> None:
    _, learner, batch, _ = wrapped(norm="batch")
    with pytest.raises(ArgumentError, match=f'Make it with norm="{norm}"'):
        learner.evaluate(batch, norm=norm)


def test_interval_is_the_95_percent_one_over_tasks() -> None:
    _, learner, _, _ = wrapped()
    batch = class_tasks((4,), tasks=9, targets=3)
    result = learner.evaluate(batch)
    assert len(result.per_task) == 9
    assert result.mean == pytest.approx(float(result.per_task.mean()))
    assert result.interval == pytest.approx(1.96 * float(result.per_task.std()) / 3)


# --- what inductive means --------------------------------------------------------------------------------------------


@pytest.mark.sampled(9)
@every_model
@every_policy
def test_inductive_prediction_is_the_same_alone_and_in_any_company(norm: str, name: str) -> None:
    _, learner, batch, _ = wrapped(name, norm=norm)
    support_x, support_y, target_x, target_y = as_tasks(batch)[0]
    adapted = learner.adapt(support_x, support_y)

    def predictions(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        parts = [part[None] for part in (support_x, support_y, x, y)]
        return adapted(x).detach(), learner.evaluate(tuple(parts), keep_predictions=True).predictions[0]

    together = predictions(target_x, target_y)
    company = predictions(
        torch.cat([target_x[:2], 10 * torch.ones_like(target_x)]), torch.cat([target_y[:2], target_y])
    )
    same = [torch.allclose(c[:2], t[:2], rtol=1e-9, atol=1e-11) for c, t in zip(company, together, strict=True)]
    assert same == [norm != "batch"] * 2
    if norm != "batch":
        for index in range(len(target_x)):
            alone = predictions(target_x[index : index + 1], target_y[index : index + 1])
            assert_same_values(alone, [each[index : index + 1] for each in together])


@every_policy
def test_norm_that_keeps_no_statistics_follows_the_policy_too(norm: str) -> None:
    model = seeded(NormedMlp)
    model.norm = nn.BatchNorm1d(6, track_running_stats=False).double()
    learner = build(model, inner_steps=2, norm=norm, multi_step_loss=False)
    batch = class_tasks((4,), shots=2)
    reference = reference_for(model, learner, batch, last_only(2), norm=norm, training=False)
    result = learner.evaluate(batch, keep_predictions=True)
    assert_same_values(result.predictions, reference.predictions)
    for index, (support_x, support_y, target_x, _) in enumerate(as_tasks(batch)):
        assert_same_values([learner.adapt(support_x, support_y)(target_x)], [reference.predictions[index]])


# --- which row a returned module has ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "row"), [(0, 0), (1, 0), (2, 1), (None, STEPS - 1), (STEPS + 5, STEPS - 1)])
@every_policy
def test_adapted_module_has_the_documented_row(norm: str, steps: int | None, row: int) -> None:
    model, learner, batch, _ = wrapped(norm=norm)
    adapted = learner.adapt(batch[0][0], batch[1][0], steps=steps)
    ours = learner.model.norm
    assert type(adapted) is type(model)
    assert (type(adapted.norm) is nn.BatchNorm1d) is (norm not in ("task", "task_layer"))
    assert isinstance(adapted.norm, nn.BatchNorm1d)
    assert torch.equal(adapted.norm.weight, ours.weight[row])
    assert torch.equal(adapted.norm.bias, ours.bias[row])
    if norm == "batch":
        assert adapted.norm.running_mean is None
        assert adapted.norm.running_var is None
        assert not adapted.norm.track_running_stats
        return
    hidden = adapted.first(batch[0][0]).detach()
    mean, variance = hidden.mean(0), hidden.var(0, correction=0)
    if norm in ("task", "task_layer"):
        found = [adapted.norm.support_mean, adapted.norm.support_variance]
    else:
        found = [adapted.norm.running_mean, adapted.norm.running_var]
    if norm == "running":
        mean = mean + ours.target_shift[row] * (variance + ours.eps).sqrt()
        variance = (variance + ours.eps) * ours.target_log_ratio[row].exp() ** 2 - ours.eps
    assert_same_values(found, [mean, variance])


@every_policy
def test_zero_steps_is_the_initialisation_at_row_zero(norm: str) -> None:
    _, learner, batch, _ = wrapped(norm=norm)
    adapted = learner.adapt(batch[0][0], batch[1][0], steps=0)
    for name, parameter in adapted.named_parameters():
        if not name.startswith("norm."):
            assert torch.equal(parameter, dict(learner.model.named_parameters())[name])
    result = learner.evaluate(batch, steps=0, keep_predictions=True)
    assert result.steps == 0
    assert_same_values([adapted(batch[2][0])], result.predictions[:1])


@every_policy
def test_unwrap_gives_row_zero_and_the_users_class(norm: str) -> None:
    model, learner, batch, _ = wrapped(norm=norm)
    learner.meta_step(batch)
    plain = learner.unwrap()
    ours = dict(learner.model.named_parameters())
    assert type(plain) is NormedMlp
    assert type(plain.norm) is nn.BatchNorm1d
    assert [name for name, _ in plain.named_parameters()] == [name for name, _ in model.named_parameters()]
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, ours[name][0] if name.startswith("norm.") else ours[name])
    if norm == "running":
        assert torch.equal(plain.norm.running_mean, learner.model.norm.running_mean[0])
        model.load_state_dict(plain.state_dict())
    pickle.loads(pickle.dumps(plain))


# --- no_grad and inference_mode --------------------------------------------------------------------------------------


@pytest.mark.sampled(10)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@every_policy
def test_adapt_and_evaluate_are_the_same_under_no_grad_and_inference_mode(norm: str, mode: Any, engine: str) -> None:
    _, learner, batch, _ = wrapped(norm=norm, engine=engine)
    support_x, support_y, target_x, _ = as_tasks(batch)[0]
    expected = learner.adapt(support_x, support_y)(target_x).detach()
    result = learner.evaluate(batch)
    with mode():
        made_inside = tuple(part.clone() for part in batch)
        adapted = learner.adapt(made_inside[0][0], made_inside[1][0])
        assert torch.equal(adapted(target_x), expected)
        again = learner.evaluate(made_inside)
        output = learner.eval()(made_inside)
    assert (again.loss, again.accuracy) == (result.loss, result.accuracy)
    assert float(output.loss) == pytest.approx(result.loss, rel=1e-12)
    # What was made inside is an ordinary module: it can be trained outside.
    nn.functional.cross_entropy(adapted(target_x), batch[3][0]).backward()
    assert adapted.first.weight.grad is not None
    learner.train().meta_step(batch)


# --- rows of statistics ----------------------------------------------------------------------------------------------


@every_policy
def test_statistics_keep_pretrained_values_in_every_row_until_trained(norm: str) -> None:
    model = seeded(NormedMlp)
    with torch.no_grad():
        model.norm.running_mean.copy_(torch.arange(6.0))
        model.norm.running_var.copy_(torch.arange(1.0, 7.0))
    learner = MAMLPlusPlus(model, inner_steps=4, norm=norm)
    for name in ("weight", "bias", "running_mean", "running_var"):
        rows = getattr(learner.model.norm, name)
        assert rows.shape == (4, 6)
        assert all(torch.equal(row, getattr(model.norm, name)) for row in rows)


def test_maml_keeps_one_row_and_folds_every_pass_into_it() -> None:
    model = seeded(NormedMlp)
    learner = build(model, method=MAML, inner_steps=3)
    batch = class_tasks((4,))
    reference = reference_for(model, learner, batch, last_only(3))
    learner.meta_step(batch)
    assert_same_gradients(statistics_of(learner), reference.statistics)
    assert learner.model.norm.running_mean.numel() == 6


def test_running_policy_trained_for_a_while_evaluates_sensibly_and_without_nan() -> None:
    _, learner, _, _ = wrapped(norm="running", meta_lr=1e-2)
    for seed in range(10):
        learner.meta_step(class_tasks((4,), seed=seed))
    result = learner.evaluate(class_tasks((4,), tasks=5, seed=99))
    assert math.isfinite(result.loss)


def test_evaluation_reports_tasks_whose_inner_loop_diverged() -> None:
    _, learner, batch, _ = wrapped("vectors", norm="running", engine="functional")
    with torch.no_grad():
        for _, rates in learner.learning_rates.items():
            rates.fill_(math.inf)
    said = r'of \d+ tasks ended with a loss that is not finite under norm="running"'
    with pytest.warns(MetaWrapWarning, match=said):
        learner.evaluate(batch)
