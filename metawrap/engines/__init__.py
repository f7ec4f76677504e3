"""Engines run a user's module with fast weights in place of its parameters. Top to bottom:

choice.py: the interface of an engine, and the choice of one
batched.py: all tasks of a batch at once, under `torch.func.vmap`
task_axis.py: operations whose vmap rules in torch are wrong, slow or missing
higher.py: a twin of the module through the `higher` library
functional.py: fast tensors in the module's own parameter slots
calling.py: edited buffers, and modes of torch in which a model is run
"""

from metawrap.engines.batched import BatchedEngine, cannot, first_line
from metawrap.engines.calling import PlainForms, differentiable_twice
from metawrap.engines.choice import ENGINES, BuiltEngines, Engine, EngineChoice, choose_engine
from metawrap.snapshot.module_state import BufferEdits

__all__ = [
    "ENGINES",
    "BatchedEngine",
    "BufferEdits",
    "BuiltEngines",
    "Engine",
    "EngineChoice",
    "PlainForms",
    "cannot",
    "choose_engine",
    "differentiable_twice",
    "first_line",
]
