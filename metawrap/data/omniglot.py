"""Omniglot: 1623 hand-drawn characters of 50 alphabets, 20 drawers each; path -> names -> classes -> split -> pixels.

Source: Lake, Salakhutdinov, Tenenbaum 2015, Science 350. The `paper` split is the protocol of Antoniou et al. 2018,
arXiv:1810.09502; the `alphabet` split keeps whole alphabets apart, as Lake et al. do.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from metawrap.data.class_folders import ClassFiles
from metawrap.data.downloads import locate
from metawrap.data.image_files import files_at
from metawrap.data.image_sets import DataSplits
from metawrap.data.pictures import GRAY
from metawrap.data.pixel_sources import file_classes
from metawrap.data.preprocessing import ImageSize, decoding_of
from metawrap.data.problems import check_counts, check_int, check_seed, wrong_argument
from metawrap.data.random_stream import RandomStream
from metawrap.errors import DataError

MAX_IMAGE_BYTES = 2**20  # the largest real image has under 600 bytes
MAX_IMAGE_PIXELS = 2**20  # the real images have 105 x 105
_FILE = re.compile(r"(?:[^/]+/)?(images_background|images_evaluation)/([^/]+/[^/]+)/([^/.][^/]*\.png)")
# The folder of Antoniou et al. has all alphabets side by side, at most in one folder more.
_NESTED = re.compile(r"((?:[^/]+/)?)([^/.][^/]*/[^/]+)/([^/.][^/]*_[^/]*\.png)")
_HOW_TO_GET = (
    "Pass root=<omniglot-py.zip, or the folder that holds omniglot-py/>, or download=True, "
    "or use the data set 'glyphs', which needs no files."
)
_FRESH_COPY = "Get a fresh copy of the data set."


def load_omniglot(
    root: str | Path | None = None,
    *,
    split: str = "paper",
    image_size: ImageSize = 28,
    seed: int | str = "metawrap-omniglot-v1",
    counts: Sequence[int] = (1150, 50, 423),
    validation_alphabets: int = 5,
    download: bool = False,
) -> DataSplits:
    """Omniglot as bytes, 255 for paper and 0 for ink; nearest-neighbour resize, as in the authors' code.

        >>> train, validation, test = load_omniglot("path/to/omniglot-py.zip")  # doctest: +SKIP

    Args:
        root: a zip file or a folder in torchvision's layout, `omniglot-py/images_background/<alphabet>/<character>/`
            and `images_evaluation/`; the folder may be `omniglot-py` itself or its parent. Or all alphabets in one
            folder, `<alphabet>/<character>/`, which is enough for the paper split.
        split: "paper" sorts all classes by name, shuffles them once and cuts them by `counts`. "alphabet" tests on
            images_evaluation, validates on some whole alphabets of images_background and trains on the others.
        image_size: side of the square images, in pixels; or a `Preprocessing`.
        seed: names the shuffle; the same seed gives the same split on every platform.
        counts: classes in train, validation and test; only for the paper split.
        validation_alphabets: the number of alphabets to validate on; only for the alphabet split.
        download: fetch the data set with torchvision into `root` (default: a cache folder) if it is not there.
    Returns:
        Images of shape (images, 1, image_size, image_size); class names are "<alphabet>/<character>".
    Raises:
        ArgumentError: an unknown split, or a size, seed or count that is no integer in range.
        DataError: the files are missing, unsafe, broken or incomplete, or hold fewer classes than asked for.
    """
    decoding = decoding_of(image_size, GRAY, interpolation="nearest", max_pixels=MAX_IMAGE_PIXELS)
    check_int("validation_alphabets", validation_alphabets, 1)
    if split not in ("paper", "alphabet"):
        raise wrong_argument("split", "'paper' or 'alphabet'", split)
    check_seed(seed)
    with closing(files_at(_locate(root, download), MAX_IMAGE_BYTES)) as files:
        background, evaluation = _class_files(files.names())
        if split == "paper":
            parts = _split_by_count(background | evaluation, counts, seed)
        else:
            parts = _split_by_alphabet(background, evaluation, validation_alphabets, seed)
        origin = "Omniglot in torchvision's layout"
        return DataSplits(*(file_classes(files, part, decoding, origin).in_memory() for part in parts))


def _split_by_count(classes: ClassFiles, counts: Sequence[int], seed: int | str) -> list[ClassFiles]:
    train, validation, test = check_counts("counts", counts, 1)
    if train + validation + test > len(classes):
        raise DataError(
            f"counts={tuple(counts)} asks for {sum(counts)} classes, but the data set has {len(classes)}. "
            "Pass smaller counts, or get the full data set (1623 classes)."
        )
    names = sorted(classes)
    shuffled = [names[index] for index in RandomStream(seed).permutation(len(names))]
    parts = (shuffled[:train], shuffled[train : train + validation], shuffled[train + validation :][:test])
    return [{name: classes[name] for name in part} for part in parts]


def _split_by_alphabet(
    background: ClassFiles, evaluation: ClassFiles, held_out: int, seed: int | str
) -> list[ClassFiles]:
    alphabets = sorted({name.split("/")[0] for name in background})
    if len(alphabets) <= held_out or not evaluation:
        raise DataError(
            f"split='alphabet' needs images_evaluation (found {len(evaluation)} classes) and more than {held_out} "
            f"alphabets in images_background (found {len(alphabets)}). Get the full data set, or lower "
            "validation_alphabets."
        )
    chosen = {alphabets[index] for index in RandomStream(seed).permutation(len(alphabets))[:held_out]}
    train, validation = (
        {name: files for name, files in background.items() if (name.split("/")[0] in chosen) is validates}
        for validates in (False, True)
    )
    return [train, validation, evaluation]


def _class_files(names: list[str]) -> tuple[ClassFiles, ClassFiles]:
    """The classes of images_background and of images_evaluation, sorted by name."""
    parts: dict[str, ClassFiles] = {"images_background": {}, "images_evaluation": {}}
    for name in sorted(names):
        if match := _FILE.fullmatch(name):
            parts[match[1]].setdefault(match[2], []).append(name)
    if not any(parts.values()):
        nested = [match for name in sorted(names) if (match := _NESTED.fullmatch(name))]
        if len({match[1] for match in nested}) == 1:
            for match in nested:
                parts["images_background"].setdefault(match[2], []).append(match[0])
    background, evaluation = parts.values()
    if not background and not evaluation:
        raise DataError(f"No image at images_background/<alphabet>/<character>/*.png was found. {_HOW_TO_GET}")
    if shared := sorted(background.keys() & evaluation.keys()):
        raise DataError(f"Class '{shared[0]}' lies in both images_background and images_evaluation. {_FRESH_COPY}")
    # The same people drew every character: file names end in _<drawer>.png.
    drawers = {
        name: {file.removesuffix(".png").rpartition("_")[2] for file in files}
        for name, files in (background | evaluation).items()
    }
    everyone = set().union(*drawers.values())
    for name, present in drawers.items():
        if present != everyone:
            raise DataError(
                f"Class '{name}' has {len(present)} of {len(everyone)} images; "
                f"*_{min(everyone - present)}.png is missing. {_FRESH_COPY}"
            )
    return background, evaluation


def _locate(root: str | Path | None, download: bool) -> Path:
    def fetch(folder: str) -> None:
        from torchvision.datasets import Omniglot  # slow to import, and needed only here

        for background in (True, False):
            Omniglot(folder, background=background, download=True)

    # A download that was cut short leaves one of the two; one is enough for smaller counts.
    needed = ("images_background", "images_evaluation") if download else ("images_background",)
    return locate(
        root,
        "Omniglot",
        "omniglot-py",
        "omniglot-py.zip",
        lambda folder: all((folder / part).is_dir() for part in needed) or (not download and _has_alphabets(folder)),
        fetch if download else None,
        _HOW_TO_GET,
    )


def _has_alphabets(folder: Path) -> bool:
    return any(next(folder.glob(pattern), None) for pattern in ("*/*/*_*.png", "*/*/*/*_*.png"))
