"""Fast tensors in the module's own parameter slots: right for every module that reads its parameters from itself."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from metawrap.engines.calling import call_model
from metawrap.surgery.swap import parameter_slots


class FunctionalEngine:
    """Puts the fast weights in, calls the user's module, and puts the parameters back."""

    name = "functional"

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._slots = parameter_slots(model)
        self._recurrent = [module for module in model.modules() if isinstance(module, nn.RNNBase)]

    def call(self, weights: Mapping[str, Tensor], inputs: Any) -> Any:
        """See `Engine.call`."""
        slots = [(*slot, weights[name]) for name in weights for slot in self._slots[name]]
        originals = [module._parameters[local] for module, local, _ in slots]
        try:
            for module, local, tensor in slots:
                module._parameters[local] = tensor  # type: ignore[assignment]
            return call_model(self.model, inputs)
        finally:
            for (module, local, _), original in zip(slots, originals, strict=True):
                module._parameters[local] = original
            for module in self._recurrent:
                # A recurrent module caches its weights, and looks for new ones by identity; left alone, the cache would
                # hold on to this call's graph.
                module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]
                module._flat_weight_refs = [weakref.ref(w) for w in module._flat_weights if w is not None]
