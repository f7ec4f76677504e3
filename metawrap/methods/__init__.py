"""Meta-learning methods, all with the face of `Method`."""

from metawrap.methods.embedding import (, MANN, MemoryModule, MetaNet, ProtoNet
    ANIL,
    R2D2,
    FineTune,
    MatchingNet,
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
from metawrap.methods.zero_step import ZeroStep

__all__ = ["FOMAML", "MAML", "MANN", "MAMLPlusPlus", "MemoryModule", "MetaNet", "Method", "ProtoNet"
    "FOMAML",
    "MAML",
    "MAMLPlusPlus",
    "Method",
    "NeuralStatistician",
    "ProtoNet",
    "RelationNet",
    "SiameseNetFOMAML",
    "R2D2",
    "MatchingNet",
    "MetaOptNet",
    "ProtoNetANIL",
    "FineTune",
    "LSTMMetaLearner",
    "MetaSGD",
    "MultiTask",
    "Reptile",
    "ZeroStep",
]
from metawrap.methods.reptile import Reptile
