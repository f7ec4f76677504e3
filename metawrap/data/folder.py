"""Your own images: class folders, with or without part folders, or a webdataset; in a folder, a zip or a tar."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from metawrap.data.class_folders import ClassFiles, class_files, folder_tree, part_classes, visible, webdataset_classes
from metawrap.data.class_split import SHARES, GivenSplit, check_shares, split_as_given, split_by_seed, validation_drawn
from metawrap.data.image_files import ImageFiles, files_at
from metawrap.data.image_sets import DataSplits, ImageSet, StreamedImages, as_splits, read_unless_streamed
from metawrap.data.pictures import GRAY, MAX_IMAGE_BYTES, RGB, Decoding
from metawrap.data.pixel_sources import file_classes
from metawrap.data.preprocessing import ImageSize, Preprocessing, decoding_of
from metawrap.data.problems import check_seed, wrong_argument
from metawrap.errors import ArgumentError, DataError


def load_image_folder(
    root: str | Path,
    *,
    image_size: ImageSize = 84,
    resize: str = "squeeze",
    splits: Sequence[float] = SHARES,
    split: GivenSplit | None = None,
    seed: int | str = 0,
    grayscale: bool = False,
    stream: bool | None = None,
) -> DataSplits:
    """A folder of class folders, split by class; other files are left out, and `metawrap data check` tells which.

        >>> train, validation, test = load_image_folder("path/to/birds", image_size=28)  # doctest: +SKIP

    Args:
        root: a folder, zip, tar or tar.gz. It holds one folder of images per class, where classes may lie in groups
            and are then called "<group>/<class>"; or folders train, val and test of such folders (also Train,
            meta-train, validation, ...); or a webdataset, in which `key.cls` has the label of `key.jpg`. Without a
            val folder, validation classes are drawn by seed from those of train.
        image_size: the side of the square images, in pixels (Lanczos); or a `Preprocessing`, of which all but the
            normalisation counts, in place of `resize` and `grayscale`.
        resize: "squeeze" changes the aspect of other images; "crop" keeps it, and cuts out the centre.
        splits: shares of the classes for train, validation and test; where a val folder is missing, the
            shares of train and validation count; not used where all three folders exist.
        split: the classes of each part by name: {"train": [...], "validation": [...], "test": [...]}, or the path of
            a JSON or YAML file with such a mapping, or of a CSV file with the columns class and split.
        seed: names the shuffle of the classes; the same seed gives the same split on every platform.
        grayscale: one channel instead of three.
        stream: True reads images when they are drawn, False reads all of them now; by default, sets that would fill
            half of the free memory are streamed. A broken image of a streamed set is an error when it is drawn;
            `metawrap data check` finds it earlier.
    Raises:
        ArgumentError: image_size, resize, seed, splits or split is out of range.
        DataError: no folder, too few classes, a class without an image or in two splits, a folder that can be read in
            two ways, or an unreadable image.
    """
    decoding = _decoding(image_size, resize, grayscale)
    check_seed(seed)
    shares = check_shares(splits)
    place, files, kind, parts = _found(root)
    if len(parts) == 1:
        [classes] = parts.values()
        named = split_by_seed(list(classes), shares, seed) if split is None else split_as_given(list(classes), split)
        origin = f"{kind}, split by {'seed' if split is None else 'name'}"
        chosen = [{name: classes[name] for name in part} for part in named]
        return as_splits(_sets(files, chosen, decoding, origin), stream)
    if split is not None:
        raise ArgumentError(f"split: '{place}' has train and test folders already. Leave split out.")
    origin = kind
    if "validation" not in parts:
        train, validation = validation_drawn(list(parts["train"]), shares, seed)
        origin += f"; {len(validation)} of {len(parts['train'])} train classes, drawn by seed, are the validation part"
        parts = {
            "train": {name: own for name, own in parts["train"].items() if name in train},
            "validation": {name: parts["train"][name] for name in validation},
            "test": parts["test"],
        }
    return as_splits(_sets(files, list(parts.values()), decoding, origin), stream)


def load_whole_folder(
    root: str | Path,
    *,
    image_size: ImageSize = 84,
    resize: str = "squeeze",
    grayscale: bool = False,
    stream: bool | None = None,
) -> ImageSet:
    """All classes of a folder, of any of its parts, as one set, for a test on classes that are all new.

    >>> birds = load_whole_folder("path/to/birds", image_size=28)  # doctest: +SKIP

    Args and errors are those of `load_image_folder`, but for the split: one class is enough.
    """
    decoding = _decoding(image_size, resize, grayscale)
    _, files, kind, parts = _found(root)
    classes = {name: own for part in parts.values() for name, own in part.items()}
    [images] = read_unless_streamed(_sets(files, [classes], decoding, f"{kind}, not split"), stream)
    return images


def _found(root: str | Path) -> tuple[Path, ImageFiles, str, dict[str, ClassFiles]]:
    """The place, its files, their layout, and the classes by part; one part "" where the folder has no parts."""
    place = Path(root).expanduser()
    if not place.exists():
        raise DataError(f"There is no folder at '{place}'. Pass one that holds a folder of images per class.")
    files = files_at(place, MAX_IMAGE_BYTES)
    names = visible(files.names())
    tree = folder_tree(names)
    if labelled := webdataset_classes(files, names):
        return place, files, "webdataset", {"": labelled}
    if parts := part_classes(tree, place):
        return place, files, f"{', '.join(parts)} folders of class folders", parts
    return place, files, "class folders", {"": class_files(tree, place)}


def published_parts(files: ImageFiles, where: Path, decoding: Decoding) -> list[StreamedImages] | None:
    """The sets of the folders train, validation and test of a published data set; None if none of them exists.

    Raises:
        DataError: as `part_classes`, or the validation part is missing.
    """
    parts = part_classes(folder_tree(visible(files.names())), where)
    if parts is not None and "validation" not in parts:
        raise DataError(f"'{where}' has train and test folders, but val is missing. Get it from the publisher.")
    origin = "train, validation and test folders of class folders"
    return None if parts is None else _sets(files, list(parts.values()), decoding, origin)


def _decoding(image_size: ImageSize, resize: str, grayscale: bool) -> Decoding:
    if resize not in ("squeeze", "crop"):
        raise wrong_argument("resize", "'squeeze' or 'crop'", resize)
    if isinstance(image_size, Preprocessing) and (resize != "squeeze" or grayscale):
        raise ArgumentError("image_size: the preprocessing has resize and channels. Leave resize and grayscale out.")
    return decoding_of(image_size, GRAY if grayscale else RGB, resize=resize)


def _sets(files: ImageFiles, parts: Sequence[ClassFiles], decoding: Decoding, origin: str) -> list[StreamedImages]:
    return [file_classes(files, part, decoding, origin) for part in parts]
