"""What the methods on an embedding share: the embedding, its statistics, and the module that is handed out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from models import Conv4, NormedMlp, TwoInputs, class_tasks, seeded
from torch import Tensor, nn

from metawrap import ArgumentError, ProtoNet, Task, TaskError, UnsupportedModuleError, methods
from metawrap.training.run_settings import METHODS

INNER_LOOPS = {"maml++", "maml", "fomaml", "meta-sgd", "reptile", "lstm", "anil", "boil"}
# Those that have an inner loop, or keep the user's own head.
NOT_FITTED = INNER_LOOPS | {"fine-tune", "multi-task", "zero-step"}


def task_of(shape: tuple[int, ...] = (4,), **options: Any) -> Task:
    return Task(*(part[0] for part in class_tasks(shape, tasks=1, **options)))


def embedded_by_hand(model: Any, x: Tensor, mean: Tensor, variance: Tensor) -> np.ndarray:
    """NormedMlp's embedding, in numpy."""
    first = x.numpy() @ model.first.weight.detach().numpy().T + model.first.bias.detach().numpy()
    normed = (first - np.asarray(mean)) / np.sqrt(np.asarray(variance) + model.norm.eps)
    return np.tanh(normed * model.norm.weight.detach().numpy() + model.norm.bias.detach().numpy())  # type: ignore[no-any-return]


def without_constant(logits: Any) -> Any:
    """Logits less those of the first class: the constant of a row has no meaning."""
    return logits - logits[:, :1]


def assert_same_up_to_a_constant(found: Tensor, expected: Any) -> None:
    np.testing.assert_allclose(without_constant(found.numpy()), without_constant(expected), rtol=1e-9, atol=1e-12)


def logits_by_hand(support: np.ndarray, labels: Tensor, target: np.ndarray) -> np.ndarray:
    means = np.stack([support[labels.numpy() == c].mean(0) for c in range(int(labels.max()) + 1)])
    return -((target[:, None] - means[None]) ** 2).sum(-1)  # type: ignore[no-any-return]


