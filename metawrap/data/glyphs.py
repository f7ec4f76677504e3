"""Glyphs: an endless family of generated pen-stroke characters; nothing has to be downloaded.

class number -> strokes through a few anchor points -> per image: wobbly anchors, smooth curve, slant, pen -> pixels.

Class i depends only on the seed, i, the size and the number of its images. The points are rounded to 1/64 pixel and
only added, multiplied and compared, so every platform draws the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from metawrap.data.image_sets import DataSplits, LabelledImages, Pixels
from metawrap.data.pictures import GRAY
from metawrap.data.preprocessing import ImageSize, decoding_of
from metawrap.data.problems import check_counts, check_int, wrong_argument
from metawrap.data.random_stream import Floats, RandomStream

# Strokes begin, turn and end at these points, as in letters: three columns, four rows, in a box of side 2 around 0.
_ANCHORS = np.array([[x, y] for y in (-1.0, -0.33, 0.33, 1.0) for x in (-0.8, 0.0, 0.8)])
# The eight corners of a ring; arcs and loops run along some of them.
_RING = np.array([[1, 0], [0.7, 0.7], [0, 1], [-0.7, 0.7], [-1, 0], [-0.7, -0.7], [0, -1], [0.7, -0.7]])
# The strokes of a class. A line has two points, a bend three or four with corners, a wave three or four without
# corners, and a ring is an arc or a loop. No class has one line only: too many such classes would look alike.
_SHAPES: tuple[tuple[str, ...], ...] = (
    *(("wave",), ("ring",), ("bend",)),
    *(("line", "ring"), ("ring", "wave"), ("bend", "line"), ("wave", "line"), ("ring", "ring"), ("bend", "ring")),
    *(("line", "line", "ring"), ("bend", "wave", "line"), ("line", "line", "line"), ("wave", "ring", "line")),
    *(("bend", "line", "line"), ("bend", "line", "ring", "line"), ("wave", "line", "line", "ring")),
)
_UNITS = 64  # steps per pixel that points are rounded to
_SAMPLES_PER_PIXEL = 0.8


@dataclass(frozen=True)
class _Stroke:
    points: Floats  # (points, 2)
    roundness: float  # 0: straight lines through the points; 1: a Catmull-Rom curve


def load_glyphs(
    classes: Sequence[int] = (240, 40, 80), images_per_class: int = 20, image_size: ImageSize = 28, seed: int = 0
) -> DataSplits:
    """Generated characters in the style of Omniglot: 255 for paper, 0 for ink, one channel.

        >>> train, validation, test = load_glyphs((6, 2, 3), images_per_class=4)
        >>> train.images.shape
        torch.Size([24, 1, 28, 28])

    Args:
        classes: number of classes in train, validation and test; they are numbered through, so no two sets share one.
        images_per_class: drawings of each class.
        image_size: side of the square images, in pixels; or a `Preprocessing`, of which size and channels count.
        seed: a non-negative integer; the same seed gives the same bytes on every platform.
    Raises:
        ArgumentError: a count is not an integer of at least 1, image_size of at least 8, or seed of at least 0.
    """
    counts = check_counts("classes", classes, 1)
    check_int("images_per_class", images_per_class, 1)
    (side, width), channels = decoding_of(image_size, GRAY).size, decoding_of(image_size, GRAY).channels
    if side != width or side < 8:
        raise wrong_argument("image_size", "an integer of at least 8, or a square", image_size)
    check_int("seed", seed, 0)
    starts = (0, counts[0], counts[0] + counts[1])
    parts = [
        _draw_classes(range(start, start + count), images_per_class, side, channels, seed)
        for start, count in zip(starts, counts, strict=True)
    ]
    return DataSplits(*parts)


def _draw_classes(numbers: range, images_per_class: int, image_size: int, channels: int, seed: int) -> LabelledImages:
    images = np.concatenate([draw_class(number, images_per_class, image_size, seed) for number in numbers])
    images = np.repeat(images, channels, axis=1)
    labels = torch.arange(len(numbers)).repeat_interleave(images_per_class)
    names = tuple(f"glyph{number:05d}" for number in numbers)
    known = tuple(f"{name} of seed {seed}, {images_per_class} images" for name in names)
    return LabelledImages(torch.from_numpy(images), labels, names, known=known)


def draw_class(number: int, count: int, image_size: int, seed: int) -> Pixels:
    """`count` drawings of one class, uint8 of shape (count, 1, image_size, image_size)."""
    random = RandomStream(seed, number)
    strokes = _make_strokes(random)
    lines = [_trace(stroke, _wobble(stroke, count, random), image_size) for stroke in strokes]
    points = _slant(np.concatenate(lines, axis=1), random)
    # On 28 pixels the pen is one to two pixels wide and sometimes broken, as in Omniglot after its resize.
    pen = image_size / 28 * random.uniform(count, low=0.5, high=0.8)
    return _ink((points + 1.0) * (image_size / 2), pen, image_size)[:, None]


def _make_strokes(random: RandomStream) -> list[_Stroke]:
    kinds = _SHAPES[int(random.uniform(1)[0] * len(_SHAPES))]
    strokes: list[_Stroke] = []
    for kind in kinds:
        points = (
            _ring(random)
            if kind == "ring"
            else _walk(2 if kind == "line" else 3 + int(random.uniform(1)[0] * 2), random)
        )
        attached, which, where = random.uniform(3).tolist()
        if strokes and attached < 0.65:
            # Most strokes of real characters begin on an earlier one.
            earlier = strokes[int(which * len(strokes))].points
            points = points + earlier[int(where * len(earlier))] - points[0]
        strokes.append(_Stroke(points, 0.0 if kind in ("line", "bend") else 1.0))
    everything = np.concatenate([stroke.points for stroke in strokes])
    low, high = everything.min(axis=0), everything.max(axis=0)
    size = (0.45 + 0.27 * random.uniform(1)[0]) / max(0.75, float((high - low).max()) / 2)
    return [_Stroke((stroke.points - (low + high) / 2) * size, stroke.roundness) for stroke in strokes]


def _walk(length: int, random: RandomStream) -> Floats:
    """Points (length, 2) that pass through anchors in one main direction, like the strokes of a hand."""
    points = _ANCHORS[random.permutation(len(_ANCHORS))[:length]] + random.uniform(length, 2, low=-0.2, high=0.2)
    direction = random.uniform(2, low=-1.0)
    return np.asarray(points[np.argsort((points * direction).sum(axis=1), kind="stable")], dtype=np.float64)


def _ring(random: RandomStream) -> Floats:
    """Points (4 to 9, 2) along an ellipse: a hook, a bow, or a closed loop."""
    start, span, backwards, which = random.uniform(4).tolist()
    corners = (int(start * 8) + np.arange(4 + int(span * 6))) % 8
    ring = _RING[corners] * random.uniform(2, low=0.35, high=0.8) + _ANCHORS[int(which * len(_ANCHORS))]
    return np.asarray(ring[::-1] if backwards < 0.5 else ring, dtype=np.float64)


def _wobble(stroke: _Stroke, count: int, random: RandomStream) -> Floats:
    """The stroke's points with a small error for each of `count` images: (count, points, 2)."""
    # The points of a ring are close together, so a line's error would crumple it.
    each_point = (0.03 if len(stroke.points) > 4 else 0.045) * random.bell(count, len(stroke.points), 2)
    whole_stroke = 0.04 * random.bell(count, 1, 2)
    return np.asarray(stroke.points + each_point + whole_stroke, dtype=np.float64)


