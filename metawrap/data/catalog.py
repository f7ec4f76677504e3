"""load_data: a name or a path -> the loader of that data set -> DataSplits."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from metawrap.data.cifar import load_cifar_fs, load_fc100
from metawrap.data.cub import load_cub
from metawrap.data.folder import load_image_folder
from metawrap.data.glyphs import load_glyphs
from metawrap.data.grocery import load_grocery
from metawrap.data.image_sets import DataSplits
from metawrap.data.mini_imagenet import load_mini_imagenet
from metawrap.data.normalisation import IMAGENET
from metawrap.data.omniglot import load_omniglot
from metawrap.data.preprocessing import Interpolation, Preprocessing
from metawrap.data.tiered_imagenet import load_tiered_imagenet
from metawrap.errors import ArgumentError, DataError

DATASETS: dict[str, Callable[..., DataSplits]] = {
    "cifar-fs": load_cifar_fs,
    "cub": load_cub,
    "fc100": load_fc100,
    "glyphs": load_glyphs,
    "grocery": load_grocery,
    "mini-imagenet": load_mini_imagenet,
    "omniglot": load_omniglot,
    "tieredimagenet": load_tiered_imagenet,
}
# The data sets that download=True fetches.
DOWNLOADED = frozenset({"cifar-fs", "fc100", "omniglot"})
_GRAY = frozenset({"glyphs", "omniglot"})
# The normalisation of published experiments with photographs; other images stay in [0, 1].
_NORMALISED = {"mini-imagenet": "imagenet", "tieredimagenet": "imagenet", "cub": "imagenet", "grocery": "imagenet"}


def load_data(name_or_path: str | Path, root: str | Path | None = None, **options: Any) -> DataSplits:
    """A named data set, or a folder or archive of class folders.

        >>> splits = load_data("glyphs", classes=(6, 2, 3))
        >>> [part.num_classes for part in splits]
        [6, 2, 3]

    Args:
        name_or_path: a name in `DATASETS`, or a path for `load_image_folder`. A name wins over a folder
            of the same name; write "./omniglot" for the folder.
        root: the place of a named data set's files; "glyphs" has none.
        options: passed on to load_omniglot, load_mini_imagenet, load_image_folder, ...
    Raises:
        ArgumentError: an option or a root that the data set does not take, or a missing root.
        DataError: no data set and no folder has this name, or loading it failed.
    """
    name = str(name_or_path)
    if name in DATASETS:
        loader = DATASETS[name]
        given = options if root is None else {"root": root, **options}
    elif root is None and Path(name).expanduser().exists():
        loader, given = load_image_folder, {"root": name, **options}
    else:
        raise DataError(
            f"'{name}' is neither a data set ({', '.join(sorted(DATASETS))}) nor an existing folder or archive"
            f"{'' if root is None else ' (root is only for named data sets)'}. {advice(name)}"
        )
    _check_options(name, loader, given)
    return loader(**given)


def normalisation_of(name: str) -> str | None:
    """The normalisation of this data set in published experiments, for `EpisodeSampler(normalise=...)`.

    >>> normalisation_of("cub"), normalisation_of("omniglot")
    ('imagenet', None)
    """
    return _NORMALISED.get(name)


def preprocessing_of(name: str) -> Preprocessing:
    """The preprocessing of this data set, or of a folder, in published experiments and by default.

    >>> preprocessing_of("omniglot").size, preprocessing_of("cub").deviation
    ((28, 28), (0.229, 0.224, 0.225))
    """
    side = inspect.signature(DATASETS.get(name, load_image_folder)).parameters["image_size"].default
    if name in _GRAY:
        interpolation: Interpolation = "nearest" if name == "omniglot" else "lanczos"
        return Preprocessing(size=(side, side), channels=1, interpolation=interpolation)
    mean, deviation = IMAGENET if normalisation_of(name) else ((), ())
    return Preprocessing(size=(side, side), mean=mean, deviation=deviation)


def advice(name: str) -> str:
    """Advice about a name that is no data set: the nearest known name, if there is one."""
    near = difflib.get_close_matches(name.lower().replace("_", "-"), list(DATASETS), n=1, cutoff=0.5)
    if near:
        return f"Did you mean '{near[0]}'?"
    return f"Name a folder, or one of {', '.join(DATASETS)}; their files go into root (--data-root)."


def _check_options(name: str, loader: Callable[..., DataSplits], given: dict[str, Any]) -> None:
    parameters = inspect.signature(loader).parameters
    unknown = [option for option in given if option not in parameters]
    if unknown:
        raise ArgumentError(f"'{name}' does not take {', '.join(unknown)}. It takes {', '.join(parameters)}.")
    if "root" in parameters and parameters["root"].default is inspect.Parameter.empty and "root" not in given:
        raise ArgumentError(f"'{name}' needs root: pass the folder with its files (--data-root).")
