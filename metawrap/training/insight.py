"""The inner values of a run: learner -> a line of insight.jsonl for each epoch, and final_insight.json.

The functions only read: training gives the same bits with and without them.
"""

from __future__ import annotations

import base64
import io
import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from metawrap.data import EpisodeSampler
from metawrap.errors import MetaWrapWarning
from metawrap.inner_loop.update_rules import LearningRates
from metawrap.outputs import prediction_in
from metawrap.results import StepMetrics, are_logits
from metawrap.settings.schedules import step_loss_weights
from metawrap.tasks import Task
from metawrap.training.class_insight import by_class, class_names, embedded
from metawrap.training.task_sources import FixedTasks, task_at
from metawrap.training.torchrun import evaluate_shared, on_rank_zero

# Test tasks that are solved once for each number of inner steps: a sixth of the time of the usual test.
STEP_TASKS = 100
MOST_STEP_COUNTS = 10
# Images that are kept of each class, all of 5-way 5-shot, and of a whole episode.
IMAGES_PER_CLASS = 5
MOST_IMAGES = 120
# torch.quantile takes no more than 16 million values.
_MOST_VALUES = 1_000_000
_NORM_PARTS = ("running_mean", "running_var", "weight", "bias")

Summary = dict[str, list[float | None]]


def epoch_insight(learner: Any, epoch: int, steps: Sequence[StepMetrics]) -> dict[str, Any]:
    """The learner's inner values after an epoch.

    Args:
        epoch: from 0.
        steps: the metrics of the epoch's meta-steps.
    Returns:
        "epoch" (from 1) and, if the method has them, by inner step and with six digits: "step_weights" and
        "step_losses", weight and mean of the target loss after each step (None if it was not computed); "rates", the
        learned rates of each parameter tensor (`quartiles` of rates per weight); "norms", the quartiles over channels
        of each batch norm's statistics, scale and shift.
    """
    settings = learner.settings
    annealed = getattr(settings, "step_loss_epochs", 0)
    losses = [each.step_losses for each in steps if each.step_losses.numel()]
    found = {
        "step_weights": _plain(step_loss_weights(settings.inner_steps, epoch, annealed)) if annealed else None,
        "step_losses": _plain(torch.cat(losses).double().nanmean(0).tolist()) if losses else None,
        "rates": _learned_rates(learner),
        "norms": _norms(learner.model),
    }
    return {"epoch": epoch + 1} | {name: value for name, value in found.items() if value}


def quartiles(values: Tensor) -> Summary:
    """The quartiles of each row of (rows, values): {"low", "median", "high"}, each with one number per row."""
    rows = values.detach().double().cpu().flatten(1)
    rows = rows[:, :: math.ceil(rows.shape[1] / _MOST_VALUES)]
    low, median, high = torch.quantile(rows, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64), dim=1)
    return {name: _plain(row.tolist()) for name, row in (("low", low), ("median", median), ("high", high))}


