"""Few-shot methods that embed a task with the user's network, and fit a head of their own to its support set."""

from metawrap.methods.embedding.embedded import Embedded
from metawrap.methods.embedding.mann import MANN
from metawrap.methods.embedding.memory_module import MemoryModule
from metawrap.methods.embedding.meta_net import MetaNet
from metawrap.methods.embedding.proto_net import ProtoNet

__all__ = ["MANN", "Embedded", "MemoryModule", "MetaNet", "ProtoNet"]
