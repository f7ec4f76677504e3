"""Engines: how a user's module is run with fast weights in place of its parameters."""

from metawrap.engines.batched import BatchedEngine, cannot
from metawrap.engines.calling import HardGates, call_model, differentiable_twice
from metawrap.engines.choice import ENGINES, Engine, choose_engine
from metawrap.snapshot.module_state import BufferEdits

__all__ = [
    "ENGINES",
    "BatchedEngine",
    "BufferEdits",
    "Engine",
    "HardGates",
    "call_model",
    "cannot",
    "choose_engine",
    "differentiable_twice",
]
