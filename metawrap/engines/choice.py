"""The interface of an engine, and the choice of one: the engine that was named, or the best that inspection allows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from metawrap.engines.batched import BatchedEngine
from metawrap.engines.functional import FunctionalEngine
from metawrap.engines.higher import HigherEngine
from metawrap.errors import ArgumentError, UnsupportedModuleError, shown
from metawrap.snapshot.module_state import BufferEdits
from metawrap.surgery.inspect import find_higher_hazards


class Engine(Protocol):
    """Runs one module with fast weights in place of some parameters; the rest is as the module has it at each call.

    >>> import torch
    >>> engine = ENGINES["functional"](nn.Linear(2, 1, bias=False))
    >>> engine.call({"weight": torch.ones(1, 2)}, torch.tensor([[1.0, 2.0]]))
    tensor([[3.]])
    """

    name: str

    def __init__(self, model: nn.Module, edits: BufferEdits | None = None) -> None:
        """Args: edits: the buffers that the model's forward is known to edit; calls add to it."""
        ...

    def call(self, weights: Mapping[str, Tensor], inputs: Any, twice: bool = False, head: str | None = None) -> Any:
        """The model's prediction with `weights` (by parameter name) in place of the parameters of those names.

        Args:
            weights: fast weights; gradients flow back to them. Parameters that are not named are used as they are.
            inputs: a tensor, or a tuple or dict of them, passed as `model(x)`, `model(*x)` or `model(**x)`.
            twice: whether the prediction will be differentiated twice: layers then take their quick forms.
            head: name of a module whose input is returned in place of the prediction.
        """
        ...

    def each(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(*args)` for one task; for every task where tensors have a leading task axis."""
        ...


ENGINES: dict[str, type[Engine]] = {"higher": HigherEngine, "functional": FunctionalEngine, "batched": BatchedEngine}


@dataclass
class EngineChoice:
    """The engine that runs a model. asked: the name that the user gave. why: the reason for the choice."""

    asked: str
    name: str
    why: str

    @property
    def of_one_task(self) -> str:
        """The engine that runs a task alone."""
        return "functional" if self.name == "batched" else self.name


class BuiltEngines(dict[str, Engine]):
    """The engines that one learner has built, by name.

    Copies and pickles of it are empty: engines hold classes made at run time.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> BuiltEngines:
        return BuiltEngines()

    def __reduce__(self) -> Any:
        return BuiltEngines, ()


def choose_engine(name: str, model: nn.Module) -> EngineChoice:
    """The engine for a model.

    `"auto"` takes `functional`: it carries every model, and can solve several tasks at the same time.

    >>> choose_engine("auto", nn.Linear(2, 2)).name
    'functional'

    Raises:
        ArgumentError: no engine has that name.
        UnsupportedModuleError: the named engine cannot carry the model.
    """
    if name not in ("auto", *ENGINES):
        raise ArgumentError(f"engine: expected 'auto', {', '.join(map(repr, ENGINES))}, but got {shown(name)}.")
    if name == "higher" and (hazards := find_higher_hazards(model)):
        raise UnsupportedModuleError(f'engine="higher" cannot carry this model: {hazards[0]}. Use engine="functional".')
    if name == "auto":
        return EngineChoice(name, "functional", "it carries every model")
    return EngineChoice(name, name, "asked for")  # Whether "batched" carries it, the first task shows.
