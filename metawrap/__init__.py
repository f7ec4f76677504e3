"""metawrap: turn any `torch.nn.Module` into a meta-learner in two lines."""

from importlib.metadata import PackageNotFoundError, version

from metawrap.description import Description, ModuleRow
from metawrap.errors import (
    ArgumentError,
    CheckpointError,
    DataError,
    DivergedError,
    MetaWrapError,
    MetaWrapWarning,
    RankError,
    TaskError,
    UnsupportedModuleError,
)
from metawrap.methods import FOMAML, MAML, MANN, MAMLPlusPlus, MemoryModule, MetaNet, ProtoNet
from metawrap.results import EvaluationResult, MetaOutput, StepMetrics
from metawrap.tasks import Task, TaskBatch

try:
    __version__ = version("metawrap")
except PackageNotFoundError:  # Run from a checkout that is not installed.
    __version__ = "0+unknown"

__all__ = [
    "FOMAML",
    "MAML",
    "MANN",
    "ArgumentError",
    "CheckpointError",
    "DataError",
    "Description",
    "DivergedError",
    "EvaluationResult",
    "MAMLPlusPlus",
    "MemoryModule",
    "MetaNet",
    "MetaOutput",
    "MetaWrapError",
    "MetaWrapWarning",
    "ModuleRow",
    "ProtoNet",
    "RankError",
    "StepMetrics",
    "Task",
    "TaskBatch",
    "TaskError",
    "UnsupportedModuleError",
    "__version__",
]
