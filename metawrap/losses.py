"""The loss function: its value on a task, whether it is one of classes, and the label that it ignores."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from metawrap.errors import ArgumentError, MetaWrapError, TaskError
from metawrap.outputs import in_words, prediction_for, prediction_in
from metawrap.tasks import describe_value

IGNORED = -100


def are_logits(prediction: Any, y: Any) -> bool:
    """Whether these are (examples, classes, ...) logits and (examples, ...) labels."""
    if not (isinstance(prediction, Tensor) and isinstance(y, Tensor)) or y.is_floating_point() or y.is_complex():
        return False
    fits = prediction.ndim == y.ndim + 1 and prediction.shape[:1] + prediction.shape[2:] == y.shape
    return bool(fits) and prediction.shape[1] > 1


# Losses of torch on one score for each class, whose prediction is the class of the largest score.
_CLASS_LOSSES: dict[Any, Callable[..., Tensor]] = {
    nn.CrossEntropyLoss.forward: F.cross_entropy,
    nn.NLLLoss.forward: F.nll_loss,
    nn.MultiMarginLoss.forward: F.multi_margin_loss,
}


def class_loss(loss_fn: Any) -> Callable[..., Tensor] | None:
    """The loss of torch on classes that this is, itself or as module or partial; None for any other loss."""
    function = _bare(loss_fn)
    if isinstance(function, nn.Module):
        return _CLASS_LOSSES.get(type(function).forward)
    return next((known for known in _CLASS_LOSSES.values() if known is function), None)


def accuracy_of(prediction: Any, y: Any, loss_fn: Any, known: bool = False) -> Tensor | None:
    """Fraction of right classes of (examples, classes, ...) scores on (examples, ...) labels.

    None unless the loss is cross-entropy, nll_loss or multi_margin_loss of torch, as function, module or partial, or
    the method knows that these are classes (`known`): shapes do not tell, as ordinal labels and tokens have them too.
    """
    if not isinstance(prediction, Tensor):
        prediction = prediction_in(prediction)
    if not (known or class_loss(loss_fn)) or not are_logits(prediction, y):
        return None
    labelled = y != ignored_label(loss_fn)
    right = (prediction.argmax(1) == y) & labelled
    accuracy: Tensor = right.sum() / labelled.sum()
    return accuracy


def ignored_label(loss_fn: Any) -> int:
    """The label that a loss ignores: its own `ignore_index`, or torch's."""
    return int(loss_option(loss_fn, "ignore_index", IGNORED))


def loss_option(loss_fn: Any, name: str, default: Any) -> Any:
    """An option of a loss that is a partial or a module."""
    keywords = loss_fn.keywords if isinstance(loss_fn, partial) else {}
    return keywords.get(name, getattr(_bare(loss_fn), name, default))


def _bare(loss_fn: Any) -> Any:
    return loss_fn.func if isinstance(loss_fn, partial) else loss_fn


def task_loss(loss_fn: Any, prediction: Any, y: Any, part: str) -> Tensor:
    """The loss of one task's examples, a scalar.

    Args:
        part: which examples, "support" or "target", for errors.
    Raises:
        TaskError: a loss on classes met a label that the model has no output for.
        ArgumentError: the loss function returned something other than a scalar tensor, or cannot read the output.
    """
    if not isinstance(prediction, Tensor):
        prediction = prediction_for(loss_fn, prediction)
    try:
        loss = loss_fn(prediction, y)
    except (AttributeError, TypeError, LookupError) as error:
        if not isinstance(prediction, Tensor) and not isinstance(error, MetaWrapError):
            raise ArgumentError(
                f"loss_fn: it gets what the network returns, {in_words(prediction)}, and fails with "
                f"{type(error).__name__}: {error}. Read the prediction from that in loss_fn. For a network that "
                "returns its losses in training mode alone, methods with an inner loop take "
                'outputs={"losses_in_training_mode": True}.'
            ) from error
        index = isinstance(error, IndexError)
        if index and class_loss(loss_fn) and isinstance(y, Tensor) and isinstance(prediction, Tensor):
            ways = prediction.shape[1]
            raise TaskError(
                f"{part}_y holds labels {int(y.min())}..{int(y.max())}, but the model has {ways} outputs. Relabel the "
                f"episode to 0..{ways - 1}, or give the model more outputs."
            ) from error
        raise
    if not isinstance(loss, Tensor) or loss.ndim:
        raise ArgumentError(f"loss_fn: expected a scalar tensor from it, but got {describe_value(loss)}.")
    return loss
