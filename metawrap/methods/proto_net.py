"""Prototypical networks: support embeddings -> the mean of each class -> minus the distance of a target to each."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from typing_extensions import Unpack

from metawrap.heads.fitted import FittedHead, LinearHead, NormalisedLinear, class_means, nearest_mean
from metawrap.learner.embedding_learner import EmbeddingKeywords, EmbeddingLearner
from metawrap.settings.keywords import checked

Distance = Literal["euclidean", "cosine"]


class ProtoNet(EmbeddingLearner):
    """Prototypical networks: a target belongs to the class whose mean support embedding is nearest.

    Minus the squared distance is linear in the embedding but for a constant of the row (section 2.4 of the paper), so
    that logits are those of a linear layer, an `nn.Linear` in the adapted module. Probabilities, the order of classes
    and the cross-entropy are those of the distances; a logit is no distance. The rounding error of a logit grows with
    the length of the embedding times the distance between prototypes.

    Args:
        distance: "euclidean" (squared, as in the paper) or "cosine" (one minus the cosine, which a logit is minus).
        keywords: see `EmbeddingKeywords` and `OuterKeywords`.

    >>> import torch
    >>> learner = ProtoNet(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)))
    >>> learner.adapt(torch.randn(8, 4), torch.arange(8) % 4)[2]
    Linear(in_features=8, out_features=4, bias=True)

    Source: Snell, Swersky, Zemel 2017, arXiv:1703.05175, Eq. 1, 2 and 8.
    """

    @checked
    def __init__(
        self, model: nn.Module, *, distance: Distance = "euclidean", **keywords: Unpack[EmbeddingKeywords]
    ) -> None:
        super().__init__(model, keywords, options=self.own)
        self.distance: Distance = distance

    def _fit_head(self, support: Tensor, labels: Tensor, ways: int) -> FittedHead:
        prototypes = class_means(support, labels, ways)
        if self.distance == "cosine":
            weight = nn.functional.normalize(prototypes, dim=1)
            return NormalisedLinear(weight=weight, bias=-support.new_ones(ways), centre=support.new_zeros(()))
        weight, bias = nearest_mean(prototypes)
        return LinearHead(weight=weight, bias=bias)
