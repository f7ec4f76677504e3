"""A learner on NormedMlp, whose head is `linear`, and two tasks with ids."""

from __future__ import annotations

from typing import Any

from face import as_tasks, build
from models import NormedMlp, class_tasks, seeded
from torch import nn

from metawrap import Task

BATCH = class_tasks((4,), tasks=2, shots=2)
TASKS = [Task(*parts, id=name) for parts, name in zip(as_tasks(BATCH), ("a", "b"), strict=True)]
HEAD = ("linear.weight", "linear.bias")


def learner_of(engine: str = "functional", model: nn.Module | None = None, **options: Any) -> Any:
    options = {"inner_steps": 2, "multi_step_loss": False, "per_step_norm_affine": False} | options
    return build(seeded(NormedMlp) if model is None else model, engine=engine, **options)
