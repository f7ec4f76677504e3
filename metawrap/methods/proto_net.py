"""Prototypical networks: support embeddings -> the mean of each class -> minus the distance of a target to each."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from typing_extensions import Unpack

from metawrap.heads.fitted import FittedHead, class_means, cosine_similarities, squared_distances
from metawrap.learner.embedding_learner import EmbeddingKeywords, EmbeddingLearner
from metawrap.settings.validated import check_value

Distance = Literal["euclidean", "cosine"]


class ProtoNet(EmbeddingLearner):
    """Prototypical networks: a target belongs to the class whose mean support embedding is nearest.

    Args:
        distance: "euclidean" (squared, as in the paper) or "cosine" (one minus the cosine).
        keywords: see `EmbeddingKeywords` and `OuterKeywords`.

    >>> import torch
    >>> learner = ProtoNet(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), distance="cosine")
    >>> adapted = learner.adapt(torch.randn(6, 4), torch.arange(6) % 3)

    Source: Snell, Swersky, Zemel 2017, arXiv:1703.05175, Eq. 1 and 2.
    """

    def __init__(
        self, model: nn.Module, *, distance: Distance = "euclidean", **keywords: Unpack[EmbeddingKeywords]
    ) -> None:
        check_value("distance", distance, Distance)
        super().__init__(model, keywords, options={"distance": distance})
        self.distance: Distance = distance

    def _fit_head(self, support: Tensor, labels: Tensor, ways: int) -> FittedHead:
        return Prototypes(class_means(support, labels, ways), self.distance)


class Prototypes(FittedHead):
    """Logits are minus the distance to each prototype. prototypes: (ways, numbers)."""

    prototypes: Tensor

    def __init__(self, prototypes: Tensor, distance: Distance) -> None:
        super().__init__(prototypes=prototypes)
        self.distance = distance

    def forward(self, embeddings: Tensor) -> Tensor:
        """(targets, numbers) to (targets, ways)."""
        if self.distance == "cosine":
            return cosine_similarities(embeddings, self.prototypes) - 1
        return -squared_distances(embeddings, self.prototypes)
