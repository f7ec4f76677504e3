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
from metawrap.methods import FOMAML, MAML, MAMLPlusPlus, NeuralStatistician, ProtoNet, RelationNet, SiameseNet
from metawrap.results import EvaluationResult, MetaOutput, StepMetrics
from metawrap.tasks import Task, TaskBatch

try:
    __version__ = version("metawrap")
except PackageNotFoundError:  # Run from a checkout that is not installed.
    __version__ = "0+unknown"

__all__ = [
    "FOMAML",
    "MAML",
    "ArgumentError",
    "CheckpointError",
    "DataError",
    "Description",
    "DivergedError",
    "EvaluationResult",
    "MAMLPlusPlus",
    "MetaOutput",
    "MetaWrapError",
    "MetaWrapWarning",
    "ModuleRow",
    "NeuralStatistician",
    "ProtoNet",
    "RankError",
    "RelationNet",
    "SiameseNet",
    "StepMetrics",
    "Task",
    "TaskBatch",
    "TaskError",
    "UnsupportedModuleError",
    "__version__",
]
