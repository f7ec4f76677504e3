"""CIFAR-FS and FC100: the 100 classes of CIFAR-100, 600 images each, 32 x 32, in two published splits by class.

Sources. CIFAR-100: Krizhevsky 2009, in torchvision's files (cifar-100-python: train, test, meta). CIFAR-FS: Bertinetto
et al. 2019, arXiv:1805.08136, 64 / 16 / 20 classes drawn at random. FC100: Oreshkin et al. 2018, arXiv:1805.10123,
whole superclasses: 12 / 4 / 4 of them, so 60 / 20 / 20 classes.

The lists below were compared with two public copies each. CIFAR-FS: the split files of torchmeta, and for the training
classes a second list; with these, the three parts hold each of the 100 classes once. FC100: torchmeta's lists of
superclasses for training and test, and the numbers in code derived from the authors' ({8, 11, 13, 16} for validation).
The authors' own files were not at hand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from metawrap.data.cached_labels import texts, whole_numbers, with_text_keys
from metawrap.data.downloads import locate
from metawrap.data.image_sets import DataSplits, StreamedImages
from metawrap.data.pickles import read_pickle
from metawrap.data.pixel_sources import ArrayPixels
from metawrap.data.preprocessing import ImageSize, decoding_of
from metawrap.data.stored_arrays import StoredArray
from metawrap.data.tar_members import read_members
from metawrap.errors import DataError


def _lists(**parts: str) -> dict[str, tuple[str, ...]]:
    return {part: tuple(names.split()) for part, names in parts.items()}


CIFAR_FS = _lists(
    train="""
        apple aquarium_fish bear bee bottle bowl boy bridge bus can castle caterpillar chair clock cloud cockroach couch
        cup dinosaur dolphin elephant forest girl hamster house kangaroo keyboard lawn_mower lion lizard lobster
        mountain mouse mushroom oak_tree orange orchid palm_tree pear pine_tree plate porcupine possum rabbit raccoon
        ray road seal shrew skunk skyscraper snake spider squirrel streetcar sunflower tank tiger train trout tulip
        turtle willow_tree wolf""",
    validation="""
        beaver beetle butterfly camel cattle crab crocodile flatfish lamp maple_tree motorcycle otter sea shark
        television tractor""",
    test="""
        baby bed bicycle chimpanzee fox leopard man pickup_truck plain poppy rocket rose snail sweet_pepper table
        telephone wardrobe whale woman worm""",
)
FC100 = _lists(  # superclasses
    train="""
        fish flowers food_containers fruit_and_vegetables household_electrical_devices household_furniture
        large_man-made_outdoor_things large_natural_outdoor_scenes reptiles trees vehicles_1 vehicles_2""",
    validation="large_carnivores large_omnivores_and_herbivores non-insect_invertebrates small_mammals",
    test="aquatic_mammals insects medium_mammals people",
)
SIDE = 32
MAX_FILE_BYTES = 2**28  # the real `train` has 155 MB
_FOLDER, _ARCHIVE = "cifar-100-python", "cifar-100-python.tar.gz"
_FILES = ("meta", "train", "test")
_HOW_TO_GET = f"Pass root=<{_ARCHIVE}, the folder {_FOLDER}, or the folder that holds one of them>, or download=True."


@dataclass
class _Cifar100:
    """All images of train and then test: their pixels, and the numbers of their classes and superclasses."""

    class_names: tuple[str, ...]
    superclass_names: tuple[str, ...]
    classes: NDArray[np.int64]
    superclasses: NDArray[np.int64]
    pixels: ArrayPixels


def load_cifar_fs(
    root: str | Path | None = None, *, image_size: ImageSize = SIDE, download: bool = False
) -> DataSplits:
    """CIFAR-FS: 64 classes to train on, 16 to validate, 20 to test, 600 images each, in memory (180 MB).

        >>> train, validation, test = load_cifar_fs("path/to/cifar-100-python.tar.gz")  # doctest: +SKIP

    Args:
        root: cifar-100-python.tar.gz, the folder cifar-100-python, or the folder that holds one of them.
        image_size: other sizes than 32 are squeezed or stretched (Lanczos); or a `Preprocessing`.
        download: fetch it with torchvision into `root` (default: a cache folder) if it is not there.
    Raises:
        ArgumentError: image_size is no integer of at least 1.
        DataError: the files are missing, unsafe or broken, or a class of the split is not in them.
    """
    return _splits(_read(root, image_size, download), CIFAR_FS, "CIFAR-100, split of CIFAR-FS")


def load_fc100(root: str | Path | None = None, *, image_size: ImageSize = SIDE, download: bool = False) -> DataSplits:
    """FC100: 60 classes to train on, 20 to validate, 20 to test, of different superclasses, in memory (180 MB).

        >>> train, validation, test = load_fc100("path/to/cifar-100-python.tar.gz")  # doctest: +SKIP

    Args, Raises: as for `load_cifar_fs`.
    """
    cifar = _read(root, image_size, download)
    groups: dict[str, list[str]] = {}
    for part, names in FC100.items():
        if absent := [name for name in names if name not in cifar.superclass_names]:
            raise DataError(f"CIFAR-100's meta has no superclass '{absent[0]}', which FC100 needs. {_HOW_TO_GET}")
        numbers = [cifar.superclass_names.index(name) for name in names]
        chosen = np.unique(cifar.classes[np.isin(cifar.superclasses, numbers)])
        groups[part] = [cifar.class_names[number] for number in chosen]
    return _splits(cifar, groups, "CIFAR-100, split of FC100")


def _splits(cifar: _Cifar100, groups: Mapping[str, Sequence[str]], origin: str) -> DataSplits:
    parts = []
    for names in groups.values():
        known = [cifar.class_names.index(name) if name in cifar.class_names else -1 for name in names]
        places = [np.flatnonzero(cifar.classes == number) for number in known]
        if absent := [name for name, own in zip(names, places, strict=True) if not len(own)]:
            raise DataError(f"CIFAR-100's files hold no image of '{absent[0]}', which the split needs. {_HOW_TO_GET}")
        labels = torch.arange(len(names)).repeat_interleave(torch.tensor([len(own) for own in places]))
        part = StreamedImages(cifar.pixels, labels, tuple(names), cifar.pixels.shape, origin, np.concatenate(places))
        parts.append(part.in_memory())
    return DataSplits(*parts)


def _read(root: str | Path | None, image_size: ImageSize, download: bool) -> _Cifar100:
    decoding = decoding_of(image_size)
    contents = _contents(_locate(root, download))
    meta = _dict_of(contents["meta"], "meta", ("fine_label_names", "coarse_label_names"))
    for key, value in meta.items():
        if not isinstance(value, list) or len(set(texts(value))) != len(value):
            raise DataError(f"CIFAR-100's meta: expected {key} to be a list of different names. {_HOW_TO_GET}")
    names = {"fine_labels": texts(meta["fine_label_names"]), "coarse_labels": texts(meta["coarse_label_names"])}
    images: list[NDArray[np.uint8]] = []
    labels: dict[str, list[NDArray[np.int64]]] = {key: [] for key in names}
    for file in ("train", "test"):
        batch = _dict_of(contents[file], file, ("data", *names))
        images.append(_images(batch["data"], file))
        for key, known in names.items():
            labels[key].append(whole_numbers(batch[key], len(images[-1]), f"{_FOLDER}/{file}"))
            if (largest := labels[key][-1].max()) >= len(known):
                raise DataError(f"CIFAR-100's {file}: {key} has {largest}, but meta names {len(known)} classes.")
    pixels = ArrayPixels(np.concatenate(images), decoding, _FOLDER)
    fine, coarse = (np.concatenate(labels[key]) for key in names)
    return _Cifar100(names["fine_labels"], names["coarse_labels"], fine, coarse, pixels)


def _dict_of(content: bytes | Path, name: str, keys: Sequence[str]) -> dict[str, Any]:
    # Python 2 wrote these files, so the keys are text in latin-1; files rewritten by Python 3 may have bytes.
    given = with_text_keys(read_pickle(content, f"{_FOLDER}/{name}"))
    if missing := [key for key in keys if key not in given]:
        raise DataError(f"'{_FOLDER}/{name}': expected a dict with '{missing[0]}', but it has none. {_HOW_TO_GET}")
    return {key: given[key] for key in keys}


def _images(array: Any, file: str) -> NDArray[np.uint8]:
    rows = array.read() if isinstance(array, StoredArray) else None
    if rows is None or rows.dtype != np.uint8 or rows.ndim != 2 or rows.shape[1] != 3 * SIDE * SIDE:
        raise DataError(f"'{_FOLDER}/{file}': expected data as uint8 of shape (images, 3072). {_HOW_TO_GET}")
    return rows.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)


def _contents(place: Path) -> dict[str, bytes | Path]:
    if place.is_dir():
        return {name: place / name for name in _FILES}
    found = read_members(place, [f"{_FOLDER}/{name}" for name in _FILES], MAX_FILE_BYTES)
    return {name: found[f"{_FOLDER}/{name}"] for name in _FILES}


def _locate(root: str | Path | None, download: bool) -> Path:
    def fetch(folder: str) -> None:
        from torchvision.datasets import CIFAR100  # slow to import, and needed only here

        CIFAR100(folder, download=True)

    complete = lambda folder: all((folder / name).is_file() for name in _FILES)  # noqa: E731
    return locate(root, "CIFAR-100", _FOLDER, _ARCHIVE, complete, fetch if download else None, _HOW_TO_GET)
