"""One way from a picture to a network's input: `Preprocessing`, training and torchvision agree pixel for pixel."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from published import noise
from torchvision.transforms import InterpolationMode, functional
from torchvision.transforms._presets import ImageClassification

from metawrap.data import EpisodeSampler, Preprocessing, load_data, load_image_folder
from metawrap.data.normalisation import IMAGENET
from metawrap.errors import ArgumentError, DataError

TALL, WIDE = noise(1, 61, 40, 3, seed=1)[0], noise(1, 37, 70, 3, seed=2)[0]
DEEP = np.linspace(0, 65535, 61 * 40).astype(np.uint16).reshape(61, 40)
MASK = np.linspace(0, 255, 61 * 40).astype(np.uint8).reshape(61, 40)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def turned(image: Image.Image, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[274] = orientation
    return saved(image, "JPEG", quality=95, exif=exif)


def on_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Alpha composition by numpy, rounded to the nearest."""
    share = alpha[:, :, None] / 255
    return np.rint(colours * share + 255 * (1 - share)).astype(np.uint8)


def jpeg(image: np.ndarray) -> np.ndarray:
    """The pixels that a decoder gives for a JPEG of an image."""
    return np.asarray(Image.open(io.BytesIO(saved(Image.fromarray(image), "JPEG", quality=95))))