def final_insight(learner: Any, tasks: FixedTasks, count: int) -> dict[str, Any]:
    """The accuracy on the first test tasks while the learner adapts, under its own batch-norm policy.

    Returns:
        {"norm", "tasks", "steps", "classes", "episodes"}: "steps" has {"steps", "accuracy", "interval"} for each of
        `step_counts` (empty without an inner loop); "classes" is `by_class` of these tasks; "episodes" the first task
        and the one with the most errors (see `_episode`). All are empty without an accuracy.
    """
    size = tasks.tasks_per_batch
    count = min(count, max(size, STEP_TASKS // size * size))
    steps = learner.settings.default_steps
    curve, final = [], None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MetaWrapWarning)  # The final test has shown them.
        for number in [None] if steps is None else step_counts(steps):
            how = {} if number is None else {"steps": number}
            final = evaluate_shared(learner, tasks, count, keep_predictions=number == steps, **how)
            if number is not None and final.accuracy is not None:
                accuracy, interval = _plain([final.accuracy, final.interval])
                curve.append({"steps": number, "accuracy": accuracy, "interval": interval})
        assert final is not None
        known = final.accuracy is not None  # Else nobody knows what a prediction says.
        hardest = int(final.per_task.argmin()) if known else 0
        chosen = {0: "the first test task"} if known else {}
        chosen |= {hardest: "the test task with most errors"} if hardest else {}
        episodes = on_rank_zero(lambda: [_episode(learner, tasks, index, why) for index, why in chosen.items()])
        predictions = final.predictions if known else []
        classes = on_rank_zero(lambda: _by_class(tasks, predictions))
    return {
        "norm": learner.settings.norm,
        "tasks": count,
        "steps": curve,
        "classes": classes,
        "episodes": [episode for episode in episodes if episode is not None],
    }


def step_counts(steps: int) -> list[int]:
    """The numbers of inner steps to test after: all from 0 to `steps`, or at most ten of many.

    >>> step_counts(50)
    [0, 1, 2, 5, 10, 20, 50]
    """
    if steps < MOST_STEP_COUNTS:
        return list(range(steps + 1))
    spaced = (digit * 10**power for power in range(len(str(steps))) for digit in (1, 2, 5))
    return [0, *(number for number in spaced if number < steps), steps]


def _by_class(tasks: FixedTasks, predictions: Sequence[Any]) -> dict[str, Any]:
    """See `by_class`; empty where a prediction is no logits of classes, or the classes of a task are not known."""
    drawn = [task_at(tasks, index) for index in range(len(predictions))]
    found = [_class_logits(each, task) for each, task in zip(predictions, drawn, strict=True)]
    if not found or any(task.classes is None for task in drawn) or any(each is None for each in found):
        return {}
    guesses = [each.argmax(-1).cpu().numpy() for each in found if each is not None]
    return by_class(drawn, guesses, _names(tasks, [number for task in drawn for number in task.classes or ()]))


def _names(tasks: FixedTasks, numbers: Iterable[int]) -> tuple[str, ...]:
    """The names of classes by number; of the user's own tasks the numbers themselves."""
    return tasks.images.class_names if isinstance(tasks, EpisodeSampler) else tuple(map(str, range(max(numbers) + 1)))


def _class_logits(output: Any, task: Task) -> Tensor | None:
    """The (targets, classes) logits in an output; None where it holds none."""
    prediction = prediction_in(output)
    known = prediction is not None and are_logits(prediction, task.target_y) and prediction.ndim == 2
    return prediction if known else None


def _episode(learner: Any, tasks: FixedTasks, index: int, why: str) -> dict[str, Any] | None:
    """One test task with its predictions; None if the predictions are no logits of classes.

    Returns:
        {"task" (from 1), "why", "classes" (names by label), "support": [{"label", "png"}], "target": [{"label",
        "prediction", "probability", "png"}]}. The first images of each class have a base64 PNG. Of a method on an
        embedding, "shares" of the variance, and each example's place "at" [x, y]: see `embedded`.
    """
    task = task_at(tasks, index)
    prediction = _class_logits(learner.evaluate([task], keep_predictions=True).predictions[0], task)
    if prediction is None:
        return None
    probabilities = prediction.detach().double().cpu().softmax(-1)
    guesses = prediction.argmax(-1).tolist()
    ways = tasks.ways if isinstance(tasks, EpisodeSampler) else prediction.shape[1]
    support, target = (_with_images(task, part, ways) for part in ("support", "target"))
    for place, example in enumerate(target):
        example["prediction"] = guesses[place]
        [example["probability"]] = _plain([float(probabilities[place, guesses[place]])])
    numbers = task.classes or range(ways)
    classes = class_names(_names(tasks, numbers), numbers)
    episode = {"task": index + 1, "why": why, "classes": classes, "support": support, "target": target}
    if plane := embedded(learner, task):
        for example, place in zip((*support, *target), plane[0].tolist(), strict=True):
            example["at"] = _plain(place)
        episode["shares"] = _plain(plane[1])
    return episode


def _with_images(task: Task, part: str, ways: int) -> list[dict[str, Any]]:
    x, labels = getattr(task, f"{part}_x"), getattr(task, f"{part}_y").tolist()
    most, kept = min(IMAGES_PER_CLASS, MOST_IMAGES // (2 * ways)), dict.fromkeys(labels, 0)
    examples = []
    for place, label in enumerate(labels):
        shown = isinstance(x, Tensor) and x.ndim == 4 and kept[label] < most
        kept[label] += 1
        examples.append({"label": label, "png": as_png(x[place]) if shown else None})
    return examples


def as_png(image: Tensor) -> str:
    """A (channels, height, width) image as base64 PNG; values outside of [0, 1] are first scaled to that range."""
    pixels = image.detach().float().cpu()
    low, high = float(pixels.min()), float(pixels.max())
    if low < 0 or high > 1:
        pixels = (pixels - low) / (high - low)
    colours = 3 if len(pixels) == 3 else 1
    array = (pixels[:colours] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(array if colours == 3 else array[:, :, 0]).save(file, format="PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def _learned_rates(learner: Any) -> dict[str, list[float | None] | Summary]:
    rates = getattr(learner, "learning_rates", None)
    if not isinstance(rates, LearningRates):
        return {}
    learned = {name: rows for name, rows in rates.items() if rows.requires_grad}
    return {name: _plain(rows.tolist()) if rows.ndim == 1 else quartiles(rows) for name, rows in learned.items()}


def _norms(model: torch.nn.Module) -> dict[str, dict[str, Summary]]:
    found: dict[str, dict[str, Summary]] = {}
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            parts = {part: getattr(module, part) for part in _NORM_PARTS}
            rows = {part: value.reshape(-1, value.shape[-1]) for part, value in parts.items() if value is not None}
            found[name] = {part: quartiles(value) for part, value in rows.items()}
    return found


def _plain(values: Sequence[float]) -> list[float | None]:
    """Each value with six digits; None for NaN and infinity, which JSON cannot hold."""
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values]
