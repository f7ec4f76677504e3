"""The final test: best validation checkpoints -> fixed tasks of unseen classes -> accuracy under each norm policy.

The authors' code of MAML++ averages the logits of the five best validation checkpoints.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metawrap.errors import CheckpointError, MetaWrapWarning
from metawrap.evaluation_result import EvaluationResult
from metawrap.layers.norm_policies import policies_of
from metawrap.outputs import prediction_in
from metawrap.training.checkpoints import CheckpointFolder, best_epochs, load_into
from metawrap.training.task_sources import FixedTasks
from metawrap.training.torchrun import evaluate_shared, on_rank_zero

_SCORES = ("before", "after", "ensemble")


def final_test(
    learner: Any,
    tasks: FixedTasks,
    count: int,
    checkpoints: CheckpointFolder,
    history: list[dict[str, Any]],
    ensemble: int = 0,
    norms: Sequence[str] | None = None,
    metric: Any = None,
) -> dict[str, Any]:
    """Tests the best checkpoint of `best_epochs`, and the average of the best `ensemble` ones.

    Leaves the best checkpoint's weights in the learner. The test uses other policies than training on purpose, so the
    warning about mixed policies is silenced.

    Returns:
        {"tasks", "epoch", "ensemble_epochs", "norms": {norm: {"before", "after", "ensemble"}}}, each of the last three
        {"accuracy", "interval"} as fractions, "loss" where the accuracy is None, and with a metric of the user's
        "metrics" (see `own_metrics`); "before" only for methods with an inner loop, "ensemble" only if more than one
        checkpoint was averaged.
    Raises:
        CheckpointError: the best checkpoint is missing or cannot be read.
    """
    epochs = on_rank_zero(lambda: epochs_to_test(checkpoints, history, ensemble))
    norms = norms or policies_of(learner.settings.norm, inner_loop=learner.inner_loop)
    scores: dict[str, dict[str, Any]] = {norm: {} for norm in norms}
    logits: dict[str, list[Any]] = {}
    own = {} if metric is None else {"metric": metric}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MetaWrapWarning)
        for epoch in reversed(epochs):  # The best comes last, so that its weights stay in the learner.
            load_into(learner, on_rank_zero(lambda epoch=epoch: checkpoints.load(epoch)))  # type: ignore[misc]
            for norm in norms:
                after = evaluate_shared(learner, tasks, count, norm=norm, keep_predictions=len(epochs) > 1, **own)
                scores[norm]["after"] = _as_score(after, metric)
                if len(epochs) > 1:
                    sums, added = logits.get(norm), [prediction_in(each) for each in after.predictions]
                    logits[norm] = added if sums is None else [a + b for a, b in zip(sums, added, strict=True)]
        for norm in norms if learner.settings.default_steps is not None else ():
            before = evaluate_shared(learner, tasks, count, norm=norm, steps=0, **own)
            scores[norm]["before"] = _as_score(before, metric)
    labels = [task.target_y for batch in tasks.batches(count // tasks.tasks_per_batch) for task in batch]
    for norm, summed in (
        logits.items() if all(each["after"]["accuracy"] is not None for each in scores.values()) else ()
    ):
        scores[norm]["ensemble"] = score_of(summed, labels)
    return {
        "tasks": count,
        "epoch": epochs[0],
        "ensemble_epochs": epochs if len(epochs) > 1 else [],
        "norms": {norm: {name: each[name] for name in _SCORES if name in each} for norm, each in scores.items()},
    }


def _as_score(result: EvaluationResult, metric: Any) -> dict[str, Any]:
    score = {"accuracy": result.accuracy, "interval": result.metrics.get("accuracy", result).interval}
    extra = {} if result.accuracy is not None else {"loss": result.loss}
    return score | extra | ({} if metric is None else {"metrics": own_metrics(result)})


def own_metrics(result: EvaluationResult) -> dict[str, float | None]:
    """The mean of each metric of the user's, by name; None for one that is not finite, which JSON cannot hold."""
    found = {name: each.mean for name, each in result.metrics.items() if name != "accuracy"}
    return {name: mean if math.isfinite(mean) else None for name, mean in found.items()}


def score_of(logits: list[Tensor], labels: list[Tensor]) -> dict[str, float]:
    """Mean accuracy over tasks and the half width of its 95 % interval (1.96 standard errors).

    logits: (targets, ways) of each task; only their order within a row matters. labels: (targets,) of each task.
    """
    pairs = zip(logits, labels, strict=True)
    per_task = torch.stack([(each.argmax(-1) == y.to(each.device)).double().mean() for each, y in pairs])
    return {"accuracy": float(per_task.mean()), "interval": 1.96 * float(per_task.std()) / math.sqrt(len(per_task))}


def epochs_to_test(checkpoints: CheckpointFolder, history: list[dict[str, Any]], ensemble: int = 0) -> list[int]:
    """The epochs to average, best first; fewer than `ensemble` if the run has fewer epochs or kept fewer. Raises
    CheckpointError if the best checkpoint is missing.
    """
    kept = set(checkpoints.epochs())
    ranked = best_epochs(history, len(history))
    if not ranked or ranked[0] not in kept:
        raise CheckpointError(
            f"The best checkpoint (epoch {ranked[0] if ranked else 1}) is not in '{checkpoints.path}'. "
            "Put it back, or train again."
        )
    return [epoch for epoch in ranked[: max(1, ensemble)] if epoch in kept]
