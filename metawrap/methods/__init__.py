"""Meta-learning methods, all with the face of `Method`."""

from metawrap.methods.embedding import NeuralStatistician, ProtoNet, RelationNet, SiameseNet
from metawrap.methods.maml import FOMAML, MAML, MAMLPlusPlus
from metawrap.methods.method import Method

__all__ = ["FOMAML", "MAML", "MAMLPlusPlus", "Method", "NeuralStatistician", "ProtoNet", "RelationNet", "SiameseNet"]
