"""Whether a model can be differentiated twice, found by doing so once: torch has operations that cannot.

Most of them raise in the second backward pass, with a message that names no module. A function that is marked
`once_differentiable` is worse: torch leaves its second derivative out where nobody asks for it by name, in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from metawrap.engines.calling import graph_behind
from metawrap.tasks import tensors_in


@dataclass
class _Call:
    """What one module saw in one pass."""

    where: str
    inputs: list[Tensor]
    outputs: list[Tensor]


_FIX = (
    "Use FOMAML or first_order_epochs=math.inf, put something differentiable in its place, or leave what is below it "
    "out of the inner loop with adapt=."
)


def missing_second_derivative(
    model: nn.Module,
    fast: Mapping[str, Tensor],
    support_loss: Callable[[Mapping[str, Tensor]], Tensor],
    fix: str = _FIX,
) -> str | None:
    """Which part of the model or loss cannot be differentiated twice, why, and what to do; None if all can.

    Args:
        fast: adapted weights, leaves.
        support_loss: runs the model on the support set with the given weights.
        fix: what to do.
    """
    calls: list[_Call] = []
    loss = support_loss(fast)
    others = [parameter for parameter in model.parameters() if parameter.requires_grad]
    cause = _obstacle([loss], list(fast.values()), [*fast.values(), *others])
    if cause is None:
        return None
    handles = [m.register_forward_hook(_recorder(name, calls), with_kwargs=True) for name, m in model.named_modules()]
    try:
        loss = support_loss(fast)
    finally:
        for handle in handles:
            handle.remove()
    # A module's call ends before its parent's, so the first with an obstacle is the innermost.
    calls += [_Call("The loss function", call.outputs, [loss]) for call in calls[-1:]]
    inner = next((call for call in calls if _obstacle(call.outputs, call.inputs, call.inputs) == cause), None)
    where = inner.where if inner else f"{type(model).__name__}, or the loss function,"
    return f"{where} cannot be differentiated twice: {cause}. Second-order meta-gradients need that. {fix}"


def _recorder(name: str, calls: list[_Call]) -> Callable[..., None]:
    def record(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        where = f"'{name or 'the model itself'}' ({type(module).__name__})"
        inputs = [*tensors_in((args, kwargs)), *module.parameters()]
        calls.append(_Call(where, [t for t in inputs if t.requires_grad], tensors_in(output)))

    return record


def _obstacle(outputs: Sequence[Tensor], inner: Sequence[Tensor], outer: Sequence[Tensor]) -> str | None:
    """Why the gradient of the outputs with respect to `inner` has none with respect to `outer`."""
    values = [output.abs().square().sum() for output in outputs if output.requires_grad]
    if not values or not inner:
        return None
    total = torch.stack([value.float() for value in values]).sum()
    try:
        found = torch.autograd.grad(total, inner, create_graph=True, allow_unused=True)
        gradients = [g.to_dense() if g.is_sparse else g for g in found if g is not None and g.requires_grad]
        if not gradients:
            return None
        if any(node.name().endswith("::Error") for node in graph_behind(gradients)):
            names = sorted({node._forward_cls.__name__ for node in graph_behind([total]) if _is_marked(node)})
            return f"the backward of {', '.join(names) or 'a function'} is marked once_differentiable"
        squares = torch.stack([gradient.abs().square().sum().float() for gradient in gradients]).sum()
        torch.autograd.grad(squares, outer, allow_unused=True, retain_graph=True)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return str(error).strip().rstrip(".").splitlines()[0]
    return None


def _is_marked(node: Any) -> bool:
    backward = getattr(getattr(node, "_forward_cls", None), "backward", None)
    # The decorator leaves no other mark on what it makes than where it was made.
    return getattr(backward, "__globals__", {}).get("__name__") == "torch.autograd.function"
