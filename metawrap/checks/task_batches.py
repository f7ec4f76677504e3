"""What is wrong with a task that its shapes do not show: labels that a loss cannot take, inputs that a model cannot.

Labels are checked before anything runs. Whether a model takes an input only the model knows, so torch's own complaint
is caught and told with the task that caused it; an error of the user's own code is left alone. Values that are not
finite are looked for where a result is on its way out; in training, to look at them would make a GPU wait.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metawrap.engines.calling import leaves_behind, refuse_wrappers
from metawrap.errors import MetaWrapError, MetaWrapWarning, TaskError
from metawrap.results import class_loss, ignored_label
from metawrap.tasks import Task, TaskBatch, as_task_batch, describe_value, is_stacked, tensors_in

PARTS = ("support_x", "support_y", "target_x", "target_y")

# What torch says of shapes, dtypes and devices that do not fit. Whatever says something else is left as it is.
_MISFIT = re.compile(
    r"mat1 and mat2|mat2 must have|must have the same (dtype|reduction)|expected scalar type"
    r"|shapes cannot be multiplied"
    r"|Given (groups|normalized_shape|transposed)|[Ee]xpected .*\binput\b|Input type|input\.size|[Ss]ize mismatch"
    r"|size of tensor a|Sizes of tensors must match|is invalid for input of size|[Oo]utput size is too small"
    r"|Calculated padded input size|not implemented for|target dtype|multi-target|class probabilities"
    r"|Expected target|must match the size|on the same device|sparse tensors?|can't be cast|inconsistent tensor size"
    r"|more than 1 spatial element|[Cc]omplex|following scalar types|index out of range in self|< num_embeddings"
    r"|^Target -?\d+ is out of bounds"
)
_FOLLOWED = (
    "Pass it detached (tensor.detach()), or call learner(task_batch).loss.backward() and step the optimizers yourself."
)
_MISCALL = re.compile(r"positional arguments?\b|unexpected keyword argument")


def checked_batch(task_batch: Any, loss_fn: Any, device: torch.device) -> TaskBatch:
    """A task batch in any accepted form, read and checked.

    Raises:
        TaskError: it has the wrong form, shapes, labels or device.
    """
    if is_stacked(task_batch) and _may_be_one_task(loss_fn, *map(tensors_in, task_batch)):
        raise TaskError(
            f"task_batch: support_x is {describe_value(task_batch[0])} and support_y {describe_value(task_batch[1])}. "
            "Their first axis may count tasks, or the examples of one task. Write TaskBatch.stacked(*parts) for tasks, "
            "or Task(*parts) for one task."
        )
    batch = as_task_batch(task_batch)
    check_device(batch, device)
    check_labels(batch, loss_fn)
    return batch


def without_graphs(batch: TaskBatch, learner: nn.Module) -> TaskBatch:
    """The batch without the graphs that lead to its tensors: a meta-step does not follow them, and says so.

    Raises:
        TaskError: such a graph leads to the learner's own parameters, so that a part of their gradient would be lost.
    """
    graphs = with_graphs(batch)
    if not graphs:
        return batch
    owned = {id(parameter): name for name, parameter in learner.named_parameters()}
    for part, tensor in graphs:
        if own := [owned[id(leaf)] for leaf in leaves_behind([tensor]) if id(leaf) in owned]:
            raise TaskError(
                f"{part} was computed from the learner's own '{own[0]}', and meta_step does not follow its graph: a "
                f"part of the gradient would be lost. {_FOLLOWED}"
            )
    warnings.warn(
        f"{graphs[0][0]} was computed with a graph, which meta_step does not follow: the network that computed it gets "
        f"no gradient. {_FOLLOWED}",
        MetaWrapWarning,
        stacklevel=3,
    )
    return TaskBatch(tuple(task.map(lambda t: t.detach().requires_grad_(t.requires_grad)) for task in batch))


def with_graphs(batch: TaskBatch) -> list[tuple[str, Tensor]]:
    """The tensors that were computed with a graph, each with the name of its part of the task."""
    parts = [(name, part) for task in batch for name, part in zip(PARTS, task.parts(), strict=True)]
    return [(name, tensor) for name, part in parts for tensor in tensors_in(part) if tensor.grad_fn is not None]


def check_labels(tasks: Iterable[Task], loss_fn: Any) -> None:
    """Checks what cross-entropy needs of labels; other losses take what they like.

    Raises:
        TaskError: names the part, and what to pass in its place.
    """
    if class_loss(loss_fn) is not F.cross_entropy:
        return
    for task in tasks:
        for part in ("support_y", "target_y"):
            y = getattr(task, part)
            if not isinstance(y, Tensor) or y.dtype in (torch.int64, torch.uint8):
                continue
            if y.is_floating_point() and y.ndim > 1:  # The probability of each class.
                continue
            otherwise = "or loss_fn=F.mse_loss for regression" if y.is_floating_point() else "as labels are indices"
            raise TaskError(
                f"{part}: cross-entropy needs labels of dtype torch.int64, but got {describe_value(y)}. "
                f"Pass {part}.long(), {otherwise}."
            )


@contextmanager
def explained(tasks: Iterable[Task], model: nn.Module) -> Iterator[None]:
    """Tells an error of torch about shapes, dtypes or devices as what it is: tasks that the model does not take.

    Raises:
        TaskError: names the parts of each kind of task, and the model's own precision.
        UnsupportedModuleError: torch.compile was put around a part of the model.
    """
    refuse_wrappers(model)
    try:
        yield
    except MetaWrapError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        what = " ".join(str(error).split()).rstrip(".")
        if not (_MISCALL if isinstance(error, TypeError) else _MISFIT).search(what):
            raise
        kinds = list(dict.fromkeys(map(_described, tasks)))
        shown = " and one with ".join(kinds[:3])
        own = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
        raise TaskError(
            f"The model or its loss cannot take this task: {what[:200]}. There is a task with {shown}; the model's "
            f"parameters are {own}. Give inputs of the shape and dtype that the model was built for, and labels below "
            "its number of outputs; or convert first: "
            "floats with task_batch.to(dtype), whole numbers with x.to(dtype), the model with learner.to(dtype)."
        ) from error


def refuse_uncounted(task: Task, loss_fn: Any, where: str = "") -> None:
    """Checks that a loss on classes counts a label of each part: without one its gradient is zero, and nothing learns.

    Synchronises with a GPU: call it only where the caller synchronises anyway.

    Raises:
        TaskError: names the part.
    """
    if class_loss(loss_fn) not in (F.cross_entropy, F.nll_loss):
        return
    ignored = ignored_label(loss_fn)
    for part in ("support_y", "target_y"):
        y = getattr(task, part)
        if isinstance(y, Tensor) and y.dtype == torch.int64 and y.numel() and bool((y == ignored).all()):
            raise TaskError(
                f"{where}{part}: expected at least one label that counts, but all {y.numel()} are {ignored}, which the "
                "loss ignores. Leave the task out, or label an example."
            )


def refuse_not_finite(task: Task, found: Iterable[Tensor], where: str = "") -> None:
    """Checks, where values of a task are not finite, whether they got through to what was `found`.

    They need not: a model may take NaN for a missing value, or minus infinity for a mask.

    Raises:
        TaskError: names the part.
    """
    bad = [
        f"{name} holds values that are not finite"
        for name, part in zip(PARTS, task.parts(), strict=True)
        for tensor in tensors_in(part)
        if not is_finite(tensor)
    ]
    if bad and not all(map(is_finite, found)):
        raise TaskError(
            f"{where}{bad[0]} (NaN or infinity), and the result is not finite either. Leave such examples out, "
            "or replace the values, with torch.nan_to_num for example."
        )


def _may_be_one_task(loss_fn: Any, sx: list[Tensor], sy: list[Tensor], tx: list[Tensor], ty: list[Tensor]) -> bool:
    """Whether four parts with a leading task axis could as well be one task, with several numbers in each label.

    No doubt is left by classes (tasks, examples) of examples with further axes, by numbers (tasks, examples, n) of
    such examples, and by support and target sets of unequal size. Other complaints are left to other checks.
    """
    if not (sx and sy and tx and ty) or any(tensor.ndim < 2 for tensor in (*sx, *sy, *tx, *ty)):
        return False
    axes, label_axes = max(tensor.ndim for tensor in sx), max(tensor.ndim for tensor in sy)
    if axes == 2:
        return True
    if [t.shape[1:] for t in (*sx, *sy)] != [t.shape[1:] for t in (*tx, *ty)]:
        return False
    if sy[0].shape[1] == 1:
        return True
    if sy[0].is_floating_point() or sy[0].is_complex() or sy[0].dtype == torch.bool:
        return label_axes != 3 and class_loss(loss_fn) is None
    return axes <= label_axes


def is_finite(tensor: Tensor) -> bool:
    """Whether all values of a tensor are finite; True for a layout that cannot be looked through."""
    values = tensor.coalesce().values() if tensor.layout == torch.sparse_coo else tensor
    return values.layout != torch.strided or bool(values.isfinite().all())


def _described(task: Task) -> str:
    return ", ".join(f"{name} {_short(value)}" for name, value in zip(PARTS, task.parts(), strict=True))


def _short(value: Any) -> str:
    shapes = [f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for t in tensors_in(value)]
    kind = "" if isinstance(value, Tensor) else f"{type(value).__name__} of "
    return kind + ", ".join(shapes[:4])


def check_device(tasks: Iterable[Task], device: torch.device) -> None:
    """Raises TaskError when a task is on another device than the model."""
    for task in tasks:
        for name, part in zip(PARTS, task.parts(), strict=True):
            for tensor in tensors_in(part):
                if tensor.device != device:
                    raise TaskError(
                        f"{name} is on '{tensor.device}', but the model is on '{device}'. "
                        f"Move the batch with task_batch.to('{device}'), or the learner with learner.to(...)."
                    )
