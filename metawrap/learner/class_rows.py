"""What the methods with a memory share: cosines with its slots, and learned rows per class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from metawrap.errors import TaskError
from metawrap.learner.direct import Parts
from metawrap.learner.embedding_learner import Embedded, EmbeddedKeywords
from metawrap.settings.settings import check_whole
from metawrap.tasks import Task


def slot_cosines(keys: Tensor, memory: Tensor) -> Tensor:
    """Cosines of (..., keys, numbers) with (..., slots, numbers), shape (..., keys, slots); 0 for an empty slot."""
    # The floor keeps the gradient of a slot that is nearly empty in bounds.
    one, other = (nn.functional.normalize(each, dim=-1, eps=1e-6) for each in (keys, memory))
    return one @ other.mT


class ClassRows(LazyModuleMixin, nn.Module):
    """A learned row for each class, (ways, numbers); a task with fewer classes uses the first.

    Its shape is that of the first call, unless `ways` says how many rows there are.
    """

    weight: nn.Parameter | nn.UninitializedParameter

    def __init__(self, ways: int | None) -> None:
        super().__init__()
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


class PerClass(Embedded):
    """A method with learned weights for each class of a task, so that their number has a limit: `ways`."""

    rows: ClassRows

    def __init__(
        self,
        model: nn.Module,
        keywords: EmbeddedKeywords,
        ways: int | None,
        *,
        options: Mapping[str, Any],
        parts: Parts,
    ) -> None:
        if ways is not None:
            check_whole("ways", ways, 2)
        rows = ClassRows(ways)
        super().__init__(model, keywords, options={"ways": ways, **options}, parts={**parts, "rows": rows})

    def _labels(self, task: Task) -> tuple[Tensor, int]:
        labels, ways = super()._labels(task)
        most = self.rows.most
        if most is not None and ways > most:
            raise TaskError(
                f"support_y has {ways} classes, but this {type(self).__name__} has learned weights for {most}, "
                f"{'as ways= says' if self.rows.ways else 'the number in its first task'}. Build it with ways={ways}."
            )
        return labels, ways
