"""Learners of the batched engine, with tasks of equal and of unequal shapes."""

from __future__ import annotations

from typing import Any

from engine_cases import ANNEAL_EPOCHS, EPOCH, STEPS
from face import as_tasks, build
from models import class_tasks
from oracle import msl_weights
from torch import nn

VECTORS = class_tasks((4,), tasks=2, shots=2)
THREE = class_tasks((4,), tasks=3, shots=2)


def batched(model: nn.Module, **options: Any) -> Any:
    options = {"inner_steps": STEPS, "msl_epochs": ANNEAL_EPOCHS, "engine": "batched"} | options
    learner = build(model, **options)
    learner.epoch = EPOCH
    return learner


def weights_of(learner: Any) -> list[float]:
    return msl_weights(learner.settings.inner_steps, learner.epoch, ANNEAL_EPOCHS)


# --- tasks and chunks ------------------------------------------------------------------------------------------------


def unequal() -> list[Any]:
    shapes = [(2, 1), (1, 2), (2, 1), (3, 1), (1, 2)]
    batches = [class_tasks((4,), tasks=1, shots=s, targets=t, seed=i) for i, (s, t) in enumerate(shapes)]
    return [as_tasks(batch)[0] for batch in batches]
