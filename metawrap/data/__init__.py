"""Data: files or generated images -> LabelledImages, split by class -> episodes (TaskBatch)."""

from __future__ import annotations

from metawrap.data.catalog import DATASETS, load_data
from metawrap.data.episodes import EpisodeSampler
from metawrap.data.folder import load_image_folder
from metawrap.data.glyphs import load_glyphs
from metawrap.data.images import LabelledImages
from metawrap.data.omniglot import load_omniglot
from metawrap.data.splits import DataSplits, ImageSet
from metawrap.data.streamed import StreamedImages

__all__ = [
    "DATASETS",
    "DataSplits",
    "EpisodeSampler",
    "ImageSet",
    "LabelledImages",
    "StreamedImages",
    "load_data",
    "load_glyphs",
    "load_image_folder",
    "load_omniglot",
]
