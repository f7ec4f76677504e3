"""Fast tensors in the module's own parameter slots: right for every module that reads its own parameters."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from metawrap.engines.calling import EditedBuffers, run_model
from metawrap.errors import UnsupportedModuleError
from metawrap.layers.quick_forms import QuickForms
from metawrap.snapshot.module_state import BufferEdits
from metawrap.surgery.swap import parameter_slots


class FunctionalEngine:
    """Puts the fast weights in, calls the user's module, and puts the parameters back."""

    name = "functional"

    def __init__(self, model: nn.Module, edits: BufferEdits | None = None) -> None:
        self.model = model
        self._slots = parameter_slots(model)
        self._known = [(name, module, set(module._parameters)) for name, module in model.named_modules()]
        self._buffers = EditedBuffers(model, edits)
        self._forms = QuickForms((module, module) for module in model.modules())
        self._recurrent = [module for module in model.modules() if isinstance(module, nn.RNNBase)]

    def call(self, weights: Mapping[str, Tensor], inputs: Any, twice: bool = False, head: str | None = None) -> Any:
        """See `Engine.call`."""
        slots = [(*slot, weights[name]) for name in weights for slot in self._slots[name]]
        originals = [module._parameters[local] for module, local, _ in slots]
        try:
            for module, local, tensor in slots:
                # torch's mark of a tensor that counts as a parameter: isinstance(_, nn.Parameter) is then true.
                tensor._is_param = True
                module._parameters[local] = tensor  # type: ignore[assignment]
            with self._buffers.lent(), self._forms.lent(twice):
                output = run_model(self.model, inputs, None if head is None else self.model.get_submodule(head))
            self._refuse_new_parameters()
            return output
        finally:
            for (module, local, _), original in zip(slots, originals, strict=True):
                module._parameters[local] = original
            for module in self._recurrent:
                # A recurrent module caches its weights; the cache would keep this call's graph alive.
                module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]
                module._flat_weight_refs = [weakref.ref(w) for w in module._flat_weights if w is not None]

    def _refuse_new_parameters(self) -> None:
        for name, module, known in self._known:
            if len(module._parameters) > len(known):
                new = min(module._parameters.keys() - known)
                del module._parameters[new]
                raise UnsupportedModuleError(
                    f"'{name or 'the model itself'}' ({type(module).__name__}) is given a weight as its attribute "
                    f"'{new}' in forward, which makes it a parameter, and a fast weight cannot be one. Keep it in a "
                    "local variable, or assign a computed tensor: weight * 1."
                )

    def each(self, function: Callable[..., Any], *args: Any) -> Any:
        """See `Engine.each`."""
        return function(*args)
