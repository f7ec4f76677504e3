"""Every method of the command line, and variants of methods: small learners and tasks that the contract runs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from keywords import grouped
from method_cases import MapNet
from models import Conv4, NormedMlp, class_tasks, seeded
from torch import nn

from metawrap import MetaWrapWarning, Task, methods
from metawrap.training.run_settings import METHODS

# Smaller, so that the contract is quick; and what a method needs to learn a handful of tasks by heart.
OPTIONS: dict[str, dict[str, Any]] = {
    "maml++": {"inner_steps": 2},
    "maml": {"inner_steps": 2},
    "fomaml": {"inner_steps": 2},
    "anil": {"inner_steps": 2},
    "boil": {"inner_steps": 2},
    "fine-tune": {"inner_steps": 5, "classes": 9},
    "multi-task": {"inner_steps": 5, "classes": 9},
    "reptile": {"inner_steps": 4, "inner_lr": 0.5, "evaluation_steps": 4},
    "lstm": {"inner_steps": 2, "inner_lr": 0.1, "hidden_size": 5, "max_grad_norm": None},
    "mann": {"hidden": 16, "slots": 8},
    "statistician": {"hidden": 32},
}
# Other code of the same method: its name, and its options.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "protonet-cosine": ("protonet", {"distance": "cosine"}),
    "metaoptnet-ridge": ("metaoptnet", {"solver": "ridge"}),
    "matchingnet-context": ("matchingnet", {"full_context": True, "processing_steps": 2, "learn_scale": True}),
    "anil-rates": ("anil", {"learn_inner_lr": True}),
    "fine-tune-full": ("fine-tune", {"tune": "full", "inner_lr": 0.05}),
    "fine-tune-growing": ("fine-tune", {"classes": None}),
    "fine-tune-own-labels": ("fine-tune", {"classes": "shared"}),
    "multi-task-growing": ("multi-task", {"classes": None}),
    "multi-task-ids": ("multi-task", {}),
    "relationnet-maps": ("relationnet", {"head": "head"}),
    "siamese-images": ("siamese", {}),
    "statistician-images": ("statistician", {}),
}
NETWORKS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "relationnet-maps": (MapNet, (1, 10, 10)),
    "siamese-images": (Conv4, (1, 16, 16)),
    "statistician-images": (Conv4, (1, 16, 16)),
}


IDS = ["a.b", 1, "1"]


def batch_of(case: str = "", tasks: int = 3, seed: int = 0, **options: Any) -> list[Task]:
    shape = NETWORKS[case][1] if case in NETWORKS else (4,)
    found = []
    for place, each in enumerate(
        zip(*class_tasks(shape, tasks=tasks, seed=seed, **{"shots": 2, **options}), strict=True)
    ):
        classes = tuple(range(3 * place, 3 * place + int(each[1].max()) + 1))
        task_id = IDS[place] if case == "multi-task-ids" else None
        named = not case.endswith(("ids", "own-labels"))
        found.append(Task(*each, id=task_id, classes=classes if named else None))
    return found


def keywords(name: str, **flat: Any) -> dict[str, Any]:
    """Flat keywords by group; `tune` and `inner_optimizer` of joint training are the method's own."""
    own = {
        key: flat.pop(key) for key in ("tune", "inner_optimizer") if name in ("fine-tune", "multi-task") and key in flat
    }
    return grouped(**flat) | own


def make(case: str, model: nn.Module | None = None, **options: Any) -> Any:
    name, own = VARIANTS.get(case, (case, {}))
    if model is None:
        model = network(case)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", MetaWrapWarning)
        torch.manual_seed(0)
        return getattr(methods, METHODS[name])(model, **keywords(name, **OPTIONS.get(name, {}) | own | options))


def network(case: str, seed: int = 0) -> nn.Module:
    return seeded(NETWORKS.get(case, (NormedMlp, ()))[0], seed)


@contextmanager
def quiet() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", MetaWrapWarning)
        torch.manual_seed(1)
        yield
