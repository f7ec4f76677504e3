"""EpisodeDraws: (seed, index) -> classes -> places of images, as numbers; and whether a set has enough of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from metawrap.data.image_sets import ImageSet
from metawrap.data.problems import check_int, listed
from metawrap.data.random_stream import Ints, RandomStream
from metawrap.errors import DataError
from metawrap.settings.settings import check_switch

ROTATIONS = 4


@dataclass(frozen=True)
class Drawn:
    """The images of a batch of tasks.

    classes: (tasks, ways), each quarter turn of a class with its own number. examples, quarter_turns: places of images
    and the number of turns of each, both (tasks, ways, shots + targets).
    """

    classes: Ints
    examples: Ints
    quarter_turns: Ints


class EpisodeDraws:
    """The draws of a sampler, numbers only: the same for images in memory and streamed images of the same labels.

    Arguments and errors are those of `EpisodeSampler`.
    """

    def __init__(
        self, images: ImageSet, ways: int, shots: int, targets: int, tasks: int, seed: int, rotations: bool = False
    ) -> None:
        for name, value in {"ways": ways, "shots": shots, "targets": targets, "tasks_per_batch": tasks}.items():
            check_int(name, value, 1)
        check_int("seed", seed, 0)
        check_switch("rotations", rotations)
        check_enough([Demand(images, ways, rotations)], shots, targets)
        self._ways, self._shots, self._examples, self._tasks, self.seed = ways, shots, shots + targets, tasks, seed
        self._distinct = images.num_classes
        self.num_classes = images.num_classes * (ROTATIONS if rotations else 1)
        labels = images.labels.cpu().numpy()
        self._by_class: Ints = np.argsort(labels, kind="stable").astype(np.int64)
        self._counts: Ints = np.bincount(labels, minlength=images.num_classes).astype(np.int64)
        self._starts: Ints = np.cumsum(self._counts) - self._counts

    def __repr__(self) -> str:
        counts = f"ways={self._ways}, shots={self._shots}, targets={self._examples - self._shots}"
        return f"{counts}, tasks_per_batch={self._tasks}, seed={self.seed}"

    def draw(self, index: int) -> Drawn:
        """The draws of the batch with this number."""
        random = RandomStream(self.seed, index)
        drawn = random.distinct(np.full(self._tasks, self.num_classes, dtype=np.int64), self._ways).reshape(-1)
        classes, quarter_turns = drawn % self._distinct, drawn // self._distinct
        within = random.distinct(self._counts[classes], self._examples)
        chosen = self._by_class[self._starts[classes, None] + within]
        shape = (self._tasks, self._ways, self._examples)
        turns = np.broadcast_to(quarter_turns[:, None], within.shape).reshape(shape)
        return Drawn(drawn.reshape(self._tasks, self._ways), chosen.reshape(shape), turns)


class Demand(NamedTuple):
    """The tasks to draw from a set. part: its name for people. keyword: the argument that sets `ways`."""

    images: ImageSet
    ways: int
    rotations: bool = False
    part: str = "the set"
    keyword: str = "ways"

    @property
    def classes(self) -> int:
        """The number of classes to draw from."""
        return self.images.num_classes * (ROTATIONS if self.rotations else 1)


def check_enough(demands: Sequence[Demand], shots: int, targets: int, fixed: bool = False) -> None:
    """Raises DataError, with all short parts and classes and numbers that fit them all, if tasks cannot be drawn.

    Args:
        fixed: whether the user cannot change ways, shots and targets, as in the test of a trained network.
    """
    for images, _, rotations, part, _ in demands:
        height, width = images.image_shape[1:]
        if rotations and height != width:
            raise DataError(
                f"rotations: expected square images, but those of {part} are {height}x{width}. Pass rotations=False "
                "(--no-rotations)."
            )
    if short := [each for each in demands if each.ways > each.classes]:
        raise DataError(f"{'; '.join(map(_few_classes, short))}. {_classes_that_fit(demands, short, fixed)}")
    needed, found, least = shots + targets, [], shots + targets
    for each in demands:
        counts = zip(each.images.class_names, each.images.images_per_class, strict=True)
        small = {name: count for name, count in counts if count < needed}
        least = min([least, *small.values()])
        if small:
            shown = ", ".join(f"{name!r} ({count})" for name, count in sorted(small.items())[:10])
            more = f" and {len(small) - 10} more" if len(small) > 10 else ""
            found.append(f"{each.part} has {len(small)} with fewer: {shown}{more}")
    if found:
        fit = min(shots, least - 1), least - min(shots, least - 1)
        use = (
            f"Use shots={fit[0]}, targets={fit[1]} (--shots {fit[0]} --targets {fit[1]}), or leave"
            if fit[0]
            else "Leave"
        )
        raise DataError(
            f"shots + targets = {shots} + {targets} = {needed} images of a class are needed, but {'; '.join(found)}. "
            f"{'Leave' if fixed else use} these classes out, or add images to them."
        )


def _few_classes(demand: Demand) -> str:
    turned = f", {demand.classes} with rotations" if demand.rotations else ""
    own = demand.images.class_names
    many = "1 class" if len(own) == 1 else f"{len(own)} classes"
    return f"{demand.keyword}={demand.ways}, but {demand.part} has only {many} ({listed(own, 5)}{turned})"


def _classes_that_fit(demands: Sequence[Demand], short: Sequence[Demand], fixed: bool) -> str:
    """The remedy: the largest numbers of ways that all parts can give, if it can be changed, or more classes."""
    parts = " and ".join(each.part for each in short)
    by_seed = any(each.images.origin.endswith("split by seed") for each in short)
    more = f"more classes to {parts}{', such as with split= (--split FILE)' if by_seed and not fixed else ''}."
    fits = {each.keyword: min(d.classes for d in demands if d.keyword == each.keyword) for each in short}
    if fixed or min(fits.values()) < 2:  # Tasks of a run have two classes at least.
        return f"Add {more}"
    numbers = ", ".join(f"{name}={count} (--{name.replace('_', '-')} {count})" for name, count in fits.items())
    return f"Use {numbers} or fewer, or add {more}"
