"""The texts of the package that a user may see, read from its source, and the names that exist for them to name."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch

import metawrap
import metawrap.data
import metawrap.sklearn
import metawrap.training
from metawrap.learner.learner import Learner
from metawrap.settings.groups import GROUPS
from metawrap.settings.keywords import keyword_types

ROOT = Path(metawrap.__file__).parent
# The words for objects of a user, and of modules under their usual names.
OBJECTS: dict[str, Any] = {"Task": metawrap.Task, "TaskBatch": metawrap.TaskBatch, "task_batch": metawrap.TaskBatch}
OBJECTS |= {"task": metawrap.Task, "images": metawrap.data.LabelledImages, "sampler": metawrap.data.EpisodeSampler}
OBJECTS |= {name: importlib.import_module(module) for name, module in {"np": "numpy", "nn": "torch.nn"}.items()}
OBJECTS |= {"F": torch.nn.functional, "torch": torch, "metawrap": metawrap}
# Keywords of torch that messages name.
FOREIGN: list[Callable[..., Any]] = [torch.optim.SGD, torch.load, torch.nn.BatchNorm2d, torch.nn.Embedding]
FOREIGN += [torch.nn.functional.cross_entropy]


@cache
def messages() -> list[tuple[str, str]]:
    """(place, text) of every text with a space that is no docstring, representation or page; filled-in values are X."""
    return [found for path in sorted(ROOT.rglob("*.py")) for found in _messages_in(path)]


def _messages_in(path: Path) -> Iterator[tuple[str, str]]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    hidden = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    for node in nodes:
        shown = isinstance(node, ast.FunctionDef) and node.name in ("__repr__", "__str__")
        if isinstance(node, ast.JoinedStr) or shown:
            hidden |= {id(inner) for inner in ast.walk(node) if inner is not node}
    for node in nodes:
        parts = node.values if isinstance(node, ast.JoinedStr) else [node] if isinstance(node, ast.Constant) else []
        text = "".join(str(part.value) if isinstance(part, ast.Constant) else "X" for part in parts)
        if id(node) not in hidden and " " in text.strip() and "</" not in text:
            yield f"{path.relative_to(ROOT.parent)}:{node.lineno}", text  # type: ignore[attr-defined]


def named(pattern: str) -> list[tuple[str, str]]:
    """(what, place and text) of all that the pattern finds in the messages."""
    return [(found, f"{place}: {text}") for place, text in messages() for found in re.findall(pattern, text)]


@cache
def public_keywords() -> frozenset[str]:
    """The keywords of public functions, methods and constructors, without the fields of groups of settings."""
    found: set[str] = set()
    for module in (metawrap, metawrap.data, metawrap.training):
        for each in (getattr(module, name) for name in module.__all__):
            if inspect.isclass(each) and issubclass(each, Learner):
                found |= {name for name in keyword_types(each) if "." not in name}
            elif callable(each) and each not in GROUPS.values() and not each.__name__.endswith(("Error", "Warning")):
                found |= set(inspect.signature(each).parameters)
    for each in (*FOREIGN, metawrap.sklearn.FewShotClassifier, Learner.evaluate, Learner.adapt, metawrap.MAML.adapt):
        found |= set(inspect.signature(each).parameters)
    return frozenset(found)


def fields_of_groups() -> dict[str, set[str]]:
    """The groups of settings that have a field of this name."""
    found: dict[str, set[str]] = {}
    for group, kind in GROUPS.items():
        for field in kind.__dataclass_fields__:  # type: ignore[attr-defined]
            found.setdefault(field, set()).add(group)
    return found


def exists(dotted: str, learner: Any) -> bool:
    """Whether torch.nn.Linear, learner.optimizer, images.subset, execution.workers, ... is there."""
    root, *names = dotted.split(".")
    if root in GROUPS:
        return names[0] in GROUPS[root].__dataclass_fields__  # type: ignore[attr-defined]
    found = learner if root == "learner" else OBJECTS[root]
    for name in names:
        if name in getattr(found, "__dataclass_fields__", {}):
            return True
        if inspect.ismodule(found) and not hasattr(found, name):
            try:
                importlib.import_module(f"{found.__name__}.{name}")
            except ImportError:
                return False
        if not hasattr(found, name):
            return False
        found = getattr(found, name)
    return True
