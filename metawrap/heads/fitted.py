"""Heads that are fitted to a support set, and the arithmetic that several of them share."""

from __future__ import annotations

import copy
from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn


class FittedHead(nn.Module):
    """A head fitted to one support set: target embeddings (targets, ...) to logits (targets, ways).

    In training its tensors carry the graph back to the support set. `adapt` puts it in the place of the user's
    own head. Its tensors are buffers, by the names that the constructor gets.

    traceable: whether torch.fx can follow `forward`, so that a pickle of the head does not need metawrap.
    """

    traceable: ClassVar[bool] = True

    def __init__(self, **tensors: Tensor) -> None:
        super().__init__()
        for name, value in tensors.items():
            self.register_buffer(name, value)

    @abstractmethod
    def forward(self, embeddings: Tensor) -> Tensor:
        """(targets, ...) to (targets, ways)."""

    def plain(self) -> nn.Module:
        """A copy that shares nothing with the learner, in eval mode; gradients must be off."""
        made = copy.deepcopy(self).eval()
        for module in made.modules():
            # A part of a larger tensor would be saved with all of it.
            own = {
                name: b.clone(memory_format=torch.contiguous_format) for name, b in module.named_buffers(recurse=False)
            }
            module._buffers.update(own)
        return made


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


def nearest_mean(means: Tensor) -> tuple[Tensor, Tensor]:
    """The linear layer whose logits are minus the squared distance to each mean, but for a constant of the row.

    |x - m|^2 - |x - c|^2 = 2 (c - m) x - (c - m)(c + m), with c a class's mean and m the mean of these means: without m
    large embeddings would lose their small differences.

    Args:
        means: (ways, numbers).
    Returns: weight (ways, numbers) and bias (ways,).
    """
    middle = means.mean(0)
    centred = means - middle
    return 2 * centred, -(centred * (means + middle)).sum(1)


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


class NormalisedLinear(LinearHead):
    """Logits are linear in the embedding after `centre`, (numbers,), is subtracted and its length made 1."""

    centre: Tensor

    def forward(self, embeddings: Tensor) -> Tensor:
        """(targets, numbers) to (targets, ways)."""
        return super().forward(nn.functional.normalize(embeddings - self.centre, dim=1))

    def plain(self) -> nn.Module:
        """A copy: torch has no layer of this kind."""
        return FittedHead.plain(self)


class WhitenedLinear(LinearHead):
    """As `NormalisedLinear`, but `whitening`, (numbers, numbers), is applied before the length is made 1."""

    centre: Tensor
    whitening: Tensor

    def forward(self, embeddings: Tensor) -> Tensor:
        """(targets, numbers) to (targets, ways)."""
        whitened = (embeddings - self.centre) @ self.whitening.T
        return super().forward(nn.functional.normalize(whitened, dim=1))

    def plain(self) -> nn.Module:
        """A copy: torch has no layer of this kind."""
        return FittedHead.plain(self)
