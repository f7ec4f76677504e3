"""Data: files, arrays or generated images -> labelled images, split by class -> episodes (TaskBatch).

The floors of this room, top to bottom; a module imports only modules of lower floors:

    contact_sheet, check_data
    episodes, catalog
    omniglot, mini_imagenet, tiered_imagenet, cifar, cub, glyphs, grocery, user_data
    folder
    class_folders, augmentation, pixel_sources, preprocessing, text_preprocessing
    array_pictures
    class_split, cached_labels, downloads, pictures
    image_sets, pickles, text_files, loader_workers, normalisation, image_files
    stored_arrays, tar_members
    random_stream, problems
"""

from __future__ import annotations

from metawrap.data.catalog import DATASETS, load_data, normalisation_of, preprocessing_of
from metawrap.data.cifar import load_cifar_fs, load_fc100
from metawrap.data.cub import load_cub
from metawrap.data.episodes import EpisodeSampler
from metawrap.data.folder import load_image_folder
from metawrap.data.glyphs import load_glyphs
from metawrap.data.grocery import load_grocery
from metawrap.data.image_sets import DataSplits, ImageSet, LabelledImages, StreamedImages
from metawrap.data.mini_imagenet import load_mini_imagenet
from metawrap.data.omniglot import load_omniglot
from metawrap.data.preprocessing import Preprocessing
from metawrap.data.text_preprocessing import TextPreprocessing
from metawrap.data.tiered_imagenet import load_tiered_imagenet
from metawrap.data.user_data import splits_from

__all__ = [
    "DATASETS", "DataSplits", "EpisodeSampler", "ImageSet", "LabelledImages", "Preprocessing", "StreamedImages",
    "TextPreprocessing", "load_cifar_fs", "load_cub", "load_data", "load_fc100", "load_glyphs", "load_grocery",
    "load_image_folder", "load_mini_imagenet", "load_omniglot", "load_tiered_imagenet", "normalisation_of",
    "preprocessing_of", "splits_from",
]  # fmt: skip
