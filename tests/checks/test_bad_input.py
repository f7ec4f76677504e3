"""A table of bad input: case -> call -> which error, and what it says. After each the learner is what it was.

Each case of a learner is tried twice: before any task was seen, and on a learner with optimizer state and counters.
"""

from __future__ import annotations

import copy
import inspect
import random
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import FrozenInstanceError, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from face import assert_same_state, fingerprint
from models import Mlp, NormedMlp, class_tasks, seeded
from torch import Tensor, nn

import metawrap
from metawrap import (
    FOMAML,
    MAML,
    ArgumentError,
    CheckpointError,
    DataError,
    ExecutionOptions,
    MAMLPlusPlus,
    MetaWrapWarning,
    OuterOptions,
    ProtoNet,
    Reptile,
    Task,
    TaskBatch,
    TaskError,
    UnsupportedModuleError,
)
from metawrap.data import EpisodeSampler, LabelledImages, load_data
from metawrap.settings.keywords import keyword_types, nested, plain_keywords
from metawrap.settings.validated import expected
from metawrap.training.run_settings import METHODS, RunSettings

Case = tuple[Callable[..., Any], type[BaseException], str]
Parts = tuple[Tensor, Tensor, Tensor, Tensor]
NAN, INF = float("nan"), float("inf")


def parts() -> Parts:
    return class_tasks((4,), tasks=2, shots=2)


def changed(**changes: Callable[[Tensor], Any]) -> tuple[Any, ...]:
    """The stacked batch with some of its parts changed: sx, sy, tx, ty; x and y stand for both."""
    names = ("sx", "sy", "tx", "ty")
    return tuple(
        changes.get(name, changes.get(name[1], lambda value: value))(value)
        for name, value in zip(names, parts(), strict=True)
    )


def first(**changes: Callable[[Tensor], Any]) -> tuple[Any, Any]:
    """The support set of one task, changed likewise."""
    sx, sy = parts()[0][0], parts()[1][0]
    return changes.get("x", lambda v: v)(sx), changes.get("y", lambda v: v)(sy)


# What every way of handing tasks to a learner refuses: name -> batch, error, words.
BATCHES: dict[str, tuple[Callable[[], Any], type[BaseException], str]] = {
    "none": (lambda: None, TaskError, "expected .*TaskBatch.*NoneType|expected a task batch"),
    "number": (lambda: 5, TaskError, "expected .*int 5"),
    "text": (lambda: "tasks", TaskError, "expected"),
    "empty list": (list, TaskError, r"expected .*list of 0|expected at least 1 task"),
    "three parts": (lambda: parts()[:3], TaskError, "expected a TaskBatch"),
    "five parts": (lambda: (*parts(), 1), TaskError, "expected a TaskBatch"),
    "numpy arrays": (lambda: tuple(p.numpy() for p in parts()), TaskError, "support_x: expected tensors"),
    "nested lists": (lambda: tuple(p.tolist() for p in parts()), TaskError, "support_x: expected tensors"),
    "support_x missing": (lambda: changed(sx=lambda v: None), TaskError, "support_x: expected tensors.*NoneType"),
    "target_y missing": (lambda: changed(ty=lambda v: None), TaskError, "target_y: expected tensors.*NoneType"),
    "no task axis": (lambda: tuple(p[0, 0] for p in parts()), TaskError, r"shape \(tasks, examples"),
    "other number of tasks in the target": (
        lambda: changed(tx=lambda v: v[:1], ty=lambda v: v[:1]),
        TaskError,
        "same number of tasks",
    ),
    "no tasks": (lambda: changed(x=lambda v: v[:0], y=lambda v: v[:0]), TaskError, "holds 0 tasks"),
    "no support examples": (lambda: changed(sx=lambda v: v[:, :0], sy=lambda v: v[:, :0]), TaskError, "at least 1 ex"),
    "no target examples": (lambda: changed(tx=lambda v: v[:, :0], ty=lambda v: v[:, :0]), TaskError, "at least 1 ex"),
    "fewer labels than inputs": (lambda: changed(sy=lambda v: v[:, :2]), TaskError, "support_x has 6 .*one label per"),
    "more labels than inputs": (lambda: changed(tx=lambda v: v[:, :2]), TaskError, "target_x has 2 .*one label per"),
    "another device": (lambda: changed(x=lambda v: v.to("meta")), TaskError, r"support_x is on 'meta'.*\.to\("),
    "labels on another device": (lambda: changed(ty=lambda v: v.to("meta")), TaskError, r"target_y is on 'meta'"),
    "int32 labels": (lambda: changed(y=lambda v: v.int()), TaskError, r"support_y: .*int64.*int32.*support_y\.long"),
    "int32 target labels": (lambda: changed(ty=lambda v: v.int()), TaskError, r"target_y: .*int64.*target_y\.long"),
    "int16 labels": (lambda: changed(y=lambda v: v.short()), TaskError, r"support_y: .*int64.*int16"),
    "float labels": (lambda: changed(y=lambda v: v.double()), TaskError, r"support_y: .*float64.*mse_loss"),
    "half labels": (lambda: changed(y=lambda v: v.half()), TaskError, r"support_y: .*float16"),
    "bool labels": (lambda: changed(y=lambda v: v > 0), TaskError, r"support_y: .*torch\.bool"),
    "complex labels": (lambda: changed(y=lambda v: v.cdouble()), TaskError, r"support_y: .*complex128"),
    "labels too high": (lambda: changed(y=lambda v: v + 7), TaskError, r"support_y.*(7\.\.9|\[7, 8, 9\]).*[Rr]elabel"),
    "negative labels": (lambda: changed(y=lambda v: v - 1), TaskError, r"support_y.*-1"),
    "target labels too high": (lambda: changed(ty=lambda v: v + 7), TaskError, "target_y holds"),
    "negative target labels": (lambda: changed(ty=lambda v: v - 1), TaskError, "target_y holds"),
    "labels with an axis too many": (lambda: changed(y=lambda v: v[..., None]), TaskError, r"support_y"),
    "one-hot whole numbers": (lambda: changed(y=F.one_hot), TaskError, "support_y"),
    "float32 for a float64 model": (lambda: changed(x=lambda v: v.float()), TaskError, "float32.*parameters are .*64"),
    "half for a float64 model": (lambda: changed(x=lambda v: v.half()), TaskError, "float16.*parameters are"),
    "whole numbers": (lambda: changed(x=lambda v: v.long()), TaskError, "support_x int64.*parameters are"),
    "bool inputs": (lambda: changed(x=lambda v: v > 0), TaskError, "support_x bool.*parameters are"),
    "complex inputs": (lambda: changed(x=lambda v: v.cdouble()), TaskError, "support_x complex128.*parameters are"),
    "too few features": (
        lambda: changed(x=lambda v: v[..., :3]),
        TaskError,
        r"cannot take.*support_x float64 \(6, 3\)",
    ),
    "no features": (lambda: changed(x=lambda v: v[..., :0]), TaskError, r"cannot take.*\(6, 0\)"),
    "other features in the target": (lambda: changed(tx=lambda v: v[..., :3]), TaskError, r"target_x float64 \(6, 3\)"),
    "an axis too many": (lambda: changed(x=lambda v: v[..., None]), TaskError, r"cannot take.*\(6, 4, 1\)"),
    "a tuple for a model of one input": (lambda: changed(x=lambda v: (v, v)), TaskError, r"positional.*tuple of"),
    "a dict for a model of one input": (lambda: changed(x=lambda v: {"q": v}), TaskError, "unexpected keyword"),
    "an empty tuple": (lambda: changed(sx=lambda v: ()), TaskError, "support_x: expected tensors"),
    "an empty dict": (lambda: changed(sx=lambda v: {}), TaskError, "support_x: expected tensors"),
    "a tuple that disagrees on the tasks": (lambda: changed(sx=lambda v: (v, v[:1])), TaskError, "disagree"),
    "a list of numbers": (lambda: [1, 2, 3], TaskError, "expected"),
    "a good task and a bad one": (lambda: [Task(*(p[0] for p in parts())), 5], TaskError, "expected"),
}
# evaluate takes any iterable, so that a string or list of something is read as one of task batches.
WAYS_IN: dict[str, Callable[[Any, Any], Any]] = {
    "meta_step": lambda learner, batch: learner.meta_step(batch),
    "forward": lambda learner, batch: learner(batch),
    "evaluate": lambda learner, batch: learner.evaluate(batch),
}

