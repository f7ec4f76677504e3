"""Differentiable fast-weight copies through the `higher` library, with its known losses put back.

`higher` makes a patched twin of the module. The twin is made once, not per task: its classes are freed only by the
garbage collector. It shares the module's hooks and buffers, which `higher` would drop and copy, follows its
attributes, and hands back those that the user's forward sets.
Fast weights are passed in, and `higher.optim` is handed their gradients rather than the loss: left to itself it
differentiates with respect to every parameter, which for parameters that are not adapted walks back through all earlier
inner steps, and it knows no first order that still trains the initial weights.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from metawrap.engines.calling import EditedBuffers, call_model
from metawrap.engines.quick import QuickForms
from metawrap.inner_loop.update_rules import Gradients, InnerOptimizer, State, UpdateRule
from metawrap.snapshot.module_state import BufferEdits

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from higher.optim import DifferentiableOptimizer, get_diff_optim
    from higher.patch import monkeypatch

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
)
_OWN = {*_HOOKS, "_parameters", "_buffers", "_modules", "_flat_weights", "_flat_weight_refs"}


class HigherEngine:
    """Calls a `higher` twin of the module with the fast weights."""

    name = "higher"

    def __init__(self, model: nn.Module, edits: BufferEdits | None = None) -> None:
        self.model = model
        # Without tracking, the twin holds the latest fast weights only; the graph lives in the tensors themselves.
        self._twin = monkeypatch(model, copy_initial_weights=False, track_higher_grads=False)
        self._pairs = list(_pairs(model, self._twin))
        for module, twin in self._pairs:
            for attribute in (*_HOOKS, "_buffers"):
                twin.__dict__[attribute] = module.__dict__[attribute]
        self._buffers = EditedBuffers(model, edits)
        self._forms = QuickForms(self._pairs)
        self._own = [_OWN | (twin.__dict__.keys() - module.__dict__.keys()) for module, twin in self._pairs]

    def call(self, weights: Mapping[str, Tensor], inputs: Any, twice: bool = False) -> Any:
        """See `Engine.call`."""
        originals = dict(self.model.named_parameters())
        for module, twin in self._pairs:
            twin.__dict__.update((key, value) for key, value in module.__dict__.items() if key not in _OWN)
        try:
            # In every submodule now, not as each is called: hooks run before that and may read parameters.
            self._twin.update_params([weights.get(name, original) for name, original in originals.items()])
            with self._buffers.lent(), self._forms.lent(twice):
                return call_model(self._twin, inputs)
        finally:
            self._twin.update_params(list(originals.values()))
            for (module, twin), own in zip(self._pairs, self._own, strict=True):
                # Counters, caches: what the user's forward has set on itself belongs to the module.
                module.__dict__.update((key, value) for key, value in twin.__dict__.items() if key not in own)

    def each(self, function: Callable[..., Any], *args: Any) -> Any:
        """See `Engine.each`."""
        return function(*args)

    def inner_optimizer(self, rule: UpdateRule) -> InnerOptimizer:
        """See `Engine.inner_optimizer`."""
        return HigherInnerOptimizer(rule)


class HigherInnerOptimizer:
    """A rule through `higher.optim`."""

    def __init__(self, rule: UpdateRule) -> None:
        self.rule = rule
        self._optimizer: DifferentiableOptimizer | None = None

    def step(
        self,
        fast: Mapping[str, Tensor],
        gradients: Gradients,
        rates: Mapping[str, Tensor],
        losses: Tensor,
        state: State,
    ) -> tuple[dict[str, Tensor], State]:
        """See `InnerOptimizer.step`."""
        if self._optimizer is None or len(self._optimizer.state) != len(fast):
            self._optimizer = _differentiable(self.rule, len(fast))
        # One group for each weight, so a group's state is that of its only weight.
        self._optimizer.state = [defaultdict(dict, {0: dict(state.get(name, {}))}) for name in fast]
        nothing = torch.zeros((), requires_grad=True)
        updated = self._optimizer.step(
            nothing,
            params=list(fast.values()),
            override={"lr": [rates[name] for name in fast]},
            grad_callback=lambda _: [gradients[name] for name in fast],
        )
        after = {name: group[0] for name, group in zip(fast, self._optimizer.state, strict=True)}
        return dict(zip(fast, updated, strict=True)), after


def _differentiable(rule: UpdateRule, count: int) -> DifferentiableOptimizer:
    # It copies its parameters, and asks them for no more than their number: empty ones cost nothing.
    places = [torch.empty(0, requires_grad=True) for _ in range(count)]
    groups = [{"params": [place]} for place in places]
    plain: torch.optim.Optimizer = (
        torch.optim.Adam(groups, betas=rule.betas, eps=rule.eps)
        if rule.name == "adam"
        else torch.optim.SGD(groups, lr=1.0, momentum=rule.momentum)
    )
    return get_diff_optim(plain, places)


def _pairs(module: nn.Module, twin: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
    yield module, twin
    for name, child in module._modules.items():
        if child is not None:
            yield from _pairs(child, twin._modules[name])  # type: ignore[arg-type]
