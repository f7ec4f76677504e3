"""What users' models do: edit buffers and inputs, hold closures and hooks, return dataclasses, keep state."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from engine_cases import ENGINES
from torch import Tensor, nn
from users_network import BATCH, DOUBLE, Only, network

from metawrap import FOMAML, MAML, MAMLPlusPlus, TaskBatch, UnsupportedModuleError
from metawrap.engines.calling import PlainForms


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("gate", [F.hardswish, F.hardsigmoid])
def test_hard_gates_stand_in_with_the_same_values_and_first_derivatives(gate: Any, inplace: bool) -> None:
    # Not at the kinks, -3 and 3, where a derivative is a matter of choice.
    x = torch.linspace(-5, 5, 41, dtype=torch.float64) + 0.01
    found, wanted = (x.clone().requires_grad_() for _ in range(2))
    with PlainForms() as mode:
        value = gate(found * 1, inplace=inplace)
    assert mode.seen
    expected = gate(wanted * 1)
    assert torch.allclose(value, expected, rtol=0, atol=1e-15)
    gradients = [torch.autograd.grad(v.sum(), leaf)[0] for v, leaf in ((value, found), (expected, wanted))]
    # torch's own derivative of hardsigmoid is 1 / 6 in float32, whatever the dtype.
    assert torch.allclose(*gradients, rtol=0, atol=1e-8)


class Counting(nn.Module):
    """Doubles its hidden layer from the fifth call on, and keeps its last activation in a list."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)
        self.calls = 0
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        hidden = F.relu(self.first(x))
        self.seen = [hidden]
        return self.last(hidden if self.calls < 5 else 2 * hidden)


def test_what_forward_sets_on_its_module_stays_there_in_both_engines() -> None:
    learners = {engine: MAMLPlusPlus(Counting(), inner_steps=2, engine=engine) for engine in ENGINES}
    losses = {engine: [learner.meta_step(BATCH).loss for _ in range(3)] for engine, learner in learners.items()}
    assert losses["higher"] == losses["functional"]
    for learner in learners.values():
        # Three meta-steps, two tasks, two steps, a support and a target pass (MSL is on). The look does not count.
        assert learner.model.calls == 3 * 2 * 2 * 2
        learner.adapt(BATCH[0].support_x, BATCH[0].support_y)
        copy.deepcopy(learner)


class Averaging(nn.Module):
    """Averages its hidden layer in a buffer: through `.data`, in place, or in place with its graph."""

    def __init__(self, how: str, alias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)
        self.register_buffer("ema", torch.ones(8))
        self.how = how
        if alias:
            self.alias = self.ema

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        if self.training and self.how == "data":
            self.ema.data.mul_(0.9).add_(0.1 * hidden.data.mean(0))
        elif self.training:
            self.ema.mul_(0.9).add_(0.1 * (hidden.mean(0) if self.how == "graph" else hidden.detach().mean(0)))
        return self.last(torch.tanh(hidden * self.ema))


