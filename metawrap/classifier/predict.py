"""Names what photos show, without metawrap: python predict.py PHOTO [PHOTO ...]

Needs torch (or, for model.onnx alone, onnxruntime), numpy and Pillow. The files beside this script are the classifier:
classifier.json (classes, preprocessing) and network.pt2 or model.onnx.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps


def pixels(
    photo: str, size: tuple[int, int], resize: str, crop_fraction: float, interpolation: str, channels: int, **_: Any
) -> Any:
    """A photo as the network was shown them: uint8 of shape (channels, height, width)."""
    image: Image.Image = ImageOps.exif_transpose(Image.open(photo))
    if image.mode.startswith("I"):  # 16 bits
        image = Image.fromarray(np.rint(np.asarray(image) / 65535 * 255).astype(np.uint8))
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if channels == 1 else "RGB")
    height, width = (round(side / crop_fraction) for side in size)
    if resize == "crop":
        if image.width * height <= image.height * width:
            height = width * image.height // image.width
        else:
            width = height * image.width // image.height
    image = image.resize((width, height), Image.Resampling[interpolation.upper()])
    top, left = round((height - size[0]) / 2), round((width - size[1]) / 2)
    image = image.crop((left, top, left + size[1], top + size[0]))
    return np.asarray(image).reshape(size[0], size[1], channels).transpose(2, 0, 1)


def load(folder: Path) -> tuple[list[str], Callable[[list[str]], Any]]:
    """The classes, and a function from photos to probabilities (photos, classes)."""
    about = json.loads((folder / "classifier.json").read_text(encoding="utf-8"))
    if (folder / "network.pt2").exists():
        import torch

        program = torch.export.load(folder / "network.pt2").module()

        def run(pictures: Any) -> Any:
            return program(torch.from_numpy(pictures)).detach().numpy()
    else:
        import onnxruntime

        session = onnxruntime.InferenceSession(folder / "model.onnx")

        def run(pictures: Any) -> Any:
            return session.run(None, {"pictures": pictures})[0]

    def probabilities(photos: list[str]) -> Any:
        shown = [np.ascontiguousarray(pixels(photo, **about["preprocessing"]))[None] for photo in photos]
        return np.concatenate([run(each) for each in shown])

    return about["classes"], probabilities


if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit("usage: python predict.py PHOTO [PHOTO ...]")
    classes, probabilities = load(Path(__file__).parent)
    broken = 0
    for photo in sys.argv[1:]:
        try:
            [row] = probabilities([photo])
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # Pillow's, of broken files.
            broken += 1
            print(f"{photo}: {error}", file=sys.stderr)
            continue
        best = int(row.argmax())
        print(f"{photo}\t{classes[best]}\t{row[best]:.4f}")
    sys.exit(2 if broken else 0)
