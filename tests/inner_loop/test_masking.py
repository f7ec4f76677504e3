"""Outputs that a task does not use: masked in training, or at test alone."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from engine_cases import ENGINES
from face import as_tasks, gradients_of, last_only, rates_of
from head_cases import BATCH, HEAD, TASKS, learner_of
from models import NormedMlp, seeded
from oracle import assert_same_gradients, meta_gradient
from torch import Tensor, nn

from metawrap import Task, TaskError

USED = (0, 2, 5)


class LogMlp(NormedMlp):
    """The network with log-probabilities as outputs."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).log_softmax(1)


def wide(kind: type = NormedMlp) -> nn.Module:
    return seeded(lambda: kind(ways=7))


def brier(prediction: Tensor, y: Tensor) -> Tensor:
    return (prediction.softmax(1) - F.one_hot(y, prediction.shape[1])).square().mean()


# Losses that a mask has its meaning under; all are the negative log-probability of the label.
LOSSES: dict[str, tuple[type, Any]] = {
    "cross-entropy of logits": (NormedMlp, F.cross_entropy),
    "cross-entropy of one's own": (NormedMlp, lambda p, y: -p.log_softmax(1).gather(1, y[:, None]).mean()),
    "cross-entropy of log-probabilities": (LogMlp, nn.CrossEntropyLoss()),
    "nll_loss": (LogMlp, F.nll_loss),
    "NLLLoss in a partial": (LogMlp, partial(nn.NLLLoss(ignore_index=9))),
    "nll of one's own": (LogMlp, lambda p, y: -p.gather(1, y[:, None]).mean()),
}
# Losses that it has none under, and what the refusal says.
REFUSED: dict[str, tuple[type, Any, str]] = {
    "label smoothing": (NormedMlp, nn.CrossEntropyLoss(label_smoothing=0.1), "not finite.*label smoothing"),
    "binary cross-entropy": (
        NormedMlp,
        lambda p, y: F.binary_cross_entropy_with_logits(p, F.one_hot(y, p.shape[1]).to(p)),
        "not finite.*binary cross-entropy",
    ),
    "the label's own logit": (NormedMlp, lambda p, y: -p.gather(1, y[:, None]).mean(), "no effect on the loss"),
    "nll_loss of logits": (NormedMlp, F.nll_loss, "do not sum to one.*F.cross_entropy"),
    "a mean over outputs": (NormedMlp, brier, "how many outputs are masked"),
    "made for seven outputs": (
        NormedMlp,
        lambda p, y: F.mse_loss(p.softmax(1), F.one_hot(y, min(p.shape[1], 7)).to(p)),
        "takes this number of outputs alone",
    ),
    "multi_margin_loss": (NormedMlp, F.multi_margin_loss, "how many outputs are masked"),
}


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


@pytest.mark.parametrize(
    ("engine", "name"), [*((engine, "nll_loss") for engine in ENGINES), *(("functional", name) for name in LOSSES)]
)
def test_masked_outputs_train_as_a_network_without_them(engine: str, name: str) -> None:
    kind, loss_fn = LOSSES[name]
    learner = learner_of(engine, wide(kind), mask_unused_outputs=True, loss_fn=loss_fn)
    small = narrow(learner.unwrap())
    values = dict(learner.model.named_parameters()) | {name: dict(small.named_parameters())[name] for name in HEAD}
    expected = meta_gradient(small, as_tasks(BATCH), rates=rates_of(learner), step_weights=last_only(2), values=values)
    metrics = learner.meta_step(relabelled(TASKS))
    assert metrics.loss == pytest.approx(float(expected.loss), rel=1e-12)
    found = gradients_of(learner)
    for name in HEAD:
        gradient = found[name]
        assert gradient[[1, 3, 4, 6]].abs().max() < 1e-15
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


@pytest.mark.parametrize("name", REFUSED)
def test_a_loss_that_masked_outputs_count_in_is_refused_and_the_fix_works(name: str) -> None:
    kind, loss_fn, words = REFUSED[name]
    learner, tasks = (
        learner_of(model=wide(kind), mask_unused_outputs=True, loss_fn=loss_fn, first_order_epochs=math.inf),
        relabelled(TASKS),
    )
    with pytest.raises(TaskError, match=f"mask_unused_outputs.*{words}"):
        learner.meta_step(tasks)
    assert learner.iteration == 0
    learner_of(model=wide(kind), mask_unused_outputs=True).meta_step(tasks)  # Fix 1: cross-entropy of logits.
    places = lambda y: (y[:, None] == torch.tensor(USED)).int().argmax(1)
    select = lambda p, y: loss_fn(p[:, list(USED)], places(y))
    selecting = learner_of(model=wide(kind), loss_fn=select, first_order_epochs=math.inf)  # Fix 2.
    expected = learner_of(model=narrow(wide(kind)), loss_fn=loss_fn, first_order_epochs=math.inf).meta_step(TASKS).loss
    assert selecting.meta_step(tasks).loss == pytest.approx(expected, rel=1e-12)


def test_a_random_loss_that_counts_its_calls_is_tried_without_a_trace() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, p: Tensor, y: Tensor) -> Tensor:
            self.calls += 1
            return F.cross_entropy(p, y) * (1 + torch.rand(()))

    drawn = []
    for mask, model, tasks in ((True, wide(), relabelled(TASKS)), (False, narrow(wide()), TASKS)):
        learner = learner_of(model=model, mask_unused_outputs=mask, loss_fn=Noisy())
        with torch.random.fork_rng():
            torch.manual_seed(3)
            drawn.append((learner.meta_step(tasks).loss, int(learner.loss_fn.calls), float(torch.rand(()))))
    assert drawn[0] == pytest.approx(drawn[1], rel=1e-12)


def test_classes_on_another_axis_are_not_masked_in_silence() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 6)))
    loss = lambda prediction, y: F.cross_entropy(prediction.transpose(1, 2), y)
    x, y = torch.randn(4, 3, 4, dtype=torch.float64), torch.randint(0, 3, (4, 3))
    with pytest.raises(TaskError, match=r"\(examples, classes, ...\)"):
        learner_of(model=model, loss_fn=loss, mask_unused_outputs=True).meta_step([Task(x, y, x, y)])


def test_lack_of_memory_in_a_trial_of_the_mask_is_told() -> None:
    def loss(p: Tensor, y: Tensor) -> Tensor:
        if p.shape[1] > 7:
            raise torch.OutOfMemoryError
        return F.cross_entropy(p, y)

    with pytest.raises(torch.OutOfMemoryError):
        learner_of(model=wide(), loss_fn=loss, mask_unused_outputs=True).evaluate(relabelled(TASKS))
