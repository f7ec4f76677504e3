"""How a gradient becomes the next fast weight: SGD, with momentum or without, and Adam, each differentiable.

A rule holds the numbers. An inner optimizer applies it to one task, and carries that task's state, with its graph, from
step to step. The learning rates come from outside, one scalar per tensor and step, so every rule can learn them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Gradients = Mapping[str, Tensor | None]


@dataclass(frozen=True)
class UpdateRule:
    """Which update, with its constants. momentum belongs to "sgd"; betas and eps to "adam"."""

    name: str = "sgd"
    momentum: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8


class InnerOptimizer(Protocol):
    """The update of one task's fast weights. Made anew for each task: it holds that task's state."""

    def step(self, fast: Mapping[str, Tensor], gradients: Gradients, rates: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The next fast weights; a tensor without a gradient stays as it is, and so does its state.

        Args:
            fast, gradients: by parameter name, real.
            rates: this step's learning rate of each, scalar.
        """
        ...


class OwnInnerOptimizer:
    """The rules, written out."""

    def __init__(self, rule: UpdateRule) -> None:
        self.rule = rule
        self._update = {"sgd": self._sgd, "adam": self._adam}[rule.name]
        self._count: dict[str, int] = {}
        self._first: dict[str, Tensor] = {}
        self._second: dict[str, Tensor] = {}

    def step(self, fast: Mapping[str, Tensor], gradients: Gradients, rates: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `InnerOptimizer.step`."""
        return {
            name: weight if (g := gradients[name]) is None else weight - rates[name] * self._update(name, g)
            for name, weight in fast.items()
        }

    def _sgd(self, name: str, gradient: Tensor) -> Tensor:
        # As in torch: the first velocity is the gradient itself.
        if self.rule.momentum:
            before = self._first.get(name)
            gradient = gradient if before is None else self.rule.momentum * before + gradient
            self._first[name] = gradient
        return gradient

    def _adam(self, name: str, gradient: Tensor) -> Tensor:
        # Kingma & Ba 2015, arXiv:1412.6980, in the order at the end of section 2: eps is added before the correction.
        (beta1, beta2), step = self.rule.betas, self._count.get(name, 0) + 1
        zero = torch.zeros_like(gradient)
        mean = beta1 * self._first.get(name, zero) + (1 - beta1) * gradient
        square = beta2 * self._second.get(name, zero) + (1 - beta2) * gradient * gradient
        self._count[name], self._first[name], self._second[name] = step, mean, square
        # The root has no derivative at zero; an entry that never had a gradient takes no part.
        nothing = square == 0
        root = torch.where(nothing, zero, torch.where(nothing, torch.ones_like(square), square).sqrt())
        return mean / (root + self.rule.eps) * (math.sqrt(1 - beta2**step) / (1 - beta1**step))


def clipped(gradients: Gradients, max_norm: float | None, max_value: float | None) -> dict[str, Tensor | None]:
    """The gradients clipped by entry, then by the norm of all of them together; differentiable, as torch clips.

    Args:
        max_norm, max_value: limits; None leaves the gradients as they are.
    """
    present = {name: g for name, g in gradients.items() if g is not None}
    if max_value is not None:
        present = {name: g.clamp(-max_value, max_value) for name, g in present.items()}
    if max_norm is not None and present:
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in present.values()]))
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        present = {name: g * scale.to(g.dtype) for name, g in present.items()}
    return {name: present.get(name) for name in gradients}
