"""How a gradient becomes the next fast weight: SGD, with momentum or without, and Adam, each differentiable.

`InnerOptions` holds the numbers of a rule. An inner optimizer applies it and holds nothing else: a task's state goes in
and comes out, with its graph. The learning rates come from outside, one scalar per tensor and step, so that every rule
can learn them.
"""

from __future__ import annotations

import functools
import math
import threading
import warnings
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from higher.optim import DifferentiableOptimizer, get_diff_optim

from metawrap.settings.groups import InnerOptions

Gradients = Mapping[str, Tensor | None]
# By parameter name: what the rule remembers of it, tensors and counts; nothing before the first step.
OptimizerState = Mapping[str, Mapping[str, Any]]


class InnerOptimizer(Protocol):
    """The update of fast weights by one rule."""

    def step(
        self,
        fast: Mapping[str, Tensor],
        gradients: Gradients,
        rates: Mapping[str, Tensor],
        losses: Tensor,
        state: OptimizerState,
    ) -> tuple[dict[str, Tensor], OptimizerState]:
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

    def __init__(self, options: InnerOptions) -> None:
        self.options = options
        self._update = {"sgd": self._sgd, "adam": self._adam}[options.rule]

    def step(
        self,
        fast: Mapping[str, Tensor],
        gradients: Gradients,
        rates: Mapping[str, Tensor],
        losses: Tensor,
        state: OptimizerState,
    ) -> tuple[dict[str, Tensor], OptimizerState]:
        """See `InnerOptimizer.step`."""
        updated, after = dict(fast), dict(state)
        for name, gradient in gradients.items():
            if gradient is not None:
                direction, after[name] = self._update(gradient, state.get(name, {}))
                updated[name] = fast[name] - rates[name] * direction
        return updated, after

    def _sgd(self, gradient: Tensor, state: Mapping[str, Any]) -> tuple[Tensor, Mapping[str, Any]]:
        if not self.options.momentum:
            return gradient, state
        # As in torch: the first velocity is the gradient itself.
        velocity = self.options.momentum * state["velocity"] + gradient if state else gradient
        return velocity, {"velocity": velocity}

    def _adam(self, gradient: Tensor, state: Mapping[str, Any]) -> tuple[Tensor, Mapping[str, Any]]:
        # Kingma & Ba 2015, arXiv:1412.6980, in the order at the end of section 2: eps is added before the correction.
        (beta1, beta2), step = self.options.betas, state.get("step", 0) + 1
        zero = torch.zeros_like(gradient)
        mean = beta1 * state.get("mean", zero) + (1 - beta1) * gradient
        square = beta2 * state.get("square", zero) + (1 - beta2) * gradient * gradient
        # The root has no derivative at zero; an entry that never had a gradient takes no part.
        nothing = square == 0
        root = torch.where(nothing, zero, torch.where(nothing, torch.ones_like(square), square).sqrt())
        direction = mean / (root + self.options.eps) * (math.sqrt(1 - beta2**step) / (1 - beta1**step))
        return direction, {"step": step, "mean": mean, "square": square}


class HigherInnerOptimizer:
    """A rule through `higher.optim`, which is handed gradients rather than the loss.

    From a loss `higher` differentiates with respect to every parameter, which for parameters that are not adapted walks
    back through all earlier inner steps; and its first order does not train the initial weights.
    """

    def __init__(self, options: InnerOptions) -> None:
        self.options = options

    def step(
        self,
        fast: Mapping[str, Tensor],
        gradients: Gradients,
        rates: Mapping[str, Tensor],
        losses: Tensor,
        state: OptimizerState,
    ) -> tuple[dict[str, Tensor], OptimizerState]:
        """See `InnerOptimizer.step`."""
        optimizer = _differentiable(self.options, len(fast), threading.get_ident())
        # One group for each weight, so a group's state is that of its only weight.
        optimizer.state = [defaultdict(dict, {0: dict(state.get(name, {}))}) for name in fast]
        nothing = torch.zeros((), requires_grad=True)
        try:
            updated = optimizer.step(
                nothing,
                params=list(fast.values()),
                override={"lr": [rates[name] for name in fast]},
                grad_callback=lambda _: [gradients[name] for name in fast],
            )
            after = {name: group[0] for name, group in zip(fast, optimizer.state, strict=True)}
        finally:
            # The optimizer stays, and must not keep the graph of this step.
            optimizer.state = []
            for group in optimizer.param_groups:
                group.update(params=[None], lr=None)
        return dict(zip(fast, updated, strict=True)), after


