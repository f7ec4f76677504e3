"""Engines: how a user's module is run with fast weights in place of its parameters."""

from metawrap.engines.batched import BatchedEngine, cannot, first_line
from metawrap.engines.calling import HardGates, call_model, differentiable_twice
<<<<<<< HEAD
from metawrap.engines.choice import ENGINES, BuiltEngines, EngineChoice, choose_engine
from metawrap.engines.engine import Engine
=======
from metawrap.engines.choice import ENGINES, Engine, choose_engine
>>>>>>> snapshot
from metawrap.snapshot.module_state import BufferEdits

__all__ = [
    "ENGINES",
    "BatchedEngine",
    "BufferEdits",
    "BuiltEngines",
    "Engine",
    "EngineChoice",
    "HardGates",
    "call_model",
    "cannot",
    "choose_engine",
    "differentiable_twice",
    "first_line",
]
