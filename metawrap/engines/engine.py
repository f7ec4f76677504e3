"""The protocol of an engine: how a user's module is run with fast weights in place of its parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from metawrap.snapshot.module_state import BufferEdits


class Engine(Protocol):
    """Runs one module with some of its parameters replaced. Everything else is as the module has it, at each call."""

    name: str

    def __init__(self, model: nn.Module, edits: BufferEdits | None = None) -> None:
        """Args: edits: what is known of the buffers that the model's forward edits; calls add to it."""
        ...

    def call(self, weights: Mapping[str, Tensor], inputs: Any, twice: bool = False) -> Any:
        """The model's prediction with `weights` (by parameter name) in place of the parameters of those names.

        Args:
            weights: fast weights; gradients flow back to them. Parameters that are not named are used as they are.
            inputs: a tensor, or a tuple or dict of them, passed as `model(x)`, `model(*x)` or `model(**x)`.
            twice: whether the prediction will be differentiated twice, so that what has a quick form for that takes it.
        """
        ...

    def each(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(*args)` for one task; where tensors have a leading task axis, for each."""
        ...
