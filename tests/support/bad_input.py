"""Tables of bad input: what is handed in, which error must come, and what it must say."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from models import Mlp, NormedMlp, class_tasks, seeded
from torch import Tensor, nn

from metawrap import ArgumentError, CheckpointError, DataError, MAMLPlusPlus, ProtoNet, Task, TaskBatch, TaskError

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


# What every way of handing tasks to a learner refuses with a TaskError: name -> batch, words.
BATCHES: dict[str, tuple[Callable[[], Any], str]] = {
    "none": (lambda: None, "expected .*TaskBatch.*NoneType|expected a task batch"),
    "number": (lambda: 5, "expected .*int 5"),
    "text": (lambda: "tasks", "expected"),
    "empty list": (list, r"expected .*list of 0|expected at least 1 task"),
    "three parts": (lambda: parts()[:3], "expected a TaskBatch"),
    "five parts": (lambda: (*parts(), 1), "expected a TaskBatch"),
    "numpy arrays": (lambda: tuple(p.numpy() for p in parts()), "support_x: expected tensors"),
    "nested lists": (lambda: tuple(p.tolist() for p in parts()), "support_x: expected tensors"),
    "support_x missing": (lambda: changed(sx=lambda v: None), "support_x: expected tensors.*NoneType"),
    "target_y missing": (lambda: changed(ty=lambda v: None), "target_y: expected tensors.*NoneType"),
    "no task axis": (lambda: tuple(p[0, 0] for p in parts()), r"shape \(tasks, examples"),
    "other number of tasks in the target": (
        lambda: changed(tx=lambda v: v[:1], ty=lambda v: v[:1]),
        "same number of tasks",
    ),
    "no tasks": (lambda: changed(x=lambda v: v[:0], y=lambda v: v[:0]), "holds 0 tasks"),
    "no support examples": (lambda: changed(sx=lambda v: v[:, :0], sy=lambda v: v[:, :0]), "at least 1 ex"),
    "no target examples": (lambda: changed(tx=lambda v: v[:, :0], ty=lambda v: v[:, :0]), "at least 1 ex"),
    "fewer labels than inputs": (lambda: changed(sy=lambda v: v[:, :2]), "support_x has 6 .*one label per"),
    "more labels than inputs": (lambda: changed(tx=lambda v: v[:, :2]), "target_x has 2 .*one label per"),
    "another device": (lambda: changed(x=lambda v: v.to("meta")), r"support_x is on 'meta'.*\.to\("),
    "labels on another device": (lambda: changed(ty=lambda v: v.to("meta")), r"target_y is on 'meta'"),
    "int32 labels": (lambda: changed(y=lambda v: v.int()), r"support_y: .*int64.*int32.*support_y\.long"),
    "int32 target labels": (lambda: changed(ty=lambda v: v.int()), r"target_y: .*int64.*target_y\.long"),
    "int16 labels": (lambda: changed(y=lambda v: v.short()), r"support_y: .*int64.*int16"),
    "float labels": (lambda: changed(y=lambda v: v.double()), r"support_y: .*float64.*mse_loss"),
    "half labels": (lambda: changed(y=lambda v: v.half()), r"support_y: .*float16"),
    "bool labels": (lambda: changed(y=lambda v: v > 0), r"support_y: .*torch\.bool"),
    "complex labels": (lambda: changed(y=lambda v: v.cdouble()), r"support_y: .*complex128"),
    "labels too high": (lambda: changed(y=lambda v: v + 7), r"support_y.*(7\.\.9|\[7, 8, 9\]).*[Rr]elabel"),
    "negative labels": (lambda: changed(y=lambda v: v - 1), r"support_y.*-1"),
    "target labels too high": (lambda: changed(ty=lambda v: v + 7), "target_y holds"),
    "negative target labels": (lambda: changed(ty=lambda v: v - 1), "target_y holds"),
    "labels with an axis too many": (lambda: changed(y=lambda v: v[..., None]), r"support_y"),
    "one-hot whole numbers": (lambda: changed(y=F.one_hot), "support_y"),
    "float32 for a float64 model": (lambda: changed(x=lambda v: v.float()), "float32.*parameters are .*64"),
    "half for a float64 model": (lambda: changed(x=lambda v: v.half()), "float16.*parameters are"),
    "whole numbers": (lambda: changed(x=lambda v: v.long()), "support_x int64.*parameters are"),
    "bool inputs": (lambda: changed(x=lambda v: v > 0), "support_x bool.*parameters are"),
    "complex inputs": (lambda: changed(x=lambda v: v.cdouble()), "support_x complex128.*parameters are"),
    "too few features": (lambda: changed(x=lambda v: v[..., :3]), r"cannot take.*support_x float64 \(6, 3\)"),
    "no features": (lambda: changed(x=lambda v: v[..., :0]), r"cannot take.*\(6, 0\)"),
    "other features in the target": (lambda: changed(tx=lambda v: v[..., :3]), r"target_x float64 \(6, 3\)"),
    "an axis too many": (lambda: changed(x=lambda v: v[..., None]), r"cannot take.*\(6, 4, 1\)"),
    "a tuple for a model of one input": (lambda: changed(x=lambda v: (v, v)), r"positional.*tuple of"),
    "a dict for a model of one input": (lambda: changed(x=lambda v: {"q": v}), "unexpected keyword"),
    "an empty tuple": (lambda: changed(sx=lambda v: ()), "support_x: expected tensors"),
    "an empty dict": (lambda: changed(sx=lambda v: {}), "support_x: expected tensors"),
    "a tuple that disagrees on the tasks": (lambda: changed(sx=lambda v: (v, v[:1])), "disagree"),
    "a list of numbers": (lambda: [1, 2, 3], "expected"),
    "a good task and a bad one": (lambda: [Task(*(p[0] for p in parts())), 5], "expected"),
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
    "execution.tune": [("yes", 'True, False or "auto"')],
    "execution.cuda_graphs": [(1, "True or False")],
    "head": [(5, "name of a submodule"), ("nowhere", "name of a submodule")],
    "outputs.head_init": [("ones", "'learned'"), (None, "'learned'")],
    "outputs.mask_unused_outputs": [(2, "True or False")],
}
# No modules, and the kind that the error names.
MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "None": (lambda: None, "NoneType"),
    "a class": (lambda: NormedMlp, "type"),
    "a function": (lambda: F.relu, "function"),
    "a state_dict": (lambda: NormedMlp().state_dict(), "Dict"),
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
    ("ways", "5", "whole number.*'5'"),
    ("ways", 5.0, "whole number"),
    ("shots", 0, "at least 1"),
    ("shots", True, "whole number.*True"),
    ("targets", None, "whole number.*None"),
    ("method", "mamlpp", "one of maml"),
    ("method", [], "one of maml"),
    ("norm", "layer", "'batch', 'running'"),
    ("backbone", "resnet", "'conv4', .*'wrn28-10'"),
    ("filters", 0, "at least 1"),
    ("inner_lr", "0.1", "number.*'0.1'"),
    ("inner_lr", NAN, "finite"),
    ("meta_lr", INF, "finite"),
    ("inner_steps", 0, "at least 1"),
    ("epochs", 0, "at least 1"),
    ("seed", -1, "at least 0"),
    ("seed", "1", "whole number"),
    ("options", [], "dict"),
    ("options", {5: 5}, "keyword arguments by name.*5"),
    ("rotations", "yes", "True or False"),
    ("test_norms", "some", "'all' or"),
    ("image_size", "28", "whole number"),
    ("device", None, "text"),
]


@cache
def other(what: str) -> dict[str, Any]:
    wide = lambda: NormedMlp(hidden=7)
    made = {
        "proto": lambda: ProtoNet(seeded(NormedMlp)),
        "wide": lambda: MAMLPlusPlus(seeded(wide), inner_steps=2),
        "steps": lambda: MAMLPlusPlus(seeded(NormedMlp), inner_steps=3),
    }
    return dict(made[what]().state_dict())
