"""Your own images: a folder with one folder per class, or with train, val and test folders of such folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from PIL import Image

from metawrap.data.checks import check_int
from metawrap.data.class_split import SHARES, GivenSplit, check_shares, split_as_given, split_by_seed
from metawrap.data.decode import Decoding, file_classes
from metawrap.data.sources import FolderSource
from metawrap.data.splits import DataSplits, as_splits
from metawrap.errors import ArgumentError, DataError

ClassFiles: TypeAlias = dict[str, list[str]]

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
MAX_IMAGE_BYTES = 64 * 2**20
MAX_IMAGE_PIXELS = 2**26
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
    """A folder of class folders, split by class; other files than images are left out.

    Args:
        root: holds one folder of images per class; or folders train, val (or validation) and test, each of which does.
        image_size: images are squeezed to this many pixels on either side (Lanczos).
        splits: shares of the classes for train, validation and test; not used where the folders exist.
        split: the classes of each by name instead: {"train": [...], "validation": [...], "test": [...]}, or the path
            of a JSON, YAML or CSV file with them (see `class_split.split_as_given`).
        seed: names the shuffle of the classes; the same seed gives the same split on every platform.
        grayscale: one channel instead of three.
        stream: read images when they are drawn (True), all of them now (False), or, by default, whichever suits the
            memory. A broken image is then an error when it is drawn; `metawrap data check` finds it before.
    Raises:
        ArgumentError: image_size, seed, splits or split is out of range.
        DataError: no folder, too few classes, a class without an image or in two splits, or an unreadable image.
    """
    check_int("image_size", image_size, 1)
    if not isinstance(seed, str):
        check_int("seed", seed, 0)
    shares = check_shares(splits)
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise DataError(f"There is no folder at '{folder}'. Pass one that holds a folder of images per class.")
    parts = split_folders(folder)
    origin = "train, validation and test folders of class folders"
    if parts is None:
        classes = _class_files(folder, folder)
        named = split_by_seed(list(classes), shares, seed) if split is None else split_as_given(list(classes), split)
        parts = [{name: classes[name] for name in part} for part in named]
        origin = f"class folders, split by {'seed' if split is None else 'name'}"
    elif split is not None:
        raise ArgumentError(f"split: '{folder}' has train, validation and test folders already. Leave split out.")
    decoding = Decoding(image_size, grayscale, Image.Resampling.LANCZOS, MAX_IMAGE_PIXELS)
    source = FolderSource(folder, MAX_IMAGE_BYTES)
    return as_splits([file_classes(source, part, decoding, origin) for part in parts], stream)


def split_folders(root: Path) -> list[ClassFiles] | None:
    """The splits that the folders themselves make, or None where there are none."""
    found = [next((root / name for name in names if _folders(root / name)), None) for names in _SPLIT_NAMES]
    if not any(found):
        return None
    missing = [" or ".join(names) for names, folder in zip(_SPLIT_NAMES, found, strict=True) if folder is None]
    if missing:
        raise DataError(
            f"'{root}' has some split folders, but {', '.join(missing)} with class folders inside is missing. "
            "Add it, or move all class folders directly into one folder."
        )
    parts = [_class_files(folder, root) for folder in found if folder is not None]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        shared = sorted(parts[first].keys() & parts[second].keys())
        if shared:
            raise DataError(
                f"Class '{shared[0]}' lies in both {_SPLIT_NAMES[first][0]} and {_SPLIT_NAMES[second][0]} of '{root}'; "
                "expected different classes in each. Few-shot splits are by class: move it to one of them."
            )
    return parts


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
