"""The final test: best validation checkpoints -> fixed tasks of unseen classes -> accuracy under each norm policy.

Averaging the logits of the best validation checkpoints is what the authors' code of MAML++ does with five of them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metawrap.data import EpisodeSampler
from metawrap.errors import CheckpointError, MetaWrapWarning
from metawrap.training.checkpoints import CheckpointFolder, best_epochs, load_into
from metawrap.training.launch import by_first, evaluate_shared
from metawrap.training.run_settings import NORMS

Score = dict[str, float | None]
_SCORES = ("before", "after", "ensemble")


def final_test(
    learner: Any,
    tasks: EpisodeSampler,
    count: int,
    checkpoints: CheckpointFolder,
    history: list[dict[str, Any]],
    ensemble: int = 0,
    norms: Sequence[str] = NORMS,
) -> dict[str, Any]:
    """Tests the checkpoint with the best validation accuracy, and the average of the best `ensemble` ones.

    Leaves the best checkpoint's weights in the learner. The policies that the learner was not trained with are tested
    on purpose, so the warning about mixed policies is silenced.

    Returns:
        {"tasks", "epoch", "ensemble_epochs", "norms": {norm: {"before", "after", "ensemble"}}}, each of the last three
        {"accuracy", "interval"} as fractions; "before" only for methods with an inner loop, "ensemble" only if more
        than one checkpoint was averaged.
    Raises:
        CheckpointError: the best checkpoint is gone or cannot be read.
    """
    epochs = by_first(lambda: _epochs_to_test(checkpoints, history, ensemble))
    scores: dict[str, dict[str, Score]] = {norm: {} for norm in norms}
    logits: dict[str, list[Tensor]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MetaWrapWarning)
        for epoch in reversed(epochs):  # the best comes last, so that its weights stay in the learner
            load_into(learner, by_first(lambda epoch=epoch: checkpoints.load(epoch)))  # type: ignore[misc]
            for norm in norms:
                after = evaluate_shared(learner, tasks, count, norm=norm, keep_predictions=len(epochs) > 1)
                scores[norm]["after"] = {"accuracy": after.accuracy, "interval": after.interval}
                if len(epochs) > 1:
                    logits[norm] = _add(logits.get(norm), after.predictions)
        for norm in norms if learner.settings.default_steps is not None else ():
            before = evaluate_shared(learner, tasks, count, norm=norm, steps=0)
            scores[norm]["before"] = {"accuracy": before.accuracy, "interval": before.interval}
    labels = [task.target_y for batch in tasks.batches(count // tasks.tasks_per_batch) for task in batch]
    for norm, summed in logits.items():
        scores[norm]["ensemble"] = score_of(summed, labels)
    averaged = epochs if len(epochs) > 1 else []
    ordered = {norm: {name: score[name] for name in _SCORES if name in score} for norm, score in scores.items()}
    return {"tasks": count, "epoch": epochs[0], "ensemble_epochs": averaged, "norms": ordered}


def score_of(logits: list[Tensor], labels: list[Tensor]) -> Score:
    """Mean accuracy over tasks and the half width of its 95 % interval (1.96 standard errors).

    logits: (targets, ways) of each task; only their order within a row matters. labels: (targets,) of each task.
    """
    pairs = zip(logits, labels, strict=True)
    per_task = torch.stack([(each.argmax(-1) == y.to(each.device)).double().mean() for each, y in pairs])
    return {"accuracy": float(per_task.mean()), "interval": 1.96 * float(per_task.std()) / math.sqrt(len(per_task))}


def _epochs_to_test(checkpoints: CheckpointFolder, history: list[dict[str, Any]], ensemble: int) -> list[int]:
    """Best first. Fewer than asked for when the run has fewer epochs, or kept fewer."""
    kept = set(checkpoints.epochs())
    ranked = best_epochs(history, len(history))
    if not ranked or ranked[0] not in kept:
        raise CheckpointError(
            f"The best checkpoint (epoch {ranked[0] if ranked else 1}) is not in '{checkpoints.path}'. "
            "Put it back, or train again."
        )
    return [epoch for epoch in ranked[: max(1, ensemble)] if epoch in kept]


def _add(total: list[Tensor] | None, predictions: list[Tensor]) -> list[Tensor]:
    if total is None:
        return list(predictions)
    return [left + right for left, right in zip(total, predictions, strict=True)]