# Of one learner: name -> call(learner), error, words.
CALLS: dict[str, Case] = {
    "adapt: no inputs": (lambda it: it.adapt(None, first()[1]), TaskError, "support_x: expected a tensor.*None"),
    "adapt: no labels": (lambda it: it.adapt(first()[0], None), TaskError, "support_y: expected a tensor.*None"),
    "adapt: numpy": (lambda it: it.adapt(first()[0].numpy(), first()[1]), TaskError, "support_x: expected a tensor"),
    "adapt: empty": (lambda it: it.adapt(first()[0][:0], first()[1][:0]), TaskError, "support: .*at least 1"),
    "adapt: fewer labels": (lambda it: it.adapt(first()[0], first()[1][:2]), TaskError, "one label per example"),
    "adapt: int32 labels": (lambda it: it.adapt(*first(y=lambda v: v.int())), TaskError, r"support_y.*\.long"),
    "adapt: float labels": (lambda it: it.adapt(*first(y=lambda v: v.double())), TaskError, "support_y.*mse_loss"),
    "adapt: labels too high": (lambda it: it.adapt(*first(y=lambda v: v + 9)), TaskError, r"support_y.*9\.\.11"),
    "adapt: other device": (lambda it: it.adapt(*first(x=lambda v: v.to("meta"))), TaskError, "is on 'meta'"),
    "adapt: other dtype": (lambda it: it.adapt(*first(x=lambda v: v.float())), TaskError, "float32.*parameters are"),
    "adapt: too few features": (lambda it: it.adapt(*first(x=lambda v: v[:, :3])), TaskError, r"\(6, 3\)"),
    "adapt: no label counts": (
        lambda it: it.adapt(*first(y=lambda v: v.fill_(-100))),
        TaskError,
        "support_y: expected at least one label that counts, but all 6 are -100",
    ),
    "adapt: NaN": (lambda it: it.adapt(*first(x=lambda v: v * NAN)), TaskError, "support_x.*not finite.*nan_to_num"),
    "adapt: infinity": (lambda it: it.adapt(*first(x=lambda v: v / 0)), TaskError, "support_x.*not finite"),
    "adapt: steps negative": (lambda it: it.adapt(*first(), steps=-1), ArgumentError, "steps: .*at least 0.*-1"),
    "adapt: steps a float": (lambda it: it.adapt(*first(), steps=1.5), ArgumentError, r"steps: .*whole.*1\.5"),
    "adapt: steps text": (lambda it: it.adapt(*first(), steps="3"), ArgumentError, "steps: .*'3'"),
    "adapt: steps True": (lambda it: it.adapt(*first(), steps=True), ArgumentError, "steps: .*True"),
    "adapt: task_id a list": (lambda it: it.adapt(*first(), task_id=[1]), TaskError, "id: expected a string or"),
    "adapt: mask a number": (lambda it: it.adapt(*first(), mask_unused_outputs=1), ArgumentError, "mask_unused_out"),
    "adapt: unknown keyword (Python's own)": (lambda it: it.adapt(*first(), step=1), TypeError, "keyword .*'step'"),
    "evaluate: NaN": (lambda it: it.evaluate(changed(x=lambda v: v * NAN)), TaskError, r"task 0.*support_x.*not fin"),
    "evaluate: NaN target": (lambda it: it.evaluate(changed(tx=lambda v: v * NAN)), TaskError, "target_x .*not finite"),
    "evaluate: no tasks": (lambda it: it.evaluate(iter(())), TaskError, "at least 1 task"),
    "evaluate: norm unknown": (lambda it: it.evaluate(parts(), norm="layer"), ArgumentError, "norm: .*'layer'"),
    "evaluate: norm a list": (lambda it: it.evaluate(parts(), norm=["batch"]), ArgumentError, "norm: expected"),
    "evaluate: steps": (lambda it: it.evaluate(parts(), steps=-3), ArgumentError, "steps: .*-3"),
    "evaluate: metric a number": (
        lambda it: it.evaluate(parts(), metric=5),
        ArgumentError,
        "metric: .*function.*int 5",
    ),
    "evaluate: metric of text": (
        lambda it: it.evaluate(parts(), metric=lambda p, y: "a"),
        ArgumentError,
        "metric: .*one",
    ),
    "evaluate: metric of a vector": (lambda it: it.evaluate(parts(), metric=lambda p, y: p), ArgumentError, "metric: "),
    "evaluate: keep_predictions": (
        lambda it: it.evaluate(parts(), keep_predictions="x"),
        ArgumentError,
        "keep_pre.*'x'",
    ),
    "evaluate: mask": (lambda it: it.evaluate(parts(), mask_unused_outputs=2), ArgumentError, "mask_unused_outputs"),
    "evaluate: bare tuples that prove nothing": (
        lambda it: it.evaluate([tuple([p] for p in parts())]),
        TaskError,
        "prove neither",
    ),
    "epoch negative": (lambda it: setattr(it, "epoch", -1), ArgumentError, "epoch: .*-1"),
    "epoch a float": (lambda it: setattr(it, "epoch", 1.0), ArgumentError, "epoch: .*whole"),
    "optimizer a number": (lambda it: setattr(it, "optimizer", 5), ArgumentError, "optimizer: .*int"),
    "optimizer of another model": (
        lambda it: setattr(it, "optimizer", torch.optim.SGD(seeded(Mlp).parameters(), lr=0.1)),
        ArgumentError,
        "optimizer: .*not the learner's",
    ),
    "scheduler a number": (lambda it: setattr(it, "scheduler", 5), ArgumentError, "scheduler: .*int"),
    "state_dict a number": (lambda it: it.load_state_dict(5), ArgumentError, "state_dict: .*int 5"),
    "state_dict empty": (lambda it: it.load_state_dict({}), CheckpointError, "state_dict: .*Nothing was loaded"),
    "state_dict of another method": (lambda it: it.load_state_dict(other("proto")), CheckpointError, "Nothing was"),
    "state_dict of a wider model": (lambda it: it.load_state_dict(other("wide")), CheckpointError, "size mismatch"),
    "state_dict of more inner steps": (lambda it: it.load_state_dict(other("steps")), CheckpointError, "size mismatch"),
    "state_dict of the user's model": (
        lambda it: it.load_state_dict(seeded(NormedMlp).state_dict()),
        CheckpointError,
        "Missing key",
    ),
    "state_dict with a counter of text": (
        lambda it: it.load_state_dict(it.state_dict() | {"_extra_state": {"iteration": "many"}}),
        CheckpointError,
        "Nothing was loaded",
    ),
    "state_dict without counters": (
        lambda it: it.load_state_dict(it.state_dict() | {"_extra_state": {}}),
        CheckpointError,
        "iteration",
    ),
    "state_dict with a list for a weight": (
        lambda it: it.load_state_dict(it.state_dict() | {"model.first.weight": [1.0]}),
        CheckpointError,
        r"first\.weight",
    ),
}

