"""Which classes and which images an episode has: (seed, index) -> places of images. Numbers only, no pixel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from metawrap.data.draws import Draws, Ints
from metawrap.data.splits import ImageSet

ROTATIONS = 4


@dataclass(frozen=True)
class Drawn:
    """The images of a batch of tasks.

    classes: (tasks, ways), each quarter turn of a class with a number of its own. examples, quarter_turns: places of
    images and how often each is turned, both (tasks, ways, shots + targets).
    """

    classes: Ints
    examples: Ints
    quarter_turns: Ints


class EpisodeDraws:
    """The draws of a sampler; the same for the same labels, whether images are in memory or streamed."""

    def __init__(self, images: ImageSet, ways: int, examples: int, tasks: int, seed: int, rotations: bool) -> None:
        self.ways, self.examples, self.tasks, self.seed = ways, examples, tasks, seed
        self._distinct = images.num_classes
        self.num_classes = images.num_classes * (ROTATIONS if rotations else 1)
        labels = images.labels.cpu().numpy()
        self._by_class: Ints = np.argsort(labels, kind="stable").astype(np.int64)
        self._counts: Ints = np.bincount(labels, minlength=images.num_classes).astype(np.int64)
        self._starts: Ints = np.cumsum(self._counts) - self._counts

    def draw(self, index: int) -> Drawn:
        """What is in the batch with this number."""
        draws = Draws(self.seed, index)
        drawn = draws.distinct(np.full(self.tasks, self.num_classes, dtype=np.int64), self.ways).reshape(-1)
        classes, quarter_turns = drawn % self._distinct, drawn // self._distinct
        within = draws.distinct(self._counts[classes], self.examples)
        chosen = self._by_class[self._starts[classes, None] + within]
        shape = (self.tasks, self.ways, self.examples)
        turns = np.broadcast_to(quarter_turns[:, None], within.shape).reshape(shape)
        return Drawn(drawn.reshape(self.tasks, self.ways), chosen.reshape(shape), turns)
