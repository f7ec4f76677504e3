"""Pixels of picture files: scaled, turned and laid on white as numpy says, or refused with the reason."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image
from published import noise
from refusals import refuses

from metawrap.data import load_image_folder, splits_from
from metawrap.data.pictures import Decoding, decode_image
from metawrap.errors import DataError

SIDE = 8
DEEP = np.linspace(0, 65535, SIDE * SIDE).astype(np.uint16).reshape(SIDE, SIDE)
COLOUR = noise(1, SIDE, SIDE, 3)[0]
FADING = noise(1, SIDE, SIDE, seed=4)[0]
NINTH = b"\1\x12\0\3\0\0\0\1\0\x09\0\0\0\0\0\0"  # an orientation that there is not
MASK = np.repeat([[255, 0]], SIDE, axis=0).repeat(SIDE // 2, axis=1).astype(np.uint8)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def folder_of(root: Path, content: bytes, suffix: str) -> Path:
    for name in "abc":
        (root / name).mkdir(parents=True)
        (root / name / f"0{suffix}").write_bytes(content)
    return root


def read(root: Path, content: bytes, suffix: str) -> np.ndarray:
    """(height, width, 3) of a file, as training has it."""
    train = load_image_folder(folder_of(root, content, suffix), image_size=SIDE).train
    return train.gather(np.array([0]))[0].permute(1, 2, 0).numpy()


def in_colour(gray: np.ndarray) -> np.ndarray:
    return np.repeat(np.rint(gray).astype(np.uint8)[:, :, None], 3, axis=2)


@pytest.mark.parametrize(
    ("kind", "suffix", "values"),
    [
        ("PNG", ".png", DEEP),
        ("TIFF", ".tif", DEEP),
        ("PPM", ".pgm", DEEP),
        ("JPEG2000", ".jp2", DEEP),
        ("TIFF", ".tiff", DEEP.astype(">u2")),
        ("PNG", ".png", np.full_like(DEEP, 40_000)),
        ("PNG", ".png", np.zeros_like(DEEP)),
    ],
)
def test_sixteen_bits_are_scaled_to_eight(tmp_path, kind, suffix, values) -> None:
    content = encoded(Image.fromarray(values), kind)
    np.testing.assert_array_equal(read(tmp_path, content, suffix), in_colour(values.astype(np.float64) * 255 / 65535))


def test_a_tiff_in_which_zero_is_white_is_turned_to_black_on_white(tmp_path) -> None:
    content = encoded(Image.fromarray(DEEP), "TIFF", tiffinfo={262: 0})
    np.testing.assert_array_equal(
        read(tmp_path, content, ".tif"), in_colour(255 - DEEP.astype(np.float64) * 255 / 65535)
    )


@pytest.mark.parametrize("values", [np.linspace(0, 1, 64), np.full(64, 0.5), np.zeros(64)])
def test_floats_from_0_to_1_are_scaled_to_eight_bits(tmp_path, values) -> None:
    values = values.reshape(SIDE, SIDE).astype(np.float32)
    content = encoded(Image.fromarray(values), "TIFF")
    np.testing.assert_array_equal(read(tmp_path, content, ".tif"), in_colour(values.astype(np.float64) * 255))


@pytest.mark.parametrize(
    ("values", "what"),
    [
        (DEEP // 16, "no value above 4095 of 65535"),
        (DEEP // 4096, "nearly black"),
        (DEEP.astype(np.float32), r"floats from 0 to 65535; expected 8 or 16 bits, or floats in \[0, 1\]"),
        (np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8), "floats from -1 to 1"),
        (np.full((8, 8), np.nan, np.float32), "floats from nan"),
        (DEEP.astype(np.int32), "whole numbers of 32 bits from 0 to 65535"),
    ],
)
def test_numbers_without_a_known_white_are_refused(tmp_path, values, what) -> None:
    refuses(DataError, what, read, tmp_path, encoded(Image.fromarray(values), "TIFF"), ".tif")


@pytest.mark.parametrize(("kind", "colours", "alphas"), [(2, 3, 0), (4, 1, 1), (6, 3, 1)], ids=["RGB", "LA", "RGBA"])
def test_twelve_bits_in_colours_of_sixteen_are_refused_as_in_gray(tmp_path, kind, colours, alphas) -> None:
    def png(values: np.ndarray) -> bytes:  # Pillow writes none of these.
        pixels = np.dstack([values] * colours + [np.full_like(values, 65535)] * alphas).astype(">u2")
        rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in pixels))
        content = b"\x89PNG\r\n\x1a\n"
        for head, body in ((b"IHDR", struct.pack(">IIBBBBB", SIDE, SIDE, 16, kind, 0, 0, 0)), (b"IDAT", rows)):
            content += struct.pack(">I", len(body)) + head + body + struct.pack(">I", zlib.crc32(head + body))
        return content + b"\0\0\0\0IEND\xaeB`\x82"

    np.testing.assert_array_equal(read(tmp_path / "bright", png(DEEP), ".png"), in_colour(DEEP >> 8))
    refuses(DataError, "no value above 4095 of 65535", read, tmp_path / "dark", png(DEEP >> 4), ".png")


# What a file of each orientation needs to stand upright, from the EXIF standard.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_pictures_stand_as_their_exif_says(tmp_path, orientation) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    image = Image.fromarray(COLOUR)
    for kind, suffix, options in (("PNG", ".png", {}), ("TIFF", ".tif", {}), ("WEBP", ".webp", {"lossless": True})):
        pixels = read(tmp_path / kind, encoded(image, kind, exif=exif, **options), suffix)
        np.testing.assert_array_equal(pixels, UPRIGHT[orientation](COLOUR))
    photo = encoded(image, "JPEG", exif=exif, quality=95)
    stored = np.asarray(Image.open(io.BytesIO(photo)))
    np.testing.assert_array_equal(read(tmp_path / "jpg", photo, ".jpg"), UPRIGHT[orientation](stored))


@pytest.mark.parametrize(("exif", "broken"), [(b"garbage!", 1), (b"MM\0*", 1), (b"MM\0*\0\0\0\x08\0\1" + NINTH, 0)])
def test_a_picture_with_a_broken_exif_is_read_with_a_remark_and_an_unknown_orientation_without(exif, broken) -> None:
    remarks: list[str] = []
    content = encoded(Image.fromarray(COLOUR), "PNG", exif=b"Exif\0\0" + exif)
    pixels = decode_image(content, "a", Decoding((SIDE, SIDE)), remarks)
    np.testing.assert_array_equal(pixels.transpose(1, 2, 0), COLOUR)
    assert remarks == ["an unreadable EXIF, so not turned"] * broken


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[:, :, None] / 255.0
    return colour * share + 255 * (1 - share)


def see_through(kind: str) -> tuple[bytes, np.ndarray]:
    """A PNG with transparency, and what is seen of it on white."""
    black = np.zeros((SIDE, SIDE), np.uint8)
    if kind == "LA":
        image = Image.merge("LA", [Image.fromarray(black), Image.fromarray(FADING)])
        return encoded(image, "PNG"), on_white(in_colour(black), FADING)
    if kind == "RGBA":
        image = Image.fromarray(np.dstack([COLOUR, FADING]))
        return encoded(image, "PNG"), on_white(COLOUR, FADING)
    if kind == "palette":
        image = Image.fromarray((MASK > 0).astype(np.uint8)).convert("P")
        image.putpalette([200, 0, 0, 0, 0, 0])
        return encoded(image, "PNG", transparency=0), in_colour(255.0 - MASK)
    gray = np.where(MASK > 0, 30, 90).astype(np.uint8)
    return encoded(Image.fromarray(gray), "PNG", transparency=90), in_colour(np.where(MASK > 0, 30.0, 255.0))


@pytest.mark.parametrize("kind", ["LA", "RGBA", "palette", "gray key"])
def test_transparent_pixels_show_white(tmp_path, kind) -> None:
    content, expected = see_through(kind)
    np.testing.assert_allclose(read(tmp_path, content, ".png").astype(float), expected, atol=1)


def test_an_opaque_alpha_changes_nothing(tmp_path) -> None:
    image = Image.fromarray(np.dstack([COLOUR, np.full_like(FADING, 255)]))
    np.testing.assert_array_equal(read(tmp_path, encoded(image, "PNG"), ".png"), COLOUR)


@pytest.mark.parametrize(
    ("colour", "alpha"), [(np.full_like(COLOUR, 255), MASK), (COLOUR, np.zeros_like(MASK)), (COLOUR | 252, FADING)]
)
def test_a_picture_that_vanishes_on_white_is_refused(tmp_path, colour, alpha) -> None:
    content = encoded(Image.fromarray(np.dstack([colour, alpha])), "PNG")
    refuses(DataError, r"'[abc]/0\.png' has transparent pixels, and nothing of it can", read, tmp_path, content, ".png")


@pytest.mark.parametrize(
    ("kind", "suffix"),
    [("JPEG", ".jfif"), ("JPEG", ".jpe"), ("AVIF", ".avif"), ("JPEG2000", ".jp2"), ("TGA", ".tga"), ("BMP", ".DIB")],
)
def test_pictures_of_other_suffixes_are_read(tmp_path, kind, suffix) -> None:
    content = encoded(Image.new("RGB", (SIDE, SIDE), (200, 100, 50)), kind)
    np.testing.assert_allclose(read(tmp_path, content, suffix).reshape(-1, 3).mean(0), (200, 100, 50), atol=3)


def test_links_to_nowhere_pipes_and_unreadable_kinds_are_named(tmp_path) -> None:
    root = folder_of(tmp_path, encoded(Image.fromarray(COLOUR), "PNG"), ".png")
    for name, make, what in (
        (
            "dead.jpg",
            lambda path: path.symlink_to("gone.jpg"),
            r"'a/dead\.jpg'.*a link to 'gone\.jpg', which is not there",
        ),
        ("pipe.png", os.mkfifo, r"'a/pipe\.png'.*missing, or no file"),
        ("phone.heic", lambda path: path.write_bytes(b"\0\0\0\x18ftypheic"), r"'a/phone\.heic'.*no known format"),
        ("page.jpg", lambda path: path.write_text("<!DOCTYPE html><html>no</html>"), r"'a/page\.jpg' is a web page"),
    ):
        make(root / "a" / name)
        refuses(DataError, what, load_image_folder, root, image_size=SIDE)
        (root / "a" / name).unlink()
    load_image_folder(root, image_size=SIDE)


def test_a_postscript_file_never_reaches_ghostscript(tmp_path, monkeypatch) -> None:
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *how, **options: started.append(how))
    content = encoded(Image.fromarray(COLOUR), "EPS")
    refuses(DataError, r"'[abc]/0\.png' is not a readable image: no known format", read, tmp_path, content, ".png")
    assert not started


def test_pil_images_of_a_data_set_are_converted_like_files() -> None:
    exif = Image.Exif()
    exif[274] = 6
    turned = Image.open(io.BytesIO(encoded(Image.fromarray(COLOUR), "PNG", exif=exif)))
    icon, expected_icon = see_through("LA")
    for image, expected in (
        (Image.fromarray(DEEP), in_colour(DEEP.astype(np.float64) * 255 / 65535)[:, :, :1]),
        (turned, UPRIGHT[6](COLOUR)),
        (Image.open(io.BytesIO(icon)), expected_icon),
    ):
        train = splits_from([(image, label) for label in "abc"]).train
        np.testing.assert_allclose(train.images[0].permute(1, 2, 0).numpy().astype(float), expected, atol=0.6)
