"""One picture, as a file or a PIL image, -> eight bits per channel, as people see it.

The picture is turned as its EXIF says; transparent pixels become white; 16 bits and floats in [0, 1] are scaled to
0..255. A picture whose range is unknown, or of which nothing would be left, is refused.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from metawrap.data.image_sets import Pixels
from metawrap.data.problems import check_no_page
from metawrap.errors import DataError

GRAY, RGB = 1, 3
MAX_IMAGE_PIXELS = 2**26
MAX_IMAGE_BYTES = 64 * 2**20
# Names of files that are read as pictures. Pillow reads HEIF with a plugin of the user's; without it, such a file is an
# error, because half of a phone's photographs would be missing.
IMAGE_SUFFIXES = (
    *(".avif", ".bmp", ".dib", ".gif", ".heic", ".heif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm"),
    *(".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"),
)
_FORMATS = ("AVIF", "BMP", "DIB", "GIF", "HEIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")
_ORIENTATION, _PHOTOMETRIC = 274, 262  # tags of EXIF and TIFF
_WHITE = 65535
# A 16-bit picture with no more than this keeps 16 of 256 levels: most often 12 bits of a camera in a file of 16.
_TOO_DARK = 4095
_FAINT, _DISTINCT = 8, 64  # levels


@dataclass(frozen=True)
class Decoding:
    """The way from a picture to its pixels, see `Preprocessing`; pictures of more than `max_pixels` are refused."""

    size: tuple[int, int]
    channels: int = RGB
    resize: str = "squeeze"
    crop_fraction: float = 1.0
    interpolation: str = "lanczos"
    max_pixels: int = MAX_IMAGE_PIXELS

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of a decoded image: (channels, height, width)."""
        return self.channels, *self.size


