"""The place of a data set's files: where the user says, in the cache folder, or downloaded by torchvision."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from metawrap.errors import DataError

_IN_THE_SHELL = " (In the shell, root= is --data-root.)"


def cache_folder() -> Path:
    """The folder of downloads without a root: $METAWRAP_DATA, else a folder in the user's cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "metawrap"
    return Path(os.environ.get("METAWRAP_DATA") or default)


def locate(
    root: str | Path | None,
    title: str,
    folder: str,
    archive: str,
    complete: Callable[[Path], bool],
    download: Callable[[str], None] | None,
    how_to_get: str,
) -> Path:
    """The `folder` or `archive` of a data set in `root`, or `root` itself if it is one of them; else DataError.

    complete: whether a folder holds the data set. download: fetches the data set into a folder, or None.
    """
    base = cache_folder() if root is None else Path(root).expanduser()
    for candidate in (base / folder, base, base / archive):
        if candidate.is_file() or complete(candidate):
            return candidate
    if download is None or base.suffix in (".zip", ".gz", ".tgz", ".tar"):
        raise DataError(f"{title} was not found at '{base}'. {how_to_get}{_IN_THE_SHELL}")
    try:
        download(str(base))
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"{title} could not be downloaded into '{base}': {error}. {how_to_get}{_IN_THE_SHELL}"
        ) from error
    return base / folder
