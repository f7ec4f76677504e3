"""How a gradient becomes the next fast weight: SGD, with momentum or without, and Adam, each differentiable.

A rule holds the numbers. An inner optimizer applies it, and holds nothing else: a task's state goes in and comes out,
with its graph. The learning rates come from outside, one scalar per tensor and step, so every rule can learn them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

Gradients = Mapping[str, Tensor | None]
# By parameter name: what the rule remembers of it, tensors and counts; nothing before the first step.
State = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class UpdateRule:
    """Which update, with its constants. momentum belongs to "sgd"; betas and eps to "adam"."""

    name: str = "sgd"
    momentum: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8


class InnerOptimizer(Protocol):
    """The update of fast weights by one rule."""

    def step(
        self,
        fast: Mapping[str, Tensor],
        gradients: Gradients,
        rates: Mapping[str, Tensor],
        losses: Tensor,
        state: State,
    ) -> tuple[dict[str, Tensor], State]:
        """The next fast weights and state; a tensor without a gradient stays as it is, and so does its state.

        Args:
            fast, gradients: by parameter name, real.
            rates: this step's learning rates of each: a scalar, or one for each of its entries.
            losses: those that the gradients are of, with their graph: a scalar, or (tasks,) where there is a task axis.
            state: what the step before returned; {} at the first.
        """
        ...


class OwnInnerOptimizer:
    """The rules, written out."""

    def __init__(self, rule: UpdateRule) -> None:
        self.rule = rule
        self._update = {"sgd": self._sgd, "adam": self._adam}[rule.name]

    def step(
        self,
        fast: Mapping[str, Tensor],
        gradients: Gradients,
        rates: Mapping[str, Tensor],
        losses: Tensor,
        state: State,
    ) -> tuple[dict[str, Tensor], State]:
        """See `InnerOptimizer.step`."""
        updated, after = dict(fast), dict(state)
        for name, gradient in gradients.items():
            if gradient is not None:
                direction, after[name] = self._update(gradient, state.get(name, {}))
                updated[name] = fast[name] - rates[name] * direction
        return updated, after

    def _sgd(self, gradient: Tensor, state: Mapping[str, Any]) -> tuple[Tensor, Mapping[str, Any]]:
        if not self.rule.momentum:
            return gradient, state
        # As in torch: the first velocity is the gradient itself.
        velocity = self.rule.momentum * state["velocity"] + gradient if state else gradient
        return velocity, {"velocity": velocity}

    def _adam(self, gradient: Tensor, state: Mapping[str, Any]) -> tuple[Tensor, Mapping[str, Any]]:
        # Kingma & Ba 2015, arXiv:1412.6980, in the order at the end of section 2: eps is added before the correction.
        (beta1, beta2), step = self.rule.betas, state.get("step", 0) + 1
        zero = torch.zeros_like(gradient)
        mean = beta1 * state.get("mean", zero) + (1 - beta1) * gradient
        square = beta2 * state.get("square", zero) + (1 - beta2) * gradient * gradient
        # The root has no derivative at zero; an entry that never had a gradient takes no part.
        nothing = square == 0
        root = torch.where(nothing, zero, torch.where(nothing, torch.ones_like(square), square).sqrt())
        direction = mean / (root + self.rule.eps) * (math.sqrt(1 - beta2**step) / (1 - beta1**step))
        return direction, {"step": step, "mean": mean, "square": square}


def clipped(
    gradients: Gradients, max_norm: float | None, max_value: float | None, stacked: bool = False
) -> dict[str, Tensor | None]:
    """The gradients clipped by entry, then by the norm of all of them together; differentiable, as torch clips.

    Args:
        max_norm, max_value: limits; None leaves the gradients as they are.
        stacked: they have a leading task axis, and each task has a norm of its own.
    """
    present = {name: g for name, g in gradients.items() if g is not None}
    if max_value is not None:
        present = {name: g.clamp(-max_value, max_value) for name, g in present.items()}
    if max_norm is not None and present:
        parts = [_norm(g.flatten(1), 1) if stacked else _norm(g) for g in present.values()]
        scale = (max_norm / (_norm(torch.stack(parts), 0) + 1e-6)).clamp(max=1.0)
        present = {
            name: g * scale.to(g.dtype).view(-1, *(1,) * (g.ndim - 1)) if stacked else g * scale.to(g.dtype)
            for name, g in present.items()
        }
    return {name: present.get(name) for name in gradients}


def _norm(values: Tensor, over: int | None = None) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(values, dim=over)
    return norm
