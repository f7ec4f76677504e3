"""Figures are what they are called: accuracy where the loss or the method knows the classes; the user's metrics."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from face import unchanged
from models import class_tasks
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor, nn

from metawrap import MAML, ArgumentError, FineTune, ProtoNet, Task


class Reshaped(nn.Module):
    """A linear layer, and its outputs in another shape."""

    def __init__(self, outputs: int, change: Callable[[Tensor], Tensor] = lambda p: p) -> None:
        super().__init__()
        self.body, self.head, self.change = nn.Linear(4, 6), nn.Linear(6, outputs), change

    def forward(self, x: Tensor) -> Any:
        return self.change(self.head(self.body(x).tanh()))


def ordinal(scores: Tensor, y: Tensor) -> Tensor:
    """Cumulative link: output k says whether the label is above k."""
    above = (y[:, None] > torch.arange(scores.shape[1])).to(scores)
    return F.binary_cross_entropy_with_logits(scores, above)


class Focal(nn.CrossEntropyLoss):
    def forward(self, prediction: Tensor, y: Tensor) -> Tensor:
        entropy = F.cross_entropy(prediction, y, reduction="none")
        return ((1 - (-entropy).exp()) ** 2 * entropy).mean()


MAPS, TOKENS = partial(Reshaped, 12, lambda p: p.view(-1, 3, 2, 2)), partial(Reshaped, 9, lambda p: p.view(-1, 3, 3))
# Model, loss, shape of the labels of an example, a label that does not count.
Case = tuple[Callable[[], nn.Module], Any, tuple[int, ...], int | None]
KNOWN: dict[str, Case] = {
    "cross-entropy": (partial(Reshaped, 3), F.cross_entropy, (), None),
    "cross-entropy, smoothed": (partial(Reshaped, 3), partial(F.cross_entropy, label_smoothing=0.1), (), -100),
    "pixels, module": (MAPS, nn.CrossEntropyLoss(ignore_index=255), (2, 2), 255),
    "pixels, partial of a module": (MAPS, partial(nn.CrossEntropyLoss(ignore_index=255)), (2, 2), 255),
    "nll_loss": (partial(Reshaped, 3, lambda p: p.log_softmax(1)), partial(F.nll_loss, ignore_index=7), (), 7),
    "margins": (partial(Reshaped, 3), nn.MultiMarginLoss(), (), None),
}
UNKNOWN: dict[str, Case] = {
    "pixels, ignored in a function": (MAPS, lambda p, y: F.cross_entropy(p, y, ignore_index=255), (2, 2), 255),
    "as many tokens as words": (TOKENS, lambda p, y: F.cross_entropy(p.transpose(1, 2), y), (3,), None),
    "ordinal": (partial(Reshaped, 3), ordinal, (), None),
    "a module of one's own": (partial(Reshaped, 3), Focal(), (), None),
    "an output for each label, not classes": (
        partial(Reshaped, 3),
        lambda p, y: F.mse_loss(p, F.one_hot(y, 3).to(p)),
        (),
        None,
    ),
}


def tasks_of(shape: tuple[int, ...], ignored: int | None) -> list[Task]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(3):
        x = torch.randn(2, 12, 4, generator=generator, dtype=torch.float64)
        y = torch.randint(0, 3, (2, 12, *shape), generator=generator)
        if ignored is not None:
            y[:, ::3] = ignored
        found.append(Task(x[0], y[0], x[1], y[1]))
    return found


def learner_of(case: Case, **options: Any) -> Any:
    torch.manual_seed(0)
    return MAML(case[0]().double(), inner_steps=1, first_order_epochs=math.inf, loss_fn=case[1], **options)


@pytest.mark.parametrize("engine", ["functional", "batched"])
@pytest.mark.parametrize("name", KNOWN)
def test_accuracy_under_a_known_loss_is_that_of_the_labels_that_count(name: str, engine: str) -> None:
    learner, tasks = learner_of(KNOWN[name], engine=engine), tasks_of(*KNOWN[name][2:])
    result = learner.evaluate(tasks, keep_predictions=True)
    right = []
    for task, prediction in zip(tasks, result.predictions, strict=True):
        y, guess = task.target_y.numpy(), prediction.numpy().argmax(1)
        right.append((guess == y)[(y >= 0) & (y < 3)].mean())
    assert result.accuracy == pytest.approx(np.mean(right))
    assert result.per_task.tolist() == pytest.approx(right)
    output = learner(tasks)
    right = [
        float((p.argmax(1) == t.target_y)[(t.target_y >= 0) & (t.target_y < 3)].double().mean())
        for p, t in zip(output.predictions, tasks, strict=True)
    ]
    assert learner.meta_step(tasks).accuracy == pytest.approx(np.mean(right)) == pytest.approx(float(output.accuracy))


@pytest.mark.parametrize("engine", ["functional", "batched"])
@pytest.mark.parametrize("name", UNKNOWN)
def test_of_another_loss_the_loss_is_reported_and_no_accuracy(name: str, engine: str) -> None:
    learner, tasks = learner_of(UNKNOWN[name], engine=engine), tasks_of(*UNKNOWN[name][2:])
    result = learner.evaluate(tasks, keep_predictions=True)
    losses = [float(UNKNOWN[name][1](p, t.target_y)) for p, t in zip(result.predictions, tasks, strict=True)]
    assert (result.accuracy, result.metric) == (None, "loss")
    assert result.mean == pytest.approx(np.mean(losses))
    assert str(result).startswith("loss ")
    metrics = learner.meta_step(tasks)
    assert metrics.accuracy is None is learner(tasks).accuracy
    assert "accuracy" not in repr(metrics)


@pytest.mark.parametrize("method", [ProtoNet, partial(FineTune, inner_steps=2)])
def test_a_method_that_knows_the_classes_has_an_accuracy_under_any_loss(method: Any) -> None:
    learner = method(Reshaped(3).double(), loss_fn=lambda p, y: F.cross_entropy(p / 2, y))
    tasks = [Task(*parts, classes=(4, 7, 9)) for parts in zip(*class_tasks((4,)), strict=True)]
    result = learner.evaluate(tasks, keep_predictions=True)
    right = [accuracy_score(t.target_y, p.argmax(1)) for p, t in zip(result.predictions, tasks, strict=True)]
    assert result.accuracy == pytest.approx(np.mean(right))
    assert learner.meta_step(tasks).accuracy is not None


def test_a_mean_over_tasks_is_of_one_figure() -> None:
    hard, soft = tasks_of((), None)[:2]
    soft = Task(*(F.one_hot(p).double() if p.dtype == torch.long else p for p in soft.parts()))
    learner = learner_of(KNOWN["cross-entropy"])
    assert learner.evaluate([hard]).metric == "accuracy"
    both = learner.evaluate([hard, soft])
    assert (both.metric, both.mean) == ("loss", pytest.approx(both.loss))
    assert learner.meta_step([hard, soft]).accuracy is None


class Gathering(nn.Module):
    """The protocol of torchmetrics: a call gives the value of its examples, and counts them for `compute`."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("right", torch.zeros(()))
        self.register_buffer("seen", torch.zeros(()))

    def update(self, preds: Tensor, target: Tensor) -> None:
        self.right += (preds.argmax(1) == target).sum()
        self.seen += len(target)

    def compute(self) -> Tensor:
        return self.right / self.seen

    def reset(self) -> None:
        self.right.zero_()
        self.seen.zero_()

    def forward(self, preds: Tensor, target: Tensor) -> Tensor:
        self.update(preds, target)
        return (preds.argmax(1) == target).double().mean()


