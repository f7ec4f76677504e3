"""Your own images: a folder with one folder per class, or with train, val and test folders of such folders."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import TypeAlias

from metawrap.data.class_split import SHARES, GivenSplit, check_shares, split_as_given, split_by_seed
from metawrap.data.image_files import FolderFiles
from metawrap.data.image_sets import DataSplits, StreamedImages, as_splits
from metawrap.data.pixel_sources import MAX_IMAGE_BYTES, Decoding, file_classes
from metawrap.data.problems import check_int, check_seed
from metawrap.errors import ArgumentError, DataError

# Class name -> the names of its image files.
ClassFiles: TypeAlias = dict[str, list[str]]

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_SPLIT_NAMES = (("train",), ("val", "validation"), ("test",))


def load_image_folder(
    root: str | Path,
    *,
    image_size: int = 84,
    splits: Sequence[float] = SHARES,
    split: GivenSplit | None = None,
    seed: int | str = 0,
    grayscale: bool = False,
    stream: bool | None = None,
) -> DataSplits:
    """A folder of class folders, split by class; files that are no images are left out.

        >>> train, validation, test = load_image_folder("path/to/birds", image_size=28)  # doctest: +SKIP

    Args:
        root: holds one folder of images per class; or folders train, val (or validation) and test of such folders.
        image_size: images are squeezed or stretched to this many pixels on either side (Lanczos).
        splits: shares of the classes for train, validation and test; not used where split folders exist.
        split: the classes of each part by name: {"train": [...], "validation": [...], "test": [...]}, or the path of
            a JSON or YAML file with such a mapping, or of a CSV file with the columns class and split.
        seed: names the shuffle of the classes; the same seed gives the same split on every platform.
        grayscale: one channel instead of three.
        stream: True reads images when they are drawn, False reads all of them now; by default, sets that would fill
            half of the free memory are streamed. A broken image of a streamed set is an error when it is drawn;
            `metawrap data check` finds it earlier.
    Raises:
        ArgumentError: image_size, seed, splits or split is out of range.
        DataError: no folder, too few classes, a class without an image or in two splits, or an unreadable image.
    """
    check_int("image_size", image_size, 1)
    check_seed(seed)
    shares = check_shares(splits)
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise DataError(f"There is no folder at '{folder}'. Pass one that holds a folder of images per class.")
    decoding = Decoding(image_size, grayscale)
    parts = split_folder_sets(folder, decoding)
    if parts is None:
        classes = _class_files(folder, folder)
        named = split_by_seed(list(classes), shares, seed) if split is None else split_as_given(list(classes), split)
        origin = f"class folders, split by {'seed' if split is None else 'name'}"
        files = FolderFiles(folder, MAX_IMAGE_BYTES)
        parts = [file_classes(files, {name: classes[name] for name in part}, decoding, origin) for part in named]
    elif split is not None:
        raise ArgumentError(f"split: '{folder}' has train, validation and test folders already. Leave split out.")
    return as_splits(parts, stream)


def split_folder_sets(root: Path, decoding: Decoding) -> list[StreamedImages] | None:
    """The sets of the folders train, val (or validation) and test; None if none of these folders exists.

    Raises:
        DataError: some of the folders are missing, or a class is in two of them.
    """
    found = [next((root / name for name in names if _folders(root / name)), None) for names in _SPLIT_NAMES]
    if not any(found):
        return None
    missing = [" or ".join(names) for names, folder in zip(_SPLIT_NAMES, found, strict=True) if folder is None]
    if missing:
        raise DataError(
            f"'{root}' has some split folders, but {', '.join(missing)} with class folders inside is missing. "
            "Add it, or move all class folders directly into one folder."
        )
    parts = {names[0]: _class_files(folder, root) for names, folder in zip(_SPLIT_NAMES, found, strict=True) if folder}
    for first, second in combinations(parts, 2):
        if shared := sorted(parts[first].keys() & parts[second].keys()):
            raise DataError(
                f"Class '{shared[0]}' lies in both {first} and {second} of '{root}'; expected different classes in "
                "each. Few-shot splits are by class: move it to one of them."
            )
    files, origin = FolderFiles(root, MAX_IMAGE_BYTES), "train, validation and test folders of class folders"
    return [file_classes(files, part, decoding, origin) for part in parts.values()]


def _class_files(folder: Path, root: Path) -> ClassFiles:
    files: ClassFiles = {}
    for class_folder in _folders(folder):
        names = [path for path in class_folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()]
        if not names:
            raise DataError(
                f"The class folder '{class_folder}' holds no image ({', '.join(IMAGE_SUFFIXES)}). Remove it."
            )
        files[class_folder.name] = sorted(path.relative_to(root).as_posix() for path in names)
    if not files:
        raise DataError(f"'{folder}' holds no class folder. Expected one folder of images per class.")
    return files


def _folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    inside = (path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    return sorted(inside, key=lambda path: path.name)
