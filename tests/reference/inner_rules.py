"""Inner update rules (momentum, Adam, clipping) written by hand, with nothing but tensors, from the formulas."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from face import as_tasks, build, rates_of
from models import Mlp, class_tasks, seeded
from torch import Tensor, nn

STEPS = 3
BATCH = class_tasks((4,), tasks=2, shots=2, seed=3)
RULES: dict[str, dict[str, Any]] = {
    "sgd": {},
    "momentum": {"inner_momentum": 0.8},
    "adam": {"inner_optimizer": "adam", "inner_lr": 0.03, "inner_betas": (0.7, 0.9), "inner_eps": 1e-3},
    "norm clipped": {"inner_max_grad_norm": 0.3},
    "value clipped": {"inner_max_grad_value": 0.05},
    "momentum, both clipped": {"inner_momentum": 0.5, "inner_max_grad_norm": 0.2, "inner_max_grad_value": 0.1},
    "adam, norm clipped": {"inner_optimizer": "adam", "inner_lr": 0.02, "inner_max_grad_norm": 0.3, "inner_eps": 1e-4},
}


class ComplexNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        return (x.to(self.weight.dtype) @ self.weight.T).abs()

    def double(self) -> ComplexNet:  # nn.Module.double leaves complex parameters alone, with a warning.
        return self


def network() -> nn.Module:
    return seeded(lambda: Mlp(4, 6, 3))


def learner_of(rule: str, engine: str, model: nn.Module | None = None, **options: Any) -> Any:
    options = {"inner_steps": STEPS, "multi_step_loss": False, "first_order_epochs": 0} | RULES[rule] | options
    return build(network() if model is None else model, engine=engine, **options)


class ByHand:
    """The inner loop of one task."""

    def __init__(self, options: dict[str, Any], second_order: bool) -> None:
        self.options, self.second_order = options, second_order
        self.velocity: dict[str, Tensor] = {}
        self.mean: dict[str, Tensor] = {}
        self.square: dict[str, Tensor] = {}

    def loss(self, values: dict[str, Tensor], rates: dict[str, Tensor], task: Any) -> Tensor:
        support_x, support_y, target_x, target_y = task
        for step in range(STEPS):
            names = list(values)
            support = F.cross_entropy(self.network(values, support_x), support_y)
            gradients = torch.autograd.grad(support, list(values.values()), create_graph=self.second_order)
            gradients = self.clip(dict(zip(names, gradients, strict=True)))
            values = {name: values[name] - rates[name][step] * self.direction(name, gradients[name], step + 1)
                      for name in names}  # fmt: skip
        return F.cross_entropy(self.network(values, target_x), target_y)

    @staticmethod
    def network(values: dict[str, Tensor], x: Tensor) -> Tensor:
        hidden = torch.tanh(x @ values["first.weight"].T + values["first.bias"])
        return hidden @ values["second.weight"].T + values["second.bias"]

    def clip(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        if (limit := self.options.get("inner_max_grad_value")) is not None:
            gradients = {n: torch.where(g.abs() > limit, g.detach().sign() * limit, g) for n, g in gradients.items()}
        if (limit := self.options.get("inner_max_grad_norm")) is not None:
            norm = sum((g**2).sum() for g in gradients.values()) ** 0.5
            if float(norm.detach()) + 1e-6 > limit:
                gradients = {n: g * limit / (norm + 1e-6) for n, g in gradients.items()}
        return gradients

    def direction(self, name: str, g: Tensor, t: int) -> Tensor:
        if self.options.get("inner_optimizer") == "adam":
            b1, b2 = self.options.get("inner_betas", (0.9, 0.999))
            self.mean[name] = b1 * self.mean.get(name, 0) + (1 - b1) * g
            self.square[name] = b2 * self.square.get(name, 0) + (1 - b2) * g**2
            scale = math.sqrt(1 - b2**t) / (1 - b1**t)
            return scale * self.mean[name] / (self.square[name].sqrt() + self.options["inner_eps"])
        if momentum := self.options.get("inner_momentum"):
            self.velocity[name] = momentum * self.velocity[name] + g if name in self.velocity else g
            return self.velocity[name]
        return g


def by_hand(learner: Any, rule: str, second_order: bool = True) -> tuple[Tensor, dict[str, Tensor | None]]:
    """The loss on BATCH and its gradients at the learner's values; rates of one row serve every step."""
    start = {n: p.detach().clone().requires_grad_() for n, p in learner.model.named_parameters()}
    rates = {name: rate.requires_grad_() for name, rate in rates_of(learner).items()}
    rows = {name: rate.expand(STEPS, *rate.shape[1:]) for name, rate in rates.items()}
    losses = [
        ByHand(RULES[rule], second_order).loss({n: v.clone() for n, v in start.items()}, rows, task)
        for task in as_tasks(BATCH)
    ]
    loss = torch.stack(losses).mean()
    leaves = start | {f"lr/{name}": rate for name, rate in rates.items()}
    return loss.detach(), dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
