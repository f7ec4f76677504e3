"""Small data sets whose every image is known."""

from __future__ import annotations

import hashlib
import io
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from metawrap.data import LabelledImages
from metawrap.tasks import TaskBatch

ALPHABETS = {"images_background": {"Greek": 3, "Latin": 2, "Runes": 2}, "images_evaluation": {"Braille": 2, "Ogham": 1}}
DRAWERS = 3


def numbered_images(classes: int = 6, per_class: int = 5, side: int = 4, channels: int = 1) -> LabelledImages:
    """No two images, and no two quarter turns of them, are equal; classes are interleaved, not grouped."""
    pixels = np.random.RandomState(3).randint(0, 256, (classes * per_class, channels, side, side), dtype=np.uint8)
    labels = torch.arange(classes).repeat(per_class)
    return LabelledImages(torch.from_numpy(pixels), labels, tuple(f"class{index}" for index in range(classes)))


def checksum(batch: TaskBatch) -> str:
    digest = hashlib.sha256()
    for task in batch:
        for part in task.parts():
            digest.update(part.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def png(number: int, side: int = 105) -> bytes:
    ink = np.random.RandomState(number).rand(side, side) < 0.3
    file = io.BytesIO()
    Image.fromarray(~ink).save(file, "PNG")
    return file.getvalue()


def omniglot_files() -> dict[str, bytes]:
    """Ten characters of five alphabets in torchvision's layout, 1-bit, 105 x 105."""
    files: dict[str, bytes] = {}
    character = 0
    for part, alphabets in ALPHABETS.items():
        for alphabet, count in alphabets.items():
            for place in range(1, count + 1):
                character += 1
                for drawer in range(1, DRAWERS + 1):
                    name = f"omniglot-py/{part}/{alphabet}/character{place:02d}/{character:04d}_{drawer:02d}.png"
                    files[name] = png(character * 100 + drawer)
    return files


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def make_image_folder(root: Path, classes: range | list[int], images: int = 2, suffix: str = "png") -> Path:
    """Every class is one flat colour, which survives any resize."""
    for number in classes:
        folder = root / f"class{number:03d}"
        folder.mkdir(parents=True)
        for image in range(images):
            Image.new("RGB", (9 + image, 7), (number, 2 * number, 200)).save(folder / f"{image}.{suffix}")
    return root


def zipped(folder: Path, path: Path, prefix: str = "") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, prefix + file.relative_to(folder).as_posix())
    return path
