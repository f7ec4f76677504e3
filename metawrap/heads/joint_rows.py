"""Support and target rows as one batch, and trials of what a batch means to a model: no shape tells.

Rows may be examples. They may also be nodes that edges point at, points of several sets, or steps of a sequence. A
trial runs the model with weights and random numbers of its own, and leaves no trace.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from metawrap.engines.calling import PLAIN_ATTENTION, WITHOUT_CUDNN
from metawrap.snapshot.module_state import unchanged
from metawrap.tasks import Inputs, device_of, map_tensors, tensors_in


def form_of(inputs: Inputs, sizes: bool = False) -> str:
    """The structure of inputs with the dtype and the number of axes of each tensor, or the sizes behind the first."""

    def kind(tensor: Tensor) -> Any:
        return tensor.dtype, tensor.shape[1:] if sizes else tensor.ndim

    return str(map_tensors(inputs, kind))


def joined(one: Inputs, other: Inputs) -> Inputs | None:
    """The rows of both as one batch; None where these inputs have another structure, other shapes or other values."""
    rows, others = tensors_in(one), tensors_in(other)
    if form_of(one, sizes=True) != form_of(other, sizes=True) or any(
        t.ndim == 0 or len(t) != len(group[0]) for group in (rows, others) for t in group
    ):
        return None
    rest = iter(others)
    return map_tensors(one, lambda tensor: torch.cat([tensor, next(rest)]))  # type: ignore[no-any-return]


def may_hold_places(inputs: Inputs) -> bool:
    """Whether one of several tensors holds whole numbers: in a task without edges a trial would not show any."""
    tensors = tensors_in(inputs)
    return len(tensors) > 1 and any(t.dtype in (torch.int16, torch.int32, torch.int64) for t in tensors)


def rows_stand_alone(model: nn.Module, run: Callable[[Any], Any], one: Inputs, other: Inputs) -> bool:
    """Whether a joint batch gives each row what the row's own set gives it; False where the trial fails.

    Args:
        run: one pass of the model, whose batch norms do not go by the batch. Only tensors of its result with a row for
            each row are compared.
    """
    # Each row twice, so that the two sets differ even if the caller has one set in both places.
    other = map_tensors(other, lambda tensor: tensor[torch.arange(len(tensor), device=tensor.device) // 2])
    # Two sets can share what rows are divided by, such as the largest number; the second pair does not.
    dimmer = map_tensors(other, lambda tensor: 0.7 * tensor if tensor.is_floating_point() else tensor)
    counts = [len(tensors_in(part)[0]) for part in (one, other)]
    try:
        for second in (other, dimmer):
            found = [tensors_in(trial(model, run, part)) for part in (one, second, joined(one, second))]
            rows = [each for each in zip(*found, strict=True) if [t.shape[:1].numel() for t in each[:2]] == counts]
            if not rows or not all(_nearly_equal(both, torch.cat(apart)) for *apart, both in rows):
                return False
        return True
    except torch.OutOfMemoryError:
        raise
    except Exception:  # Whatever the model says: sets that it takes apart are known to be right.
        return False


def _nearly_equal(one: Tensor, other: Tensor) -> bool:
    """Whether two results differ by rounding only."""
    if one.shape != other.shape or not other.is_floating_point():
        return torch.equal(one, other)
    tolerance = torch.finfo(other.dtype).eps ** 0.5
    size = float(other.nan_to_num().abs().mean())
    return torch.allclose(one, other, rtol=tolerance, atol=tolerance * size, equal_nan=True)


def trial(model: nn.Module, run: Callable[[Any], Any], inputs: Any) -> Any:
    """`run(inputs)` with stirred weights, and with random numbers that no row has of its own.

    A gate that is zero at first, as in residual branches, would hide what comes through it later.
    """
    device = device_of(model)
    plain = WITHOUT_CUDNN.made()  # Fused operations draw where no mode sees it.
    with unchanged(model, device), torch.no_grad(), plain, PLAIN_ATTENTION.made():
        _stir(model)
        with _ConstantDraws():  # type: ignore[no-untyped-call]
            return run(map_tensors(inputs, Tensor.clone))


def _stir(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    stirred: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is None or not p.is_floating_point():
                continue
            if id(p) not in stirred:
                inputs = p[0].numel() if p.ndim > 1 else 4
                noise = torch.randn(p.shape, generator=generator).to(p) * (0.5 / inputs**0.5)
                stirred[id(p)] = nn.Parameter(p.detach() + noise, requires_grad=False)
            # By setattr: recurrent modules hold their weights in a list, too.
            setattr(module, name, stirred[id(p)])


class _ConstantDraws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Draws are their parameters' sum, or 0.5; a permutation is the reversed order, and dropout keeps all."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name.startswith("rrelu_with_noise"):
            return func(*args[:4], training=False)
        found = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return found
        if name == "randperm":
            return found.copy_(torch.arange(len(found) - 1, -1, -1, device=found.device))
        if name == "native_dropout":
            return args[0], found[1]
        if name == "multinomial":
            return found.copy_(args[0].argmax(-1, keepdim=True))
        # The mean or rate of a draw may come from other rows.
        given = [a for a in args if isinstance(a, Tensor) and (a.shape, a.dtype) == (found.shape, found.dtype)]
        return sum(given) if given and not name.endswith(("_", "_like")) else found.fill_(0.5)
