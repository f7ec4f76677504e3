"""The reference of every ratio: MAML++ as someone would write it in plain torch, for this one network. No library.

Nothing here knows metawrap: tensors in a dictionary, `torch.autograd.grad(create_graph=True)`, `backward()`, Adam.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from cases import BLOCKS, EPSILON, META_LR, MOMENTUM, SLOPE, Case, TaskTensors, adapted_names, step_loss_weights
from torch import Tensor


class PlainLoop:
    """A meta-step by an unrolled loop.

    Args:
        first_order: the inner gradients count as constants.
        one_backward: one backward pass over the mean loss of the batch, rather than one for each task: the graphs of
            all tasks then stand at once.
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
        self.values = {name: value.clone().requires_grad_() for name, value in values.items()}
        self.adapted = adapted_names(values)
        self.weights = step_loss_weights(case)
        rows = values["conv0.norm.weight"]
        self.means = [torch.zeros_like(rows) for _ in range(BLOCKS)]
        self.variances = [torch.ones_like(rows) for _ in range(BLOCKS)]
        self.optimizer = torch.optim.Adam(list(self.values.values()), lr=META_LR, fused=True)

    def step(self) -> None:
        """One outer update."""
        self.optimizer.zero_grad()
        losses = []
        for task in self.tasks:
            loss = self.task_loss(task) / len(self.tasks)
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

    def task_loss(self, task: TaskTensors) -> Tensor:
        """The weighted target losses after each inner step of one task."""
        support_x, support_y, target_x, target_y = task
        fast = {name: self.values[name] for name in self.adapted}
        losses = []
        for step, weight in enumerate(self.weights):
            support_loss = F.cross_entropy(self.network(support_x, fast, step), support_y)
            gradients = torch.autograd.grad(support_loss, list(fast.values()), create_graph=not self.first_order)
            fast = {
                name: value - self.values[f"lr/{name}"][step] * gradient
                for (name, value), gradient in zip(fast.items(), gradients, strict=True)
            }
            losses.append(weight * F.cross_entropy(self.network(target_x, fast, step), target_y))
        return torch.stack(losses).sum()

    def network(self, x: Tensor, fast: dict[str, Tensor], step: int) -> Tensor:
        """Conv4 with this step's row of every batch norm."""
        for block in range(BLOCKS):
            x = F.conv2d(x, fast[f"conv{block}.conv.weight"], fast[f"conv{block}.conv.bias"], padding=1)
            scale, shift = (self.values[f"conv{block}.norm.{kind}"][step] for kind in ("weight", "bias"))
            mean, variance = self.means[block][step], self.variances[block][step]
            x = F.batch_norm(x, mean, variance, scale, shift, training=True, momentum=MOMENTUM, eps=EPSILON)
            x = F.max_pool2d(F.leaky_relu(x, SLOPE), 2)
        return F.linear(x.flatten(1), fast["linear.weight"], fast["linear.bias"])
