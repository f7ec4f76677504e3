"""What users do around a learner: move it, feed it odd batches, bring odd optimizers and losses."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from engine_cases import ENGINES
from torch import Tensor, nn
from torch.utils.data import DataLoader
from users_network import BATCH, DOUBLE, network

from metawrap import ArgumentError, MAMLPlusPlus, MetaWrapWarning, TaskBatch, TaskError
from metawrap.results import accuracy_of


def test_a_learner_can_change_dtype_between_meta_steps_and_its_optimizer_follows() -> None:
    learner = MAMLPlusPlus(network(), inner_steps=2)
    learner.meta_step(BATCH)
    first = learner.optimizer.state[learner.model[0].weight]["exp_avg"].clone()
    learner.double()
    moved = learner.optimizer.state[learner.model[0].weight]["exp_avg"]
    assert moved.dtype == torch.float64
    assert torch.equal(moved, first.double())
    learner.meta_step(DOUBLE)
    assert all(p.dtype == torch.float64 for p in learner.parameters())


def test_a_first_meta_step_with_a_loss_that_is_not_finite_is_skipped_without_blaming_an_engine() -> None:
    loss_fn = lambda p, y: F.cross_entropy(p, y) * float("nan")
    learner = MAMLPlusPlus(network(), inner_steps=2, engine="higher", loss_fn=loss_fn)
    before = copy.deepcopy(learner.state_dict())
    assert learner.meta_step(BATCH).skipped
    assert learner.describe().engine == "higher"
    for name, value in learner.state_dict().items():
        if isinstance(value, Tensor) and name != "skipped_steps":
            assert torch.equal(value, before[name]), name


def test_one_example_per_pass_is_refused_by_the_name_of_the_norm() -> None:
    learner = MAMLPlusPlus(network(), inner_steps=1)
    one = TaskBatch.stacked(
        torch.randn(1, 1, 4), torch.zeros(1, 1).long(), torch.randn(1, 1, 4), torch.zeros(1, 1).long()
    )
    with pytest.raises(TaskError, match=r"'1' normalises by the statistics of its batch.*at least 2 examples"):
        learner.meta_step(one)


def test_an_optimizer_that_needs_a_closure_is_refused_when_it_is_given() -> None:
    with pytest.raises(ArgumentError, match=r"optimizer: LBFGS.*Adam or SGD"):
        MAMLPlusPlus(network(), optimizer=torch.optim.LBFGS)


def test_an_assigned_optimizer_takes_over_and_one_of_the_users_own_model_is_refused() -> None:
    model = network()
    learner = MAMLPlusPlus(model, inner_steps=1)
    with pytest.raises(ArgumentError, match=r"optimizer: .*learner\.parameters\(\)"):
        learner.optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    assert isinstance(learner.optimizer, torch.optim.Adam)
    learner.optimizer = torch.optim.SGD(learner.parameters(), lr=0.5)
    with pytest.raises(ArgumentError, match=r"scheduler: .*learner\.optimizer"):
        learner.scheduler = torch.optim.lr_scheduler.StepLR(torch.optim.SGD(learner.parameters(), lr=0.5), 1)
    before = learner.model[3].weight.detach().clone()
    assert learner.meta_step(BATCH).meta_lr == 0.5
    assert torch.equal(learner.model[3].weight, before - 0.5 * learner.model[3].weight.grad)


@pytest.mark.parametrize("engine", ["higher", "functional"])
def test_no_graph_outlives_a_meta_step(engine: str) -> None:
    graphs: list[weakref.ref[Tensor]] = []

    def remembered(prediction: Tensor, y: Tensor) -> Tensor:
        graphs.append(weakref.ref(prediction))
        return F.cross_entropy(prediction, y)

    model = nn.Sequential(network(), nn.Linear(3, 3))
    learner = MAMLPlusPlus(model, inner_steps=2, engine=engine, loss_fn=remembered)
    learner.meta_step(BATCH)
    learner.evaluate(BATCH)
    gc.collect()
    assert graphs
    assert [ref for ref in graphs if ref() is not None] == []


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("part", ["model.1.weight", "model.0.weight", "learning_rates.3"])
def test_what_is_frozen_after_a_meta_step_stays_where_it_is(part: str, engine: str) -> None:
    learner = MAMLPlusPlus(network(), inner_steps=2, engine=engine)
    learner.meta_step(BATCH)
    frozen = [p for name, p in learner.named_parameters() if name.startswith(part)]
    assert frozen
    for parameter in frozen:
        parameter.requires_grad_(False)
    before = [parameter.clone() for parameter in frozen]
    for _ in range(2):
        learner.meta_step(BATCH)
    assert all(torch.equal(old, new) for old, new in zip(before, frozen, strict=True))


def test_a_learner_that_is_frozen_for_deployment_adapts_all_the_same() -> None:
    learner = MAMLPlusPlus(network(), inner_steps=2)
    task = BATCH[0]
    expected = learner.adapt(task.support_x, task.support_y)(task.target_x)
    frozen = MAMLPlusPlus(network(), inner_steps=2).requires_grad_(False).eval()
    assert torch.equal(frozen.adapt(task.support_x, task.support_y)(task.target_x), expected)


def test_autocast_around_the_loop_trains_as_autocast_around_each_step() -> None:
    def losses(*, around_loop: bool) -> list[float]:
        learner = MAMLPlusPlus(
            network(), inner_steps=2, adapt="3.*", inner_lr=0.01, optimizer=lambda p: torch.optim.SGD(p, lr=0.3)
        )
        found = []
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=around_loop):
            for _ in range(4):
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    found.append(learner.meta_step(BATCH).loss)
        return found

    assert losses(around_loop=True) == losses(around_loop=False)


@pytest.mark.parametrize(
    ("prediction", "y", "accuracy"),
    [
        (torch.tensor([[3.0], [-1.0]]), torch.tensor([1, 0]), None),  # one logit: no classes to choose from
        (torch.zeros(2, 5, 7), torch.zeros(2, 5).long(), None),  # classes on the last axis
        (torch.eye(3), torch.tensor([0, -100, 1]), 0.5),  # what the loss ignores does not count
        (torch.eye(3), torch.tensor([0, 1, 2]), 1.0),
    ],
)
def test_accuracy_is_of_classes_or_there_is_none(prediction: Tensor, y: Tensor, accuracy: float | None) -> None:
    found = accuracy_of(prediction, y, F.cross_entropy)
    assert (found is None) == (accuracy is None)
    assert accuracy is None or found == accuracy


def test_a_rate_set_by_hand_is_not_overwritten_in_silence() -> None:
    learner = MAMLPlusPlus(network(), inner_steps=1)
    learner.optimizer.param_groups[0]["lr"] = 0.5
    with pytest.warns(MetaWrapWarning, match=r"0\.5 is not one of the cosine schedule.*cosine_annealing=False"):
        assert learner.meta_step(BATCH).meta_lr == 1e-3
    learner.epoch = 7
    saved = copy.deepcopy(learner.optimizer.state_dict())
    learner.epoch = 9
    learner.optimizer.load_state_dict(saved)  # going back to an earlier epoch's state is no surprise
    learner.meta_step(BATCH)


def test_setting_the_epoch_moves_the_rate_for_those_who_step_themselves() -> None:
    learner = MAMLPlusPlus(network(), inner_steps=1, epochs=10, meta_lr=1e-3, min_meta_lr=1e-5)
    learner.epoch = 10
    assert learner.optimizer.param_groups[0]["lr"] == pytest.approx(1e-5)


def test_a_data_loader_of_tasks_is_a_batch() -> None:
    loader = DataLoader([task.parts() for task in BATCH], batch_size=2)
    learner = MAMLPlusPlus(network(), inner_steps=1)
    expected = learner.evaluate(BATCH).mean
    assert learner.evaluate(loader).mean == expected
    assert learner.evaluate(next(iter(loader))).mean == expected


def test_a_loss_with_weights_is_copied_and_the_users_own_left_alone() -> None:
    loss = nn.CrossEntropyLoss(weight=torch.ones(3))
    learner = MAMLPlusPlus(network(), inner_steps=1, loss_fn=loss).double()
    assert loss.weight is not None
    assert loss.weight.dtype == torch.float32
    learner.meta_step(DOUBLE)


def test_an_option_whose_part_is_off_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"msl_epochs: has no effect with multi_step_loss=False"):
        MAMLPlusPlus(network(), multi_step_loss=False, msl_epochs=5)


def test_a_meta_step_in_inference_mode_leaves_the_learner_usable_outside() -> None:
    learner = MAMLPlusPlus(network(), inner_steps=1)
    with torch.inference_mode():
        learner.meta_step(BATCH)
    learner.meta_step(BATCH)
    assert learner.iteration == 2


def test_a_replaced_module_is_reported_not_left_untrained() -> None:
    learner = MAMLPlusPlus(network(), inner_steps=1)
    learner.meta_step(BATCH)
    learner.model[3] = nn.Linear(8, 3)
    with pytest.raises(ArgumentError, match=r"optimizer: it does not hold model\.3\.weight.*wrap the model again"):
        learner.meta_step(BATCH)


def test_a_kept_norm_is_kept_through_train_on_the_model() -> None:
    learner = MAMLPlusPlus(network(), inner_steps=1, wrapping={"keep_norm": "1"})
    before = copy.deepcopy(dict(learner.model[1].named_buffers()))
    learner.model.train()
    learner.meta_step(BATCH)
    assert all(torch.equal(value, before[name]) for name, value in learner.model[1].named_buffers())


def test_a_frozen_norm_that_is_made_per_step_is_reported() -> None:
    model = network()
    model[1].eval()
    with pytest.warns(MetaWrapWarning, match=r"1: in eval mode.*'keep_norm': \['1'\]"):
        MAMLPlusPlus(model)
