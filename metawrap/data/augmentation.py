"""Augmentation of episodes: each drawn image by itself -> the user's transform -> an image of the episode."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metawrap.data.image_sets import ImageSet, Pixels
from metawrap.data.problems import wrong_argument
from metawrap.data.random_stream import RandomStream, seeded_generators
from metawrap.errors import ArgumentError
from metawrap.tasks import describe_value

# An image, uint8 of shape (channels, height, width) -> uint8, or floats in [0, 1], of as many channels.
Augment: TypeAlias = Callable[[Tensor], Tensor]
_TRIALS = 67  # A prime: a function that counts its calls is at another place the second time.


def check_augment(augment: Augment, images: ImageSet) -> None:
    """Tries a transform on noise of the images' shape.

    Raises:
        ArgumentError: it is no function, fails, returns no image, or draws from a random generator of its own, so that
            the same seed would not give the same episodes.
    """
    if not callable(augment):
        raise wrong_argument("augment", "a function or transform of one image", augment)
    # Noise shows a change that an image, which may be symmetric or plain, hides.
    trials = np.repeat(RandomStream("noise").raw(1, *images.image_shape).astype(np.uint8), _TRIALS, axis=0)
    made = []
    for _ in range(2):
        with seeded_generators("augment"):
            made.append(augmented(trials, augment))
    if not np.array_equal(made[0], made[1]):
        raise ArgumentError(
            "augment: expected the same result from the same state of the global random generators, but it differs. "
            "Let it draw from torch's, NumPy's or Python's global generator, not from one of its own."
        )


def augmented(pixels: Pixels, augment: Augment) -> NDArray[np.uint8] | NDArray[np.float32]:
    """Each image of (images, channels, height, width) by a draw of its own; floats in [0, 1] unless all are uint8.

    Raises:
        ArgumentError: the transform fails, or returns another thing than an image, or images of several sizes.
    """
    made = [_augmented(torch.from_numpy(image.copy()), augment) for image in pixels]
    if len(shapes := {tuple(image.shape) for image in made}) > 1:
        raise ArgumentError(f"augment: expected images of one size, but got {sorted(shapes)[:3]}. Crop or resize them.")
    if all(image.dtype == torch.uint8 for image in made):
        return torch.stack(made).numpy()
    # The product is that of the sampler for images that are not augmented.
    scaled = [image.float().mul_(1 / 255) if image.dtype == torch.uint8 else image.float() for image in made]
    return torch.stack(scaled).numpy()


def _augmented(image: Tensor, augment: Augment) -> Tensor:
    try:
        result = augment(image)
    except Exception as error:  # The user's transform may raise anything.
        raise ArgumentError(
            f"augment: it fails on a uint8 tensor of shape {tuple(image.shape)}: {' '.join(str(error).split())[:200]}. "
            "Pass a transform of tensors, such as those of torchvision.transforms.v2."
        ) from error
    kind_is_right = isinstance(result, Tensor) and (result.dtype == torch.uint8 or result.is_floating_point())
    if not kind_is_right or result.ndim != 3 or result.shape[0] != image.shape[0] or result.numel() == 0:
        expected = f"an image as a tensor ({image.shape[0]}, height, width), uint8 or floats in [0, 1], as the result"
        raise wrong_argument("augment", expected, result)
    result = result.detach().cpu()
    if result.is_floating_point() and not (result.min() >= 0 and result.max() <= 1):
        raise ArgumentError(
            f"augment: expected floats in [0, 1] as the result, but got {describe_value(result)} from "
            f"{float(result.min()):g} to {float(result.max()):g}. Clamp them; to normalise, pass normalise= to the "
            "EpisodeSampler."
        )
    return result
