"""Meta-learning methods, all with the face of `Method`."""

from metawrap.methods.embedding import ProtoNet
from metawrap.methods.maml import FOMAML, MAML, MAMLPlusPlus
from metawrap.methods.method import Method

__all__ = ["FOMAML", "MAML", "MAMLPlusPlus", "Method", "ProtoNet"]
