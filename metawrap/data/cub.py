"""CUB: 200 species of birds, 11,788 images; images.txt and classes.txt -> classes -> split -> pixels.

Source: Wah et al. 2011, Caltech-UCSD Birds-200-2011. The split is that of Chen et al. 2019 (A Closer Look at Few-shot
Classification, arXiv:1904.04232). Their code makes it by a rule, and torchmeta's lists agree with the rule: classes are
numbered from 0 in the order of their names; even numbers train (100), those of remainder 1 by 4 validate (50), those of
remainder 3 test (50). Other papers have other splits; pass these as `split`.
"""

from __future__ import annotations

from pathlib import Path

from metawrap.data.class_split import GivenSplit, split_as_given
from metawrap.data.image_files import ImageFiles, files_at
from metawrap.data.image_sets import DataSplits, as_splits
from metawrap.data.pictures import MAX_IMAGE_BYTES
from metawrap.data.pixel_sources import file_classes
from metawrap.data.preprocessing import ImageSize, decoding_of
from metawrap.data.problems import check_name
from metawrap.data.text_files import decoded
from metawrap.errors import DataError

_FOLDER, _ARCHIVE = "CUB_200_2011", "CUB_200_2011.tgz"
_TABLES = ("images.txt", "image_class_labels.txt", "classes.txt")
_HOW_TO_GET = (
    f"Pass root=<the unpacked folder {_FOLDER}, the folder that holds it, or its tgz or zip>, with images/, "
    f"{', '.join(_TABLES)}."
)


def load_cub(
    root: str | Path, *, split: GivenSplit = "closer-look", image_size: ImageSize = 84, stream: bool | None = None
) -> DataSplits:
    """CUB-200-2011, whole images; bounding boxes and the data set's own split by image are not used.

        >>> train, validation, test = load_cub("path/to/CUB_200_2011")  # doctest: +SKIP

    Args:
        root: the folder CUB_200_2011, the published tgz or a zip of it, or the folder that holds one of the first two.
        split: "closer-look", the rule of Chen et al. above; or the names of the classes, as for `load_image_folder`.
        image_size, stream: as for `load_image_folder`.
    Raises:
        ArgumentError, DataError: as `load_image_folder`; or an unsafe or broken file.
    """
    decoding = decoding_of(image_size)
    base = Path(root).expanduser()
    base = next((place for place in (base / _FOLDER, base / _ARCHIVE) if place.exists()), base)
    if not base.exists():
        raise DataError(f"CUB was not found at '{base}'. {_HOW_TO_GET}")
    files = files_at(base, MAX_IMAGE_BYTES)
    classes = _classes(files, f"{_FOLDER}/" if base.is_file() else "")
    names = list(classes)
    rule = split == "closer-look"
    parts = [names[0::2], names[1::4], names[3::4]] if rule else split_as_given(names, split)
    if not all(parts):
        raise DataError(f"CUB: {len(names)} classes are too few for the split of Chen et al.; 4 are needed.")
    origin = f"CUB-200-2011, split {'of Chen et al. 2019' if rule else 'by name'}"
    chosen = ({name: classes[name] for name in part} for part in parts)
    return as_splits([file_classes(files, part, decoding, origin) for part in chosen], stream)


def _classes(files: ImageFiles, prefix: str) -> dict[str, list[str]]:
    """Class name -> its files, classes in the order of their names."""
    images, labels, classes = (_table(files, prefix + name) for name in _TABLES)
    found: dict[str, list[str]] = {name: [] for name in sorted(classes.values())}
    for number, image in images.items():
        check_name(image, "'images.txt'")
        if labels.get(number) not in classes:
            raise DataError(f"image_class_labels.txt has no known class for image {number}, '{image}'. {_HOW_TO_GET}")
        found[classes[labels[number]]].append(f"{prefix}images/{image}")
    if empty := [name for name, own in found.items() if not own]:
        raise DataError(f"images.txt has no image of '{empty[0]}'. {_HOW_TO_GET}")
    return {name: sorted(own) for name, own in found.items()}


def _table(files: ImageFiles, name: str) -> dict[str, str]:
    """The lines of a table, each a number and a value."""
    rows = [line.split(maxsplit=1) for line in decoded(files.read(name), name).splitlines() if line.strip()]
    for place, row in enumerate(rows, start=1):
        if len(row) != 2:
            raise DataError(f"'{name}' line {place}: expected a number and a value, but got '{row[0][:60]}'.")
    table = {number: value.strip() for number, value in rows}
    if len(table) != len(rows):
        raise DataError(f"'{name}' has a number twice. {_HOW_TO_GET}")
    return table
