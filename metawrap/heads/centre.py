"""The mean support embedding of the training tasks, which is subtracted from embeddings."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from metawrap.results import TaskOutcome

# The mean is that of all tasks at first, later one that forgets, because embeddings change in training.
_TASKS = 100


class Centre(LazyModuleMixin, nn.Module):
    """The stored mean, (numbers,), sized by the first embeddings. seen: training tasks so far.

    Both are frozen parameters: unlike a buffer, a parameter can be without a size, and no pass puts it back.

    >>> centre = Centre()
    >>> centre(torch.tensor([[1.0, 2.0], [3.0, 2.0]]))
    tensor([2., 2.])
    """

    mean: nn.Parameter | nn.UninitializedParameter

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.UninitializedParameter(requires_grad=False)
        self.seen = nn.Parameter(torch.zeros(()), requires_grad=False)

    def initialize_parameters(self, support: Tensor) -> None:
        """Gives the mean its size."""
        if isinstance(self.mean, nn.UninitializedParameter):
            self.mean.materialize((support.shape[1],))
            nn.init.zeros_(self.mean)

    def forward(self, support: Tensor) -> Tensor:
        """Support embeddings (examples, numbers) to the centre of their task, (numbers,).

        In training, and before any, it is their own mean.
        """
        if self.training:
            return support.mean(0)
        return torch.where(self.seen > 0, self.mean.detach().to(support.dtype), support.mean(0))

    @torch.no_grad()
    def keep(self, outcomes: Iterable[TaskOutcome], applied: Tensor) -> None:
        """Adds `head["centre"]` of each outcome, a training task's mean embedding, if the meta-step was applied."""
        for outcome in outcomes:
            self.seen.add_(applied)
            moved = torch.lerp(self.mean, outcome.head["centre"].to(self.mean), 1 / self.seen.clamp(1, _TASKS))
            self.mean.copy_(torch.where(applied, moved, self.mean))
