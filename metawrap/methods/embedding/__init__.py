"""Few-shot methods that embed a task with the user's network, and fit a head of their own to its support set."""

from metawrap.methods.embedding.anil import ANIL
from metawrap.methods.embedding.embedded import Embedded
from metawrap.methods.embedding.fine_tune import FineTune
from metawrap.methods.embedding.multi_task import MultiTask
from metawrap.methods.embedding.proto_net import ProtoNet

__all__ = ["ANIL", "Embedded", "FineTune", "MultiTask", "ProtoNet"]
