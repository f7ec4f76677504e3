"""Meta-learning methods, all with the face of `Method`."""

from metawrap.methods.embedding import R2D2, MatchingNet, MetaOptNet, ProtoNet
from metawrap.methods.maml import FOMAML, MAML, MAMLPlusPlus
from metawrap.methods.method import Method

__all__ = ["FOMAML", "MAML", "R2D2", "MAMLPlusPlus", "MatchingNet", "MetaOptNet", "Method", "ProtoNet"]
