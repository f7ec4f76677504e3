"""The first look at a task, once per mode: a gradient shows problems that inspection cannot. Changes nothing."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from metawrap.errors import MetaWrapWarning, UnsupportedModuleError
from metawrap.outputs import prediction_in
from metawrap.results import are_logits, class_loss, ignored_label, loss_option
from metawrap.snapshot.generators import Generators
from metawrap.snapshot.reachable_state import RANDOM_NUMBERS
from metawrap.tasks import Task, tensors_in

Gradients = Sequence[Tensor | None]
_HOOKS_REFUSED = "metawrap: saved-tensor hooks are refused here"


@dataclass
class FirstLook:
    """Results of the first look at a task.

    unused: adapted parameters that the support loss does not depend on.
    differentiable: whether it was looked at with gradients to come.
    no_second_derivative: why the model cannot be differentiated twice; None if it can, or need not.
    left_behind: what one task leaves behind for the next, so that tasks must be solved in order; None if nothing.
    """

    unused: list[str]
    differentiable: bool = False
    no_second_derivative: str | None = None
    left_behind: str | None = None


def support_gradient(fast: Mapping[str, Tensor], support_loss: Callable[[Mapping[str, Tensor]], Tensor]) -> list[str]:
    """Runs one support pass and its gradient; returns the names of the adapted parameters that get none.

    Raises:
        UnsupportedModuleError: the model checkpoints activations, or no adapted parameter gets a gradient.
    """
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks(_HOOKS_REFUSED):
            loss = support_loss(fast)
            if not loss.requires_grad:
                raise UnsupportedModuleError(_NO_GRADIENT)
            gradients = torch.autograd.grad(loss, tuple(fast.values()), allow_unused=True)
    except RuntimeError as error:
        if _HOOKS_REFUSED in str(error) or "checkpoint" in str(error).lower():
            raise UnsupportedModuleError(
                "The model checkpoints activations (torch.utils.checkpoint): the backward pass would run it again, "
                "with other weights than the fast ones. Switch checkpointing off in the model; execution= "
                'with {"tasks_per_backward": 1} holds memory down.'
            ) from error
        raise
    unused = [name for name, gradient in zip(fast, gradients, strict=True) if gradient is None]
    if len(unused) == len(fast):
        raise UnsupportedModuleError(_NO_GRADIENT)
    return unused


def without_part(model: nn.Module, prediction: Any) -> list[str]:
    """The trainable parameters that a prediction, with its graph, does not depend on."""
    learned = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    outputs = [output.abs().sum() for output in tensors_in(prediction) if output.requires_grad]
    if not outputs or not learned:
        return []
    gradients = torch.autograd.grad(outputs, list(learned.values()), allow_unused=True)
    return [name for name, gradient in zip(learned, gradients, strict=True) if gradient is None]


def refuse_other_layout(prediction: Callable[[], Any]) -> None:
    """Checks that a forward pass takes images in channels_last.

    Raises:
        UnsupportedModuleError: it calls `.view()` on a tensor, which the layout does not allow.
    """
    try:
        prediction()
    except RuntimeError as error:
        if "view size is not compatible" in str(error):
            raise UnsupportedModuleError(
                "execution.channels_last=True: the model's forward calls .view() on images, which needs the usual "
                "layout. Use .reshape() or .flatten() there, or leave it out."
            ) from error
        raise


def refuse_bypassed(prediction: Any, adapted: Sequence[tuple[str, nn.Parameter]]) -> None:
    """Checks that a prediction with fast weights does not depend on the parameters that the fast weights replace.

    Raises:
        UnsupportedModuleError: forward reads such a parameter from another place than its module.
    """
    outputs = [tensor.abs().sum().float() for tensor in tensors_in(prediction) if tensor.requires_grad]
    read = [(name, parameter) for name, parameter in adapted if parameter.requires_grad]
    if not outputs or not read:
        return
    gradients = torch.autograd.grad(torch.stack(outputs).sum(), [p for _, p in read], allow_unused=True)
    names = [f"'{name}'" for (name, _), gradient in zip(read, gradients, strict=True) if gradient is not None]
    if names:
        raise UnsupportedModuleError(
            f"The model's forward reads {', '.join(names)} from somewhere else than the module that owns it, such as "
            "another object's attribute, a closure or a global: no fast weight can replace it there. Read it from its "
            "module, or leave it out of the inner loop with adapt=."
        )


def refuse_carried_graphs(model: nn.Module, carried: Collection[str], support_loss: Callable[[], Tensor]) -> None:
    """Checks that a second pass does not differentiate through the values that a first pass left in a buffer.

    Args:
        carried: buffers that the first pass edited in place, and left with a graph.

    Raises:
        UnsupportedModuleError: it does, so that the gradient would go through every earlier call, of other tasks too.
    """
    names, leaves, stand_ins = [], [], {}
    for path, module in model.named_modules():
        for local, buffer in module._buffers.items():
            name = f"{path}.{local}" if path else local
            if buffer is not None and (buffer.grad_fn is not None or name in carried):
                if id(buffer) not in stand_ins:
                    names.append(name)
                    leaves.append(buffer.detach().clone().requires_grad_())
                    stand_ins[id(buffer)] = (buffer, leaves[-1].clone())
                module._buffers[local] = stand_ins[id(buffer)][1]
    if not leaves:
        return
    gradients = torch.autograd.grad(support_loss(), leaves, allow_unused=True)
    found = [
        f"'{name}'" for name, g in zip(names, gradients, strict=True) if g is not None and float(g.abs().sum()) > 0
    ]
    if found:
        raise UnsupportedModuleError(
            f"The model's forward writes values with a graph into its buffer {', '.join(found)}, and differentiates "
            "through them at its next call, back through every earlier one. Detach what is written: "
            "self.buffer = 0.9 * self.buffer + 0.1 * value.detach()."
        )


def differ(found: Gradients, reference: Gradients, tolerance: float | None = None) -> bool:
    """Whether two gradients of the same parameters differ by more than rounding.

    Args:
        tolerance: relative; by the precision of the numbers if None.
    """
    pairs = list(zip(found, reference, strict=True))
    if any((a is None) != (b is None) for a, b in pairs):
        return True
    present = [(a, b) for a, b in pairs if a is not None and b is not None]
    largest = max((float(b.detach().abs().max()) for _, b in present if b.numel()), default=0.0)
    if not math.isfinite(largest):
        return False  # A loss that is not finite says nothing about the engine; meta_step skips it.
    tight = all(b.dtype in (torch.float64, torch.complex128) for _, b in present)
    # A bias before a norm has a gradient of zero up to rounding, which in single precision reached 1e-6 of the largest.
    floor = largest * (1e-3 if tight or tolerance else 1e-1)
    for a, b in present:
        allowed = (tolerance or (1e-9 if tight else 1e-4)) * max(float(b.abs().max()) if b.numel() else 0.0, floor)
        if not torch.allclose(a, b, rtol=0, atol=allowed):
            return True
    return False


def warn_unused(unused: list[str]) -> None:
    """Warns of adapted parameters that play no part in the support loss."""
    if unused:
        warnings.warn(
            f"The support loss does not depend on {', '.join(unused)}: they are not adapted. Freeze them before "
            "wrapping, or leave them out with adapt=, to silence this.",
            MetaWrapWarning,
            stacklevel=5,
        )


def warn_many_outputs(prediction: Any, task: Task, loss_fn: Any, or_else: str = "") -> None:
    """Warns where a task is an episode of classes 0..ways - 1 and the network has more outputs.

    Labels that mean the same in every task leave classes out, or show them unequally often; then only a network of at
    least twice as many outputs is told.

    Args:
        prediction: on the support set. or_else: what else helps, if the loss can be masked.
    """
    prediction = prediction_in(prediction)
    if class_loss(loss_fn) is None or not are_logits(prediction, task.support_y):
        return
    counted = [y[y != ignored_label(loss_fn)] for y in (task.support_y, task.target_y)]
    classes, counts = torch.unique(counted[0], return_counts=True)
    ways, outputs = len(classes), prediction.shape[1]
    if ways < 2 or classes.tolist() != list(range(ways)) or not set(counted[1].unique().tolist()) <= set(range(ways)):
        return
    if outputs >= 2 * ways or (outputs > ways and len(counts.unique()) == 1):
        masked = class_loss(loss_fn) is not F.multi_margin_loss and not loss_option(loss_fn, "label_smoothing", 0.0)
        fix = f"Give the network {ways} outputs{or_else if masked else ''}."
        warnings.warn(
            f"The network has {outputs} outputs, but its first task has {ways} classes: outputs of no class take "
            f"probability from them, here and in what adapt returns. {fix} "
            f"adapt(..., classes=range({ways})) returns a network with these outputs alone.",
            MetaWrapWarning,
            stacklevel=5,
        )


def warn_no_second_derivative(reason: str, epoch: float) -> None:
    """Warns that training will stop when second-order gradients begin."""
    warnings.warn(
        f"From epoch {epoch} on, when second-order gradients begin, this model will be refused. {reason}",
        MetaWrapWarning,
        stacklevel=5,
    )


def warn_tasks_in_order(workers: int | str, reason: str) -> None:
    """Warns that tasks are solved one after another although more workers were asked for."""
    warnings.warn(
        f"workers={workers}: tasks are solved one after another, because {reason}. Pass "
        'execution={"workers": "auto"} to silence this.',
        MetaWrapWarning,
        stacklevel=5,
    )


_NO_GRADIENT = (
    "No adapted parameter gets a gradient from the support loss. The model may compute under no_grad, detach its "
    "output, or run on parameters other than its own (a closure over another module, say). Make forward read its "
    "parameters from the module itself."
)


def counted(run: Callable[[], Any]) -> tuple[Any, int, str | None]:
    """The result of a call, the number of multiplications and additions in it, and in words that it drew in torch.

    (result, 0, None) if the operations cannot be seen.
    """
    try:
        with _Operations() as seen:
            return run(), seen.work, RANDOM_NUMBERS if seen.draws else None
    except Exception:  # The counting mode does not know all tensors, nested ones for example. An error of the call
        return run(), 0, None  # itself is raised here again.


class _Operations(TorchDispatchMode):
    """What runs inside.

    work: multiplications and additions of convolutions, products of matrices and attention. draws: whether an operation
    draws random numbers, from a generator that is put back afterwards too.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.work, self.draws = 0, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation."""
        # The tag alone tells nothing: attention and recurrent networks have it without dropout, too.
        may_draw = torch.Tag.nondeterministic_seeded in func.tags
        before = Generators(held=[*args, *(kwargs or {}).values()]) if may_draw else None
        found = func(*args, **(kwargs or {}))
        self.draws |= before is not None and bool(before.moved())
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.work += count(*args, **(kwargs or {}), out_val=found)
        return found
