"""DataSplits: train, validation and test classes, in memory or streamed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

from metawrap.data.images import LabelledImages
from metawrap.data.streamed import StreamedImages, free_memory

ImageSet: TypeAlias = LabelledImages | StreamedImages


class DataSplits(NamedTuple):
    """Three sets without a class in common: `train, validation, test = splits`."""

    train: ImageSet
    validation: ImageSet
    test: ImageSet


def as_splits(parts: Sequence[StreamedImages], stream: bool | None) -> DataSplits:
    """The three parts, read into memory unless `stream`; None streams what would fill over half of the free memory."""
    if stream is None:
        stream = sum(len(part) * int(np.prod(part.image_shape)) for part in parts) > free_memory() // 2
    return DataSplits(*(parts if stream else [part.in_memory() for part in parts]))
