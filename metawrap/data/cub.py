"""CUB: 200 species of birds, 11,788 images; images.txt and classes.txt -> classes -> split -> pixels.

Source: Wah et al. 2011, Caltech-UCSD Birds-200-2011. The split is that of Chen et al. 2019 (A Closer Look at Few-shot
Classification, arXiv:1904.04232), which their code makes by a rule, and torchmeta's lists agree with it: with classes
numbered from 0 in the order of their names, even ones train (100), those of remainder 1 by 4 validate (50), those of
remainder 3 test (50). Other papers have other splits: name one with `split`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from metawrap.data.checks import check_int
from metawrap.data.class_split import MAX_TEXT_BYTES, GivenSplit, decoded, split_as_given
from metawrap.data.decode import Decoding, file_classes
from metawrap.data.folder import MAX_IMAGE_BYTES, MAX_IMAGE_PIXELS
from metawrap.data.sources import ImageSource, check_name, source_at
from metawrap.data.splits import DataSplits, as_splits
from metawrap.errors import DataError

_FOLDER = "CUB_200_2011"
_TABLES = ("images.txt", "image_class_labels.txt", "classes.txt")
_HOW_TO_GET = (
    f"Pass root=<the unpacked folder {_FOLDER}, the folder that holds it, or a zip of it>, with images/, "
    f"{', '.join(_TABLES)}."
)


def load_cub(
    root: str | Path, *, split: GivenSplit = "closer-look", image_size: int = 84, stream: bool | None = None
) -> DataSplits:
    """CUB-200-2011, whole images; bounding boxes and the data set's own split by image are not used.

    Args:
        root: the folder CUB_200_2011, the one that holds it, or a zip of it.
        split: "closer-look", the rule of Chen et al. above; or the names of the classes, as for `load_image_folder`.
        image_size: images are squeezed to this many pixels on either side (Lanczos).
        stream: read images when they are drawn (True), all now (False), or, by default, whichever suits the memory.
    Raises:
        ArgumentError: image_size or split is not of these.
        DataError: the files are missing, unsafe or broken, or too few classes; names the file.
    """
    check_int("image_size", image_size, 1)
    base = Path(root).expanduser()
    base = base / _FOLDER if (base / _FOLDER).is_dir() else base
    if not base.exists():
        raise DataError(f"CUB was not found at '{base}'. {_HOW_TO_GET}")
    source = source_at(base, MAX_IMAGE_BYTES)
    classes = _classes(source, f"{_FOLDER}/" if base.is_file() else "")
    names = list(classes)
    rule = [names[0::2], names[1::4], names[3::4]]
    parts = rule if split == "closer-look" else split_as_given(names, split)
    if not all(parts):
        raise DataError(f"CUB: {len(names)} classes are too few for the split of Chen et al.; 4 are needed.")
    decoding = Decoding(image_size, False, Image.Resampling.LANCZOS, MAX_IMAGE_PIXELS)
    origin = f"CUB-200-2011, split {'of Chen et al. 2019' if split == 'closer-look' else 'by name'}"
    streamed = [file_classes(source, {name: classes[name] for name in part}, decoding, origin) for part in parts]
    return as_splits(streamed, stream)


def _classes(source: ImageSource, prefix: str) -> dict[str, list[str]]:
    """Class name -> its files, classes in the order of their names."""
    images, labels, classes = (dict(_table(source, prefix + name)) for name in _TABLES)
    files: dict[str, list[str]] = {name: [] for name in sorted(classes.values())}
    for number, image in images.items():
        check_name(image, "'images.txt'")
        if labels.get(number) not in classes:
            raise DataError(f"image_class_labels.txt has no known class for image {number}, '{image}'. {_HOW_TO_GET}")
        files[classes[labels[number]]].append(f"{prefix}images/{image}")
    if empty := [name for name, own in files.items() if not own]:
        raise DataError(f"images.txt has no image of '{empty[0]}'. {_HOW_TO_GET}")
    return {name: sorted(own) for name, own in files.items()}


def _table(source: ImageSource, name: str) -> Sequence[tuple[str, str]]:
    """Lines of a number and a value."""
    text = decoded(source.read(name)[: MAX_TEXT_BYTES + 1], name)
    rows = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
    for number, row in enumerate(rows, start=1):
        if len(row) != 2:
            raise DataError(f"'{name}' line {number}: expected a number and a value, but got '{row[0][:60]}'.")
    if len({row[0] for row in rows}) != len(rows):
        raise DataError(f"'{name}' has a number twice. {_HOW_TO_GET}")
    return [(row[0], row[1].strip()) for row in rows]
