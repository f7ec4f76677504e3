"""Meta-learning methods, all with the face of `Method`."""

from metawrap.methods.embedding import ANIL, FineTune, MultiTask, ProtoNet
from metawrap.methods.maml import FOMAML, MAML, MAMLPlusPlus
from metawrap.methods.method import Method
from metawrap.methods.zero_step import ZeroStep

__all__ = ["ANIL", "FOMAML", "MAML", "FineTune", "MAMLPlusPlus", "Method", "MultiTask", "ProtoNet", "ZeroStep"]
