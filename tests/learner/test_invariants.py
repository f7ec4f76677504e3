"""The invariants of design.md, by number; 7 to 9 are tested with training and data."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from engine_cases import ALL_ENGINES, ENGINES, POLICIES
from face import (
    as_tasks,
    assert_same_state,
    assert_step_equals_oracle,
    build,
    fingerprint,
    gradients_of,
    last_only,
    poisoned,
    reference_for,
    snapshot,
    statistics_of,
    unchanged,
    values_of,
)
from models import Conv4, LSTMClassifier, NormedMlp, TiedNet, class_tasks, hooked_conv4, seeded
from oracle import assert_same_gradients
from torch import Tensor, nn

from metawrap import DivergedError, MAMLPlusPlus, MetaWrapError, MetaWrapWarning, Task, TaskError

BATCH = class_tasks((4,), tasks=4)


def small(**options: Any) -> Any:
    return build(seeded(NormedMlp), **{"multi_step_loss": False, "first_order_epochs": 0} | options)


every_engine = pytest.mark.parametrize("engine", ENGINES)
all_engines = pytest.mark.parametrize("engine", ALL_ENGINES)


# --- 1: the user's module is never changed ---------------------------------------------------------------------------


@pytest.mark.sampled(5)
@every_engine
@pytest.mark.parametrize(
    ("make", "shape"),
    [(NormedMlp, (4,)), (TiedNet, (6,)), (LSTMClassifier, (4, 3)), (hooked_conv4, (1, 16, 16)), (Conv4, (1, 16, 16))],
)
def test_1_users_module_is_never_changed(make: Any, shape: tuple[int, ...], engine: str) -> None:
    model = seeded(make)
    before = fingerprint(model)
    learner = MAMLPlusPlus(model, inner_steps=2, engine=engine)
    assert fingerprint(model) == before
    batch = class_tasks(shape)
    learner.meta_step(batch)
    learner.evaluate(batch)
    learner.adapt(batch[0][0], batch[1][0])
    learner.unwrap()
    assert fingerprint(model) == before
    owned = {id(value) for value in [*model.parameters(), *model.buffers(), *model.modules()]}
    ours = [*learner.parameters(), *learner.buffers(), *learner.modules()]
    assert not owned & {id(value) for value in ours}
    storages = {value.data_ptr() for value in [*model.parameters(), *model.buffers()] if value.numel()}
    returned = [learner.unwrap(), learner.adapt(batch[0][0], batch[1][0]), learner]
    for module in returned:
        assert not storages & {v.data_ptr() for v in [*module.parameters(), *module.buffers()] if v.numel()}


def test_1_what_is_returned_shares_no_memory_with_the_learner() -> None:
    learner = small()
    state = snapshot(dict(learner.state_dict()))
    for module in (learner.unwrap(), learner.adapt(BATCH[0][0], BATCH[1][0])):
        for value in [*module.parameters(), *module.buffers()]:
            with torch.no_grad():
                value.zero_()
    assert_same_state(dict(learner.state_dict()), state)


# --- 2: a batch is the mean of its tasks -----------------------------------------------------------------------------


@pytest.mark.sampled(5)
@all_engines
@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 100])
def test_2_meta_step_is_the_mean_of_single_task_gradients_whatever_the_chunking(chunk: int, engine: str) -> None:
    def gradients(batch: Any, **options: Any) -> tuple[float, dict[str, Tensor | None]]:
        learner = small(**options)
        return learner.meta_step(batch).loss, gradients_of(learner)

    loss, whole = gradients(BATCH, tasks_per_backward=chunk, engine=engine)
    alone = [gradients([Task(*task)], engine="functional") for task in as_tasks(BATCH)]
    mean = {name: sum(each[name] for _, each in alone) / 4 for name in whole}  # type: ignore[misc]
    assert_same_gradients(whole, mean)
    assert loss == pytest.approx(sum(single for single, _ in alone) / 4, rel=1e-9)


@pytest.mark.sampled(2)
@all_engines
def test_2_chunking_leaves_the_same_statistics_and_weights(engine: str) -> None:
    learners = [small(tasks_per_backward=chunk, engine=engine) for chunk in (1, 3, 4)]
    for learner in learners:
        for seed in range(3):
            learner.meta_step(class_tasks((4,), tasks=4, seed=seed))
    first = dict(learners[0].state_dict())
    for learner in learners[1:]:
        for name, value in learner.state_dict().items():
            if isinstance(value, Tensor):
                torch.testing.assert_close(value, first[name], rtol=1e-7, atol=1e-9, msg=name)


def test_2_forward_and_meta_step_agree() -> None:
    one, other = small(), small()
    loss = one(BATCH).loss
    loss.backward()
    assert float(loss.detach()) == pytest.approx(other.meta_step(BATCH).loss, rel=1e-12)
    assert_same_gradients(gradients_of(one), gradients_of(other))
    assert_same_gradients(statistics_of(one), statistics_of(other))


# --- 3: evaluation and adapt change nothing --------------------------------------------------------------------------


@pytest.mark.sampled(5)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", POLICIES)
@every_engine
def test_3_evaluation_and_adapt_change_nothing(engine: str, norm: str, training: bool) -> None:
    learner = small(engine=engine, norm=norm).train(training)
    if training:
        learner.meta_step(BATCH)
    before, gradients = fingerprint(learner), gradients_of(learner)
    state, optimizer = snapshot(dict(learner.state_dict())), snapshot(learner.optimizer.state_dict())
    rng = torch.random.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MetaWrapWarning)
        for policy in {"batch", "running", "support", norm}:
            learner.evaluate(BATCH, norm=policy, steps=3)
        learner.adapt(BATCH[0][0], BATCH[1][0], steps=3)(BATCH[2][0])
        learner.unwrap()
        learner.describe()
    if not training:
        learner(BATCH)
    assert learner.training is training
    assert fingerprint(learner) == before
    assert_same_state(dict(learner.state_dict()), state)
    assert_same_state(learner.optimizer.state_dict(), optimizer)
    assert_same_state(gradients_of(learner), gradients)
    assert torch.equal(torch.random.get_rng_state(), rng)


@every_engine
def test_3_evaluating_between_steps_does_not_change_the_training(engine: str) -> None:
    quiet, watched = small(engine=engine), small(engine=engine)
    for seed in range(3):
        batch = class_tasks((4,), seed=seed)
        quiet.meta_step(batch)
        watched.meta_step(batch)
        watched.evaluate(BATCH)
        watched.adapt(BATCH[0][0], BATCH[1][0])
    assert_same_state(dict(watched.state_dict()), dict(quiet.state_dict()))


def test_3_an_error_in_the_users_forward_leaves_the_learner_usable() -> None:
    learner = small(engine="functional")
    with unchanged(learner), pytest.raises(TaskError):
        learner.adapt(torch.zeros(3, 7, dtype=torch.float64), torch.arange(3))
    with pytest.raises(TaskError):
        learner.meta_step(class_tasks((7,)))
    assert_same_state(values_of(learner), values_of(small()))
    assert learner.meta_step(BATCH).loss == small(engine="functional").meta_step(BATCH).loss


# --- 4: first order still trains the rates (against the oracle in test_maml) ------------------------------------------


@every_engine
def test_4_first_order_gives_the_rates_their_exact_gradient(engine: str) -> None:
    learner = small(engine=engine, first_order_epochs=9)
    reference = reference_for(seeded(NormedMlp), learner, BATCH, last_only(2), second_order=False)
    learner.meta_step(BATCH)
    rates = {name: g for name, g in gradients_of(learner).items() if name.startswith("lr/")}
    assert_same_gradients(rates, {name: reference.gradients[name] for name in rates})
    assert float(learner.learning_rates["linear.weight"].grad.abs().min()) > 0


# --- 5: frozen stays frozen, unused is reported ----------------------------------------------------------------------


@every_engine
def test_5_frozen_parameter_stays_frozen_everywhere(engine: str) -> None:
    model = seeded(NormedMlp)
    model.first.weight.requires_grad_(False)
    model.norm.bias.requires_grad_(False)
    learner = build(model, engine=engine, multi_step_loss=False)
    frozen = {name: dict(learner.model.named_parameters())[name] for name in ("first.weight", "norm.bias")}
    before = {name: parameter.detach().clone() for name, parameter in frozen.items()}
    assert not set(frozen) & set(learner.learning_rates)
    assert_step_equals_oracle(learner, model, BATCH, last_only(2))
    for name, parameter in frozen.items():
        assert not parameter.requires_grad
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])
    for returned in (learner.unwrap(), learner.adapt(BATCH[0][0], BATCH[1][0])):
        assert not returned.first.weight.requires_grad
        assert torch.equal(returned.first.weight, model.first.weight)
    assert {"first.weight", "norm.bias"} <= set(learner.describe().frozen)


class WithUnused(NormedMlp):
    def __init__(self) -> None:
        super().__init__()
        self.never_called = nn.Linear(3, 3)


@every_engine
def test_5_unused_parameter_is_reported_not_a_crash(engine: str) -> None:
    learner = build(seeded(WithUnused), engine=engine, multi_step_loss=False)
    before = learner.model.never_called.weight.detach().clone()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        metrics = learner.meta_step(BATCH)
        learner.evaluate(BATCH)
    said = " ".join(str(warning.message) for warning in caught) + str(learner.describe().warnings)
    assert "never_called" in said
    assert not metrics.skipped
    assert torch.equal(learner.model.never_called.weight, before)


# --- 6: a non-finite meta-gradient never reaches the weights ---------------------------------------------------------


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1)


@pytest.mark.sampled(5)
@all_engines
@pytest.mark.parametrize(
    "options",
    [{"tasks_per_backward": 1}, {"tasks_per_backward": 4}, {"optimizer": sgd}],
    ids=["chunks of 1", "chunks of 4", "sgd"],
)
def test_6_a_non_finite_step_changes_no_weight_statistic_or_optimizer_state(
    options: dict[str, Any], engine: str
) -> None:
    learner = small(engine=engine, inner_steps=3, **options)
    for seed in range(2):
        learner.meta_step(class_tasks((4,), seed=seed))  # so that the optimizer has a momentum that would move weights
    parameters, statistics = values_of(learner), statistics_of(learner)
    optimizer = snapshot(learner.optimizer.state_dict()["state"])
    assert learner.meta_step(poisoned(BATCH)).skipped
    assert_same_state(values_of(learner), parameters)
    assert_same_state(statistics_of(learner), statistics)
    assert_same_state(learner.optimizer.state_dict()["state"], optimizer)


def test_6_training_after_a_skipped_step_is_as_if_it_never_happened() -> None:
    clean, hurt = small(), small()
    for seed in range(4):
        if seed == 2:
            assert hurt.meta_step(poisoned(BATCH)).skipped
        for learner in (clean, hurt):
            assert not learner.meta_step(class_tasks((4,), seed=seed)).skipped
    assert_same_state(values_of(hurt), values_of(clean))
    assert_same_state(statistics_of(hurt), statistics_of(clean))


def test_6_training_stops_with_a_clear_error_after_the_set_number_in_a_row() -> None:
    learner = small(max_skipped_steps=3)
    learner.meta_step(BATCH)
    weights = values_of(learner)

    def keep_training() -> None:
        for _ in range(200):
            learner.meta_step(poisoned(BATCH))

    with pytest.raises(DivergedError, match=r"finite|NaN|inf"):
        keep_training()
    assert_same_state(values_of(learner), weights)


def test_6_skipped_steps_that_are_not_in_a_row_do_not_stop_training() -> None:
    learner = small(max_skipped_steps=2)
    for _ in range(8):
        learner.meta_step(poisoned(BATCH))
        learner.meta_step(BATCH)


def test_6_skipped_steps_are_counted_in_the_state() -> None:
    learner = small()
    learner.meta_step(BATCH)
    for _ in range(3):
        learner.meta_step(poisoned(BATCH))
    assert int(learner.skipped_steps[0]) == 3  # total, in a row, longest row


# --- 10: errors name the module or argument, the cause, and the fix (the rest: checks/test_bad_input.py) --------------


def test_10_a_batch_whose_parts_disagree_or_that_holds_no_task_is_refused() -> None:
    learner = small()
    with pytest.raises(TaskError, match=r"target_x.*3.*|number of tasks"):
        learner.meta_step((*BATCH[:2], BATCH[2][:3], BATCH[3]))
    with pytest.raises(TaskError, match=r"support"):
        learner.meta_step([Task(*as_tasks(BATCH)[0]), "task"])


def test_10_a_model_without_anything_to_adapt_is_refused() -> None:
    model = seeded(NormedMlp).requires_grad_(False)
    with pytest.raises(MetaWrapError, match=r"(?i)requires_grad|frozen|adapt"):
        MAMLPlusPlus(model)
    with pytest.raises(MetaWrapError, match=r"(?i)module"):
        MAMLPlusPlus("resnet18")
