"""The mean support embedding of the training tasks, which is subtracted, and their spread within classes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from metawrap.heads.fitted import class_sums
from metawrap.results import TaskOutcome

# The mean is that of all tasks at first, later one that forgets, because embeddings change in training.
_TASKS = 100


class Centre(LazyModuleMixin, nn.Module):
    """The stored mean, (numbers,), sized by the first embeddings. seen: training tasks so far.

    With `spread`, also the covariance within classes, (numbers, numbers), of support and target embeddings. They are
    frozen parameters: unlike a buffer, a parameter can be without a size, and no pass puts it back.

    >>> centre = Centre()
    >>> centre(torch.tensor([[1.0, 2.0], [3.0, 2.0]]))
    tensor([2., 2.])
    """

    mean: nn.Parameter | nn.UninitializedParameter
    within: nn.Parameter | nn.UninitializedParameter | None

    def __init__(self, spread: bool = False) -> None:
        super().__init__()
        self.mean = nn.UninitializedParameter(requires_grad=False)
        self.within = nn.UninitializedParameter(requires_grad=False) if spread else None
        self.seen = nn.Parameter(torch.zeros(()), requires_grad=False)

    def initialize_parameters(self, support: Tensor) -> None:
        """Gives what is stored its size."""
        for stored, axes in ((self.mean, 1), (self.within, 2)):
            if isinstance(stored, nn.UninitializedParameter):
                stored.materialize((support.shape[1],) * axes)
                nn.init.zeros_(stored)

    def forward(self, support: Tensor) -> Tensor:
        """Support embeddings (examples, numbers) to the centre of their task, (numbers,).

        In training, and before any, it is their own mean.
        """
        if self.training:
            return support.mean(0)
        return torch.where(self.seen > 0, self.mean.detach().to(support.dtype), support.mean(0))

    def whitening(self, strength: float, like: Tensor) -> Tensor:
        """A matrix (numbers, numbers) whose product with embeddings makes the covariance within classes nearly one.

        That is A with A C A^T = 1, for C the stored covariance plus `strength` times its mean variance on the
        diagonal. Of many such matrices it is the inverse of the lower triangular one; they differ by a rotation. Before
        any training it is the identity.
        """
        assert self.within is not None
        precision = torch.promote_types(like.dtype, torch.float32)
        one = torch.eye(len(self.within), dtype=precision, device=like.device)
        stored = self.within.detach().to(precision)
        loaded = torch.where(self.seen > 0, stored + strength * stored.diagonal().mean() * one, one)
        # Without the check of `cholesky`, for which a GPU waits: what is not positive definite is not finite here.
        root: Tensor = torch.linalg.cholesky_ex(loaded)[0]
        inverse: Tensor = torch.linalg.solve_triangular(root, one, upper=False)
        return inverse.to(like.dtype)

    def kept(self, support: Tensor, target: Tensor, labels: Tensor, ways: int) -> dict[str, Tensor]:
        """What `keep` takes of a training task. labels: of support and target embeddings; others do not count."""
        found = {"centre": support.detach().mean(0)}
        if self.within is not None:
            every = torch.cat([support, target]).detach()
            counts = ((labels >= 0) & (labels < ways)).to(every.dtype)[:, None]
            own = labels.clamp(0, ways - 1)
            means = class_sums(every * counts, own, ways) / class_sums(counts, own, ways)
            apart = (every - means[own]) * counts
            found["within"] = apart.T @ apart / (counts.sum() - ways).clamp(min=1)
        return found

    @torch.no_grad()
    def keep(self, outcomes: Iterable[TaskOutcome], applied: Tensor) -> None:
        """Adds what `kept` found of each outcome's task, if the meta-step was applied."""
        for outcome in outcomes:
            self.seen.add_(applied)
            for name, stored in (("centre", self.mean), ("within", self.within)):
                if stored is not None:
                    moved = torch.lerp(stored, outcome.head[name].to(stored), 1 / self.seen.clamp(1, _TASKS))
                    stored.copy_(torch.where(applied, moved, stored))
