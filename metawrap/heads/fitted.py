"""Heads that are fitted to a support set, and the arithmetic that several of them share."""

from __future__ import annotations

import copy
from abc import abstractmethod

import torch
from torch import Tensor, nn


class FittedHead(nn.Module):
    """A head fitted to one support set: target embeddings (targets, ...) to logits (targets, ways).

    In training its tensors carry the graph back to the support set. `adapt` puts it in the place of the user's
    own head. Its tensors are buffers, by the names that the constructor gets.
    """

    def __init__(self, **tensors: Tensor) -> None:
        super().__init__()
        for name, value in tensors.items():
            self.register_buffer(name, value)

    @abstractmethod
    def forward(self, embeddings: Tensor) -> Tensor:
        """(targets, ...) to (targets, ways)."""

    def plain(self) -> nn.Module:
        """A copy that shares nothing with the learner, in eval mode; gradients must be off."""
        return copy.deepcopy(self).eval()


class PlacedHead(nn.Module):
    """A fitted head in the place of the user's own: takes one argument, under any name.

    flat: whether an embedding of any shape is taken as a vector.
    """

    def __init__(self, head: nn.Module, flat: bool) -> None:
        super().__init__()
        self.head, self.flat = head, flat

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """(targets, ...) to (targets, ways)."""
        [embeddings] = (*args, *kwargs.values())
        logits: Tensor = self.head(embeddings.flatten(1) if self.flat else embeddings)
        return logits


def one_hot(labels: Tensor, ways: int, like: Tensor) -> Tensor:
    """(examples,) to (examples, ways), in the precision of `like`."""
    return nn.functional.one_hot(labels.long(), ways).to(like.dtype)


def class_sums(embeddings: Tensor, labels: Tensor, ways: int) -> Tensor:
    """The sum of each class's embeddings: (examples, ...), (examples,) to (ways, ...)."""
    return embeddings.new_zeros(ways, *embeddings.shape[1:]).index_add(0, labels, embeddings)


def class_means(embeddings: Tensor, labels: Tensor, ways: int) -> Tensor:
    """The mean embedding of each class: (examples, ...), (examples,) to (ways, ...)."""
    counts = one_hot(labels, ways, embeddings).sum(0)  # bincount would make a GPU wait.
    return class_sums(embeddings, labels, ways) / counts.view(-1, *(1,) * (embeddings.ndim - 1))


def squared_distances(one: Tensor, other: Tensor) -> Tensor:
    """Squared Euclidean distances of (n, d) to (m, d), shape (n, m); by differences: near points keep theirs."""
    return (one[:, None] - other[None]).square().sum(-1)


def cosine_similarities(one: Tensor, other: Tensor) -> Tensor:
    """Cosines of (n, d) with (m, d), shape (n, m)."""
    return nn.functional.normalize(one, dim=1) @ nn.functional.normalize(other, dim=1).T


def ridge_weights(inputs: Tensor, targets: Tensor, strength: Tensor | float) -> Tensor:
    """argmin over W of |inputs W - targets|^2 + strength |W|^2: (examples, numbers), (examples, k) to (numbers, k).

    Solves the smaller of the two systems that give it: (numbers x numbers) or, by Woodbury's identity, (examples x
    examples).
    """
    examples, numbers = inputs.shape
    dual = examples < numbers
    gram = inputs @ inputs.T if dual else inputs.T @ inputs
    system = gram + strength * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    # Without the check of `solve`, for which a GPU waits: the system is positive definite, or not finite.
    solved: Tensor = torch.linalg.solve_ex(system, targets if dual else inputs.T @ targets)[0]
    return inputs.T @ solved if dual else solved


class LinearHead(FittedHead):
    """Logits are linear in the embedding. weight: (ways, numbers); bias: (ways,)."""

    weight: Tensor
    bias: Tensor

    def forward(self, embeddings: Tensor) -> Tensor:
        """(targets, numbers) to (targets, ways)."""
        return nn.functional.linear(embeddings, self.weight, self.bias)

    def plain(self) -> nn.Module:
        """The same as an ordinary linear layer."""
        ways, numbers = self.weight.shape
        layer = nn.Linear(numbers, ways, dtype=self.weight.dtype, device="meta").to_empty(device=self.weight.device)
        layer.weight.copy_(self.weight)
        layer.bias.copy_(self.bias)
        return layer.eval()