def _trace(stroke: _Stroke, points: Floats, image_size: int) -> Floats:
    """Dense points along a cubic Hermite curve through the points: (images, samples, 2)."""
    longest = np.abs(np.diff(points, axis=1)).sum(axis=2).max() * image_size / 2
    steps = np.arange(0, 1, min(0.25, _SAMPLES_PER_PIXEL / 2 / max(longest, 1.0)))[:, None]
    padded = np.concatenate([points[:, :1], points, points[:, -1:]], axis=1)
    tangents = stroke.roundness * (padded[:, 2:] - padded[:, :-2])[:, :, None] / 2
    here, there = points[:, :-1, None], points[:, 1:, None]
    square, cube = steps * steps, steps * steps * steps
    curve = here * (2 * cube - 3 * square + 1) + there * (3 * square - 2 * cube)
    curve = curve + tangents[:, :-1] * (cube - 2 * square + steps) + tangents[:, 1:] * (cube - square)
    return np.asarray(curve.reshape(len(points), -1, 2), dtype=np.float64)


def _slant(points: Floats, random: RandomStream) -> Floats:
    """A small rotation, shear, stretch and shift of each image's points."""
    count = len(points)
    # The tangent of half the angle replaces the sine, whose last bit depends on the platform.
    half = 0.055 * random.bell(count, 1)
    cosine, sine = (1 - half * half) / (1 + half * half), 2 * half / (1 + half * half)
    shear = 0.12 * random.bell(count, 1)
    stretch = 1 + 0.13 * random.bell(count, 2)
    shift = 0.11 * random.bell(count, 2)
    x = points[:, :, 0] * stretch[:, :1] + shear * points[:, :, 1]
    y = points[:, :, 1] * stretch[:, 1:]
    turned = (cosine * x - sine * y + shift[:, :1], sine * x + cosine * y + shift[:, 1:])
    return np.stack(turned, axis=2)


def _ink(points: Floats, pen: Floats, size: int) -> Pixels:
    """Blackens every pixel whose centre is within the pen's radius of a point; points are (images, samples, 2)."""
    count = len(points)
    x, y = (np.rint(points[:, :, axis] * _UNITS).astype(np.int64) for axis in (0, 1))
    reach = np.rint(pen * _UNITS).astype(np.int64)[:, None] ** 2
    # A frame around the canvas catches ink outside the image, so the loop below needs no bounds.
    frame = int(pen.max()) + 1
    side = size + 2 * frame
    column, row = (np.clip(place // _UNITS, 0, size - 1) for place in (x, y))
    canvas = np.full(count * side * side, 255, dtype=np.uint8)
    base = np.arange(count)[:, None] * (side * side) + (row + frame) * side + column + frame
    for down in range(-frame, frame + 1):
        off_y = (row + down) * _UNITS + _UNITS // 2 - y
        for right in range(-frame, frame + 1):
            off_x = (column + right) * _UNITS + _UNITS // 2 - x
            canvas[(base + down * side + right)[off_x * off_x + off_y * off_y <= reach]] = 0
    return np.ascontiguousarray(canvas.reshape(count, side, side)[:, frame:-frame, frame:-frame])
