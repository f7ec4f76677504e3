"""Meta-learning methods, all with the face of `Method`."""

from metawrap.methods.embedding import ProtoNet
from metawrap.methods.lstm_meta_learner import LSTMMetaLearner
from metawrap.methods.maml import FOMAML, MAML, MAMLPlusPlus
from metawrap.methods.meta_sgd import MetaSGD
from metawrap.methods.method import Method
from metawrap.methods.reptile import Reptile

__all__ = ["FOMAML", "MAML", "LSTMMetaLearner", "MAMLPlusPlus", "MetaSGD", "Method", "ProtoNet", "Reptile"]
