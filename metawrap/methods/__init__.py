"""Meta-learning methods, all with the face of `Method`."""

from metawrap.methods.embedding import (
    ANIL,
    MANN,
    R2D2,
    FineTune,
    MatchingNet,
    MemoryModule,
    MetaNet,
    MetaOptNet,
    MultiTask,
    NeuralStatistician,
    ProtoNet,
    RelationNet,
    SiameseNet,
)
from metawrap.methods.lstm_meta_learner import LSTMMetaLearner
from metawrap.methods.maml import FOMAML, MAML, MAMLPlusPlus
from metawrap.methods.meta_sgd import MetaSGD
from metawrap.methods.method import Method
from metawrap.methods.reptile import Reptile
from metawrap.methods.zero_step import ZeroStep

__all__ = [
    "ANIL",
    "FOMAML",
    "MAML",
    "MANN",
    "R2D2",
    "FineTune",
    "LSTMMetaLearner",
    "MAMLPlusPlus",
    "MatchingNet",
    "MemoryModule",
    "MetaNet",
    "MetaOptNet",
    "MetaSGD",
    "Method",
    "MultiTask",
    "NeuralStatistician",
    "ProtoNet",
    "RelationNet",
    "Reptile",
    "SiameseNet",
    "ZeroStep",
]
