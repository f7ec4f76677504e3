"""What users do around a learner: move it, feed it odd batches, bring odd optimizers and odd activations."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metawrap import ArgumentError, MAMLPlusPlus, TaskBatch, TaskError
from metawrap.engines.calling import HardGates

BATCH = TaskBatch.stacked(
    torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0)),
    torch.arange(3).repeat(2, 2),
    torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(1)),
    torch.arange(3).repeat(2, 2),
)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def test_a_learner_can_change_dtype_between_meta_steps_and_its_optimizer_follows() -> None:
    learner = MAMLPlusPlus(network(), inner_steps=2)
    learner.meta_step(BATCH)
    first = learner.optimizer.state[learner.model[0].weight]["exp_avg"].clone()
    learner.double()
    moved = learner.optimizer.state[learner.model[0].weight]["exp_avg"]
    assert moved.dtype == torch.float64
    assert torch.equal(moved, first.double())
    learner.meta_step(TaskBatch(tuple(t.map(lambda x: x.double() if x.is_floating_point() else x) for t in BATCH)))
    assert all(p.dtype == torch.float64 for p in learner.parameters())


def test_a_first_meta_step_with_a_loss_that_is_not_finite_is_skipped_without_blaming_an_engine() -> None:
    learner = MAMLPlusPlus(network(), inner_steps=2, loss_fn=lambda p, y: F.cross_entropy(p, y) * float("nan"))
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


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("gate", [F.hardswish, F.hardsigmoid])
def test_hard_gates_stand_in_with_the_same_values_and_first_derivatives(gate: object, inplace: bool) -> None:
    # Not at the kinks, -3 and 3, where a derivative is a matter of choice.
    x = torch.linspace(-5, 5, 41, dtype=torch.float64) + 0.01
    found, wanted = (x.clone().requires_grad_() for _ in range(2))
    with HardGates() as mode:
        value = gate(found * 1, inplace=inplace)  # type: ignore[operator]
    assert mode.seen
    expected = gate(wanted * 1)  # type: ignore[operator]
    assert torch.allclose(value, expected, rtol=0, atol=1e-15)
    gradients = [torch.autograd.grad(v.sum(), leaf)[0] for v, leaf in ((value, found), (expected, wanted))]
    # torch's own derivative of hardsigmoid is 1 / 6 in float32, whatever the dtype.
    assert torch.allclose(*gradients, rtol=0, atol=1e-8)


@pytest.mark.parametrize("engine", ["higher", "functional"])
def test_no_graph_outlives_a_meta_step(engine: str) -> None:
    graphs: list[weakref.ref[Tensor]] = []

    def remembered(prediction: Tensor, y: Tensor) -> Tensor:
        graphs.append(weakref.ref(prediction))
        return F.cross_entropy(prediction, y)

    model = nn.Sequential(network(), nn.Linear(3, 3))
    learner = MAMLPlusPlus(model, inner_steps=2, engine=engine, loss_fn=remembered)  # type: ignore[arg-type]
    learner.meta_step(BATCH)
    learner.evaluate(BATCH)
    gc.collect()
    assert graphs
    assert [ref for ref in graphs if ref() is not None] == []
