"""Data: files, arrays or generated images -> labelled images, split by class -> episodes (TaskBatch)."""

from __future__ import annotations

from metawrap.data.any_data import splits_from
from metawrap.data.catalog import DATASETS, load_data, normalisation_of
from metawrap.data.cifar import load_cifar_fs, load_fc100
from metawrap.data.cub import load_cub
from metawrap.data.episodes import EpisodeSampler
from metawrap.data.folder import load_image_folder
from metawrap.data.glyphs import load_glyphs
from metawrap.data.images import LabelledImages
from metawrap.data.mini_imagenet import load_mini_imagenet
from metawrap.data.omniglot import load_omniglot
from metawrap.data.splits import DataSplits, ImageSet
from metawrap.data.streamed import StreamedImages
from metawrap.data.tiered_imagenet import load_tiered_imagenet

__all__ = [
    "DATASETS",
    "DataSplits",
    "EpisodeSampler",
    "ImageSet",
    "LabelledImages",
    "StreamedImages",
    "load_cifar_fs",
    "load_cub",
    "load_data",
    "load_fc100",
    "load_glyphs",
    "load_image_folder",
    "load_mini_imagenet",
    "load_omniglot",
    "load_tiered_imagenet",
    "normalisation_of",
    "splits_from",
]
