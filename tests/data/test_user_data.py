"""splits_from: arrays, tensors and torch data sets become the same few-shot splits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from published import noise
from refusals import refuses
from torch.utils.data import ChainDataset, ConcatDataset, Dataset, Subset, TensorDataset

from metawrap.data import LabelledImages, StreamedImages, splits_from
from metawrap.errors import ArgumentError, DataError

IMAGES = noise(30, 6, 5, 3)
LABELS = np.tile(np.arange(10), 3)
NAMES = [f"bird{i}" for i in range(10)]


class Birds(Dataset):
    """Counts how often an image is asked for."""

    def __init__(self, kind: str = "array", **attributes: object) -> None:
        self.kind, self.asked = kind, 0
        for name, value in attributes.items():
            setattr(self, name, value)

    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, place: int):
        if place >= len(self):
            raise IndexError
        self.asked += 1
        image = IMAGES[place]
        made = {
            "array": lambda: image,
            "pil": lambda: Image.fromarray(image),
            "tensor": lambda: torch.from_numpy(image).permute(2, 0, 1),
            "float": lambda: torch.from_numpy(image).permute(2, 0, 1) / 255,
        }[self.kind]()
        return made, int(LABELS[place])


def expect_the_images(splits, names: list[str], order: np.ndarray | slice = slice(None)) -> None:
    """Every class once, and with it just its images, in their order in the data set."""
    images, labels = IMAGES[order], LABELS[order]
    seen = []
    for part in splits:
        pixels = part.gather(np.arange(len(part))).permute(0, 2, 3, 1).numpy()
        for label, name in enumerate(part.class_names):
            np.testing.assert_array_equal(pixels[part.labels.numpy() == label], images[names.index(name) == labels])
            seen.append(name)
    assert sorted(seen) == sorted(names)


NUMBERS = [str(i) for i in range(10)]


@pytest.mark.parametrize("stream", [False, True, None])
@pytest.mark.parametrize("kind", ["array", "pil", "tensor", "float"])
def test_a_data_set_of_any_kind_of_image_is_split_by_class(kind: str, stream: bool | None) -> None:
    splits = splits_from(Birds(kind), stream=stream)
    assert isinstance(splits.train, StreamedImages if stream else LabelledImages)
    assert [part.num_classes for part in splits] == [6, 2, 2]
    expect_the_images(splits, NUMBERS)


def test_arrays_and_tensors_with_labels_are_the_same_set() -> None:
    texts = np.array(NAMES)[LABELS]
    tensor = torch.from_numpy(IMAGES).permute(0, 3, 1, 2)
    for data, labels, names in (
        (IMAGES, LABELS, NUMBERS),
        (IMAGES, torch.from_numpy(LABELS), NUMBERS),
        (IMAGES, LABELS.tolist(), NUMBERS),
        (IMAGES, texts, NAMES),
        (IMAGES.astype(np.float64) / 255, texts.tolist(), NAMES),
        (tensor, LABELS, NUMBERS),
        (tensor.double() / 255, LABELS, NUMBERS),
        (TensorDataset(tensor, torch.from_numpy(LABELS)), None, NUMBERS),
        (list(zip(IMAGES, LABELS.tolist(), strict=True)), None, NUMBERS),
    ):
        expect_the_images(splits_from(data, labels), names)


def test_gray_images_need_no_channel_and_bools_are_black_and_white() -> None:
    gray = IMAGES[:, :, :, 0]
    for data in (gray, torch.from_numpy(gray)):
        part = splits_from(data, LABELS, split={"train": [0], "val": [1], "test": [2]}).train
        np.testing.assert_array_equal(part.images[:, 0].numpy(), gray[LABELS == 0])
    assert set(splits_from(gray > 127, LABELS).train.images.unique().tolist()) == {0, 255}


@pytest.mark.parametrize("attribute", ["targets", "labels"])
def test_known_labels_save_a_pass_over_the_images(attribute: str) -> None:
    data = Birds(**{attribute: torch.from_numpy(LABELS), "classes": NAMES})
    splits = splits_from(data, stream=True)
    assert data.asked <= 9  # eight to compare the labels, and one for the shape
    expect_the_images(splits, NAMES)


class Shuffled(Dataset):
    """A wrapper that reads the places of another data set in another order, and hands on all its attributes."""

    def __init__(self, order: np.ndarray, relabel: int = 0) -> None:
        self.data, self.order, self.relabel = Birds(targets=LABELS.tolist(), classes=NAMES), order, relabel

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, place: int):
        image, label = self.data[int(self.order[place])]
        return image, (label + self.relabel) % 10

    def __getattr__(self, name: str) -> object:
        return getattr(self.data, name)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "order", [np.random.RandomState(0).permutation(30), np.arange(30)[::-1], np.roll(range(30), 1)]
)
def test_labels_that_a_wrapper_hands_on_in_another_order_are_not_believed(order: np.ndarray, stream: bool) -> None:
    expect_the_images(splits_from(Shuffled(order), stream=stream), NUMBERS, order)


def test_class_names_that_come_with_wrong_labels_are_not_believed() -> None:
    splits = splits_from(Shuffled(np.arange(30), relabel=3))
    expect_the_images(splits, [str((label + 3) % 10) for label in range(10)])


def test_a_single_wrong_label_is_named_when_its_image_is_read() -> None:
    order = np.arange(30)
    order[[17, 18]] = 18, 17
    refuses(DataError, r"image 18 has the label 7, but the data set says 8.*Subset", splits_from, Shuffled(order))
    images = splits_from(Shuffled(order), stream=True)
    with pytest.raises(DataError, match=r"image 1[78] has the label"):
        expect_the_images(images, NAMES)
    # The remedy that the message names.
    expect_the_images(splits_from(Subset(Shuffled(order), range(30))), NUMBERS, order)


def test_items_of_three_values_need_labels_that_are_known() -> None:
    items = [(image, place, label) for place, (image, label) in enumerate(zip(IMAGES, LABELS.tolist(), strict=True))]
    refuses(ArgumentError, "item 0 is 3 values", splits_from, items)

    class Indexed(Shuffled):
        def __getitem__(self, place: int):
            image, label = self.data[place]
            return (image, label, place) if self.relabel else (image, place, label)

    expect_the_images(splits_from(Indexed(np.arange(30), relabel=1)), NAMES)
    refuses(ArgumentError, "item 0 is 3 values", splits_from, Indexed(np.arange(30)))


FIRST = np.ascontiguousarray(IMAGES.transpose(0, 3, 1, 2))


@pytest.mark.parametrize(
    ("data", "place"),
    [
        (FIRST, "first"),
        (torch.from_numpy(IMAGES), "last"),
        (list(zip(FIRST, LABELS.tolist(), strict=True)), "first"),
        (TensorDataset(torch.from_numpy(IMAGES) / 255, torch.from_numpy(LABELS)), "last"),
    ],
)
def test_the_place_of_the_channels_is_asked_for_where_the_shape_tells_another(data, place: str) -> None:
    labels = LABELS if isinstance(data, np.ndarray | torch.Tensor) else None
    refuses(ArgumentError, "channels: image 0 has the shape", splits_from, data, labels)
    expect_the_images(splits_from(data, labels, channels=place), NUMBERS)


def test_other_numbers_of_channels_are_asked_for_and_four_are_not() -> None:
    wide = noise(6, 8, 8, 13)
    refuses(ArgumentError, "which would be 13 channels", splits_from, wide, list("aabbcc"))
    assert splits_from(wide, list("aabbcc"), channels="last").train.image_shape == (13, 8, 8)
    assert splits_from(noise(6, 8, 8, 4), list("aabbcc")).train.image_shape == (4, 8, 8)
    refuses(ArgumentError, "which would be 3 channels", splits_from, noise(6, 3, 8, 3), list("aabbcc"))
    refuses(ArgumentError, "has no axis of channels", splits_from, wide[..., 0], list("aabbcc"), channels="last")
    refuses(ArgumentError, "channels: expected 'first', 'last'", splits_from, wide, list("aabbcc"), channels=1)
    refuses(DataError, "0 and 1 only", splits_from, noise(6, 8, 8) // 128, list("aabbcc"))


def test_labels_that_a_transform_changes_are_taken_from_the_items() -> None:
    data = Birds(targets=[0] * 30, target_transform=abs)
    expect_the_images(splits_from(data), NUMBERS)


def test_subsets_and_concatenations_are_data_sets_too() -> None:
    data = Birds(targets=LABELS.tolist())
    halves = ConcatDataset([Subset(data, range(15)), Subset(data, range(15, 30))])
    expect_the_images(splits_from(halves, class_names=NAMES), NAMES)


def test_the_split_is_that_of_a_folder_with_the_same_names(tmp_path) -> None:
    from metawrap.data import load_image_folder

    for name, image in zip(np.array(NAMES)[LABELS], IMAGES, strict=True):
        (tmp_path / name).mkdir(exist_ok=True)
        Image.fromarray(image).resize((8, 8)).save(tmp_path / name / f"{len(list((tmp_path / name).iterdir()))}.png")
    folder = load_image_folder(tmp_path, image_size=8, seed=4)
    mine = splits_from(IMAGES, np.array(NAMES)[LABELS], image_size=8, seed=4)
    assert [part.class_names for part in mine] == [part.class_names for part in folder]


@pytest.mark.parametrize(
    ("data", "labels", "error", "what"),
    [
        (IMAGES, None, ArgumentError, "labels: expected one for each of 30 images, but got None"),
        (IMAGES, LABELS[:5], ArgumentError, "but got int 5"),
        (IMAGES[:0], LABELS[:0], ArgumentError, "at least one"),
        (IMAGES[0, 0], LABELS, ArgumentError, "data: expected images"),
        (IMAGES, LABELS + 0.5, ArgumentError, "whole numbers or texts"),
        (IMAGES, [None] * 30, ArgumentError, "whole numbers or texts"),
        (IMAGES.astype(np.int64), LABELS, DataError, r"int64 from .*Divide them by their white, or convert"),
        (IMAGES / 127.5 - 1, LABELS, DataError, r"Take Normalize out of the transform"),
        (IMAGES / np.nan, LABELS, DataError, r"floats in \[0, 1\]"),
        (Birds(), LABELS, ArgumentError, "a data set has labels of its own"),
        ("folder", None, ArgumentError, "a data set with __len__"),
        ({}, None, ArgumentError, "a data set with __len__"),
        (ChainDataset([]), None, ArgumentError, "Collect an iterable one into a list"),
        ([], None, ArgumentError, "not empty"),
        ([(IMAGES[0],)], None, ArgumentError, "items \\(image, label\\)"),
        ([("a.png", 0), ("b.png", 1), ("c.png", 2)], None, DataError, "image 0: expected a PIL image"),
        ([(IMAGES[0], 0), (IMAGES[1, 1:], 1), (IMAGES[2], 2)], None, DataError, r"image 1 has the shape \(3, 5, 5\)"),
        ([(IMAGES[0], 0), (IMAGES[1], 1)], None, DataError, "2 classes are too few"),
    ],
)
def test_what_does_not_fit_is_named(data, labels, error, what: str) -> None:
    refuses(error, what, splits_from, data, labels, stream=False)


def test_names_and_splits_have_to_fit() -> None:
    refuses(ArgumentError, "there are 3 names, and label 3 is 3", splits_from, IMAGES, LABELS, class_names=NAMES[:3])
    twice, texts = [*NAMES[:8], "crane", "crane"], [f"label {label}" for label in LABELS]
    refuses(ArgumentError, "the labels 8 and 9 are both called 'crane'", splits_from, IMAGES, LABELS, class_names=twice)
    refuses(ArgumentError, "both called 'crane'", splits_from, Birds(targets=LABELS.tolist(), classes=twice))
    refuses(ArgumentError, "None, because the labels are texts", splits_from, IMAGES, texts, class_names=NAMES)
    for split, error, what in (
        ({"train": [0], "val": [1]}, ArgumentError, "test is missing"),
        ({"train": [0], "val": [1], "test": []}, ArgumentError, "at least one"),
        ({"train": [0], "val": [1], "exam": [2]}, ArgumentError, "the part 'exam'"),
        ({"train": [0], "val": [1], "validation": [3], "test": [2]}, ArgumentError, "again"),
        ({"train": [0], "val": [1], "test": [0]}, DataError, r"'0 \(train and test\)' are named more than once"),
        ({"train": [0], "val": [1], "test": [77]}, DataError, "the classes '77' of test do not exist"),
        (7, ArgumentError, "split: expected a mapping"),
        ("splits.txt", ArgumentError, r"\.csv, \.json or \.yaml"),
    ):
        refuses(error, what, splits_from, IMAGES, LABELS, split=split)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("s.csv", "class,split\nbird0,train\nbird1,train\nbird2,val\nbird3,test\n"),
        ("s.csv", "\ufeffsplit,class,remark\r\ntrain,bird0,\r\ntrain,bird1,\r\nvalidation,bird2,\r\ntest,bird3,x\r\n"),
        ("s.json", '{"train": ["bird0", "bird1"], "val": ["bird2"], "test": ["bird3"]}'),
        ("s.yaml", "train: [bird0, bird1]\nvalidation:\n  - bird2\ntest: [bird3]\n"),
    ],
)
def test_a_split_is_read_from_a_file(tmp_path, file: str, text: str) -> None:
    (tmp_path / file).write_text(text, encoding="utf-8", newline="")
    splits = splits_from(IMAGES, np.array(NAMES)[LABELS], split=tmp_path / file)
    assert [part.class_names for part in splits] == [("bird0", "bird1"), ("bird2",), ("bird3",)]


@pytest.mark.parametrize(
    ("file", "text", "what"),
    [
        ("s.json", "{", "not readable JSON"),
        ("s.json", "[" * 100_000, "not readable JSON"),
        ("s.json", "[1]", "expected train, validation and test"),
        ("s.yaml", "train: [", "not readable YAML"),
        ("s.yaml", "a: !!python/object/apply:os.system [echo]", "not readable YAML"),
        ("s.yaml", "train: {a: 1}\nval: [b]\ntest: [c]", "expected a list of class names for train"),
        ("s.csv", "name,part\na,train\n", "expected the header class,split"),
        ("s.csv", "class,split\nbird0,exam\n", "the part 'exam'"),
    ],
)
def test_a_broken_split_file_is_named(tmp_path, file: str, text: str, what: str) -> None:
    (tmp_path / file).write_text(text)
    refuses((DataError, ArgumentError), what, splits_from, IMAGES, np.array(NAMES)[LABELS], split=tmp_path / file)


def test_a_missing_split_file_is_named(tmp_path) -> None:
    refuses(DataError, r"none\.json' cannot be read", splits_from, IMAGES, LABELS, split=tmp_path / "none.json")


def test_images_are_resized_with_lanczos_when_asked() -> None:
    part = splits_from(IMAGES, LABELS, image_size=9, split={"train": [0], "val": [1], "test": [2]}).train
    for mine, image in zip(part.images, IMAGES[LABELS == 0], strict=True):
        expected = np.asarray(Image.fromarray(image).resize((9, 9), Image.Resampling.LANCZOS))
        np.testing.assert_array_equal(mine.permute(1, 2, 0).numpy(), expected)