@functools.lru_cache(maxsize=32)
def _differentiable(options: InnerOptions, count: int, thread: int) -> DifferentiableOptimizer:
    """An optimizer for so many weights, made once for each thread, as it holds a step's state while the step runs."""
    # It copies its parameters, and asks them for no more than their number: empty ones cost nothing.
    places = [torch.empty(0, requires_grad=True) for _ in range(count)]
    groups = [{"params": [place]} for place in places]
    plain: torch.optim.Optimizer = (
        torch.optim.Adam(groups, betas=options.betas, eps=options.eps)
        if options.rule == "adam"
        else torch.optim.SGD(groups, lr=1.0, momentum=options.momentum)
    )
    return get_diff_optim(plain, places)


def inner_optimizer(engine: str, options: InnerOptions) -> InnerOptimizer:
    """The update of fast weights by the rule of `options`, through `higher.optim` under the engine "higher"."""
    return HigherInnerOptimizer(options) if engine == "higher" else OwnInnerOptimizer(options)


def clipped(
    gradients: Gradients, max_norm: float | None, max_value: float | None, stacked: bool = False
) -> dict[str, Tensor | None]:
    """The gradients clipped by entry, then by the norm of all of them together; differentiable, as torch clips.

    Args:
        max_norm, max_value: limits; None leaves the gradients as they are.
        stacked: they have a leading task axis, and each task has a norm of its own.
    """
    if max_norm is None and max_value is None:
        return dict(gradients)
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


class LearningRates(nn.Module):
    """`rates[name]` holds a row for each step of the user's parameter `name`; the sign is free.

    A row is a scalar, or with `per_weight` as large as the parameter: (rows, *shape), and (rows, *shape, 2) for a
    complex one, whose entries are two numbers each. A step past the last row uses the last row, so that one row serves
    all steps. Source: Antoniou et al. 2018, arXiv:1810.09502, LSLR; the authors' code keeps one rate per parameter
    tensor (weight and bias apart), as this does.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, Tensor]],
        rows: int,
        initial: float,
        learned: bool,
        per_weight: bool = False,
    ) -> None:
        super().__init__()
        self.names: list[str] = []
        for name, like in parameters:
            real = torch.view_as_real(like) if like.is_complex() else like
            shape = (rows, *real.shape) if per_weight else (rows,)
            rate = torch.full(shape, initial, dtype=real.dtype, device=like.device)
            self.names.append(name)
            self.register_parameter(_key(name), nn.Parameter(rate, requires_grad=learned))

    def __getitem__(self, name: str) -> nn.Parameter:
        if name not in self.names:
            raise KeyError(f"'{name}' has no learning rate; adapted parameters: {', '.join(self.names)}")
        return self._parameters[_key(name)]  # type: ignore[return-value]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def items(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Pairs of parameter name and its rates, row by row."""
        return ((name, self[name]) for name in self.names)

    def leave_out(self, names: Collection[str]) -> None:
        """Leaves these parameters out of the inner update. Their rates stay in state_dict, unused."""
        self.names = [name for name in self.names if name not in names]

    def per_step(self) -> dict[str, tuple[Tensor, ...]]:
        """Each name's rows, one after another."""
        return {name: rates.unbind() for name, rates in self.items()}


def _key(name: str) -> str:
    # torch refuses dots in a parameter's own name, and names that are already an attribute, such as "items".
    return name.replace(".", "/") if "." in name else f"/{name}"
