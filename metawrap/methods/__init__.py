"""Meta-learning methods, all with the face of `Method`."""

from metawrap.methods.embedding import MANN, MemoryModule, MetaNet, ProtoNet
from metawrap.methods.maml import FOMAML, MAML, MAMLPlusPlus
from metawrap.methods.method import Method

__all__ = ["FOMAML", "MAML", "MANN", "MAMLPlusPlus", "MemoryModule", "MetaNet", "Method", "ProtoNet"]
