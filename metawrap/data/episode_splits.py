"""benchmark: the name of a data set -> its published split and preprocessing -> train, validation and test episodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from metawrap.data.augmentation import Augment
from metawrap.data.catalog import load_data, normalisation_of
from metawrap.data.episode_draws import Demand, check_enough
from metawrap.data.episodes import EpisodeSampler

# Every run has the same validation and test tasks, whatever its seed: results of runs can be compared.
VALIDATION_SEED = 1_000_001
TEST_SEED = 1_000_002
EVALUATION_TASKS = 20  # in a batch


class EpisodeSplits(NamedTuple):
    """Samplers of training, validation and test episodes; no class is in two of them."""

    train: EpisodeSampler
    validation: EpisodeSampler
    test: EpisodeSampler

    def __repr__(self) -> str:
        counts = ("ways", "shots", "targets", "tasks_per_batch", "num_classes")
        return "\n".join(
            f"{f'{part}:':12}{', '.join(f'{name}={getattr(sampler, name)}' for name in counts)}"
            for part, sampler in self._asdict().items()
        )


def benchmark(
    name: str | Path,
    root: str | Path | None = None,
    *,
    ways: int = 5,
    shots: int = 1,
    targets: int = 15,
    tasks_per_batch: int = 4,
    seed: int = 0,
    rotations: bool | None = None,
    device: torch.device | str | None = None,
    augment: Augment | None = None,
    **options: Any,
) -> EpisodeSplits:
    """Episodes of a benchmark of the literature, split by class and preprocessed as published.

        >>> train, validation, test = benchmark("glyphs", ways=5, shots=1)
        >>> test
        EpisodeSampler(ways=5, shots=1, targets=15, tasks_per_batch=20, seed=1000002)
        80 classes, 1600 images of 1 x 28 x 28

    Validation and test tasks are those of `metawrap train` with the same ways, shots and targets: 20 in a batch, with a
    seed of their own, so `test[:30]` are its 600 tasks.

    Args:
        name, root: a data set and the place of its files, or a folder of your own, as for `load_data`.
        ways, shots, targets: of all tasks. The literature has 15 targets for photographs.
        tasks_per_batch, seed, augment: of the training episodes.
        rotations: quarter turns of the training classes as further classes; None means for Omniglot alone.
        device: the device of the batches.
        options: passed on to `load_data`, such as split, image_size, stream or download.
    Raises:
        ArgumentError, DataError: as `load_data` and `EpisodeSampler`; classes that are too few are named by part.
    """
    splits = load_data(name, root, **options)
    turned = (
        str(name) == "omniglot" if rotations is None else rotations
    )  # As nearly every publication since MANN (2016).
    demands = [Demand(part, ways, turned and word == "train", word) for word, part in splits._asdict().items()]
    check_enough(demands, shots, targets)
    how: dict[str, Any] = {"device": device, "normalise": normalisation_of(str(name))}
    parts = [(splits.train, tasks_per_batch, seed, turned, augment)]
    parts += [(splits.validation, EVALUATION_TASKS, VALIDATION_SEED, False, None)]
    parts += [(splits.test, EVALUATION_TASKS, TEST_SEED, False, None)]
    return EpisodeSplits(
        *(
            EpisodeSampler(images, ways, shots, targets, tasks, own_seed, turn, augment=change, **how)
            for images, tasks, own_seed, turn, change in parts
        )
    )
