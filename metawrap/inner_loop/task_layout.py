"""How tasks lie in memory: which of them share a stack, the stack, apart again, and images in channels_last."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from metawrap.inner_loop.padding import are_near
from metawrap.layers.step_clock import Moments
from metawrap.results import TaskOutcome, accuracy_of
from metawrap.tasks import Task, map_tensors, tensors_in


def alike(tasks: Sequence[Task], pads: bool = False) -> list[list[int]]:
    """The places of tasks that can be stacked: of the same structure, shapes, dtypes and values that are no tensors.

    Args:
        pads: sets that are near to each other in size can be stacked, too.
    """
    groups: list[tuple[Any, list[int]]] = []

    def takes(places: Sequence[int], place: int) -> bool:
        return not pads or are_near([tasks[each] for each in (*places, place)])

    for place, task in enumerate(tasks):
        form = [map_tensors(part, partial(_Form, any_size=pads)) for part in task.parts()]
        fitting = (places for known, places in groups if _equal(known, form) and takes(places, place))
        places = next(fitting, None)
        if places is None:
            groups.append((form, [place]))
        else:
            places.append(place)
    return [places for _, places in groups]


def _equal(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except (RuntimeError, ValueError):  # Arrays, say, which answer entry by entry: these tasks stay alone.
        return False


class _Form:
    """Stands for a tensor; equal where two could be stacked."""

    def __init__(self, tensor: Tensor, any_size: bool) -> None:
        self._like = (tensor.shape[any_size:], tensor.dtype, tensor.layout)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Form) and self._like == other._like

    __hash__ = None  # type: ignore[assignment]


def stacked(tasks: Sequence[Task]) -> Task:
    """One task whose every tensor has a leading task axis."""
    columns = zip(*(tensors_in(task.parts()) for task in tasks), strict=True)
    whole = iter([torch.stack(column) for column in columns])
    return Task(*map_tensors(tasks[0].parts(), lambda _: next(whole)))


def start_of(values: Sequence[Tensor]) -> Tensor:
    """A weight as each task of a stack starts from it, in memory of its own."""
    first = values[0]
    if all(value is first for value in values):
        return first.expand(len(values), *first.shape).clone(memory_format=torch.contiguous_format)
    return torch.stack(list(values))


def apart(
    tasks: Sequence[Task],
    losses: Tensor,
    step_losses: Sequence[Tensor | None],
    prediction: Any,
    moments: Iterable[Moments],
    head: Mapping[str, Tensor],
    loss_fn: Any,
    cut: bool = False,
) -> list[TaskOutcome]:
    """Each task's outcome, without graph, from those of all of them.

    Args:
        losses: (tasks,). step_losses: (tasks,) for each step, None where not computed. The tensors in the others have
            a leading task axis. cut: the prediction has padded rows.
    """
    prediction, losses = map_tensors(prediction, Tensor.detach), losses.detach()
    missing = torch.full_like(losses, torch.nan)
    rows = [missing if step is None else step.detach() for step in step_losses]
    table = torch.stack(rows, 1) if rows else losses.new_empty(len(tasks), 0)
    seen = list(moments)
    outcomes = []
    for place, task in enumerate(tasks):
        own = map_tensors(prediction, lambda tensor, i=place: tensor[i])  # type: ignore[misc]
        own = own[: len(task.target_y)] if cut else own
        passes = [one._replace(mean=one.mean[place], variance=one.variance[place]) for one in seen]
        stored = {name: value[place].clone() for name, value in head.items()}
        accuracy = accuracy_of(own, task.target_y, loss_fn)
        outcomes.append(TaskOutcome(losses[place], table[place], own, accuracy, passes, task.id, stored))
    return outcomes


def to_channels_last(tensor: Tensor) -> Tensor:
    """Images (batch, channels, height, width), or volumes, with the channels of a pixel side by side in memory."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if tensor.ndim not in formats or not tensor.is_floating_point() or tensor.layout != torch.strided:
        return tensor
    # Not .contiguous(): with one channel a tensor is already so by torch's rule, and convolutions do not take it so.
    wanted = torch.empty_like(tensor, memory_format=formats[tensor.ndim], device="meta").stride()
    if tensor.stride() == wanted:
        return tensor
    return torch.empty_like(tensor, memory_format=formats[tensor.ndim]).copy_(tensor)


def layouts_of_weights(model: nn.Module) -> dict[str, torch.memory_format]:
    """The layout for the weight of each convolution, by its name, where images are in channels_last.

    A convolution whose weight has another layout copies it at every call.
    """
    formats = {nn.Conv2d: torch.channels_last, nn.Conv3d: torch.channels_last_3d}
    convolutions = ((path, formats.get(type(module))) for path, module in model.named_modules())
    return {f"{path}.weight".removeprefix("."): layout for path, layout in convolutions if layout is not None}
