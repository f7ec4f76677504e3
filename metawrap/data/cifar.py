"""CIFAR-FS and FC100: the 100 classes of CIFAR-100, 600 images each, 32 x 32, in two published splits by class.

Sources. CIFAR-100: Krizhevsky 2009, read from torchvision's files (cifar-100-python: train, test, meta; the pickles are
not run). CIFAR-FS: Bertinetto et al. 2019, arXiv:1805.08136, 64 / 16 / 20 classes drawn at random. FC100: Oreshkin et
al. 2018, arXiv:1805.10123, whole superclasses: 12 / 4 / 4 of them, so 60 / 20 / 20 classes.

The lists below were compared with two public copies each. CIFAR-FS: the split files of torchmeta, and for the training
classes a second list; with these, the three parts hold each of the 100 classes once. FC100: torchmeta's lists of
superclasses for training and test, and the numbers in code derived from the authors' ({8, 11, 13, 16} for validation).
The authors' own files were not at hand.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from metawrap.data.arrays import ArrayPixels
from metawrap.data.checks import check_int
from metawrap.data.mini_imagenet import numbered_labels, texts
from metawrap.data.omniglot import cache_folder
from metawrap.data.pickled_array import PickledArray
from metawrap.data.pickles import read_pickle
from metawrap.data.splits import DataSplits
from metawrap.data.streamed import StreamedImages
from metawrap.data.tarred import read_members
from metawrap.errors import DataError


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


CIFAR_FS = {
    "train": _names("""
        apple aquarium_fish bear bee bottle bowl boy bridge bus can castle caterpillar chair clock cloud cockroach couch
        cup dinosaur dolphin elephant forest girl hamster house kangaroo keyboard lawn_mower lion lizard lobster
        mountain mouse mushroom oak_tree orange orchid palm_tree pear pine_tree plate porcupine possum rabbit raccoon
        ray road seal shrew skunk skyscraper snake spider squirrel streetcar sunflower tank tiger train trout tulip
        turtle willow_tree wolf"""),
    "validation": _names("""
        beaver beetle butterfly camel cattle crab crocodile flatfish lamp maple_tree motorcycle otter sea shark
        television tractor"""),
    "test": _names("""
        baby bed bicycle chimpanzee fox leopard man pickup_truck plain poppy rocket rose snail sweet_pepper table
        telephone wardrobe whale woman worm"""),
}
FC100 = {  # superclasses
    "train": _names("""
        fish flowers food_containers fruit_and_vegetables household_electrical_devices household_furniture
        large_man-made_outdoor_things large_natural_outdoor_scenes reptiles trees vehicles_1 vehicles_2"""),
    "validation": _names("large_carnivores large_omnivores_and_herbivores non-insect_invertebrates small_mammals"),
    "test": _names("aquatic_mammals insects medium_mammals people"),
}
SIDE = 32
MAX_FILE_BYTES = 2**28  # the real `train` has 155 MB
_FOLDER, _ARCHIVE = "cifar-100-python", "cifar-100-python.tar.gz"
_FILES = ("meta", "train", "test")
_HOW_TO_GET = f"Pass root=<{_ARCHIVE}, the folder {_FOLDER}, or the folder that holds one of them>, or download=True."


def load_cifar_fs(root: str | Path | None = None, *, image_size: int = SIDE, download: bool = False) -> DataSplits:
    """CIFAR-FS: 64 classes to train on, 16 to validate, 20 to test, 600 images each, in memory (180 MB).

    Args:
        root: cifar-100-python.tar.gz, the folder cifar-100-python, or the folder that holds one of them.
        image_size: other sizes than 32 are squeezed or stretched (Lanczos).
        download: fetch it with torchvision into `root` (default: a cache folder) if it is not there.
    Raises:
        ArgumentError: image_size is no integer of at least 1.
        DataError: the files are missing, unsafe or broken, or a class of the split is not in them.
    """
    fine, _, labels, _, pixels = _read(root, image_size, download)
    return _splits(CIFAR_FS, fine, labels, pixels, "CIFAR-100, split of CIFAR-FS")


def load_fc100(root: str | Path | None = None, *, image_size: int = SIDE, download: bool = False) -> DataSplits:
    """FC100: 60 classes to train on, 20 to validate, 20 to test, of different superclasses, in memory (180 MB).

    Args, Raises: as `load_cifar_fs`.
    """
    fine, coarse, labels, superclasses, pixels = _read(root, image_size, download)
    known = dict(enumerate(fine))
    groups: dict[str, list[str]] = {}
    for part, names in FC100.items():
        if absent := [name for name in names if name not in coarse]:
            raise DataError(f"CIFAR-100's meta has no superclass '{absent[0]}', which FC100 needs. {_HOW_TO_GET}")
        numbers = [coarse.index(name) for name in names]
        groups[part] = [known[int(label)] for label in np.unique(labels[np.isin(superclasses, numbers)])]
    return _splits(groups, fine, labels, pixels, "CIFAR-100, split of FC100")


def _splits(
    groups: Mapping[str, Sequence[str]],
    fine: Sequence[str],
    labels: NDArray[np.int64],
    pixels: ArrayPixels,
    origin: str,
) -> DataSplits:
    parts = []
    for names in groups.values():
        if absent := [name for name in names if name not in fine or not (labels == fine.index(name)).any()]:
            raise DataError(f"CIFAR-100's files hold no image of '{absent[0]}', which the split needs. {_HOW_TO_GET}")
        places = [np.flatnonzero(labels == fine.index(name)) for name in names]
        own = torch.arange(len(names)).repeat_interleave(torch.tensor([len(each) for each in places]))
        part = StreamedImages(pixels, own, tuple(names), pixels.shape, origin, np.concatenate(places))
        parts.append(part.in_memory())
    return DataSplits(*parts)


def _read(
    root: str | Path | None, image_size: int, download: bool
) -> tuple[tuple[str, ...], tuple[str, ...], NDArray[np.int64], NDArray[np.int64], ArrayPixels]:
    """Names of classes and superclasses; of each image of train and then test its class and superclass; the pixels."""
    check_int("image_size", image_size, 1)
    contents = _contents(_locate(root, download))
    meta = _dict_of(contents["meta"], "meta", ("fine_label_names", "coarse_label_names"))
    names = []
    for key in ("fine_label_names", "coarse_label_names"):
        if not isinstance(meta[key], list) or len(set(texts(meta[key]))) != len(meta[key]):
            raise DataError(f"CIFAR-100's meta: expected {key} to be a list of different names. {_HOW_TO_GET}")
        names.append(texts(meta[key]))
    arrays: list[NDArray[np.uint8]] = []
    fine: list[NDArray[np.int64]] = []
    coarse: list[NDArray[np.int64]] = []
    for file in ("train", "test"):
        batch = _dict_of(contents[file], file, ("data", "fine_labels", "coarse_labels"))
        arrays.append(_images(batch["data"], file))
        for labels, key, known in ((fine, "fine_labels", names[0]), (coarse, "coarse_labels", names[1])):
            labels.append(numbered_labels(batch[key], len(arrays[-1]), Path(file)))
            if labels[-1].max() >= len(known):
                raise DataError(
                    f"CIFAR-100's {file}: {key} has {labels[-1].max()}, but meta names {len(known)} classes."
                )
    pixels = ArrayPixels(np.concatenate(arrays), image_size, _FOLDER)
    return names[0], names[1], np.concatenate(fine), np.concatenate(coarse), pixels


def _dict_of(content: bytes | Path, name: str, keys: Sequence[str]) -> dict[str, Any]:
    found = read_pickle(content, f"{_FOLDER}/{name}")
    # Written by Python 2, so the keys are text in latin-1; written anew by Python 3, they may be bytes.
    given = {texts([key])[0]: value for key, value in found.items()} if isinstance(found, dict) else {}
    if missing := [key for key in keys if key not in given]:
        raise DataError(f"'{_FOLDER}/{name}': expected a dict with '{missing[0]}', but it has none. {_HOW_TO_GET}")
    return given


def _images(array: Any, file: str) -> NDArray[np.uint8]:
    rows = array.read() if isinstance(array, PickledArray) else None
    if rows is None or rows.dtype != np.uint8 or rows.ndim != 2 or rows.shape[1] != 3 * SIDE * SIDE:
        raise DataError(f"'{_FOLDER}/{file}': expected data as uint8 of shape (images, 3072). {_HOW_TO_GET}")
    return rows.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)


def _contents(place: Path) -> dict[str, bytes | Path]:
    if place.is_dir():
        return {name: place / name for name in _FILES}
    try:
        found = read_members(place, [f"{_FOLDER}/{name}" for name in _FILES], MAX_FILE_BYTES)
    except (gzip.BadGzipFile, zlib.error, EOFError, OSError) as error:
        raise DataError(f"'{place}' cannot be read: {error}. Get a fresh copy of it.") from error
    return {name: found[f"{_FOLDER}/{name}"] for name in _FILES}


def _locate(root: str | Path | None, download: bool) -> Path:
    base = cache_folder() if root is None else Path(root).expanduser()
    for candidate in (base / _FOLDER, base, base / _ARCHIVE):
        if candidate.is_file() or all((candidate / name).is_file() for name in _FILES):
            return candidate
    if not download or base.suffix in (".gz", ".tgz", ".tar"):
        raise DataError(f"CIFAR-100 was not found at '{base}'. {_HOW_TO_GET}")
    from torchvision.datasets import CIFAR100  # slow to import, and needed only here

    try:
        CIFAR100(str(base), download=True)
    except (OSError, RuntimeError) as error:
        raise DataError(f"CIFAR-100 could not be downloaded into '{base}': {error}. {_HOW_TO_GET}") from error
    return base / _FOLDER
