"""The output of a network: which tensor in it is the prediction, and the same output around another prediction.

The prediction is known where the output is a tensor, has one tensor by the name `logits`, or holds one floating-point
tensor only. Every other output is ambiguous: the caller refuses it, or asks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, empty, nn

from metawrap.errors import ArgumentError, MetaWrapError
from metawrap.tasks import map_tensors

# Losses of these packages take the prediction as a tensor; any other loss gets the output as the network returns it.
_OF_TENSORS = ("torch", "torchvision", "metawrap")


def prediction_in(output: Any) -> Tensor | None:
    """The tensor that is the prediction; None where the output is ambiguous or holds none.

    >>> prediction_in({"logits": empty(2, 3), "hidden": empty(2, 5)}).shape, prediction_in((empty(2, 3), empty(2, 5)))
    (torch.Size([2, 3]), None)
    """
    if isinstance(output, Tensor):
        return output
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return named if isinstance(named, Tensor) else only_tensor(output)


def only_tensor(output: Any) -> Tensor | None:
    """The one floating-point tensor in an output; None where it holds several or none."""
    found = {id(tensor): tensor for tensor in candidates(output).values()}
    return next(iter(found.values())) if len(found) == 1 else None


def candidates(output: Any, path: str = "output") -> dict[str, Tensor]:
    """The tensors that can be a prediction or an embedding, by how Python reads them: floating-point, no scalar."""
    if isinstance(output, Tensor):
        return {path: output} if (output.is_floating_point() or output.is_complex()) and output.ndim else {}
    if is_dataclass(output) and not isinstance(output, type):
        parts = {f"{path}.{part.name}": getattr(output, part.name, None) for part in fields(output)}
    elif isinstance(output, tuple) and hasattr(output, "_fields"):
        parts = {f"{path}.{name}": getattr(output, name) for name in output._fields}
    elif isinstance(output, tuple | list):
        parts = {f"{path}[{place}]": part for place, part in enumerate(output)}
    else:
        parts = {f"{path}[{key!r}]": v for key, v in output.items()} if isinstance(output, Mapping) else {}
    return {name: tensor for place, part in parts.items() for name, tensor in candidates(part, place).items()}


def in_words(output: Any, notes: Mapping[str, str] | None = None) -> str:
    """The kind of an output and its tensors, for errors. Args: notes: more about a tensor, by its path."""
    found = candidates(output)
    told = [f"{path} {tuple(tensor.shape)}{(notes or {}).get(path, '')}" for path, tensor in found.items()]
    more = f" and {len(told) - 4} more" if len(told) > 4 else ""
    kind = type(output).__name__
    article = "an" if kind[:1] in "AEIOU" else "a"
    return f"{article} {kind} with {', '.join(told[:4]) or 'no floating-point tensor'}{more}"


def takes_tensors(loss_fn: Any) -> bool:
    """Whether a loss is known to take the prediction as a tensor: one of torch, for example."""
    function = loss_fn.func if isinstance(loss_fn, partial) else loss_fn
    code = type(function).forward if isinstance(function, nn.Module) else function
    return str(getattr(code, "__module__", None) or "").split(".")[0] in _OF_TENSORS


def prediction_for(loss_fn: Any, output: Any) -> Any:
    """What a loss gets of a network's output: the prediction, where the loss takes tensors, else the output itself.

    Raises:
        ArgumentError: the loss takes tensors, and the output is ambiguous.
    """
    if not takes_tensors(loss_fn):
        return output
    found = prediction_in(output)
    if found is None:
        first = next(iter(candidates(output)), "output.logits")
        raise ArgumentError(
            f"loss_fn: the network returns {in_words(output)}, so it is not known which tensor is the prediction. Pass "
            f"a loss_fn that reads it, such as lambda output, y: torch.nn.functional.cross_entropy({first}, y), or "
            "return the prediction under the name 'logits'."
        )
    return found


def form_of(output: Any, is_prediction: Callable[[Tensor], bool]) -> Any:
    """The output with empty tensors as marks: (0,) for the prediction, (0, 0) for others; None for a bare tensor."""
    if isinstance(output, Tensor):
        return None

    def mark(part: Any) -> Any:
        if isinstance(part, Tensor) and is_prediction(part):
            return empty(0)
        # Numbers can change with each pass, and objects such as a cache of keys and values may hold tensors.
        return part if part is None or isinstance(part, bool | str | Enum) else empty(0, 0)

    return map_tensors(output, mark, mark)


def filled(form: Any, prediction: Any, other: Any = None) -> Any:
    """An output of a form around another prediction. Args: other: stands for each other tensor, number and object."""
    if form is None:
        return prediction
    return map_tensors(form, lambda mark: prediction if mark.ndim == 1 else other)


class LeftOut(Tensor):
    """Stands for a part of an output that a loss must not read: its use raises `error` with these words."""

    error: ClassVar[type[MetaWrapError]] = ArgumentError
    words = (
        "loss_fn: reads more of the network's output than the prediction, but this method trains by the prediction "
        "alone. Read nothing else, or use MAML, whose loss gets the whole output."
    )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every use of such a tensor passes here."""
        raise cls.error(cls.words)


def left_out(kind: type[LeftOut] = LeftOut) -> Tensor:
    """A new `LeftOut`."""
    return empty(0).as_subclass(kind)


def refuse_unread(argument: str, output: Any, error: Exception, more: str = "") -> None:
    """Raises ArgumentError where a function of the user's failed to read an output. Args: more: further advice."""
    if not isinstance(output, Tensor) and not isinstance(error, MetaWrapError):
        raise ArgumentError(
            f"{argument}: it gets what the network returns, {in_words(output)}, and fails with "
            f"{type(error).__name__}: {error}. Read the prediction from that in {argument}.{more}"
        ) from error
