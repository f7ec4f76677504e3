"""Outputs that a task does not use: masked in training, or at test alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from engine_cases import ENGINES
from face import as_tasks, gradients_of, last_only, rates_of
from head_cases import BATCH, HEAD, TASKS, learner_of
from models import NormedMlp, seeded
from oracle import assert_same_gradients, meta_gradient
from torch import nn

from metawrap import Task, TaskError

USED = (0, 2, 5)


def wide() -> nn.Module:
    return seeded(lambda: NormedMlp(ways=7))


def relabelled(tasks: list[Task]) -> list[Task]:
    classes = torch.tensor(USED)
    return [Task(t.support_x, classes[t.support_y], t.target_x, classes[t.target_y]) for t in tasks]


def narrow(model: Any) -> nn.Module:
    """The same network with nothing but the used outputs."""
    small = copy.deepcopy(model)
    small.linear = nn.Linear(6, 3).double()
    with torch.no_grad():
        small.linear.weight.copy_(model.linear.weight[list(USED)])
        small.linear.bias.copy_(model.linear.bias[list(USED)])
    return small


@pytest.mark.parametrize("engine", ENGINES)
def test_masked_outputs_train_as_a_network_without_them(engine: str) -> None:
    learner = learner_of(engine, wide(), mask_unused_outputs=True)
    small = narrow(learner.unwrap())
    values = dict(learner.model.named_parameters()) | {name: dict(small.named_parameters())[name] for name in HEAD}
    expected = meta_gradient(small, as_tasks(BATCH), rates=rates_of(learner), step_weights=last_only(2), values=values)
    metrics = learner.meta_step(relabelled(TASKS))
    assert metrics.loss == pytest.approx(float(expected.loss), rel=1e-12)
    found = gradients_of(learner)
    for name in HEAD:
        gradient = found[name]
        assert not gradient[[1, 3, 4, 6]].any()
        found[name] = gradient[list(USED)]
    assert_same_gradients(found, expected.gradients)


def test_masking_at_test_alone_is_asked_of_evaluate_and_adapt() -> None:
    learner = learner_of(model=wide())
    tasks = relabelled(TASKS)
    plain = learner.evaluate(tasks, keep_predictions=True)
    masked = learner.evaluate(tasks, mask_unused_outputs=True, keep_predictions=True)
    assert masked.loss < plain.loss
    assert all(set(p.argmax(1).tolist()) <= set(USED) for p in masked.predictions)
    assert all(bool(p[:, [1, 3, 4, 6]].isinf().all()) for p in masked.predictions)
    adapted = learner.adapt(tasks[0].support_x, tasks[0].support_y, mask_unused_outputs=True)
    outputs = adapted(tasks[0].target_x).detach()[:, list(USED)]
    torch.testing.assert_close(outputs, masked.predictions[0][:, list(USED)])
    assert learner.evaluate(tasks).loss == plain.loss


def test_masked_maps_of_pixels() -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 6, 1)))
    learner = learner_of(model=model, mask_unused_outputs=True)
    generator = torch.Generator().manual_seed(0)
    labels = 2 * torch.randint(0, 2, (2, 4, 4), generator=generator)
    labels[0, 0] = -100  # ignored pixels are no class
    x = torch.randn(2, 1, 4, 4, generator=generator, dtype=torch.float64)
    result = learner.evaluate([Task(x, labels, x, labels)], keep_predictions=True)
    assert set(result.predictions[0].argmax(1).unique().tolist()) <= {0, 2}
    logits = learner.adapt(x, labels)(x)
    expected = F.cross_entropy(logits[:, [0, 2]], torch.where(labels > 0, labels // 2, labels)).detach()
    assert result.loss == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: Task(t.support_x, t.support_y.double(), t.target_x, t.target_y.double()), "regression"),
        (lambda t: Task(t.support_x, t.support_y, t.target_x, t.target_y + 1), r"classes \[3\]"),
        (lambda t: Task(t.support_x, t.support_y + 5, t.target_x, t.target_y + 5), r"labels 5\.\.7"),
    ],
)
def test_labels_that_cannot_be_masked_are_refused(change: Any, message: str) -> None:
    learner = learner_of(model=wide(), mask_unused_outputs=True)
    with pytest.raises(TaskError, match=message):
        learner.meta_step([change(TASKS[0])])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_labels_of_any_whole_dtype_are_masked(dtype: torch.dtype) -> None:
    learner = learner_of(model=wide(), mask_unused_outputs=True, loss_fn=lambda p, y: F.cross_entropy(p, y.long()))
    tasks = relabelled(TASKS)
    expected = learner.evaluate(tasks).loss
    small = [Task(t.support_x, t.support_y.to(dtype), t.target_x, t.target_y.to(dtype)) for t in tasks]
    assert learner.evaluate(small).loss == expected


def test_the_losss_own_ignored_label_is_no_class() -> None:
    learner = learner_of(model=wide(), mask_unused_outputs=True, loss_fn=nn.CrossEntropyLoss(ignore_index=255))
    tasks = relabelled(TASKS)
    labels = tasks[0].support_y.clone()
    labels[0] = 255
    targets = tasks[0].target_y.clone()
    targets[:2] = 255
    result = learner.evaluate([Task(tasks[0].support_x, labels, tasks[0].target_x, targets)], keep_predictions=True)
    right = result.predictions[0].argmax(1)[2:] == targets[2:]
    assert result.accuracy == pytest.approx(float(right.double().mean()))


def test_label_smoothing_under_a_mask_is_refused_not_infinite() -> None:
    learner = learner_of(model=wide(), mask_unused_outputs=True, loss_fn=nn.CrossEntropyLoss(label_smoothing=0.1))
    with pytest.raises(TaskError, match="label smoothing"):
        learner.meta_step(relabelled(TASKS))
    assert learner.iteration == 0


def test_classes_on_another_axis_are_not_masked_in_silence() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 6)))
    loss = lambda prediction, y: F.cross_entropy(prediction.transpose(1, 2), y)
    x, y = torch.randn(4, 3, 4, dtype=torch.float64), torch.randint(0, 3, (4, 3))
    with pytest.raises(TaskError, match=r"\(examples, classes, ...\)"):
        learner_of(model=model, loss_fn=loss, mask_unused_outputs=True).meta_step([Task(x, y, x, y)])