# Constructors of tasks: name -> call, error, words.
TASKS: dict[str, Case] = {
    "Task: no parts (Python's own)": (lambda: Task(), TypeError, "missing 4 required"),
    "Task: None": (lambda: Task(None, None, None, None), TaskError, "support_x: expected a tensor"),
    "Task: a list": (lambda: Task([1.0], first()[1], *first()), TaskError, "support_x: expected a tensor"),
    "Task: a scalar": (lambda: Task(torch.ones(()), torch.ones(()), *first()), TaskError, "at least 1 example"),
    "Task: id a float": (lambda: Task(*first(), *first(), id=1.5), TaskError, r"id: .*1\.5"),
    "Task: id True": (lambda: Task(*first(), *first(), id=True), TaskError, "id: .*True"),
    "Task: classes a number": (lambda: Task(*first(), *first(), classes=3), TaskError, "classes: .*int 3"),
    "Task: classes empty": (lambda: Task(*first(), *first(), classes=()), TaskError, "classes: "),
    "Task: classes twice": (lambda: Task(*first(), *first(), classes=(1, 1)), TaskError, "classes: .*different"),
    "Task: classes negative": (lambda: Task(*first(), *first(), classes=(-1, 1)), TaskError, "classes: .*at least 0"),
    "Task: classes floats": (lambda: Task(*first(), *first(), classes=(0.0, 1.0)), TaskError, "classes: .*whole"),
    "TaskBatch: a number": (lambda: TaskBatch(5), TaskError, "tasks: expected a tuple of Task.*int 5"),
    "TaskBatch: None": (lambda: TaskBatch(None), TaskError, "tasks: expected a tuple of Task"),
    "TaskBatch: numbers": (lambda: TaskBatch((1, 2)), TaskError, "tasks: .*stacked"),
    "TaskBatch: the four parts": (lambda: TaskBatch(parts()), TaskError, r"TaskBatch\.stacked"),
    "TaskBatch: nothing": (lambda: TaskBatch(()), TaskError, "0 tasks"),
    "TaskBatch.stacked: classes a number": (
        lambda: TaskBatch.stacked(*parts(), classes=5),
        TaskError,
        "classes: .*2 ta",
    ),
    "TaskBatch.stacked: classes of one": (
        lambda: TaskBatch.stacked(*parts(), classes=[(0, 1, 2)]),
        TaskError,
        "classes",
    ),
    "TaskBatch.stacked: classes flat": (lambda: TaskBatch.stacked(*parts(), classes=[1, 2]), TaskError, "classes: "),
    "TaskBatch.chunks: none": (
        lambda: next(TaskBatch.stacked(*parts()).chunks(0)),
        ArgumentError,
        "size: .*at least 1",
    ),
    "TaskBatch.chunks: text": (lambda: next(TaskBatch.stacked(*parts()).chunks("2")), ArgumentError, "size: .*'2'"),
    "TaskBatch.to: no device (torch's own)": (lambda: TaskBatch.stacked(*parts()).to("moon"), RuntimeError, "moon"),
}

