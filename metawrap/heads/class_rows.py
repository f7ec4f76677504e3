"""Learned rows, one for each class of a task, of the methods whose number of classes has a limit."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from metawrap.errors import TaskError
from metawrap.settings.settings import check_whole


class ClassRows(LazyModuleMixin, nn.Module):
    """A learned row for each class, (ways, numbers); a task with fewer classes uses the first.

    Its shape is that of the first call, unless `ways` says how many rows there are.

    >>> rows = ClassRows(ways=5)
    >>> rows(3, 4).shape, rows.most
    (torch.Size([3, 4]), 5)
    """

    weight: nn.Parameter | nn.UninitializedParameter

    def __init__(self, ways: int | None) -> None:
        super().__init__()
        if ways is not None:
            check_whole("ways", ways, 2)
        self.ways = ways
        self.weight = nn.UninitializedParameter()

    @property
    def most(self) -> int | None:
        """The most classes that a task may have; None while that is open."""
        return self.ways if self.has_uninitialized_params() else len(self.weight)

    def initialize_parameters(self, ways: int, numbers: int) -> None:
        """Draws the rows, as `nn.Linear` does."""
        if isinstance(self.weight, nn.UninitializedParameter):
            self.weight.materialize((self.ways or ways, numbers))
            nn.init.uniform_(self.weight, -(numbers**-0.5), numbers**-0.5)

    def forward(self, ways: int, numbers: int) -> Tensor:
        """(ways, numbers)."""
        return self.weight[:ways]

    def check_ways(self, ways: int, method: str) -> None:
        """Raises TaskError when a task has more classes than there are rows."""
        if self.most is not None and ways > self.most:
            raise TaskError(
                f"support_y has {ways} classes, but this {method} has learned weights for {self.most}, "
                f"{'as ways= says' if self.ways else 'the number in its first task'}. Build it with ways={ways}."
            )
