"""Few-shot methods that embed a task with the user's network, and fit a head of their own to its support set."""

from metawrap.methods.embedding.anil import ANIL
from metawrap.methods.embedding.embedded import Embedded
from metawrap.methods.embedding.fine_tune import FineTune
from metawrap.methods.embedding.mann import MANN
from metawrap.methods.embedding.matching_net import MatchingNet
from metawrap.methods.embedding.memory_module import MemoryModule
from metawrap.methods.embedding.meta_net import MetaNet
from metawrap.methods.embedding.metaopt_net import MetaOptNet
from metawrap.methods.embedding.multi_task import MultiTask
from metawrap.methods.embedding.neural_statistician import NeuralStatistician
from metawrap.methods.embedding.proto_net import ProtoNet
from metawrap.methods.embedding.r2d2 import R2D2
from metawrap.methods.embedding.relation_net import RelationNet
from metawrap.methods.embedding.siamese_net import SiameseNet

__all__ = [
    "ANIL",
    "MANN",
    "R2D2",
    "Embedded",
    "FineTune",
    "MatchingNet",
    "MemoryModule",
    "MetaNet",
    "MetaOptNet",
    "MultiTask",
    "NeuralStatistician",
    "ProtoNet",
    "RelationNet",
    "SiameseNet",
]
