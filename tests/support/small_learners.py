"""A small normed network, its task batch, and a learner without the multi-step loss."""

from __future__ import annotations

from typing import Any

import pytest
from engine_cases import ENGINES
from face import build
from models import NormedMlp, class_tasks, seeded
from torch import nn

BATCH = class_tasks((4,))
every_engine = pytest.mark.parametrize("engine", ENGINES)


def normed() -> nn.Module:
    return seeded(NormedMlp)


def small(**options: Any) -> Any:
    return build(normed(), **{"multi_step_loss": False, "first_order_epochs": 0, "engine": "functional"} | options)


def losses_of(learner: Any, batch: Any) -> float:
    return float(learner(batch).loss.detach())
