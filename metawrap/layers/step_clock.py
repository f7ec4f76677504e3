"""The inner-step index that all per-step layers share, and the statistics that norms use at that step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from torch import Tensor

from metawrap.errors import UnsupportedModuleError

Statistics = Literal["batch", "running", "capture", "captured"]
"""batch: the batch's own. running: the stored row. capture: the batch's own, kept for a later pass with gradients.
captured: those of the last capturing pass (conditional batch norm)."""


class Moments(NamedTuple):
    """Batch mean and unbiased variance of one pass through one norm, each (channels,), without gradient."""

    norm: str
    row: int
    mean: Tensor
    variance: Tensor


@dataclass
class StepClock:
    """Shared by every per-step layer of one learner; only the inner loop sets it.

    A shared object, not an int per layer: `higher` copies attributes when it patches, so an int would stay at step 0.
    With `statistics=None`, outside of an inner loop, a norm follows its own `training` flag as ordinary norms do.
    twice: whether the pass will be differentiated twice; batch norm then takes its quick form.

    >>> clock = StepClock()
    >>> with clock.at(2, "batch"):
    ...     clock.step
    2
    """

    step: int = 0
    statistics: Statistics | None = None
    recorder: list[Moments] | None = None
    twice: bool = False
    captured: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)

    @contextmanager
    def at(
        self, step: int, statistics: Statistics, recorder: list[Moments] | None = None, twice: bool = False
    ) -> Iterator[None]:
        """Sets the clock for one pass, and restores it afterwards."""
        before = self.step, self.statistics, self.recorder, self.twice
        if statistics == "capture":
            self.captured = {}
        self.step, self.statistics, self.recorder, self.twice = step, statistics, recorder, twice
        try:
            yield
        except BaseException:
            self.captured = {}
            raise
        finally:
            self.step, self.statistics, self.recorder, self.twice = before
            if statistics == "captured":
                self.captured = {}

    def taken(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Returns and forgets the statistics of the last capturing pass, by norm, for a plain batch norm to hold.

        Raises:
            UnsupportedModuleError: a norm ran more than once in it.
        """
        captured, self.captured = self.captured, {}
        for name, passes in captured.items():
            if len(passes) != 1:
                raise UnsupportedModuleError(
                    f"'{name}' runs {len(passes)} times in one forward pass, but a plain batch norm holds one set of "
                    'statistics. Use norm="batch" or norm="running", or evaluate with the learner itself.'
                )
        return {name: passes[0] for name, passes in captured.items()}