class Uncalled:
    """The protocol of torcheval: update and compute alone; lists grow until `reset`."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def update(self, preds: Tensor, target: Tensor) -> Uncalled:
        self.seen.append((preds.argmax(1), target))
        return self

    def compute(self) -> float:
        guesses, labels = (torch.cat(each) for each in zip(*self.seen, strict=True))
        return float(f1_score(labels, guesses, average="macro"))

    def reset(self) -> None:
        self.seen.clear()


class Collection(Gathering):
    """Several in one, as MetricCollection."""

    def forward(self, preds: Tensor, target: Tensor) -> Any:
        return {"Accuracy": super().forward(preds, target), "Errors": (preds.argmax(1) != target).sum()}


def f1(prediction: Tensor, y: Tensor) -> np.floating[Any]:
    return np.float32(f1_score(y, prediction.argmax(1), average="macro"))


def errors(prediction: Tensor, y: Tensor) -> int:
    return int((prediction.argmax(1) != y).sum())


# Metric, and the functions of one task that it stands for.
METRICS: dict[str, tuple[Any, dict[str, Callable[[Tensor, Tensor], float]]]] = {
    "a function": (errors, {"errors": errors}),
    "several": ({"f1": f1, "wrong": errors}, {"f1": f1, "wrong": errors}),
    "torchmetrics": (Gathering(), {"Gathering": lambda p, y: accuracy_score(y, p.argmax(1))}),
    "torcheval": (Uncalled(), {"Uncalled": f1}),
    "a collection": (Collection(), {"Accuracy": lambda p, y: accuracy_score(y, p.argmax(1)), "Errors": errors}),
    "all": (
        {"one": Collection(), "two": Uncalled(), "three": partial(errors)},
        {"one.Accuracy": lambda p, y: accuracy_score(y, p.argmax(1)), "one.Errors": errors, "two": f1, "three": errors},
    ),
}


@pytest.mark.parametrize("name", METRICS)
def test_metrics_of_any_kind_are_means_over_tasks_and_stay_as_they_were(name: str) -> None:
    metric, functions = METRICS[name]
    learner, tasks = learner_of(UNKNOWN["ordinal"]), tasks_of((), None)
    with unchanged(*(each for each in (metric, learner) if isinstance(each, nn.Module))):
        result = learner.evaluate(tasks, metric=metric, keep_predictions=True)
    assert list(result.metrics) == list(functions)
    for label, function in functions.items():
        values = [float(function(p, t.target_y)) for p, t in zip(result.predictions, tasks, strict=True)]
        found = result.metrics[label]
        assert found.per_task.tolist() == pytest.approx(values, rel=1e-6)
        assert found.mean == pytest.approx(np.mean(values), rel=1e-6)
        assert found.interval == pytest.approx(1.96 * np.std(values, ddof=1) / 3**0.5, rel=1e-6)
        assert f"{label} {found.mean:.4g} +- " in str(result)
    assert (result.metric, result.mean) == (next(iter(functions)), next(iter(result.metrics.values())).mean)
    assert result.joined([copy.copy(result), result]).metrics[label].per_task.tolist() == found.per_task.tolist() * 2


@pytest.mark.parametrize(
    "metric",
    [
        *({}, {1: errors}, {"errors": 3}, Gathering, [errors], {"both": lambda p, y: p}, lambda p, y: {"a": None}),
        lambda p, y: {str(y[:5].tolist()): 1.0},
    ],
)
def test_what_is_no_metric_is_refused_by_name(metric: Any) -> None:
    with pytest.raises(
        ArgumentError, match=r"metric: expected .*(by name|one number per task|same names from each task)"
    ):
        learner_of(KNOWN["cross-entropy"]).evaluate(tasks_of((), None), metric=metric)


def test_of_a_dict_an_object_gets_the_prediction_and_a_function_all() -> None:
    case = (partial(Reshaped, 3, lambda p: {"logits": p}), *KNOWN["cross-entropy"][1:])
    learner, tasks = learner_of(case), tasks_of((), None)
    own = {"own": lambda output, y: errors(output["logits"], y), "object": Gathering(), "loss": nn.CrossEntropyLoss()}
    found = learner.evaluate(tasks, metric=own)
    assert found.metrics["loss"].mean == pytest.approx(found.loss)
    assert found.metrics["object"].mean == pytest.approx(1 - found.metrics["own"].mean / 12)
    with pytest.raises(ArgumentError, match=r"metric: it gets .*a dict with output\['logits'\].*AttributeError"):
        learner.evaluate(tasks, metric=errors)
