"""Siamese networks: twin embeddings -> a learned weighting of their L1 distance -> probability of the same class."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from metawrap.heads.fitted import FittedHead
from metawrap.learner.embedding_learner import EmbeddingKeywords, EmbeddingLearner
from metawrap.results import ignored_label
from metawrap.tasks import Task


class SiameseNet(EmbeddingLearner):
    """Siamese networks: a target belongs to the class of the support example that it most likely shares a class with.

    Two examples are of one class with probability sigmoid(sum_j a_j |f(x)_j - f(x')_j| + b), a and b learned. Trained
    on the pairs of a task (each support example with each target and with each other support example) by binary
    cross-entropy, in which the means over like and over unlike pairs count half each; the paper draws as many of one
    kind as of the other. A class is predicted by the largest match among its support examples, before the sigmoid.

    Differs from the paper: pairs are those of one task; the bias b; for embeddings of n numbers each a_j starts at
    -1/sqrt(n) and b at sqrt(n)/2, so that the nearer example is the better match from the first step on (with b = 0
    learning was far slower); embeddings enter the distance as they are, and images are not distorted.

    Args:
        keywords: see `EmbeddingKeywords` and `OuterKeywords`. A loss_fn takes the place of the cross-entropy on pairs:
            it gets the prediction for the targets, (targets, ways), and their labels.

    >>> learner = SiameseNet(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)))
    >>> adapted = learner.adapt(torch.randn(6, 4), torch.arange(6) % 3)

    Source: Koch, Zemel, Salakhutdinov 2015, Siamese neural networks for one-shot image recognition, ICML Deep Learning
    Workshop, section 3.
    """

    match: nn.Linear

    def __init__(self, model: nn.Module, **keywords: Unpack[EmbeddingKeywords]) -> None:
        super().__init__(model, keywords, parts={"match": _Match()})
        self.on_pairs = "loss_fn" not in keywords

    def _fit_head(self, support: Tensor, labels: Tensor, ways: int) -> FittedHead:
        return BestMatch(support, labels, ways, self.match)

    def _predict(self, task: Task, support: Tensor, labels: Tensor, ways: int, target: Tensor) -> tuple[Tensor, Tensor]:
        head, target_y = BestMatch(support, labels, ways, self.match), task.target_y
        matches = head.matches(target)
        prediction = head.best(matches)
        if not self.on_pairs:
            return prediction, self._loss(prediction, target_y, "target")
        shown = target_y != ignored_label(self.loss_fn)
        one, other = torch.triu_indices(len(labels), len(labels), 1, device=labels.device).unbind()
        among = self.match((support[one] - support[other]).abs()).squeeze(-1)
        pairs = torch.cat([matches.flatten(), among])
        like = torch.cat([(target_y[:, None] == labels).flatten(), labels[one] == labels[other]])
        counted = torch.cat([shown[:, None].expand_as(matches).flatten(), torch.ones_like(one, dtype=torch.bool)])
        return prediction, pair_loss(pairs, like, counted)


def pair_loss(pairs: Tensor, like: Tensor, counted: Tensor) -> Tensor:
    """Binary cross-entropy of pairs, where the like and the unlike ones count half each; all, where one kind is absent.

    Args:
        pairs: (pairs,), the match before the sigmoid. like: (pairs,), whether both are of one class. counted: (pairs,),
            False for those that are left out.
    """
    pairs = torch.where(counted, pairs, 0)
    losses = F.binary_cross_entropy_with_logits(pairs, like.to(pairs.dtype), reduction="none")
    kinds = torch.stack([like & counted, ~like & counted])
    counts = kinds.sum(1)
    return (torch.where(kinds, losses, 0).sum(1) / counts.clamp(min=1)).sum() / (counts > 0).sum()


class BestMatch(FittedHead):
    """Logits are a class's best match. support: (examples, numbers). labels: (examples,)."""

    support: Tensor
    labels: Tensor

    def __init__(self, support: Tensor, labels: Tensor, ways: int, match: nn.Linear) -> None:
        super().__init__(support=support, labels=labels)
        self.ways, self.match = ways, match

    def forward(self, embeddings: Tensor) -> Tensor:
        """(targets, numbers) to (targets, ways)."""
        return self.best(self.matches(embeddings))

    def matches(self, embeddings: Tensor) -> Tensor:
        """(targets, numbers) to (targets, support examples): how well they match, before the sigmoid."""
        matches: Tensor = self.match((embeddings[:, None] - self.support).abs()).squeeze(-1)
        return matches

    def best(self, matches: Tensor) -> Tensor:
        """(targets, support examples) to (targets, ways)."""
        is_class = self.labels == torch.arange(self.ways, device=self.labels.device)[:, None]
        return torch.where(is_class, matches[:, None], -torch.inf).amax(2)


class _Match(nn.LazyLinear):
    """One number from the distances of two embeddings; sized by the first."""

    def __init__(self) -> None:
        super().__init__(1)

    def reset_parameters(self) -> None:
        """As `SiameseNet` says; nothing before the size is known."""
        if self.in_features and not self.has_uninitialized_params():
            nn.init.constant_(self.weight, -(self.in_features**-0.5))
            nn.init.constant_(self.bias, self.in_features**0.5 / 2)