# Keywords that every method has: keyword -> bad values and what the error says.
OUTER: dict[str, list[tuple[Any, str]]] = {
    "meta_lr": [(0, "positive"), (-1.0, "positive"), (NAN, "positive"), (INF, "positive"), ("0.1", "positive")],
    "epochs": [(0, "at least 1"), (1.5, "whole"), (True, "whole")],
    "iterations_per_epoch": [(0, "at least 1"), ("5", "whole")],
    "norm": [("layer", "'batch'"), (5, "'batch'"), (["batch"], "'batch'")],
    "outer_update.betas": [(value, "two numbers") for value in (0.9, (0.9,), (0.9, 1.0), "ab")],
    "outer_update.max_grad_norm": [(0, "positive"), (NAN, "positive"), ("1", "positive")],
    "outer_update.max_grad_value": [(-1, "positive"), (True, "positive")],
    "execution.tasks_per_backward": [(0, "at least 1"), (2.0, "whole")],
    "outer_update.max_skipped_steps": [(0, "at least 1"), ("20", "whole")],
    "loss_fn": [(5, "function"), ("mse", "function")],
    "optimizer": [(5, "function"), ("adam", "function")],
    "scheduler": [(5, "function")],
    "wrapping.swap": [(5, "mapping"), ({5: 5}, "mapping"), ({nn.Mish: nn.ReLU}, "no submodule")],
    "wrapping.keep_norm": [(5, "names or wildcards"), ("nothing.*", "matches none")],
    "execution.allocator": [("yes", "True or False"), (1, "True or False")],
    "cosine_annealing": [("no", "True or False")],
}
# Those of gradient-based methods, on MAML++.
INNER: dict[str, list[tuple[Any, str]]] = {
    "inner_steps": [(0, "at least 1"), (-1, "at least 1"), (1.5, "whole"), ("5", "whole"), (True, "whole")],
    "inner_lr": [(NAN, "finite"), ("0.1", "number"), (True, "number"), ([0.1], "number")],
    "inner_update.rule": [("rmsprop", "'sgd'"), (5, "'sgd'")],
    "inner_update.momentum": [(1.0, "up to"), (-0.1, "up to"), ("0.9", "number")],
    "inner_update.betas": [((0.9, 1.5), "no effect|two numbers"), (0.9, "two numbers")],
    "inner_update.eps": [(0, "positive"), (-1e-8, "positive")],
    "inner_update.max_grad_norm": [(0, "positive"), ("1", "positive")],
    "inner_update.max_grad_value": [(NAN, "positive")],
    "preset": [("mine", "one of"), ([], "one of"), (5, "one of")],
    "multi_step_loss": [(1, "True or False")],
    "msl_epochs": [(-1, "at least 0"), (1.5, "whole")],
    "first_order_epochs": [(-1, "at least 0"), (0.5, "whole"), (NAN, "whole")],
    "per_step_norm_statistics": [("on", "True or False")],
    "per_step_norm_affine": [(0, "True or False")],
    "learn_inner_lr": [("yes", "True or False")],
    "min_meta_lr": [(-1.0, "at least 0"), (1.0, "at most meta_lr")],
    "adapt": [(5, "names or wildcards"), ("nothing", "matches none"), ([5], "names or wildcards"), ((), "adapt|model")],
    "adapt_norm": [("x", "True or False")],
    "engine": [("jax", "'auto'"), ([], "'auto'"), (5, "'auto'")],
    "execution.memory": [("small", "'unrolled'"), (5, "'unrolled'")],
    "execution.workers": [(0, "at least 1"), (1.5, "whole"), ("all", "auto")],
    "execution.workers_in": [("fibres", "'threads'")],
    "execution.channels_last": [(1, "True or False")],
    "execution.tune": [("yes", "True or False")],
    "execution.cuda_graphs": [(1, "True or False")],
    "head": [(5, "name of a submodule"), ("nowhere", "name of a submodule")],
    "outputs.head_init": [("ones", "'learned'"), (None, "'learned'")],
    "outputs.mask_unused_outputs": [(2, "True or False")],
}
MODELS: dict[str, tuple[Callable[[], Any], type[BaseException], str]] = {
    "None": (lambda: None, ArgumentError, "model: expected a torch.nn.Module.*NoneType"),
    "a class": (lambda: NormedMlp, ArgumentError, "model: expected a torch.nn.Module.*type"),
    "a function": (lambda: F.relu, ArgumentError, "model: expected a torch.nn.Module.*function"),
    "a state_dict": (lambda: NormedMlp().state_dict(), ArgumentError, "model: expected a torch.nn.Module.*Dict"),
}