def averaging_by_hand(model: nn.Module) -> list[Tensor]:
    """The final buffer, and the meta-gradient of `first.weight` and `last.weight`: two steps, no module is called."""
    names = ["first.weight", "first.bias", "last.weight", "last.bias"]
    start = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    ema, total = torch.ones(8).double(), torch.zeros(()).double()

    def loss(fast: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        nonlocal ema
        hidden = x.double() @ fast["first.weight"].T + fast["first.bias"]
        ema = 0.9 * ema + 0.1 * hidden.detach().mean(0)
        return F.cross_entropy(torch.tanh(hidden * ema) @ fast["last.weight"].T + fast["last.bias"], y)

    for task in BATCH:
        fast = dict(start)
        for _ in range(2):
            gradients = torch.autograd.grad(
                loss(fast, task.support_x, task.support_y), [fast[n] for n in names], create_graph=True
            )
            fast = {n: fast[n] - 0.125 * g for n, g in zip(names, gradients, strict=True)}
        total = total + loss(fast, task.target_x, task.target_y) / len(BATCH)
    return [ema, *torch.autograd.grad(total, [start["first.weight"], start["last.weight"]])]


@pytest.mark.parametrize("change", ["none", "dtype", "copy"])
@pytest.mark.parametrize("how", ["data", "in place"])
@pytest.mark.parametrize("engine", ENGINES)
def test_buffers_that_are_edited_behind_torchs_back_are_followed_after_every_change(
    engine: str, how: str, change: str
) -> None:
    learner = MAML(Averaging(how), inner_steps=2, inner_lr=0.125, engine=engine)
    if change != "none":  # The first look sees other tensors than the meta-step.
        learner.eval()
        learner(BATCH)
        learner.train()
        learner(BATCH)
        learner.model.ema.fill_(1)
    if change == "copy":
        learner = copy.deepcopy(learner)
    learner.double()
    expected = averaging_by_hand(learner.model)
    learner(DOUBLE).loss.backward()
    model = learner.model
    found = [model.ema, model.first.weight.grad, model.last.weight.grad]
    for value, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("how", ["data", "in place"])
def test_a_buffer_that_is_edited_and_aliased_is_refused_at_every_try_and_may_be_evaluated(how: str) -> None:
    learner = MAMLPlusPlus(Averaging(how, alias=True), inner_steps=2)
    learner.evaluate(BATCH)  # In eval mode it is not edited.
    for _ in range(2):
        with pytest.raises(UnsupportedModuleError, match=r"'ema', which forward edits.*\(Averaging\).*'alias'"):
            learner.meta_step(BATCH)


@pytest.mark.parametrize("kind", [MAMLPlusPlus, FOMAML])
def test_a_buffer_that_carries_its_graph_is_refused_by_name_at_every_try(kind: type[MAML]) -> None:
    learner = kind(Averaging("graph"), inner_steps=2)
    for _ in range(2):
        with pytest.raises(UnsupportedModuleError, match=r"a graph into its buffer 'ema'.*detach\(\)"):
            learner.meta_step(BATCH)


def test_a_model_that_edits_no_buffer_is_lent_none() -> None:
    seen = set()

    class Reads(Only):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            seen.add(self.table.data_ptr())
            return super().forward(x * self.table)

    learner = MAMLPlusPlus(Reads(), inner_steps=2, engine="functional")
    learner.meta_step(BATCH)  # The first look is over.
    seen.clear()
    learner.meta_step(BATCH)
    learner.evaluate(BATCH)
    assert seen == {learner.model.table.data_ptr()}


def test_hooks_get_the_users_module_and_not_a_twin_of_it() -> None:
    learner = MAMLPlusPlus(network(), inner_steps=1)
    seen = set()
    learner.model[0].register_forward_hook(lambda module, args, output: seen.add(module))
    model = network()
    model[0].register_forward_hook(lambda module, args, output: seen.add(type(module)))
    assert MAMLPlusPlus(model, inner_steps=1).describe().engine == "functional"


def test_a_hook_on_a_parameter_is_carried_to_the_copy() -> None:
    model = network()
    model[3].weight.register_hook(lambda gradient: gradient * 0)
    learner = MAMLPlusPlus(model, inner_steps=1)
    before = learner.model[3].weight.detach().clone()
    learner.meta_step(BATCH)
    assert torch.equal(learner.model[3].weight, before)
    assert not torch.equal(learner.model[0].weight, model[0].weight)


class TypeTest(Only):
    def forward(self, x: Tensor) -> Tensor:
        return self.only(x) * (1.0 if type(self.only) is nn.Linear else 0.5)


def test_higher_is_checked_when_it_is_named_too() -> None:
    with pytest.raises(UnsupportedModuleError, match=r'engine="higher" cannot carry.*engine="functional"'):
        MAMLPlusPlus(TypeTest(), inner_steps=1, engine="higher").meta_step(BATCH)


class Closed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = self.layer = nn.Linear(4, 3)
        self.forward = lambda x: layer(x)  # type: ignore[method-assign]


def test_a_copied_learner_of_a_model_with_a_closure_trains_itself() -> None:
    learner = MAMLPlusPlus(Closed(), inner_steps=1)
    learner.meta_step(BATCH)
    copied = copy.deepcopy(learner)
    before = learner.model.layer.weight.detach().clone()
    copied.meta_step(BATCH)
    assert torch.equal(learner.model.layer.weight, before)
    assert not torch.equal(copied.model.layer.weight, before)


class EditsInput(Only):
    def forward(self, x: Tensor) -> Tensor:
        x -= 1
        return self.only(x)


def test_a_forward_that_edits_its_input_leaves_the_tasks_as_they_were() -> None:
    task = BATCH[0]
    before = task.map(Tensor.clone)
    learner = MAMLPlusPlus(EditsInput(), inner_steps=2)
    learner.meta_step(TaskBatch((task,)))
    learner.evaluate(task)
    learner.adapt(task.support_x, task.support_y)
    assert all(torch.equal(a, b) for a, b in zip(before.parts(), task.parts(), strict=True))


class RunningMean(Only):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        if self.fails and self.mean.abs().sum() > 0:
            raise KeyboardInterrupt
        return self.only(x)


def test_a_users_own_buffer_survives_an_interrupt_and_a_skipped_step() -> None:
    learner = MAMLPlusPlus(RunningMean(), inner_steps=2)
    learner.meta_step(BATCH)
    before = learner.model.mean.clone()
    nan = TaskBatch((BATCH[0].map(lambda x: x * float("nan") if x.is_floating_point() else x),))
    assert learner.meta_step(nan).skipped
    assert torch.equal(learner.model.mean, before)
    learner.model.fails = True
    with pytest.raises(KeyboardInterrupt):
        learner.meta_step(BATCH)
    assert torch.equal(learner.model.mean, before)


def test_an_interrupt_between_capture_and_use_leaves_no_statistics_behind() -> None:
    learner = MAMLPlusPlus(network(), inner_steps=1, norm="support")
    learner.meta_step(BATCH)

    def stop(module: nn.Module, args: object) -> None:
        if learner.wrapped.clock.captured:
            raise KeyboardInterrupt

    learner.model[3].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        learner.meta_step(BATCH)
    assert learner.wrapped.clock.captured == {}


def test_a_parameter_may_be_called_items() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.items = nn.Parameter(torch.zeros(4, 3))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.items

    learner = MAMLPlusPlus(Named(), inner_steps=1)
    learner.meta_step(BATCH)
    assert learner.learning_rates["items"].shape == (1,)


def test_a_module_used_on_its_own_follows_the_policy_as_its_unwrapped_form_does() -> None:
    learner = MAMLPlusPlus(network(), inner_steps=1).eval()
    assert torch.equal(learner.model(BATCH[0].support_x), learner.unwrap().eval()(BATCH[0].support_x))


def test_predictions_in_a_dataclass_are_detached() -> None:
    @dataclass
    class Output:
        logits: Tensor

    class Returns(Only):
        def forward(self, x: Tensor) -> Output:
            return Output(self.only(x))

    learner = MAMLPlusPlus(Returns(), inner_steps=1, loss_fn=lambda p, y: F.cross_entropy(p.logits, y))
    assert not learner(BATCH).predictions[0].logits.requires_grad


def test_embeddings_with_sparse_gradients_are_learned() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.only = nn.Embedding(9, 4, sparse=True), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.only(self.table(x).mean(1))

    words = torch.randint(0, 9, (2, 6, 5), generator=torch.Generator().manual_seed(0))
    labels = torch.arange(3).repeat(2, 2)
    learner = MAMLPlusPlus(Words(), inner_steps=1, adapt="only.*")
    before = learner.model.table.weight.detach().clone()
    learner.meta_step((words, labels, words, labels))
    assert not torch.equal(learner.model.table.weight, before)


class Observed(nn.Module):
    """Hooks its layers at its first call, as transformers does where hidden states are asked for, and keeps a log."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)
        self.log: dict[str, list[int]] = {"hidden": []}

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "observed"):
            self.observed = self.first.register_forward_hook(lambda _, args, output: self.log["hidden"].append(1))
        return self.last(torch.relu(self.first(x)))


def test_the_first_look_leaves_no_hooks_and_no_entries_in_the_models_containers() -> None:
    learner = MAMLPlusPlus(Observed(), inner_steps=2, engine="functional", multi_step_loss=False)
    learner.meta_step(BATCH)
    assert len(learner.model.first._forward_hooks) == 1
    assert len(learner.model.log["hidden"]) == 2 * (2 + 1)  # Tasks, support passes and target pass.
