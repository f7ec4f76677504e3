"""Photos of coloured shapes, and networks that tell them apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from metawrap.data.preprocessing import Preprocessing

SIZE = 24
WAY = Preprocessing(size=(SIZE, SIZE), mean=(0.4, 0.5, 0.6), deviation=(0.2, 0.3, 0.25))
COLOURS = {"red": (200, 40, 40), "green": (40, 180, 60), "blue": (50, 60, 210)}


def photo(name: str, number: int, size: tuple[int, int] = (31, 37)) -> Image.Image:
    """A noisy picture of one colour with a brighter square, another one for each number."""
    rng = np.random.default_rng([number, *name.encode()])
    pixels = np.array(COLOURS[name]) + rng.normal(0, 25, (*size, 3))
    top, left = rng.integers(0, np.array(size) - 9)
    pixels[top : top + 9, left : left + 9] += 45
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def folder(place: Path, each: int = 4, names: tuple[str, ...] = tuple(COLOURS)) -> Path:
    """A folder of photos per class."""
    for name in names:
        (place / name).mkdir(parents=True)
        for number in range(each):
            photo(name, number).save(place / name / f"{number}.png")
    return place


class Net(nn.Module):
    """A small network on RGB images with a batch norm and a head."""

    def __init__(self, ways: int = 3) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(3))
        self.head = nn.Linear(72, ways)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).flatten(1))


def network(ways: int = 3) -> Net:
    """The network with the statistics of some photos, as a pretrained one has them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = Net(ways)
        made(torch.stack([WAY(photo(name, n)) for name in COLOURS for n in range(100, 104)]))
    return made.eval()
