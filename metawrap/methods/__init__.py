"""Meta-learning methods, all with the face of `Learner`."""

from metawrap.learner.learner import Learner
from metawrap.methods.anil import ANIL
from metawrap.methods.boil import BOIL
from metawrap.methods.fine_tune import FineTune
from metawrap.methods.logistic_regression import LogisticRegression
from metawrap.methods.lstm_meta_learner import LSTMMetaLearner
from metawrap.methods.maml import FOMAML, MAML, MAMLPlusPlus
from metawrap.methods.mann import MANN
from metawrap.methods.matching_net import MatchingNet
from metawrap.methods.memory_module import MemoryModule
from metawrap.methods.meta_net import MetaNet
from metawrap.methods.meta_sgd import MetaSGD
from metawrap.methods.metaopt_net import MetaOptNet
from metawrap.methods.multi_task import MultiTask
from metawrap.methods.neural_statistician import NeuralStatistician
from metawrap.methods.proto_net import ProtoNet
from metawrap.methods.r2d2 import R2D2
from metawrap.methods.relation_net import RelationNet
from metawrap.methods.reptile import Reptile
from metawrap.methods.siamese_net import SiameseNet
from metawrap.methods.simple_shot import SimpleShot
from metawrap.methods.zero_step import ZeroStep

__all__ = [
    "ANIL",
    "BOIL",
    "FOMAML",
    "MAML",
    "MANN",
    "R2D2",
    "FineTune",
    "LSTMMetaLearner",
    "Learner",
    "LogisticRegression",
    "MAMLPlusPlus",
    "MatchingNet",
    "MemoryModule",
    "MetaNet",
    "MetaOptNet",
    "MetaSGD",
    "MultiTask",
    "NeuralStatistician",
    "ProtoNet",
    "RelationNet",
    "Reptile",
    "SiameseNet",
    "SimpleShot",
    "ZeroStep",
]
