"""load_data: one word, or a path, to a data set."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from metawrap.data.folder import load_image_folder
from metawrap.data.glyphs import load_glyphs
from metawrap.data.omniglot import load_omniglot
from metawrap.data.splits import DataSplits
from metawrap.errors import ArgumentError, DataError

DATASETS: dict[str, Callable[..., DataSplits]] = {"glyphs": load_glyphs, "omniglot": load_omniglot}


def load_data(name_or_path: str | Path, root: str | Path | None = None, **options: Any) -> DataSplits:
    """A named data set, or a folder of class folders.

    Args:
        name_or_path: "glyphs", "omniglot", or the path of a folder for `load_image_folder`. A name wins over a folder
            of the same name; write "./omniglot" for the folder.
        root: where the files of a named data set lie; "glyphs" has none.
        options: passed on to load_glyphs, load_omniglot or load_image_folder.
    Raises:
        ArgumentError: an option or a root that the data set does not take.
        DataError: no data set and no folder has this name, or loading it failed.
    """
    name = str(name_or_path)
    if name in DATASETS:
        loader = DATASETS[name]
        given = options if root is None else {"root": root, **options}
    elif root is None and Path(name).expanduser().is_dir():
        loader, given = load_image_folder, {"root": name, **options}
    else:
        raise DataError(
            f"'{name}' is neither a data set ({', '.join(sorted(DATASETS))}) nor an existing folder"
            f"{'' if root is None else ' (root is only for named data sets)'}. "
            "A zip of Omniglot is load_data('omniglot', root=<zip>)."
        )
    _check_options(name, loader, given)
    return loader(**given)


def _check_options(name: str, loader: Callable[..., DataSplits], given: dict[str, Any]) -> None:
    known = list(inspect.signature(loader).parameters)
    unknown = [option for option in given if option not in known]
    if unknown:
        raise ArgumentError(f"'{name}' does not take {', '.join(unknown)}. It takes {', '.join(known)}.")
