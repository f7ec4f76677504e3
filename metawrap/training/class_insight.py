"""The final test by class: predictions of test tasks -> accuracy and confusions of each class; embeddings in a plane.

The records stay small with thousands of classes: see `MOST_CLASSES` and `WHOLE_TABLE`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from metawrap.heads.embedding import Embedding
from metawrap.learner.evaluation import in_eval_mode
from metawrap.tasks import Task, usable

# All classes of a test are recorded, or half of this number from each end: those most often and least often right.
MOST_CLASSES = 60
# All confusions of this many classes are recorded; of more classes the `MOST_CLASSES` most frequent ones.
WHOLE_TABLE = 30


def class_names(names: Sequence[str], numbers: Iterable[int]) -> list[str]:
    """The names of an episode's classes; each quarter turn of a class has a name of its own.

    >>> class_names(["a", "b"], [1, 3])
    ['b', 'b turned by 90°']
    """
    named = [(names[int(number) % len(names)], int(number) // len(names)) for number in numbers]
    return [f"{name} turned by {90 * turns}°" if turns else name for name, turns in named]


def by_class(tasks: Iterable[Task], guesses: Iterable[NDArray[Any]], names: Sequence[str]) -> dict[str, Any]:
    """Accuracy and confusions of each class over tasks.

    Args:
        tasks: with `classes`. guesses: the predicted label of each target, (targets,), of each task. names: by class.
    Returns:
        {"count": of classes, "shown": [{"class", "targets", "right"}] with the lowest accuracy first, "confusions":
        [{"class", "taken_for", "times", "targets"}] with the most frequent first}. "targets" of a confusion are the
        targets of "class" in tasks that have "taken_for" as well: only they can be confused.
    """
    targets: Counter[int] = Counter()
    times: Counter[tuple[int, int]] = Counter()
    chances: Counter[tuple[int, int]] = Counter()
    for task, guess in zip(tasks, guesses, strict=True):
        own = [int(number) for number in task.classes or ()]
        for label, count in Counter(task.target_y.tolist()).items():
            targets[own[label]] += count
            chances.update({(own[label], other): count for other in own})
        times.update((own[label], own[other]) for label, other in zip(task.target_y.tolist(), guess, strict=True))
    named = dict(zip(targets, class_names(names, targets), strict=True))
    ranked = sorted(targets, key=lambda each: (times[each, each] / targets[each], named[each]))
    half = MOST_CLASSES // 2
    shown = ranked if len(ranked) <= MOST_CLASSES else ranked[:half] + ranked[-half:]
    wrong = sorted((-count, named[a], named[b], a, b) for (a, b), count in times.items() if a != b)
    return {
        "count": len(ranked),
        "shown": [{"class": named[each], "targets": targets[each], "right": times[each, each]} for each in shown],
        "confusions": [
            {"class": one, "taken_for": other, "times": -minus, "targets": chances[a, b]}
            for minus, one, other, a, b in wrong[: None if len(ranked) <= WHOLE_TABLE else MOST_CLASSES]
        ],
    }


def embedded(learner: Any, task: Task) -> tuple[NDArray[Any], list[float]] | None:
    """A task's embeddings as its learner compares them, in the plane of `principal_plane`, support before target.

    None for a method that does not fit a head to embeddings.
    """
    if not isinstance(getattr(learner, "embedding", None), Embedding):
        return None
    with learner.calls.modules(learner) as used, in_eval_mode(used), torch.no_grad():
        sets = used.embedding.of_task(usable(task), False, used.settings.norm, [])
    return principal_plane(torch.cat([each.flatten(1) for each in sets]).double().cpu().numpy())


def principal_plane(rows: NDArray[Any]) -> tuple[NDArray[Any], list[float]] | None:
    """The first two principal components of rows.

    Args:
        rows: (examples, numbers).
    Returns:
        Coordinates, (examples, 2), each axis towards its farthest example, and the share of the variance of each axis;
        None where the rows are all the same, or not finite.
    """
    if not np.isfinite(rows).all():
        return None
    centred = rows - rows.mean(0)
    # An embedding can have many more numbers than a task has examples.
    values, vectors = np.linalg.eigh(centred @ centred.T)
    values, vectors = values[::-1][:2].clip(0), vectors[:, ::-1][:, :2]
    total = (centred**2).sum()
    if len(rows) < 2 or not 0 < total < np.inf:
        return None
    vectors = vectors * np.where(vectors[np.abs(vectors).argmax(0), [0, 1]] < 0, -1, 1)
    return vectors * np.sqrt(values), (values / total).tolist()