def moments(model: Any, x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    first = (x @ model.first.weight.T + model.first.bias).detach().numpy()
    return first.mean(0), first.var(0)


@pytest.mark.parametrize("norm", ["batch", "support"])
def test_prototypes_and_distances_equal_those_by_hand(norm: str) -> None:
    model, task = seeded(NormedMlp), task_of(shots=2)
    learner = ProtoNet(model, norm=norm)
    found = learner.evaluate([task], keep_predictions=True).predictions[0]
    support = embedded_by_hand(model, task.support_x, *moments(model, task.support_x))
    other = task.support_x if norm == "support" else task.target_x
    target = embedded_by_hand(model, task.target_x, *moments(model, other))
    assert_same_up_to_a_constant(found, logits_by_hand(support, task.support_y, target))


def test_under_running_it_trains_on_one_batch_and_evaluates_on_what_was_stored() -> None:
    model, task = seeded(NormedMlp), task_of(shots=2)
    learner = ProtoNet(model, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    loss = learner.meta_step([task]).loss
    both = torch.cat([task.support_x, task.target_x])
    mean, variance = moments(model, both)
    embedded = embedded_by_hand(model, both, mean, variance)
    logits = torch.from_numpy(logits_by_hand(embedded[:6], task.support_y, embedded[6:]))
    assert loss == pytest.approx(float(nn.functional.cross_entropy(logits, task.target_y)), rel=1e-9)
    stored_mean, stored_variance = 0.1 * mean, 0.9 + 0.1 * variance * len(both) / (len(both) - 1)
    np.testing.assert_allclose(learner.model.norm.running_mean.numpy(), stored_mean, rtol=1e-9)
    np.testing.assert_allclose(learner.model.norm.running_var.numpy(), stored_variance, rtol=1e-9)
    found = learner.evaluate([task], keep_predictions=True).predictions[0]
    support, target = (
        embedded_by_hand(model, x, stored_mean, stored_variance) for x in (task.support_x, task.target_x)
    )
    assert_same_up_to_a_constant(found, logits_by_hand(support, task.support_y, target))


def test_cosine_is_one_minus_the_cosine_of_the_angle() -> None:
    learner, task = ProtoNet(seeded(NormedMlp), distance="cosine", norm="batch"), task_of()
    found = learner.evaluate([task], keep_predictions=True).predictions[0]
    model = learner.unwrap()
    support, target = (embedded_by_hand(model, x, *moments(model, x)) for x in (task.support_x, task.target_x))
    unit = [e / np.linalg.norm(e, axis=1, keepdims=True) for e in (support, target)]
    np.testing.assert_allclose(found.numpy(), unit[1] @ unit[0].T - 1, rtol=1e-9, atol=1e-12)


def test_classes_may_have_unlike_numbers_of_examples_and_any_order() -> None:
    model, x = seeded(NormedMlp), torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([2, 0, 1, 1, 2, 2])
    task = Task(x, labels, x, labels)
    found = ProtoNet(model, norm="batch").evaluate([task], keep_predictions=True).predictions[0]
    embedded = embedded_by_hand(model, x, *moments(model, x))
    np.testing.assert_allclose(
        without_constant(found.numpy()),
        without_constant(logits_by_hand(embedded, labels, embedded)),
        rtol=1e-9,
        atol=1e-12,
    )


@pytest.mark.parametrize("kind", [tuple, dict])
def test_inputs_may_be_tuples_or_dicts(kind: type) -> None:
    generator = torch.Generator().manual_seed(0)

    def inputs(count: int) -> Any:
        pair = [torch.randn(count, size, generator=generator, dtype=torch.float64) for size in (2, 3)]
        return tuple(pair) if kind is tuple else dict(zip(("left", "right"), pair, strict=True))

    labels = torch.arange(3)
    task = Task(inputs(3), labels, inputs(3), labels)
    learner = ProtoNet(seeded(TwoInputs))
    learner.meta_step([task])
    assert learner.head == "linear"
    module = learner.adapt(task.support_x, task.support_y)
    found = module(*task.target_x) if kind is tuple else module(**task.target_x)  # type: ignore[misc]
    torch.testing.assert_close(found, learner.evaluate([task], keep_predictions=True).predictions[0])


def test_inputs_in_a_tuple_train_as_the_same_tensor_does() -> None:
    task = task_of(shots=2)
    wrapped = Task((task.support_x,), task.support_y, (task.target_x,), task.target_y)
    losses = [ProtoNet(seeded(NormedMlp)).meta_step([each]).loss for each in (task, wrapped)]
    assert losses[0] == losses[1]


def test_a_network_without_a_head_is_embedded_by_its_output() -> None:
    body = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU()).double()
    task = task_of((1, 6, 6), shots=2)
    with pytest.raises(UnsupportedModuleError, match=r"embedding=\"output\""):
        ProtoNet(body).meta_step([task])
    learner = ProtoNet(body, embedding="output")
    learner.meta_step([task])
    assert learner.head is None
    found = learner.adapt(task.support_x, task.support_y)(task.target_x)
    torch.testing.assert_close(found, learner.evaluate([task], keep_predictions=True).predictions[0])


def test_the_adapted_module_is_of_the_users_class_with_a_fitted_head_in_its_place() -> None:
    learner, task = ProtoNet(seeded(Conv4)), task_of((1, 16, 16), shots=2)
    learner.meta_step([task])
    module = learner.adapt(task.support_x, task.support_y)
    assert type(module) is Conv4
    assert type(learner.model.linear) is nn.Linear
    assert type(module.linear) is nn.Linear
    assert module.linear is not learner.model.linear


class Hidden(nn.Module):
    """Calls its head through a list."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)
        self.calls = [self.head]

    def forward(self, x: Tensor) -> Tensor:
        return self.calls[0](torch.tanh(self.body(x)))  # type: ignore[no-any-return]


class Called(nn.Module):
    """Calls its head in its own way."""

    def __init__(self, call: Any) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), Named(5, 3)
        self.call = call

    def forward(self, x: Tensor) -> Any:
        return self.call(self.head, torch.tanh(self.body(x)))


class Named(nn.Linear):
    """Takes its input by another name, and a second argument."""

    def forward(self, features: Tensor, scale: float = 1.0) -> Tensor:
        return scale * super().forward(features)


EMBEDDING = [name for name in METHODS if name not in NOT_FITTED]


@pytest.mark.parametrize("name", EMBEDDING)
def test_a_head_may_be_called_by_keyword(name: str) -> None:
    task = task_of(shots=2)
    learner = getattr(methods, METHODS[name])(Called(lambda head, x: head(features=x)).double(), head="head")
    learner.evaluate([task])
    found = learner.adapt(task.support_x, task.support_y)(task.target_x)
    torch.testing.assert_close(found, learner.evaluate([task], keep_predictions=True).predictions[0])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda head, x: -head(x), "does more behind the head 'head'"),
        (lambda head, x: head(x, 2.0), "'head' is called with 2 arguments"),
        (lambda head, x: head(x.to(head.weight.dtype)), r"is used for more than being called \(AttributeError"),
    ],
)
@pytest.mark.parametrize("name", EMBEDDING)
def test_what_a_fitted_head_could_not_do_in_its_place_is_refused(name: str, call: Any, words: str) -> None:
    learner = getattr(methods, METHODS[name])(Called(call).double(), head="head")
    with pytest.raises(UnsupportedModuleError, match=words):
        learner.evaluate([task_of(shots=2)])


class Twice(nn.Module):
    """Runs its head twice."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.head(self.body(-x))
        return self.head(self.body(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Hidden(), "the head 'head' is called through something other"),
        (Twice(), "'head' ran 2 times"),
        (nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3), nn.LogSoftmax(1)), "last module that ran is '1'"),
        (nn.Linear(4, 3), "one Linear: nothing is embedded"),
    ],
)
def test_a_head_that_cannot_be_told_is_refused_and_nothing_has_moved(model: nn.Module, words: str) -> None:
    learner, task = ProtoNet(model.double()), task_of()
    before = {name: value.clone() for name, value in learner.state_dict().items() if isinstance(value, Tensor)}
    for _ in range(2):
        with pytest.raises(UnsupportedModuleError, match=f"(?i){words}"):
            learner.meta_step([task])
    assert learner.head is None
    for name, value in before.items():
        assert torch.equal(learner.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: Task(t.support_x, t.support_y + 1, t.target_x, t.target_y), r"support_y: ProtoNet needs each class"),
        (lambda t: Task(t.support_x, t.support_y, t.target_x, t.target_y + 1), r"target_y holds classes \[3\]"),
        (lambda t: Task(t.support_x, t.support_y.double(), t.target_x, t.target_y), r"support_y: cross-entropy needs"),
    ],
)
def test_labels_that_are_no_classes_are_refused(change: Any, words: str) -> None:
    with pytest.raises(TaskError, match=words):
        ProtoNet(seeded(NormedMlp)).meta_step([change(task_of())])


def test_a_label_that_the_loss_does_not_ignore_is_refused() -> None:
    task = task_of()
    wrong = Task(task.support_x, task.support_y, task.target_x, task.target_y.clone().fill_(-100))
    learner = ProtoNet(seeded(NormedMlp), loss_fn=nn.CrossEntropyLoss(ignore_index=-1))
    with pytest.raises(TaskError, match=r"target_y holds classes \[-100\]"):
        learner.meta_step([wrong])


def test_a_wholly_frozen_network_can_be_evaluated() -> None:
    model = seeded(NormedMlp).requires_grad_(False)
    task = task_of(shots=2)
    learner = ProtoNet(model)
    result = learner.evaluate([task])
    assert result.accuracy is not None
    with pytest.raises(ArgumentError, match=r"all are frozen"):
        learner.meta_step([task])
