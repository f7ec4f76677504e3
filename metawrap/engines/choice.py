"""Which engine carries a model: the one that was named, or the best that inspection allows."""

from __future__ import annotations

from torch import nn

from metawrap.engines.batched import BatchedEngine
from metawrap.engines.engine import Engine
from metawrap.engines.functional import FunctionalEngine
from metawrap.engines.higher import HigherEngine
from metawrap.errors import ArgumentError, UnsupportedModuleError
from metawrap.surgery.inspect import find_higher_hazards, find_hooks

ENGINES: dict[str, type[Engine]] = {"higher": HigherEngine, "functional": FunctionalEngine, "batched": BatchedEngine}


def choose_engine(name: str, model: nn.Module, threads: bool = False) -> tuple[str, str]:
    """The name of the engine for a model, and why it was chosen.

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
    if name in ("functional", "batched"):  # Whether the latter carries it, the first task shows.
        return name, "asked for"
    if threads and name == "auto":
        return "functional", "it runs tasks in threads"
    hazards = find_higher_hazards(model)
    hooked = find_hooks(model) if name == "auto" else None
    if not hazards and hooked is not None:
        return "functional", f"higher would hand the hooks of '{hooked}' a twin of it in place of the module"
    if not hazards:
        return "higher", "asked for" if name == "higher" else "nothing found that higher gets wrong"
    if name == "higher":
        raise UnsupportedModuleError(f'engine="higher" cannot carry this model: {hazards[0]}. Use engine="functional".')
    return "functional", f"higher cannot carry it: {hazards[0]}"