SAMPLERS: dict[str, list[tuple[Any, type[BaseException], str]]] = {
    "images": [(None, ArgumentError, "images: .*LabelledImages"), (torch.zeros(2, 1, 3, 3), ArgumentError, "images: ")],
    "ways": [(0, ArgumentError, "ways: "), (2.0, ArgumentError, "ways: "), (99, DataError, "ways=99.*only 4 classes")],
    "shots": [(0, ArgumentError, "shots: "), ("1", ArgumentError, "shots: "), (9, DataError, "shots \\+ targets")],
    "targets": [(0, ArgumentError, "targets: "), (True, ArgumentError, "targets: "), (6, DataError, "targets")],
    "tasks_per_batch": [(0, ArgumentError, "tasks_per_batch: "), (None, ArgumentError, "tasks_per_batch: ")],
    "seed": [(-1, ArgumentError, "seed: .*at least 0"), (0.5, ArgumentError, "seed: "), ("a", ArgumentError, "seed: ")],
    "rotations": [("yes", ArgumentError, "rotations: .*True or False"), (1, ArgumentError, "rotations: ")],
    "device": [("moon", ArgumentError, "device: .*'cpu'"), ([], ArgumentError, "device: ")],
}

SETTINGS: list[tuple[str, Any, str]] = [
    ("data", 5, "text"),
    ("ways", 1, "at least 2"),
    ("ways", "5", "whole number.*str '5'"),
    ("ways", 5.0, "whole number"),
    ("shots", 0, "at least 1"),
    ("shots", True, "whole number.*bool"),
    ("targets", None, "whole number.*None"),
    ("method", "mamlpp", "one of maml"),
    ("method", [], "text"),
    ("norm", "layer", "one of batch"),
    ("backbone", "resnet", "one of conv4"),
    ("inner_lr", "0.1", "number.*str"),
    ("inner_lr", NAN, "finite"),
    ("meta_lr", INF, "finite"),
    ("inner_steps", 0, "at least 1"),
    ("epochs", 0, "at least 1"),
    ("seed", -1, "0 or more"),
    ("seed", "1", "whole number"),
    ("options", [], "dict"),
    ("options", {5: 5}, "names of keyword arguments.*5"),
    ("rotations", "yes", "True or False"),
    ("test_norms", "some", "one of all"),
    ("image_size", "28", "whole number"),
    ("device", None, "text"),
]


def trained(learner: Any, batch: Any) -> Any:
    learner.meta_step(batch)
    return learner


@cache
def other(what: str) -> dict[str, Any]:
    wide = lambda: NormedMlp(hidden=7)
    made = {
        "proto": lambda: ProtoNet(seeded(NormedMlp)),
        "wide": lambda: MAMLPlusPlus(seeded(wide), inner_steps=2),
        "steps": lambda: MAMLPlusPlus(seeded(NormedMlp), inner_steps=3),
    }
    return dict(made[what]().state_dict())


@cache
def maml(seen: bool) -> Any:
    learner = MAMLPlusPlus(seeded(NormedMlp), inner_steps=2)
    return trained(learner, parts()) if seen else learner


@cache
def proto() -> Any:
    return trained(ProtoNet(seeded(NormedMlp)), parts())


