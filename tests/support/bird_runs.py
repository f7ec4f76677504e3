"""A folder of small images with twenty classes, and quick runs on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = [f"bird{number:02d}" for number in range(20)]
# By seed, 13 classes train, 3 validate and 4 test; one class more moves others between the parts.
FLAGS = [
    *("--data", "birds", "--method", "protonet", "--image-size", "16", "--filters", "2", "--ways", "2"),
    *("--device", "cpu", "--epochs", "2", "--iterations", "1", "--batch", "1"),
    *("--validation-tasks", "2", "--test-tasks", "2"),
]
MAML = [*FLAGS, "--method", "maml", "--ways", "3", "--inner-steps", "1"]


def write_class(folder: Path, name: str, images: int = 2) -> None:
    (folder / name).mkdir(parents=True)
    for place in range(images):
        pixels = np.random.RandomState([*name.encode(), place]).randint(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name / f"{place}.png")


def write_birds(folder: Path, classes: list[str] = CLASSES) -> None:
    for name in classes:
        write_class(folder, name)
