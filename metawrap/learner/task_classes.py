"""The classes of one task in `adapt`: names and numbers -> labels; the adapted module -> one output for each class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from metawrap.engines import first_line
from metawrap.errors import ArgumentError, TaskError, UnsupportedModuleError
from metawrap.outputs import in_words, prediction_in
from metawrap.results import ignored_label
from metawrap.snapshot.generators import Generators
from metawrap.snapshot.module_state import untouched_buffers
from metawrap.surgery.inspect import find_head
from metawrap.surgery.swap import parameter_slots
from metawrap.tasks import Inputs, Task, call_model, describe_value, device_of, map_tensors, tensors_in

Classes: TypeAlias = Sequence[int] | Sequence[str] | Mapping[str, int]
# Layers with a row of weights for each output, and the axis of these outputs.
_ROWS = {nn.Linear: -1, nn.Conv1d: 1, nn.Conv2d: 1, nn.Conv3d: 1}


class TaskClasses:
    """The classes of a task. The adapted module has one output for each, in their order.

    classes: whole numbers, ascending: the labels of the task's classes, which are places among the network's outputs;
    or names: the class with label 0, with label 1, and so on; or a dict from name to label. None: all outputs stay.
    support_y then holds labels, or is a list with the name (or label) of each example.

    Raises:
        ArgumentError: `classes` is none of these. TaskError: support_y holds another class.
    """

    def __init__(self, classes: Classes | None, support_x: Inputs, support_y: Any, loss_fn: Any) -> None:
        self._inputs, self.labels = support_x, support_y
        self._numbers = None if classes is None else _by_name(classes)
        if self._numbers is None:
            return
        known = set(self._numbers.values())
        if isinstance(listed := _listed(support_y), Sequence):
            labels = {**{number: number for number in known}, **self._numbers}
            if unknown := [each for each in listed if not isinstance(each, str | Integral) or each not in labels]:
                raise TaskError(f"support_y holds {unknown[0]!r}, which is not in classes={list(self._numbers)[:10]}.")
            device = next((tensor.device for tensor in tensors_in(support_x)), None)
            self.labels = torch.tensor([labels[each] for each in listed], device=device)
        if not isinstance(self.labels, Tensor) or self.labels.is_floating_point() or self.labels.is_complex():
            raise TaskError(
                "support_y: expected whole numbers as labels, or a list of names, with classes=, but got "
                f"{describe_value(support_y)}."
            )
        shown = set(torch.unique(self.labels).tolist()) - {ignored_label(loss_fn)}
        if not shown <= known:
            raise TaskError(
                f"support_y holds labels {sorted(shown)[:10]}, but classes= has {sorted(known)[:10]}. Numbers in "
                "classes= are labels of support_y. For the names of labels 0, 1, ... pass strings, or a dict from name "
                "to label."
            )

    def task(self, *, places: bool = False, **more: Any) -> Task:
        """The support set as a task. Args: places: the labels are places among the classes. more: fields of `Task`."""
        labels = self.labels
        if places and self._numbers is not None:
            labels = labels.clone()
            for place, number in enumerate(self._numbers.values()):
                labels[self.labels == number] = place
        return Task(self._inputs, labels, self._inputs, labels, **more)

    def cut(self, module: nn.Module) -> nn.Module:
        """The module, changed in place so that its outputs are those of the classes; compared on the support set.

        Raises:
            UnsupportedModuleError: they are not the rows of its last layer.
        """
        if self._numbers is None:
            return module
        wanted, generators, seen = list(self._numbers.values()), Generators(device_of(module)), list[Any]()

        def run() -> Any:
            seen.append(call_model(module, map_tensors(self._inputs, Tensor.clone)))
            if generators.moved():
                generators.put_back()
            return seen[-1]

        with torch.inference_mode(False), torch.no_grad(), untouched_buffers(module):
            name = find_head(module, run).name
            if (whole := prediction_in(seen[0])) is not None and whole.ndim == 2 and wanted == [*range(whole.shape[1])]:
                return module
            axis = None if whole is None else _keep_rows(module, name, wanted, whole.shape)
            try:
                if axis is not None and _are_those(prediction_in(run()), whole, wanted, axis):
                    return module
            except Exception as error:  # Layers behind it may need all outputs.
                reason = f"without the others it fails ({type(error).__name__}: {first_line(error)})"
            else:
                reason = f"its prediction is not made by the rows of a layer of its own (the last one is '{name}')"
                if whole is None:
                    reason = f"it returns {in_words(seen[0])}, and it is not known which tensor is the prediction"
        raise UnsupportedModuleError(
            f"classes: {type(module).__name__} cannot be cut down to the outputs of its classes: {reason}. Leave "
            "classes= out, and select them from the prediction, as adapted(x)[:, labels] does for a tensor."
        )


def _keep_rows(module: nn.Module, name: str | None, wanted: Sequence[int], shape: torch.Size) -> int | None:
    """Keeps only these outputs of a layer; returns their axis, or None where the layer has no rows of its own.

    shape: of the prediction.
    """
    layer: Any = None if name is None else module.get_submodule(name)
    places = [slots for slots in parameter_slots(module).values() if any(owner is layer for owner, _ in slots)]
    axis = _ROWS.get(type(layer))
    if axis is None or getattr(layer, "groups", 1) != 1 or any(len(slots) > 1 for slots in places):
        return None  # Its weights serve something else, too.
    if len(shape) < 2 or shape[axis] != len(layer.weight):
        return None
    if max(wanted) >= len(layer.weight):
        raise ArgumentError(f"classes: expected labels below {len(layer.weight)}, the outputs, but got {max(wanted)}.")
    for [(_, local)] in places:
        old = layer._parameters[local]
        layer._parameters[local] = nn.Parameter(old[list(wanted)].clone(), old.requires_grad)
    setattr(layer, "out_features" if axis == -1 else "out_channels", len(wanted))
    return axis


def _are_those(found: Any, whole: Any, wanted: Sequence[int], axis: int) -> bool:
    """Whether outputs are the wanted ones of the whole, or their probabilities again."""
    chosen = whole.index_select(axis, torch.tensor(wanted, device=whole.device))
    close = torch.finfo(chosen.dtype).eps ** 0.5
    return found.shape == chosen.shape and any(
        torch.allclose(found, each, rtol=close, atol=close * max(1.0, float(each.abs().max())), equal_nan=True)
        for each in (chosen, chosen.log_softmax(axis), chosen / chosen.sum(axis, keepdim=True))
    )


def _by_name(classes: Any) -> dict[Any, int]:
    """The label of each class, by its name, or by itself."""
    given = classes.tolist() if isinstance(classes, Tensor) else _listed(classes)
    named = isinstance(given, Mapping | Sequence) and all(isinstance(each, str) for each in given)
    names = list(given) if isinstance(given, Mapping | Sequence) and (named or isinstance(given, Sequence)) else []
    numbers = list(given.values()) if isinstance(given, Mapping) else list(range(len(names))) if named else names
    whole = all(isinstance(n, Integral) and not isinstance(n, bool) and int(n) >= 0 for n in numbers)
    ordered = named or (whole and numbers == sorted(numbers))
    if not names or not ordered or not whole or len({*numbers}) != len(names) or len({*names}) != len(names):
        raise ArgumentError(
            "classes: expected different whole numbers of at least 0 in ascending order, different names, or a dict "
            f"from name to label, but got {describe_value(classes)}."
        )
    return {name: int(number) for name, number in zip(names, numbers, strict=True)}


def _listed(value: Any) -> Any:
    """An array of numpy as a list, and a text, which is no list of names, as None."""
    if isinstance(value, str):
        return None
    return value.tolist() if hasattr(value, "tolist") and not isinstance(value, Tensor) else value
