"""Starts of a head that has a row for each class: from one vector, or from the prototypes; the table of all starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from metawrap.errors import ArgumentError, TaskError
from metawrap.inner_loop.head_starts import HeadStart, OwnStart, RandomHead, StoredHead, ZeroHead
from metawrap.inner_loop.inner_loop import FastWeights, InnerLoop
from metawrap.tasks import Task, TaskId, describe_value

_ONE = "The rows of the classes are those of its last layer."


class SharedHead(OwnStart):
    """`head_init="shared"`: UNICORN-MAML: one learned vector and bias, from which the row of every class starts.

    Each row starts at the mean of the learned rows, so the order of the labels does not matter. That mean is the one
    vector of the paper: each learned row gets 1/K of its gradient, K the number of classes, so that Adam, which does
    not see the scale, moves it as it would move a vector of its own, and plain SGD as with 1/K of the rate. Different
    from the authors' code, where the gradient is always first-order. Source: Ye & Chao 2022, arXiv:2106.16245.
    """

    kind = "shared"
    alike = True

    def _check_owners(self, owners: Mapping[str, nn.Module]) -> None:
        self._refuse_several_layers(owners, _ONE)
        _row_layer(self.kind, owners)

    def values(self, model: nn.Module, task_id: TaskId | None) -> Mapping[str, Tensor]:
        """The mean over the rows, with its gradient."""
        parameters = dict(model.named_parameters())
        return {name: parameters[name].mean(0, keepdim=True).expand_as(parameters[name]) for name in self.names}


class PrototypeHead(OwnStart):
    """`head_init="prototypes"`: ProtoMAML: the head starts as the linear layer that classifies as a ProtoNet does.

    With c_k the mean of what enters the head over the support examples of class k, at the initial weights and in the
    norm statistics of a first inner step: W_k = 2 c_k and b_k = -|c_k|^2, so that the logits are -|x - c_k|^2 + |x|^2.
    As in the paper and the authors' code (Meta-Dataset): the outer gradient flows through the prototypes into the body,
    in first order too, where the inner gradients alone count as constants (fo-Proto-MAML); an inner gradient takes
    head and body as independent; classes that a task lacks start at zero, and must be masked. The learned head plays no
    part. Source: Triantafillou et al. 2020, arXiv:1903.03096, section 3.
    """

    kind = "prototypes"
    reads_support = True

    def __init__(self) -> None:
        super().__init__()
        self.ways = 0

    def _check_owners(self, owners: Mapping[str, nn.Module]) -> None:
        self._refuse_several_layers(owners, _ONE)
        layer: Any = _row_layer(self.kind, owners)
        plain = isinstance(layer, nn.Linear) or (
            {*layer.kernel_size, *layer.stride} == {1} and (isinstance(layer.padding, str) or not any(layer.padding))
        )
        if not plain or layer.bias is None:
            raise ArgumentError(
                'head_init="prototypes": expected a head that is one linear layer, or a 1x1 convolution, with a bias, '
                f"but got {layer}. Give it bias=True and one place of its input for each output, or use "
                'outputs={"head_init": "shared"}.'
            )
        self.ways = len(layer.weight)

    def check(self, task: Task, ignored: int, masked: bool) -> None:
        """Raises TaskError when a class has no prototype; asks nothing while the head is not known."""
        if self.ways:
            self._check_labels(task.support_y, ignored, masked)

    def of_support(self, loop: InnerLoop, initial: Callable[[], FastWeights], ignored: int) -> Mapping[str, Tensor]:
        """Weight and bias from the prototypes, with their graph."""
        fast, labels = initial(), loop.task.support_y
        # A recording cannot wait for the device; `check` has looked at the labels before.
        if not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
            for each in labels if loop.stacked else [labels]:
                self._check_labels(each, ignored, loop.mask is not None)
        full = {local.rpartition(".")[2]: name for name, local in self.names.items()}
        inside = next(iter(self.names.values())).rpartition(".")[0]
        layer, weight = ".".join(filter(None, [self.head, inside])), fast[full["weight"]]
        embedded = loop.embedded(fast, layer)
        axis = 2 if loop.stacked else 1
        if embedded.ndim != weight.ndim or labels.shape != embedded.select(axis, 0).shape:
            raise TaskError(
                f'outputs.head_init="prototypes": expected one embedding for each label, but what enters the head '
                f"'{self.head}' is {describe_value(embedded)} for support_y, {describe_value(labels)}. Name the layer "
                "that makes one prediction for each label with head=."
            )
        centres = loop.engine.each(partial(_prototypes, ways=self.ways), embedded, labels).to(weight)
        return {full["weight"]: (2 * centres).view_as(weight), full["bias"]: -centres.square().sum(-1)}

    def _check_labels(self, labels: Any, ignored: int, masked: bool) -> None:
        asked, ways = 'outputs.head_init="prototypes"', self.ways
        if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
            raise TaskError(
                f"{asked} needs whole numbers as labels, but support_y is {describe_value(labels)}. Pass class numbers "
                '(labels.argmax(1) of one-hot rows), or use outputs={"head_init": "learned"}, as for regression.'
            )
        known = sorted({*labels.flatten().tolist()} - {ignored})
        if beyond := [label for label in known if not 0 <= label < ways]:
            raise TaskError(
                f"{asked}: support_y holds the labels {beyond}, but the head '{self.head}' has {ways} outputs. Relabel "
                f"the episode to 0..{ways - 1}, or give the head more outputs."
            )
        if not masked and (missing := sorted({*range(ways)} - {*known})):
            raise TaskError(
                f"{asked}: the head '{self.head}' has {ways} outputs, but the support set shows no example of the "
                f"classes {missing}, which have no prototype. Number the task's classes 0..{len(known) - 1} and give "
                f'the head {len(known)} outputs, or pass outputs={{"mask_unused_outputs": True}}.'
            )


def _prototypes(embedded: Tensor, labels: Tensor, ways: int) -> Tensor:
    """The mean embedding of each class: (ways, numbers); zero for a class without examples.

    Args:
        embedded: (examples, numbers, ...). labels: (examples, ...), of 0..ways - 1; others are left out.
    """
    rows = embedded.movedim(1, -1).flatten(0, -2)
    with torch.autocast(rows.device.type, enabled=False):
        members = (labels.flatten() == torch.arange(ways, device=rows.device).unsqueeze(1)).to(rows.dtype)
        return members @ rows / members.sum(1, keepdim=True).clamp(min=1)


def _row_layer(kind: str, owners: Mapping[str, nn.Module]) -> nn.Module:
    """The one layer of a head; raises ArgumentError unless its weight has a row for each output."""
    layer = next(iter(owners.values()))
    known = any(type(layer).forward is each.forward for each in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
    if not known or "forward" in vars(layer) or getattr(layer, "groups", 1) > 1:
        raise ArgumentError(
            f'head_init="{kind}": expected a head that is one torch.nn.Linear, or a convolution without groups, but '
            f"got {type(layer).__name__}, of which the rows of the classes are not known. Name that layer with head=, "
            'or use outputs={"head_init": "zeros"}.'
        )
    return layer


HEAD_STARTS: dict[str, type[HeadStart]] = {
    start.kind: start for start in (HeadStart, ZeroHead, RandomHead, StoredHead, SharedHead, PrototypeHead)
}
