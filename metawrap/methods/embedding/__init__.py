"""Few-shot methods that embed a task with the user's network, and fit a head of their own to its support set."""

from metawrap.methods.embedding.embedded import Embedded
from metawrap.methods.embedding.neural_statistician import NeuralStatistician
from metawrap.methods.embedding.proto_net import ProtoNet
from metawrap.methods.embedding.relation_net import RelationNet
from metawrap.methods.embedding.siamese_net import SiameseNet

__all__ = ["Embedded", "NeuralStatistician", "ProtoNet", "RelationNet", "SiameseNet"]
