"""ANIL against MAML with a body that stands still, finite differences, and one inner step by hand."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from face import assert_same_state, fingerprint
from method_cases import MLP, assert_a_failed_call_changes_nothing, conv_tasks, gradients, mlp, net, vector_tasks
from oracle import assert_same_gradients
from torch import nn

from metawrap import ANIL, MAML, Task, TaskError, UnsupportedModuleError


@pytest.mark.parametrize("norm", ["batch", "support"])
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("steps", [1, 3])
def test_gradient_is_that_of_maml_whose_body_has_rates_of_zero(norm, first_order, steps):
    model, batch = net(), conv_tasks(2)
    anil = ANIL(model, inner_steps=steps, learn_inner_lr=True, first_order=first_order, norm=norm)
    maml = MAML(
        model,
        inner_steps=steps,
        learn_inner_lr=True,
        norm=norm,
        engine="functional",
        first_order_epochs=10**6 if first_order else 0,
    )
    with torch.no_grad():
        for name, rate in maml.learning_rates.items():
            rate.fill_(0.1 if name.startswith("linear") else 0.0)
    anil.evaluate(batch[:1])  # The head is known from then on, and has its rates.
    found, expected = anil(batch), maml(batch)
    found.loss.backward()
    expected.loss.backward()
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-9, atol=0)
    torch.testing.assert_close(found.step_losses[:, -1], expected.step_losses[:, -1], rtol=1e-9, atol=0)
    of_model = dict(maml.model.named_parameters())
    wanted = {f"model.{name}": p.grad for name, p in of_model.items()}
    ours = gradients(anil)
    assert_same_gradients({name: g for name, g in ours.items() if name in wanted}, wanted)
    for name in ("linear.weight", "linear.bias"):
        got, want = anil.learning_rates[name].grad, maml.learning_rates[name].grad
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_one_inner_step_is_that_by_hand():
    model, [task] = mlp(), vector_tasks(1)
    numbers = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}

    def embed(x: np.ndarray) -> np.ndarray:
        return np.tanh(x @ numbers["body.0.weight"].T + numbers["body.0.bias"])

    support, target = embed(task.support_x.numpy()), embed(task.target_x.numpy())
    weight, bias = numbers["head.weight"], numbers["head.bias"]
    logits = support @ weight.T + bias
    shares = np.exp(logits - logits.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    shares[np.arange(len(support)), task.support_y.numpy()] -= 1
    shares /= len(support)
    weight, bias = weight - 0.3 * shares.T @ support, bias - 0.3 * shares.sum(0)
    learner = ANIL(model, inner_steps=1, inner_lr=0.3)
    expected = target @ weight.T + bias
    np.testing.assert_allclose(learner([task]).predictions[0].numpy(), expected, rtol=1e-9)
    module = learner.adapt(task.support_x, task.support_y)
    np.testing.assert_allclose(module.head.weight.detach().numpy(), weight, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(module.body[0].weight.detach().numpy(), numbers["body.0.weight"], rtol=0)
    np.testing.assert_allclose(module(task.target_x).detach().numpy(), expected, rtol=1e-9)


def test_zero_steps_predict_as_the_initialisation():
    learner, [task] = ANIL(net(), norm="batch"), conv_tasks(1)
    found = learner.evaluate(task, steps=0, keep_predictions=True).predictions[0]
    torch.testing.assert_close(found, learner.unwrap()(task.target_x).detach(), rtol=1e-9, atol=1e-12)
    better = learner.evaluate(Task(task.support_x, task.support_y, task.support_x, task.support_y), steps=50)
    assert better.loss < learner.evaluate(task, steps=0).loss


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("head", [None, "linear"])
def test_a_state_from_before_any_task_makes_a_trained_learner_as_it_was_then(learned, head):
    def build(head=head) -> ANIL:
        return ANIL(net(), inner_steps=2, learn_inner_lr=learned, head=head)

    saved, learner, batch = build(None), build(), conv_tasks(2)
    state, optimizer = copy.deepcopy(saved.state_dict()), copy.deepcopy(saved.optimizer.state_dict())
    for _ in range(2):
        learner.meta_step(batch)
    learner.evaluate(batch)
    trained = copy.deepcopy(learner.state_dict())
    learner.load_state_dict(state)
    learner.optimizer.load_state_dict(optimizer)
    if head is None:
        assert_same_state(dict(learner.state_dict()), dict(state))
    assert learner.describe()
    evaluated = [one.evaluate(batch, keep_predictions=True).predictions for one in (learner, saved)]
    assert_same_state(*evaluated)
    for _ in range(2):
        assert learner.meta_step(batch).loss == saved.meta_step(batch).loss
    assert_same_state(dict(learner.state_dict()), dict(saved.state_dict()))
    # And the other way round, into one that has gone back.
    learner.load_state_dict(state)
    learner.load_state_dict(trained)
    assert_same_state(dict(learner.state_dict()), dict(trained))
    held = {id(p) for group in learner.optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in learner.parameters() if p.requires_grad} <= held <= set(map(id, learner.parameters()))


def test_a_part_of_a_state_leaves_the_rates_alone():
    learner = ANIL(net(), inner_steps=2, learn_inner_lr=True)
    learner.meta_step(conv_tasks(2))
    rates = copy.deepcopy(learner.learning_rates.state_dict())
    learner.load_state_dict({f"model.{name}": v for name, v in learner.model.state_dict().items()}, strict=False)
    assert_same_state(learner.learning_rates.state_dict(), rates)


def test_a_failed_first_call_leaves_no_rates():
    [task] = vector_tasks(1)
    learner, twin = ANIL(mlp(), learn_inner_lr=True), ANIL(mlp(), learn_inner_lr=True)
    broken = Task(task.support_x, task.support_y, task.target_x[:, :3], task.target_y)
    assert_a_failed_call_changes_nothing(learner, learner.meta_step, [broken])
    assert learner.meta_step([task]).loss == twin.meta_step([task]).loss
    assert_same_state(dict(learner.state_dict()), dict(twin.state_dict()))


def test_learns_and_moves_its_rates():
    learner, batch = ANIL(mlp(), inner_steps=3, learn_inner_lr=True, meta_lr=0.01), vector_tasks(3)
    losses = [learner.meta_step(batch).loss for _ in range(40)]
    assert losses[-1] < 0.6 * losses[0]
    assert all(bool((rate != 0.1).all()) for _, rate in learner.learning_rates.items())


def test_permuted_labels_permute_the_logits():
    model, [task] = mlp(), vector_tasks(1)
    order = torch.tensor([2, 0, 1])
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.head.weight.copy_(model.head.weight[order.argsort()])
        other.head.bias.copy_(model.head.bias[order.argsort()])
    one = ANIL(model).evaluate(task, keep_predictions=True).predictions[0]
    renamed = Task(task.support_x, order[task.support_y], task.target_x, order[task.target_y])
    torch.testing.assert_close(ANIL(other).evaluate(renamed, keep_predictions=True).predictions[0][:, order], one)


def test_more_classes_than_outputs_are_refused_by_name():
    learner = ANIL(mlp(2))
    before = fingerprint(learner)
    with pytest.raises(TaskError, match=r"support_y holds labels 0\.\.2, but the model has 2 outputs"):
        learner.meta_step(vector_tasks(1, ways=3))
    assert fingerprint(learner) == before


class HeadOfTwo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 6)
        self.head = nn.Sequential(
            nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)), nn.Hardswish(), nn.Dropout(0.0), nn.Linear(5, 3)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.body(x)))


def test_a_named_head_of_several_layers_with_a_parametrization_and_a_hard_gate():
    torch.manual_seed(0)
    model, batch = HeadOfTwo().double(), vector_tasks(2)
    anil = ANIL(model, inner_steps=2, head="head", learn_inner_lr=True)
    maml = MAML(model, inner_steps=2, adapt="head.*", norm="batch", engine="functional")
    anil(batch).loss.backward()
    maml(batch).loss.backward()
    wanted = {f"model.{name}": p.grad for name, p in maml.model.named_parameters()}
    assert_same_gradients({name: g for name, g in gradients(anil).items() if name in wanted}, wanted)
    found = anil.evaluate(batch[0], keep_predictions=True).predictions[0]
    module = anil.adapt(batch[0].support_x, batch[0].support_y)
    torch.testing.assert_close(module(batch[0].target_x).detach(), found, rtol=1e-9, atol=1e-12)


def test_frozen_parts_stay_and_hooks_fire():
    model, calls = mlp(), []
    model.head.bias.requires_grad_(False)
    model.head.register_forward_hook(lambda *_: calls.append(1))
    learner = ANIL(model, inner_steps=2)
    [task] = vector_tasks(1)
    learner.meta_step([task])
    assert list(learner.learning_rates) == ["head.weight"]
    assert len(calls) >= 3
    module = learner.adapt(task.support_x, task.support_y)
    assert_same_state(module.head.bias, model.head.bias)
    assert not torch.equal(module.head.weight, learner.model.head.weight)


def test_double_and_a_users_optimizer_with_named_parameters():
    def build() -> ANIL:
        return ANIL(MLP(), learn_inner_lr=True, optimizer=lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9))

    torch.manual_seed(0)
    learner = build()
    singles = [task.map(lambda t: t.float() if t.is_floating_point() else t) for task in vector_tasks(2)]
    learner.meta_step(singles)
    learner.double().meta_step(vector_tasks(2))
    named = ANIL(mlp(), learn_inner_lr=True)
    named.optimizer = torch.optim.Adam(named.named_parameters(), lr=0.01)
    named.meta_step(vector_tasks(1))
    [group] = named.optimizer.param_groups
    assert group["param_names"] == [name for name, _ in named.named_parameters()]
    assert len(group["params"]) == 6


def test_describes_what_is_adapted():
    learner = ANIL(net())
    learner.meta_step(conv_tasks(1))
    told = learner.describe()
    assert set(told.adapted) == {"linear.weight", "linear.bias"}
    assert told.rates == 10
    assert told.settings["inner_steps"] == 5
    assert told.settings["first_order"] is False
    assert "ANIL" in str(told)


class Behind(MLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.log_softmax(super().forward(x), 1)


class Tied(MLP):
    def __init__(self) -> None:
        super().__init__(ways=4, width=4)
        self.head.weight = self.body[0].weight


class Frozen(MLP):
    def __init__(self) -> None:
        super().__init__()
        self.head.requires_grad_(False)


class NormedHead(MLP):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3))


@pytest.mark.parametrize(
    ("model", "head", "words"),
    [
        (Behind, None, "No module's output is the prediction itself"),
        (Behind, "head", "does more behind the head 'head'"),
        (Tied, None, r"shares 'body\.0\.weight' with Linear\.weight"),
        (Frozen, None, "no parameters that are not frozen"),
        (NormedHead, "head", "holds the batch norm '0'"),
        (lambda: nn.Linear(4, 3), None, "Use MAML"),
    ],
)
def test_heads_that_cannot_be_fitted_are_refused_by_name(model, head, words):
    made = model().double()
    before = fingerprint(made)
    with pytest.raises(UnsupportedModuleError, match=words):
        ANIL(made, head=head).meta_step(vector_tasks(1))
    assert fingerprint(made) == before


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2 * g * ctx.saved_tensors[0]


class OnceHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Sequential(nn.Linear(5, 3), Square())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


class Square(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Once.apply(x)


def test_a_head_without_second_derivative_is_refused_and_runs_in_first_order():
    torch.manual_seed(0)
    with pytest.raises(UnsupportedModuleError, match=r"cannot be differentiated twice.*first_order=True"):
        ANIL(OnceHead().double(), head="head").meta_step(vector_tasks(1))
    ANIL(OnceHead().double(), head="head", first_order=True).meta_step(vector_tasks(1))
