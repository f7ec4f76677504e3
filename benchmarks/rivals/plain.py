"""The reference of every ratio: one MAML++ meta-step of this one network in plain torch, without any library."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rivals.cases import BLOCKS, EPSILON, META_LR, MOMENTUM, SLOPE, Case, TaskTensors, adapted_names, step_loss_weights

Norm = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


class PlainLoop:
    """A meta-step by an unrolled loop over inner steps, a backward pass for each task, and Adam.

    The libraries of libraries.py replace `start`, `predict` and `inner_step`.

    Args:
        first_order: the inner gradients count as constants.
        one_backward: one backward pass over the mean loss of the batch. The graphs of all tasks are in memory at once.
    """

    def __init__(
        self,
        case: Case,
        values: dict[str, Tensor],
        tasks: list[TaskTensors],
        first_order: bool = False,
        one_backward: bool = False,
    ) -> None:
        self.tasks, self.first_order, self.one_backward = tasks, first_order, one_backward
        self.adapted, self.weights = adapted_names(values), step_loss_weights(case)
        self.values = self.learned(values)
        rows = values["conv0.norm.weight"]
        self.means = [torch.zeros_like(rows) for _ in range(BLOCKS)]
        self.variances = [torch.ones_like(rows) for _ in range(BLOCKS)]
        self.optimizer = torch.optim.Adam(list(self.values.values()), lr=META_LR, fused=True)

    def learned(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors that the outer update learns, by the names of `initial_values`."""
        return {name: value.clone().requires_grad_() for name, value in values.items()}

    def step(self) -> None:
        """One outer update."""
        self.optimizer.zero_grad()
        losses = []
        for task in self.tasks:
            loss = self.task_loss(*task) / len(self.tasks)
            if self.one_backward:
                losses.append(loss)
            else:
                loss.backward()
        if self.one_backward:
            torch.stack(losses).sum().backward()
        self.optimizer.step()

    def gradients(self) -> dict[str, Tensor]:
        """The last step's meta-gradient."""
        return {name: value.grad for name, value in self.values.items() if value.grad is not None}

    def task_loss(self, support_x: Tensor, support_y: Tensor, target_x: Tensor, target_y: Tensor) -> Tensor:
        """The weighted sum of one task's target losses after each inner step."""
        losses = []
        with self.start() as fast:
            for step, weight in enumerate(self.weights):
                support_loss = F.cross_entropy(self.predict(fast, support_x, step), support_y)
                fast = self.inner_step(fast, support_loss, step)
                losses.append(weight * F.cross_entropy(self.predict(fast, target_x, step), target_y))
        return torch.stack(losses).sum()

    def start(self) -> AbstractContextManager[Any]:
        """The fast weights before the first inner step."""
        return nullcontext({name: self.values[name] for name in self.adapted})

    def predict(self, fast: Any, x: Tensor, step: int) -> Tensor:
        """Logits of Conv4 with fast weights, and with this step's row of each batch norm."""
        for block, norm in enumerate(self.norms(step)):
            x = F.conv2d(x, fast[f"conv{block}.conv.weight"], fast[f"conv{block}.conv.bias"], padding=1)
            x = after_convolution(x, norm)
        return F.linear(x.flatten(1), fast["linear.weight"], fast["linear.bias"])

    def inner_step(self, fast: Any, support_loss: Tensor, step: int) -> Any:
        """The next fast weights."""
        gradients = torch.autograd.grad(support_loss, list(fast.values()), create_graph=not self.first_order)
        return updated(fast, self.rates(step), gradients)

    def norms(self, step: int) -> list[Norm]:
        """This step's row of each batch norm: weight, bias, running mean, running variance (None: not recorded)."""
        return [
            (
                self.values[f"conv{block}.norm.weight"][step],
                self.values[f"conv{block}.norm.bias"][step],
                self.means[block][step],
                self.variances[block][step],
            )
            for block in range(BLOCKS)
        ]

    def rates(self, step: int) -> list[Tensor]:
        """This step's learning rate of each adapted tensor."""
        return [self.values[f"lr/{name}"][step] for name in self.adapted]


def after_convolution(x: Tensor, norm: Norm) -> Tensor:
    """The rest of a block: batch norm, leaky ReLU, pooling."""
    weight, bias, mean, variance = norm
    x = F.batch_norm(x, mean, variance, weight, bias, training=True, momentum=MOMENTUM, eps=EPSILON)
    return F.max_pool2d(F.leaky_relu(x, SLOPE), 2)


def updated(fast: Mapping[str, Tensor], rates: list[Tensor], gradients: Any) -> dict[str, Tensor]:
    """Each fast weight minus its rate times its gradient."""
    parts = zip(fast.items(), rates, gradients, strict=True)
    return {name: value - rate * gradient for (name, value), rate, gradient in parts}
