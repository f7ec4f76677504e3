"""Which engine carries a model: the one that was named, or the best that inspection allows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from metawrap.engines.batched import BatchedEngine
from metawrap.engines.engine import Engine
from metawrap.engines.functional import FunctionalEngine
from metawrap.engines.higher import HigherEngine
from metawrap.errors import ArgumentError, UnsupportedModuleError
from metawrap.snapshot.module_state import BufferEdits
from metawrap.surgery.inspect import find_higher_hazards, find_hooks

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


class BuiltEngines:
    """The engines that one learner has built, by name. Copies and pickles hold none: engines hold classes made at run time."""

    def __init__(self) -> None:
        self._built: dict[str, Engine] = {}

    def of(self, name: str, model: nn.Module, edits: BufferEdits) -> Engine:
        """The engine of that name, built at the first call."""
        if name not in self._built:
            self._built[name] = ENGINES[name](model, edits)
        return self._built[name]

    def __deepcopy__(self, memo: dict[int, Any]) -> BuiltEngines:
        return BuiltEngines()

    def __reduce__(self) -> Any:
        return BuiltEngines, ()


def choose_engine(name: str, model: nn.Module, threads: bool = False) -> EngineChoice:
    """The engine for a model.

    `"auto"` takes `higher` where inspection finds nothing that it gets wrong, else `functional`; never `batched`, which
    not every task batch fits.

    Args:
        threads: whether tasks may be solved at the same time, which `higher` does not.

    Raises:
        ArgumentError: there is no engine of that name.
        UnsupportedModuleError: the named engine cannot carry the model.
    """
    if name not in ("auto", *ENGINES):
        raise ArgumentError(f"engine: expected 'auto', {', '.join(map(repr, ENGINES))}, but got {name!r}.")
    if name in ("functional", "batched"):  # Whether "batched" carries it, the first task shows.
        return EngineChoice(name, name, "asked for")
    if threads and name == "auto":
        return EngineChoice(name, "functional", "it runs tasks in threads")
    hazards = find_higher_hazards(model)
    hooked = find_hooks(model) if name == "auto" else None
    if not hazards and hooked is not None:
        reason = f"higher would hand the hooks of '{hooked}' a twin of it in place of the module"
        return EngineChoice(name, "functional", reason)
    if not hazards:
        reason = "asked for" if name == "higher" else "nothing found that higher gets wrong"
        return EngineChoice(name, "higher", reason)
    if name == "higher":
        raise UnsupportedModuleError(f'engine="higher" cannot carry this model: {hazards[0]}. Use engine="functional".')
    return EngineChoice(name, "functional", f"higher cannot carry it: {hazards[0]}")