def state_of(learner: Any) -> dict[str, Any]:
    """What a failed call could change: parameters, buffers, flags, optimizer, counters, the global generators."""
    return {
        "module": fingerprint(learner),
        "state": copy.deepcopy(dict(learner.state_dict())),
        "optimizer": copy.deepcopy(learner.optimizer.state_dict()),
        "same optimizer": id(learner.optimizer),
        "iteration": learner.iteration,
        "rng": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": str(np.random.get_state()),
        "grad": torch.is_grad_enabled(),
    }


def assert_refused(learner: Any, call: Callable[[], Any], error: type[BaseException], words: str) -> None:
    before = state_of(learner)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MetaWrapWarning)
        with pytest.raises(error, match=rf"(?s){words}") as caught:
            call()
    assert type(caught.value) is error
    assert_same_state(state_of(learner), before)


def ids(value: Any) -> str:
    return str(value)


def test_the_table_is_as_long_as_it_says() -> None:
    keywords = sum(map(len, OUTER.values())) + sum(map(len, INNER.values()))
    own = len(BATCHES) + len(CALLS) + len(TASKS) + len(MODELS) + len(SETTINGS) + sum(map(len, SAMPLERS.values()))
    assert keywords + own >= 250


@pytest.mark.parametrize("seen", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize("way", WAYS_IN)
@pytest.mark.parametrize("name", BATCHES)
def test_a_bad_batch_is_named_and_changes_nothing(name: str, way: str, seen: bool) -> None:
    make, error, words = BATCHES[name]
    learner = maml(seen)
    assert_refused(learner, lambda: WAYS_IN[way](learner, make()), error, words)


@pytest.mark.parametrize("name", BATCHES)
def test_a_method_on_an_embedding_refuses_the_same(name: str) -> None:
    make, error, words = BATCHES[name]
    assert_refused(proto(), lambda: proto().meta_step(make()), error, words)


@pytest.mark.parametrize("seen", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize("name", CALLS)
def test_a_bad_call_is_named_and_changes_nothing(name: str, seen: bool) -> None:
    call, error, words = CALLS[name]
    learner = maml(seen)
    assert_refused(learner, lambda: call(learner), error, words)


@pytest.mark.parametrize("name", TASKS)
def test_a_bad_task_is_named(name: str) -> None:
    call, error, words = TASKS[name]
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize(
    ("keyword", "value", "words"), [(k, v, w) for k, each in {**OUTER, **INNER}.items() for v, w in each], ids=ids
)
def test_a_bad_keyword_is_named_and_the_model_is_untouched(keyword: str, value: Any, words: str) -> None:
    model = seeded(NormedMlp)
    before = fingerprint(model)
    with pytest.raises((ArgumentError, UnsupportedModuleError), match=rf"{keyword}(.|\n)*({words})|{words}"):
        MAMLPlusPlus(model, **nested({keyword: value}))
    assert fingerprint(model) == before


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> Iterator[Any]:
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", MetaWrapWarning)
        yield getattr(metawrap, METHODS[request.param])


def test_every_method_names_a_bad_keyword(method: Any) -> None:
    model = seeded(NormedMlp)
    before = fingerprint(model)
    flat = ("meta_lr", "epochs", "norm", "optimizer")
    for keyword in (*flat, "wrapping.swap", "wrapping.keep_norm", "execution.allocator"):
        value, words = OUTER[keyword][0]
        with pytest.raises(ArgumentError, match=rf"{keyword.removeprefix('wrapping.')}: .*{words}"):
            method(model, **nested({keyword: value}))
    for given, words in [
        ({"inner_step": 5}, "'inner_step'"),
        ({"iteration_per_epoch": 5}, "'iteration_per_epoch'. Did you mean 'iterations_per_epoch'?"),
        ({"execution": {"allocater": 0}}, "'allocater' in execution=. Did you mean execution={\"allocator\": ...}?"),
        ({"max_grad_norm": 1.0}, "'max_grad_norm'. Did you mean outer_update={\"max_grad_norm\": ...}?"),
    ]:
        called = re.escape(f"{method.__name__}() got an unexpected keyword argument {words}")
        with pytest.raises(TypeError, match=f"^{called}"):
            method(model, **given)
    with pytest.raises(ArgumentError, match=r"execution: expected ExecutionOptions or a dict of its fields.* int 5"):
        method(model, execution=5)
    assert fingerprint(model) == before


@pytest.mark.parametrize("name", MODELS)
def test_every_method_names_what_is_no_model(method: Any, name: str) -> None:
    make, error, words = MODELS[name]
    with pytest.raises(error, match=words):
        method(make())


def test_a_model_with_nothing_to_learn_is_named() -> None:
    for kind in (MAML, MAMLPlusPlus, ProtoNet):
        with pytest.raises(ArgumentError, match="model: Flatten has no parameter"):
            kind(nn.Flatten())


BAD_EVERYWHERE = ("int32 labels", "labels too high", "half for a float64 model", "too few features", "another device")


def test_every_method_refuses_bad_tasks_and_states_and_stays_as_it_was(method: Any) -> None:
    options = {"FineTune": {"classes": 6}, "MultiTask": {"classes": 6}, "LSTMMetaLearner": {"hidden_size": 4}}
    learner = method(seeded(NormedMlp), **options.get(method.__name__, {}))
    for seen in (False, True):
        for name in BAD_EVERYWHERE[method is metawrap.RelationNet :]:  # Its loss is not cross-entropy.
            make, _, _ = BATCHES[name]
            bad = with_classes(make())
            assert_refused(learner, lambda bad=bad: learner.meta_step(bad), TaskError, "_x|_y")  # type: ignore[misc]
            if name != "labels too high" or method.__name__ != "ZeroStep":  # which never looks at the support labels
                one = bad[0]
                x, y = one.support_x, one.support_y
                assert_refused(learner, lambda x=x, y=y: learner.adapt(x, y), TaskError, "_x|_y")  # type: ignore[misc]
        state = learner.state_dict() | {"model.first.weight": torch.ones(2, 2)}
        assert_refused(learner, lambda s=state: learner.load_state_dict(s), CheckpointError, "first.weight")  # type: ignore[misc]
        if not seen:
            learner.meta_step(with_classes(parts()))


def with_classes(batch: Any) -> TaskBatch:
    tasks = TaskBatch.stacked(*batch)
    return TaskBatch(tuple(replace(t, classes=(3 * i, 3 * i + 1, 3 * i + 2)) for i, t in enumerate(tasks)))


def test_nan_in_training_is_skipped_and_counted_and_changes_nothing_else() -> None:
    learner = copy.deepcopy(maml(True))
    weights = {n: p.detach().clone() for n, p in learner.named_parameters()}
    metrics = learner.meta_step(changed(sx=lambda v: v.masked_fill(v == v.max(), NAN)))
    assert metrics.skipped
    assert int(learner.skipped_steps[0]) == 1
    assert all(torch.equal(p, weights[n]) for n, p in learner.named_parameters())


class FillsIn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = NormedMlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.nan_to_num())


def test_a_model_that_takes_nan_for_a_missing_value_may() -> None:
    learner = MAML(seeded(FillsIn), inner_steps=2)
    batch = changed(x=lambda v: v.masked_fill(v > 1, NAN))
    assert not learner.meta_step(batch).skipped
    assert np.isfinite(learner.evaluate(batch).loss)
    assert all(p.isfinite().all() for p in learner.adapt(batch[0][0], batch[1][0]).parameters())


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = NormedMlp()

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("the user's own words")


def test_an_error_of_the_users_own_is_left_alone() -> None:
    with pytest.raises(RuntimeError, match="the user's own words") as caught:
        MAML(Broken().double()).meta_step(parts())
    assert type(caught.value) is RuntimeError


def images() -> LabelledImages:
    labels = torch.arange(4).repeat_interleave(5)
    return LabelledImages(torch.zeros(20, 1, 3, 3, dtype=torch.uint8), labels, tuple("abcd"))


@pytest.mark.parametrize(
    ("keyword", "value", "error", "words"), [(k, *case) for k, each in SAMPLERS.items() for case in each], ids=ids
)
def test_a_bad_argument_of_the_sampler_is_named(keyword: str, value: Any, error: Any, words: str) -> None:
    given: dict[str, Any] = {"images": images(), "ways": 2, "shots": 1, "targets": 1} | {keyword: value}
    with pytest.raises(error, match=words):
        EpisodeSampler(**given)


@pytest.mark.parametrize("index", [-1, 1.5, "0", None, True])
def test_a_bad_index_of_an_episode_is_named(index: Any) -> None:
    sampler = EpisodeSampler(images(), ways=2)
    with pytest.raises(ArgumentError, match="index: expected an integer of at least 0"):
        sampler.batch(index)
    with pytest.raises(ArgumentError, match="count: expected an integer"):
        sampler.batches(index if index is not None else -1)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: load_data("nothing"), DataError, "'nothing' is neither"),
        (lambda: load_data("glyphs", colour=True), ArgumentError, "does not take colour"),
        (lambda: load_data("glyphs", root="x"), ArgumentError, "does not take root"),
        (lambda: load_data("omniglot", root="/nowhere"), DataError, "/nowhere"),
        (lambda: LabelledImages(None, None, ()), DataError, "images: .*None"),
        (lambda: replace(images(), images=torch.zeros(20, 1, 3, 3)), DataError, "images: .*uint8.*float32"),
        (lambda: replace(images(), labels=torch.zeros(20)), DataError, "labels: .*int64.*float32"),
        (lambda: replace(images(), labels=images().labels - 1), DataError, "labels: .*from -1"),
        (lambda: replace(images(), labels=images().labels[:3]), DataError, "labels: .*3 labels for 20"),
        (lambda: replace(images(), class_names=tuple("abc")), DataError, "labels: .*0..2"),
        (lambda: replace(images(), class_names=tuple("abcde")), DataError, "class_names: .*'e'"),
        (lambda: images().subset([]), DataError, "class_indices"),
        (lambda: images().subset([0, 0]), DataError, "class_indices"),
        (lambda: images().subset([9]), DataError, "class_indices"),
    ],
)
def test_bad_data_is_named(call: Callable[[], Any], error: type[BaseException], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize(("field", "value", "words"), SETTINGS, ids=ids)
def test_a_bad_setting_of_a_run_is_named(field: str, value: Any, words: str) -> None:
    with pytest.raises(ArgumentError, match=f"{field}: .*{words}"):
        RunSettings(**{field: value})
    with pytest.raises(ArgumentError, match=f"{field}: .*{words}"):  # as a stored run or a recipe has it
        RunSettings.from_dict({field: value})


class Strange:
    """No argument is one of these."""


def keywords_of_all_methods() -> list[Any]:
    return [
        pytest.param(name, keyword, hint, id=f"{name}-{keyword}")
        for name in METHODS.values()
        for keyword, hint in plain_keywords(getattr(metawrap, name)).items()
    ]


@pytest.mark.parametrize(("name", "keyword", "hint"), keywords_of_all_methods())
def test_every_keyword_of_every_method_is_checked(name: str, keyword: str, hint: Any) -> None:
    model = seeded(NormedMlp)
    before = fingerprint(model)
    bad: list[Any] = [Strange(), [Strange()]]
    if "number" in (expected(hint) or ""):
        bad += [NAN, "5"]
    options = {"FineTune": {"classes": 6}, "MultiTask": {"classes": 6}}.get(name, {})
    for value in bad:
        with pytest.raises(ArgumentError, match=re.escape(keyword.removeprefix("wrapping."))):
            getattr(metawrap, name)(model, **{**options, **nested({keyword: value})})
    assert fingerprint(model) == before


def test_a_group_says_what_is_wrong_with_it_before_a_learner_is_made() -> None:
    with pytest.raises(ArgumentError, match=r"^execution\.workers: expected a whole number of at least 1"):
        ExecutionOptions(workers=0)
    with pytest.raises(TypeError, match=r"^ExecutionOptions\(\) got an unexpected keyword argument 'worker'. It has"):
        ExecutionOptions(worker=2)  # type: ignore[call-arg]
    with pytest.raises(FrozenInstanceError):
        ExecutionOptions().workers = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("old", "now"),
    [
        ("workers", 'execution={"workers": ...}'),
        ("worker", 'execution={"workers": ...}'),
        ("tune", 'execution={"tune": ...}'),
        ("inner_optimizer", 'inner_update={"rule": ...}'),
        ("inner_betas", 'inner_update={"betas": ...}'),
        ("betas", 'outer_update={"betas": ...}'),
        ("head_init", 'outputs={"head_init": ...}'),
        ("swap", 'wrapping={"swap": ...}'),
        ("inner_step", "'inner_steps'"),
    ],
)
def test_a_keyword_of_0_1_is_told_its_place(old: str, now: str) -> None:
    with pytest.raises(TypeError) as caught:
        MAML(seeded(NormedMlp), **{old: 2})
    assert str(caught.value) == f"MAML() got an unexpected keyword argument '{old}'. Did you mean {now}?"