def decode_image(content: bytes, name: str, decoding: Decoding, remarks: list[str] | None = None) -> Pixels:
    """A picture as uint8 of shape (channels, height, width).

    Args:
        remarks: the list to which the conversions of `plain` are added.
    Raises:
        DataError: the content is no picture of a known format, is cut short, its header claims more than `max_pixels`
            pixels, or `plain` refuses it.
    """
    check_no_page(content, name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of huge headers, which are refused here.
            # Without a list, Pillow would start Ghostscript for a PostScript file, whatever its name.
            with Image.open(io.BytesIO(content), formats=_known_formats()) as image:
                # Only the header is read at this point, so a decompression bomb is stopped before its pixels.
                check_pixels(image, name, decoding.max_pixels)
                if remarks is not None and image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
                    remarks.append("several frames, of which the first is read")
                return fitted(plain(image, name, remarks), name, decoding)
    except DataError:
        raise
    except UnidentifiedImageError as error:  # Its message names an object in memory.
        known = ", ".join(_known_formats())
        raise DataError(
            f"'{name}' is not a readable image: no known format ({known}). Convert, replace or remove it."
        ) from error
    except Exception as error:  # Pillow's decoders raise errors of many kinds for broken files.
        raise DataError(f"'{name}' is not a readable image: {error}. Replace or remove it.") from error


def plain(image: Image.Image, name: str, remarks: list[str] | None = None) -> Image.Image:
    """The picture in mode L, RGB or another mode of eight bits that Pillow converts without loss of meaning.

    Raises:
        DataError: numbers without a known white, or a picture that is white on a transparent ground.
    """
    done = [] if remarks is None else remarks
    kind, white_is_zero = image.format, getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0
    # Of colours with 16 bits, Pillow keeps the upper eight; only the tiles of a file that is not yet read tell.
    deep = any(";16" in str(tile[3]) for tile in getattr(image, "tile", []))
    image.load()  # So that an error of getexif is one of EXIF alone.
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # As of broken pixels, Pillow raises errors of many kinds.
        orientation = None
        done.append("an unreadable EXIF, so not turned")
    if orientation in range(2, 9):
        done.append("an orientation in EXIF, turned upright")
        image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        return _scaled(image, name, kind, white_is_zero, done)
    if deep:
        high = int(np.asarray(image.convert("RGB")).max())
        _check_sixteen_bits(256 * high + 255 if high else 0, name, done)
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        return _on_white(image, name, done)
    return image


def check_pixels(image: Image.Image, name: str, most: int) -> None:
    """Raises DataError if the header of a picture claims more than `most` pixels."""
    if image.width * image.height > most:
        raise DataError(
            f"'{name}' claims {image.width} x {image.height} pixels; at most {most} in all are accepted. Shrink or "
            "remove it."
        )


def fitted(picture: Image.Image, name: str, decoding: Decoding) -> Pixels:
    """A picture of eight bits, resized and cropped, as (channels, height, width).

    Both steps round as torchvision's Resize and CenterCrop do, so that the pixels are those of a network's training.
    """
    # Converted first, because Pillow resizes palette images by nearest neighbour always.
    picture = picture.convert("L" if decoding.channels == GRAY else "RGB")
    height, width = (round(side / decoding.crop_fraction) for side in decoding.size)
    if decoding.resize == "crop":
        if picture.width * height <= picture.height * width:
            height = width * picture.height // picture.width
        else:
            width = height * picture.width // picture.height
    if width * height > decoding.max_pixels:
        raise DataError(
            f"'{name}' has {picture.width} x {picture.height} pixels, and would be resized to {width} x {height}; at "
            f"most {decoding.max_pixels} in all are accepted. Cut it, or remove it."
        )
    resized = picture.resize((width, height), Image.Resampling[decoding.interpolation.upper()])
    top, left = round((height - decoding.size[0]) / 2), round((width - decoding.size[1]) / 2)
    return channels_first(resized.crop((left, top, left + decoding.size[1], top + decoding.size[0])))


def fitted_array(image: Pixels, name: str, decoding: Decoding) -> Pixels:
    """As `fitted`, for an array (height, width, 1 or 3)."""
    if (*image.shape[:2], image.shape[2], decoding.crop_fraction) == (*decoding.size, decoding.channels, 1.0):
        return np.ascontiguousarray(image.transpose(2, 0, 1))
    flat = image[:, :, 0] if image.shape[2] == GRAY else image
    return fitted(Image.fromarray(np.ascontiguousarray(flat)), name, decoding)


def channels_first(picture: Image.Image) -> Pixels:
    """A picture of eight bits as an array (channels, height, width)."""
    pixels = np.array(picture, dtype=np.uint8).reshape(picture.height, picture.width, -1)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _scaled(image: Image.Image, name: str, kind: str | None, white_is_zero: bool, done: list[str]) -> Image.Image:
    """16-bit numbers, or floats in [0, 1], as mode L."""
    values = np.asarray(image).astype(np.float64)
    low, high = float(values.min()), float(values.max())
    # Pillow has PNG and PGM pictures of 16 bits in numbers of 32 bits too, in some versions.
    if image.mode != "F" and (image.mode != "I" or kind in ("PNG", "PPM")):
        _check_sixteen_bits(_WHITE if white_is_zero else high, name, done)
        values /= _WHITE
    elif image.mode == "F" and low >= 0 and high <= 1:
        done.append("floats in [0, 1], scaled to 8 bits")
    else:
        numbers = "floats" if image.mode == "F" else "whole numbers of 32 bits"
        raise DataError(
            f"'{name}' holds {numbers} from {low:g} to {high:g}; expected 8 or 16 bits, or floats in [0, 1]. Scale and "
            "save it so."
        )
    if "transparency" in image.info:
        raise DataError(f"'{name}' has 16 bits and a transparent value, which is not read. Save it with 8 bits.")
    return Image.fromarray(np.rint((1 - values if white_is_zero else values) * 255).astype(np.uint8))


def _check_sixteen_bits(high: float, name: str, done: list[str]) -> None:
    if 0 < high <= _TOO_DARK:
        raise DataError(
            f"'{name}' has 16 bits, but no value above {high:g} of {_WHITE}, so it would become nearly black. "
            "Multiply its values (by 16 for a camera of 12 bits), or save it with 8 bits."
        )
    dim = high < (_WHITE + 1) // 4
    done.append("16 bits, scaled to 8" + (", and no value above a quarter of white" if dim else ""))


def _on_white(image: Image.Image, name: str, done: list[str]) -> Image.Image:
    colours = image.convert("RGBA")
    alpha = colours.getchannel("A")
    if alpha.getextrema() == (255, 255):
        return image.convert("RGB")
    done.append("transparency, shown on white")
    shown = Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours).convert("RGB")
    if _span(shown) < _FAINT and max(_span(alpha), _span(colours.convert("RGB"))) >= _DISTINCT:
        raise DataError(
            f"'{name}' has transparent pixels, and nothing of it can be seen on white. Paint it on another ground, and "
            "save it without transparency."
        )
    return shown


def _span(image: Image.Image) -> int:
    low, high = image.convert("L").getextrema()
    return int(high) - int(low)  # type: ignore[arg-type]


def _known_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(kind for kind in _FORMATS if kind in Image.OPEN)
