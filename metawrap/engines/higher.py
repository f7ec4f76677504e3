"""Fast weights through the `higher` library, which makes a patched twin of the module.

The twin is made once, not per task: its classes are freed only by the garbage collector. The twin shares the module's
hooks, which `higher` would drop, and its buffers, which `higher` would copy; attributes are carried over before and
after each call.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from metawrap.engines.calling import EditedBuffers, run_model
from metawrap.errors import UnsupportedModuleError
from metawrap.layers.quick_forms import QuickForms
from metawrap.snapshot.module_state import BufferEdits
from metawrap.surgery.swap import parameter_slots

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from higher.patch import monkeypatch

_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks"),
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
        # A recurrent twin makes its list of flat weights in each call, so its first list is not kept.
        kept = [key for key in _OWN if not key.startswith("_flat_weight")]
        self._kept = [{key: twin.__dict__[key] for key in kept} for _, twin in self._pairs]
        slots = parameter_slots(model)
        self._names = slots.keys()
        names = {(id(m), local): name for name, places in slots.items() for m, local in places}
        # A module that is registered twice has two twins.
        self._slots = [
            (names[id(module), local], twin._parameters, local)
            for module, twin in self._pairs
            for local, parameter in module._parameters.items()
            if parameter is not None
        ]

    def call(self, weights: Mapping[str, Tensor], inputs: Any, twice: bool = False, head: str | None = None) -> Any:
        """See `Engine.call`."""
        originals = dict(self.model.named_parameters())
        if originals.keys() != self._names:
            changed = min(originals.keys() ^ self._names)
            raise UnsupportedModuleError(
                f"'{changed}' of learner.model was added, removed or tied to another parameter after wrapping. Wrap "
                'the model again, or use engine="functional".'
            )
        for (module, twin), kept in zip(self._pairs, self._kept, strict=True):
            twin.__dict__.update({**module.__dict__, **kept})
        try:
            self._hand_over({name: weights.get(name, original) for name, original in originals.items()})
            with self._buffers.lent(), self._forms.lent(twice):
                # The twin shares the hooks of the module.
                return run_model(self._twin, inputs, None if head is None else self.model.get_submodule(head))
        finally:
            self._hand_over(originals)
            for (module, twin), own in zip(self._pairs, self._own, strict=True):
                # Counters and caches that the user's forward sets on the twin belong to the module.
                module.__dict__.update({key: value for key, value in twin.__dict__.items() if key not in own})

    def _hand_over(self, weights: Mapping[str, Tensor]) -> None:
        """Puts weights into every submodule now, not as each is called: hooks run before that and may read them.

        As `update_params` of the twin, which takes a hundred times as long.
        """
        self._twin.fast_params = list(weights.values())
        for name, table, local in self._slots:
            table[local] = weights[name]

    def each(self, function: Callable[..., Any], *args: Any) -> Any:
        """See `Engine.each`."""
        return function(*args)


def _pairs(module: nn.Module, twin: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
    yield module, twin
    for name, child in module._modules.items():
        if child is not None:
            yield from _pairs(child, twin._modules[name])  # type: ignore[arg-type]
