"""A PIL image, tensor or array of one picture -> bytes of shape (height, width, channels). Nothing is guessed."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from metawrap.data.image_sets import Pixels
from metawrap.data.pictures import GRAY, RGB, plain
from metawrap.data.problems import wrong_argument
from metawrap.errors import ArgumentError, DataError
from metawrap.tasks import describe_value


def bytes_of(
    image: Any, name: str, channels: str | None = None, fix: str = "Pass channels='first' or channels='last'."
) -> Pixels:
    """An image of any accepted kind as uint8 of shape (height, width, channels), at its own size.

    Args:
        channels: "first" or "last", where the shape alone does not tell; None asks the shape.
        fix: the remedy where it does not tell.
    Raises:
        ArgumentError, DataError: another kind of object, channels at an unknown place, or pixels in another range.
    """
    usual = "first" if isinstance(image, Tensor) else "last"
    if isinstance(image, Image.Image):
        plain_image = plain(image, name)
        array = np.asarray(plain_image if plain_image.mode == "L" else plain_image.convert("RGB"))
    elif isinstance(image, Tensor | np.ndarray):
        array = image.detach().cpu().numpy() if isinstance(image, Tensor) else image
    else:
        array = np.empty(())
    if array.ndim not in (2, 3) or 0 in array.shape:
        raise DataError(
            f"{name}: expected a PIL image, a tensor (channels, height, width) or an array (height, width, channels), "
            f"but got {describe_value(image)}. Let the data set, or its transform, return one."
        )
    if channels is not None and (array.ndim == 2 or isinstance(image, Image.Image)):
        raise wrong_argument("channels", f"None, because {name} has no axis of channels", channels, "Leave it out.")
    if array.ndim == 3 and not isinstance(image, Image.Image):
        place = channels or _place_of_channels(array, usual, name, fix)
        array = np.moveaxis(array, 0, 2) if place == "first" else array
    array = array[:, :, None] if array.ndim == 2 else array
    return _in_bytes(array, name)


def _place_of_channels(array: NDArray[Any], usual: str, name: str, fix: str) -> str:
    """The usual place of the channels, or ArgumentError where the shape may mean another."""
    own, other = (array.shape[0], array.shape[2]) if usual == "first" else (array.shape[2], array.shape[0])
    if own in (GRAY, RGB, 4) and other not in (GRAY, RGB):
        return usual
    kind = "A tensor" if usual == "first" else "An array"
    raise ArgumentError(
        f"channels: {name} has the shape {array.shape}. {kind} is read with its channels {usual}, which would be "
        f"{own} channels, but the shape does not tell that for sure. {fix}"
    )


def _in_bytes(array: NDArray[Any], name: str) -> NDArray[np.uint8]:
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    low, high = (float(array.min()), float(array.max())) if array.dtype.kind in "fiu" else (np.nan, np.nan)
    if array.dtype.kind != "f" or not (low >= 0 and high <= 1):
        fix = "Divide them by their white, or convert them to uint8."
        if low < 0:
            fix = "Take Normalize out of the transform, and pass normalise= to EpisodeSampler instead."
        raise DataError(
            f"{name}: expected uint8, bool or floats in [0, 1], but got {array.dtype} from {low:g} to {high:g}. {fix}"
        )
    return np.asarray(np.rint(array * 255), dtype=np.uint8)
