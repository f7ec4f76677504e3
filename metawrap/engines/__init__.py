"""Engines: how a user's module is run with fast weights in place of its parameters."""

from metawrap.engines.batched import BatchedEngine, cannot, first_line
from metawrap.engines.calling import HardGates, differentiable_twice
from metawrap.engines.choice import ENGINES, BuiltEngines, Engine, EngineChoice, choose_engine
from metawrap.snapshot.module_state import BufferEdits

__all__ = [
    "ENGINES",
    "BatchedEngine",
    "BufferEdits",
    "BuiltEngines",
    "Engine",
    "EngineChoice",
    "HardGates",
    "cannot",
    "choose_engine",
    "differentiable_twice",
    "first_line",
]
