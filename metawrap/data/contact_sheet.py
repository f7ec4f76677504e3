"""One episode as a picture: a row for each class, support images on the left, target images on the right."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from metawrap.data.episodes import EpisodeSampler

_CELL, _GAP, _NAME, _HEAD = 84, 6, 190, 30
_INK, _FAINT, _PAPER = (25, 30, 36), (120, 128, 138), (255, 255, 255)


def contact_sheet(sampler: EpisodeSampler, index: int = 0) -> Image.Image:
    """The first task of the sampler's batch `index`; the sampler must not normalise.

        >>> from metawrap.data import load_glyphs
        >>> contact_sheet(EpisodeSampler(load_glyphs((6, 2, 3)).train, ways=3)).size
        (388, 306)

    Raises:
        DataError: an image of the task cannot be read.
    """
    task = sampler.batch(index)[0]
    names = [sampler.images.class_names[number % sampler.images.num_classes] for number in task.classes or ()]
    columns = sampler.shots + sampler.targets
    width = _NAME + columns * (_CELL + _GAP) + 3 * _GAP
    sheet = Image.new("RGB", (width, _HEAD + sampler.ways * (_CELL + _GAP) + _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=15)
    first_target = _NAME + sampler.shots * (_CELL + _GAP) + 2 * _GAP
    draw.text((_NAME, 7), "support", _FAINT, font)
    draw.text((first_target, 7), "target", _FAINT, font)
    for row, name in enumerate(names):
        top = _HEAD + row * (_CELL + _GAP)
        draw.text((_GAP, top + _CELL // 2 - 9), _shown(name), _INK, font)
        _paste(sheet, task.support_x[task.support_y == row], _NAME, top)
        _paste(sheet, task.target_x[task.target_y == row], first_target, top)
    line = first_target - _GAP - _GAP // 2
    draw.line([(line, 4), (line, sheet.height - _GAP)], (210, 214, 220), 1)
    return sheet


def _paste(sheet: Image.Image, images: Tensor, left: int, top: int) -> None:
    for place, image in enumerate(images):
        pixels = np.asarray((image * 255).round().byte().cpu().permute(1, 2, 0))
        pixels = pixels[:, :, :3] if pixels.shape[2] >= 3 else pixels[:, :, 0]
        cell = Image.fromarray(np.ascontiguousarray(pixels)).convert("RGB")
        small = max(cell.size) < _CELL
        cell = cell.resize((_CELL, _CELL), Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS)
        sheet.paste(cell, (left + place * (_CELL + _GAP), top))


def _shown(name: str) -> str:
    plain = "".join(sign if sign.isprintable() else "?" for sign in name)
    return plain if len(plain) <= 22 else f"{plain[:10]}…{plain[-11:]}"  # Both ends tell classes apart.
