"""metawrap: turn any `torch.nn.Module` into a meta-learner in two lines."""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from metawrap.errors import (
    ArgumentError,
    CheckpointError,
    DataError,
    DivergedError,
    MetaWrapError,
    MetaWrapWarning,
    OutOfMemoryError,
    RankError,
    TaskError,
    UnsupportedModuleError,
)
from metawrap.evaluation_result import EvaluationResult
from metawrap.learner.description import Description, ModuleRow
from metawrap.methods import (
    ANIL,
    BOIL,
    FOMAML,
    MAML,
    MANN,
    R2D2,
    FineTune,
    LogisticRegression,
    LSTMMetaLearner,
    MAMLPlusPlus,
    MatchingNet,
    MemoryModule,
    MetaNet,
    MetaOptNet,
    MetaSGD,
    MultiTask,
    NeuralStatistician,
    ProtoNet,
    RelationNet,
    Reptile,
    SiameseNet,
    SimpleShot,
    ZeroStep,
)
from metawrap.results import MetaOutput, StepMetrics, Trouble
from metawrap.settings.groups import ExecutionOptions, InnerOptions, OuterOptions, OutputOptions, WrappingOptions
from metawrap.tasks import Task, TaskBatch

if TYPE_CHECKING:
    from metawrap.data.episode_splits import benchmark
    from metawrap.training.loaded_run import LoadedRun, load
    from metawrap.training.own_run import train

try:
    __version__ = version("metawrap")
except PackageNotFoundError:  # Run from a checkout that is not installed.
    __version__ = "0+unknown"

__all__ = [
    "ANIL",
    "BOIL",
    "FOMAML",
    "MAML",
    "MANN",
    "R2D2",
    "ArgumentError",
    "CheckpointError",
    "DataError",
    "Description",
    "DivergedError",
    "EvaluationResult",
    "ExecutionOptions",
    "FineTune",
    "InnerOptions",
    "LSTMMetaLearner",
    "LoadedRun",
    "LogisticRegression",
    "MAMLPlusPlus",
    "MatchingNet",
    "MemoryModule",
    "MetaNet",
    "MetaOptNet",
    "MetaOutput",
    "MetaSGD",
    "MetaWrapError",
    "MetaWrapWarning",
    "ModuleRow",
    "MultiTask",
    "NeuralStatistician",
    "OutOfMemoryError",
    "OuterOptions",
    "OutputOptions",
    "ProtoNet",
    "RankError",
    "RelationNet",
    "Reptile",
    "SiameseNet",
    "SimpleShot",
    "StepMetrics",
    "Task",
    "TaskBatch",
    "TaskError",
    "Trouble",
    "UnsupportedModuleError",
    "WrappingOptions",
    "ZeroStep",
    "__version__",
    "benchmark",
    "load",
    "train",
]


def __getattr__(name: str) -> Any:
    """Runs and data need the rooms `training` and `data`, which take longer to import than the methods."""
    if name == "benchmark":
        from metawrap.data.episode_splits import benchmark

        return benchmark
    if name not in ("LoadedRun", "load", "train"):
        raise AttributeError(f"module 'metawrap' has no attribute '{name}'")
    from metawrap.training import loaded_run, own_run

    return getattr(own_run if name == "train" else loaded_run, name)
