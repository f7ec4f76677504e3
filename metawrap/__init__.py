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
from metawrap.methods import (, FOMAML, MAML, R2D2, MAMLPlusPlus, MatchingNet, MetaOptNet, ProtoNet, NeuralStatistician, RelationNet, SiameseNet, MANN, MemoryModule, MetaNet
    ANIL,
    FOMAML,
    MAML,
    FineTune,
    LSTMMetaLearner,
    MAMLPlusPlus,
    MetaSGD,
    MultiTask,
    ProtoNet,
    Reptile,
    ZeroStep,
)
from metawrap.results import EvaluationResult, MetaOutput, StepMetrics
from metawrap.tasks import Task, TaskBatch

try:
    __version__ = version("metawrap")
except PackageNotFoundError:  # Run from a checkout that is not installed.
    __version__ = "0+unknown"

__all__ = [
    "ANIL",
    "FOMAML",
    "MAML",
    "R2D2",
    "MANN",
    "ArgumentError",
    "CheckpointError",
    "DataError",
    "Description",
    "DivergedError",
    "EvaluationResult",
    "FineTune",
    "LSTMMetaLearner",
    "MAMLPlusPlus",
    "MatchingNet",
    "MetaOptNet",
    "MemoryModule",
    "MetaNet",
    "MetaOutput",
    "MetaSGD",
    "MetaWrapError",
    "MetaWrapWarning",
    "ModuleRow",
    "MultiTask",
    "ProtoNet",
    "RankError",
    "Reptile",
    "NeuralStatistician",
    "RelationNet",
    "SiameseNet",
    "StepMetrics",
    "Task",
    "TaskBatch",
    "TaskError",
    "UnsupportedModuleError",
    "ZeroStep",
    "__version__",
]