RGBA = np.concatenate([TALL, MASK[:, :, None]], axis=2)
# A file's content, and its pixels before resizing as NumPy has them.
PICTURES = {
    "png": (saved(Image.fromarray(TALL), "PNG"), TALL),
    "wide.png": (saved(Image.fromarray(WIDE), "PNG"), WIDE),
    "jpg": (saved(Image.fromarray(TALL), "JPEG", quality=95), jpeg(TALL)),
    "turned.jpg": (turned(Image.fromarray(TALL), 6), np.rot90(jpeg(TALL), -1)),
    "mirrored.jpg": (turned(Image.fromarray(TALL), 2), jpeg(TALL)[:, ::-1]),
    "gray.png": (saved(Image.fromarray(MASK), "PNG"), np.repeat(MASK[:, :, None], 3, axis=2)),
    "rgba.png": (saved(Image.fromarray(RGBA), "PNG"), on_white(TALL, MASK)),
    "deep.png": (
        saved(Image.fromarray(DEEP), "PNG"),
        np.repeat(np.rint(DEEP / 257)[:, :, None], 3, 2).astype(np.uint8),
    ),
}
WAYS = {
    "squeeze": Preprocessing(size=(24, 24)),
    "crop": Preprocessing(
        size=(28, 28), resize="crop", crop_fraction=28 / 32, interpolation="bilinear", mean=IMAGENET[0],
        deviation=IMAGENET[1],
    ),
    "oblong": Preprocessing(size=(20, 30), resize="crop", interpolation="bicubic", crop_fraction=0.9, order="BGR"),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Each picture twice in a class of its own, three classes more, so that there are three parts."""
    root = tmp_path_factory.mktemp("pictures")
    for name, (content, _) in PICTURES.items():
        (root / "train" / name).mkdir(parents=True)
        for place in range(2):
            (root / "train" / name / f"{place}.{name.rpartition('.')[2]}").write_bytes(content)
    for part, names in (("val", "ab"), ("test", "cd")):
        for name in names:
            (root / part / name).mkdir(parents=True)
            for place in range(2):
                (root / part / name / f"{place}.png").write_bytes(PICTURES["png"][0])
    return root


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("stream", [False, True])
def test_an_episode_has_the_inputs_that_the_preprocessing_of_its_files_gives(folder, way, stream) -> None:
    train = load_image_folder(folder, image_size=way, stream=stream).train
    task = EpisodeSampler(train, ways=len(PICTURES), shots=1, targets=1, normalise=way).batch(0)[0]
    for number, support, target in zip(task.classes, task.support_x, task.target_x, strict=True):
        name = train.class_names[number]
        expected = way(folder / "train" / name / f"0.{name.rpartition('.')[2]}")
        assert torch.equal(support, expected), name
        assert torch.equal(target, expected), name


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize("size", [24, 32, 64])
def test_a_file_becomes_what_torchvision_makes_of_its_pixels(name, size) -> None:
    content, pixels = PICTURES[name]
    oracle = ImageClassification(crop_size=size, resize_size=size + 6, interpolation=InterpolationMode.BICUBIC)
    way = Preprocessing(
        size=(size, size),
        resize="crop",
        crop_fraction=size / (size + 6),
        interpolation="bicubic",
        mean=IMAGENET[0],
        deviation=IMAGENET[1],
    )
    expected = oracle(Image.fromarray(np.ascontiguousarray(pixels)))
    # torchvision divides by 255, metawrap multiplies by 1/255, as CUDA does: the last bits differ.
    torch.testing.assert_close(way(content), expected, rtol=0, atol=2e-6)
    squeezed = functional.resize(Image.fromarray(np.ascontiguousarray(pixels)), [size, size])
    plain = Preprocessing(size=(size, size), interpolation="bilinear").pixels(content)
    np.testing.assert_array_equal(plain, np.asarray(squeezed))


def test_path_bytes_pil_image_array_and_tensor_give_the_same_input(tmp_path) -> None:
    way = WAYS["crop"]
    for name, (content, pixels) in PICTURES.items():
        path = tmp_path / name
        path.write_bytes(content)
        array = pixels.copy()
        kinds = (str(path), content, Image.open(path), array, torch.from_numpy(array).permute(2, 0, 1), array / 255)
        for kind in kinds:
            assert torch.equal(way(path), way(kind)), (name, type(kind))
        assert way.pixels(path).shape == (28, 28, 3)
    gray = Preprocessing(size=(8, 8), channels=1)
    assert torch.equal(gray(MASK), gray(MASK[:, :, None]))
    assert gray(MASK).shape == (1, 8, 8)
    # An array with alpha is laid on white, as a file is.
    assert torch.equal(way(RGBA), way(PICTURES["rgba.png"][0]))


def test_bgr_turns_the_channels_and_normalises_them_in_the_networks_order() -> None:
    red = np.zeros((4, 4, 3), np.uint8)
    red[:, :, 0] = 255
    way = Preprocessing(size=(2, 2), order="BGR", mean=(0.0, 0.0, 0.5), deviation=(1.0, 1.0, 0.25))
    assert way(red)[:, 0, 0].tolist() == [0.0, 0.0, 2.0]
    assert way.pixels(red)[0, 0].tolist() == [255, 0, 0]


def test_floats_given_to_normalised_stay_as_they_are() -> None:
    pixels = torch.rand(3, 4, 4)
    before = pixels.clone()
    WAYS["crop"].normalised(pixels)
    assert torch.equal(pixels, before)


def test_a_preprocessing_survives_json_and_refuses_what_is_wrong() -> None:
    for way in WAYS.values():
        assert Preprocessing.from_dict(json.loads(json.dumps(way.to_dict()))) == way
    good = WAYS["crop"].to_dict()
    for change, words in (
        ({"size": [28]}, "size: expected"),
        ({"size": [28, 0]}, "size: expected"),
        ({"resize": "pad"}, "resize: expected"),
        ({"crop_fraction": 0.0}, "crop_fraction: expected a number from 0.01 to 1"),
        ({"mean": [0.5]}, "mean: expected a number for each of 3 channels"),
        ({"mean": [0.5, 0.5, float("nan")]}, "mean: expected"),
        ({"deviation": [1.0, 0.0, 1.0]}, "deviation: expected a positive number"),
        ({"order": "GBR"}, "order: expected"),
        ({"interpolation": "magic"}, "interpolation: expected"),
        ({"channels": 2}, "channels: expected"),
        ({"code": "print()"}, "it has no 'code'"),
    ):
        with pytest.raises(ArgumentError, match=words):
            Preprocessing.from_dict(good | change)
    with pytest.raises(ArgumentError, match="size"):
        Preprocessing.from_dict({})
    with pytest.raises(ArgumentError, match="preprocessing: expected a mapping"):
        Preprocessing.from_dict([1])
    with pytest.raises(ArgumentError, match="order: expected 'RGB'"):
        Preprocessing(size=(2, 2), channels=1, order="BGR")


def test_pictures_that_are_none_or_too_large_are_refused(tmp_path) -> None:
    way = WAYS["crop"]
    with pytest.raises(DataError, match="cannot be read"):
        way(tmp_path / "missing.jpg")
    with pytest.raises(DataError, match="is not a readable image"):
        way(b"no picture")
    with pytest.raises(DataError, match="expected a PIL image"):
        way(None)
    with pytest.raises(ArgumentError, match=r"channels: picture has the shape \(3, 8, 8\).*Pass an array \(height"):
        way(np.zeros((3, 8, 8), np.uint8))
    with pytest.raises(DataError, match="claims 9000 x 9000 pixels"):
        way(Image.new("1", (9000, 9000)))
    # With its aspect kept, one row of pixels would become 28 rows of more than a billion.
    with pytest.raises(DataError, match="would be resized to"):
        way(Image.new("L", (5_000_000, 1)))
    broken = Image.open(io.BytesIO(PICTURES["png"][0][:900]))
    with pytest.raises(DataError, match="is not a readable image"):
        way(broken)


def test_every_data_set_takes_a_preprocessing_for_its_size() -> None:
    way = Preprocessing(size=(32, 32), mean=IMAGENET[0], deviation=IMAGENET[1])
    colours, gray = (load_data("glyphs", classes=(2, 2, 2), image_size=size).train for size in (way, 32))
    assert torch.equal(colours.images, gray.images.expand(-1, 3, -1, -1))


def test_resize_crop_keeps_the_aspect_and_squeeze_does_not(folder) -> None:
    cut = load_image_folder(folder, image_size=20, resize="crop").train
    squeezed = load_image_folder(folder, image_size=20).train
    place = int((cut.labels == cut.class_names.index("wide.png")).nonzero()[0])
    wide = Image.fromarray(WIDE)
    expected = functional.center_crop(functional.resize(wide, [20], InterpolationMode.LANCZOS), [20])
    np.testing.assert_array_equal(cut.images[place].permute(1, 2, 0), np.asarray(expected))
    expected = wide.resize((20, 20), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(squeezed.images[place].permute(1, 2, 0), np.asarray(expected))
    with pytest.raises(ArgumentError, match="resize: expected 'squeeze' or 'crop'"):
        load_image_folder(folder, resize="pad")
    with pytest.raises(ArgumentError, match="image_size: the preprocessing has resize"):
        load_image_folder(folder, image_size=WAYS["crop"], resize="crop")