def test_a_group_is_an_object_or_a_dict_and_leaves_a_preset_what_it_does_not_name() -> None:
    for outer in (OuterOptions(max_grad_norm=1.0), {"max_grad_norm": 1.0}):
        settings = MAMLPlusPlus(seeded(NormedMlp), preset="paper", outer_update=outer).settings
        assert settings.outer_update == OuterOptions(betas=(0.9, 0.99), max_grad_norm=1.0)


@pytest.mark.parametrize("given", [{"execution": {"memory": "flat"}}, {"execution": ExecutionOptions(memory="flat")}])
def test_a_field_that_a_method_does_not_have_is_refused(given: dict[str, Any]) -> None:
    for kind in (Reptile, ProtoNet):
        with pytest.raises(TypeError, match=rf"^{kind.__name__}\(\) got .* 'memory' in execution=\.$"):
            kind(seeded(NormedMlp), **given)


def test_settings_can_be_replaced_field_by_field() -> None:
    options = ExecutionOptions(workers=2, workers_in="processes")
    assert replace(replace(options, workers_in="threads"), workers=1, memory="flat") == ExecutionOptions(memory="flat")


@pytest.mark.filterwarnings("ignore:first_order_epochs.*get no gradient")
@pytest.mark.parametrize("preset", [None, "maml", "authors_code", "paper"])
def test_first_order_maml_is_first_order_under_every_preset(preset: str | None) -> None:
    assert FOMAML(seeded(NormedMlp), preset=preset).settings.first_order_epochs == INF


def test_first_order_maml_refuses_second_order_epochs() -> None:
    with pytest.raises(ArgumentError, match=r"first_order_epochs: cannot be 0 in FOMAML, where it is inf.*use MAML"):
        FOMAML(seeded(NormedMlp), first_order_epochs=0)


@pytest.mark.parametrize("kind", [MAMLPlusPlus, Reptile, ProtoNet])
def test_epochs_of_the_built_in_schedule_are_refused_beside_one_of_the_users_own(kind: Any) -> None:
    for own in (
        {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1)},
        {"scheduler": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1)},
    ):
        with pytest.raises(ArgumentError, match=f"epochs: belongs to the built-in .*{next(iter(own))}= was given"):
            kind(seeded(NormedMlp), epochs=3, **own)


def test_constructors_show_their_keywords_and_have_at_most_28() -> None:
    for name in METHODS.values():
        kind = getattr(metawrap, name)
        assert len([each for each in keyword_types(kind) if "." not in each]) <= 27
    shown = inspect.signature(MAML).parameters
    assert {"inner_steps", "execution", "wrapping"} <= set(shown)
    assert "memory" not in shown
    assert set(shown) == {"model", *(name for name in keyword_types(MAML) if "." not in name)}
