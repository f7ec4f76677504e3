"""Few-shot methods that embed a task with the user's network, and fit a head of their own to its support set."""

from metawrap.methods.embedding.embedded import Embedded
from metawrap.methods.embedding.proto_net import ProtoNet

__all__ = ["Embedded", "ProtoNet"]
