"""The clock that tells per-step layers the inner step of a pass, and the moments that norms record in a pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from metawrap.layers.norm_policies import Statistics


class Moments(NamedTuple):
    """Batch mean and unbiased variance of one pass through one norm, each (channels,), without gradient.

    shift: True if the two tensors are a shift and a log ratio instead; see layers/moments.py.
    """

    norm: str
    row: int
    mean: Tensor
    variance: Tensor
    shift: bool = False


@dataclass
class StepClock:
    """The inner step, and the statistics that normalise, of the pass that runs now.

    All per-step layers of a learner hold the same clock, and only the inner loop sets it. An int in each layer would
    stay at step 0, as `higher` copies a module's attributes when it patches the module.
    With `statistics=None`, outside of an inner loop, a norm follows its own `training` flag as ordinary norms do.
    rows: (examples,), which rows of a padded batch are examples; None where all are.

    >>> clock = StepClock()
    >>> with clock.at(2, "batch"):
    ...     clock.step
    2
    """

    step: int = 0
    statistics: Statistics | None = None
    recorder: list[Moments] | None = None
    captured: dict[str, list[tuple[Tensor, ...]]] = field(default_factory=dict)
    rows: Tensor | None = None

    @contextmanager
    def at(self, step: int, statistics: Statistics, recorder: list[Moments] | None = None) -> Iterator[None]:
        """Sets the clock for one pass, and restores it afterwards."""
        before = self.step, self.statistics, self.recorder
        if statistics in ("capture", "blended_capture"):
            self.captured = {}
        self.step, self.statistics, self.recorder = step, statistics, recorder
        try:
            yield
        except BaseException:
            self.captured = {}
            raise
        finally:
            self.step, self.statistics, self.recorder = before
            if statistics in ("captured", "shifted", "blended_captured"):
                self.captured = {}
