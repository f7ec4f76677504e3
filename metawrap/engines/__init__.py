"""Engines: how a user's module is run with fast weights in place of its parameters."""

from metawrap.engines.calling import HardGates, differentiable_twice
from metawrap.engines.choice import ENGINES, choose_engine
from metawrap.engines.engine import Engine

__all__ = ["ENGINES", "Engine", "HardGates", "choose_engine", "differentiable_twice"]
