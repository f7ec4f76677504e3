"""Normalising images by a mean and a standard deviation per channel, as published experiments do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from metawrap.data.problems import wrong_argument

Normalise: TypeAlias = str | tuple[Sequence[float], Sequence[float]] | None

# Mean and standard deviation of ImageNet's training images in [0, 1]: red, green, blue. Torchvision's pretrained models
# document these numbers, and MAML++ (arXiv:1810.09502) normalises mini-ImageNet with them.
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def statistics_of(normalise: Normalise, channels: int) -> tuple[Tensor, Tensor] | None:
    """Mean and standard deviation as float32 of shape (channels, 1, 1), or None for images in [0, 1].

    Raises:
        ArgumentError: an unknown name, numbers for another number of channels, or a deviation that is not above 0.
    """
    if normalise is None:
        return None
    if isinstance(normalise, str):
        if normalise != "imagenet":
            kinds = "None, 'imagenet', or (mean, deviation) with a number for each channel"
            raise wrong_argument("normalise", kinds, normalise)
        normalise = IMAGENET
    numbers = [_numbers(part) for part in normalise] if isinstance(normalise, tuple | list) else []
    if len(numbers) != 2 or any(part is None or len(part) != channels for part in numbers):
        fix = "Pass None, or (mean, deviation) of that length."
        raise wrong_argument("normalise", f"a mean and a deviation for each of {channels} channels", normalise, fix)
    mean, deviation = (torch.tensor(part, dtype=torch.float32).view(-1, 1, 1) for part in numbers)
    if not bool((deviation > 0).all()) or not bool(torch.isfinite(torch.cat([mean, deviation])).all()):
        raise wrong_argument("normalise", "finite numbers and deviations above 0", normalise)
    return mean, deviation


def normalised(pixels: Tensor, statistics: tuple[Tensor, Tensor] | None, turned: bool = False) -> Tensor:
    """Pixels, uint8 or floats in [0, 1], of shape (..., channels, height, width) as a network's float32 input.

    Args:
        statistics: mean and deviation of `statistics_of`, on the device of the pixels; None leaves [0, 1].
        turned: whether the channels change from RGB to BGR.
    """
    # A product: CUDA turns a division by a number into a product, and the CPU's last bit would differ from it.
    scale = 1 / 255 if pixels.dtype == torch.uint8 else None
    pixels = (pixels.flip(-3) if turned else pixels).to(torch.float32, copy=True)
    pixels = pixels if scale is None else pixels.mul_(scale)
    if statistics is None:
        return pixels
    mean, deviation = statistics
    return pixels.sub_(mean).div_(deviation)


def _numbers(part: Any) -> list[float] | None:
    if isinstance(part, Tensor) or hasattr(part, "tolist"):
        part = part.tolist()
    good = isinstance(part, tuple | list) and all(isinstance(each, int | float) for each in part)
    return [float(each) for each in part] if good else None
