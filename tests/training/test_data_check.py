"""metawrap data check says what it found, and exits with 2 where training would refuse it."""

from __future__ import annotations

import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from data_helpers import omniglot_files, write_folder, write_zip, zipped
from PIL import Image
from published import cifar_archive, cub_folder, grocery_files, mini_caches, mini_csv, noise, tiered_pickles
from tiny_runs import log_of

from metawrap.cli import main
from metawrap.data import EpisodeSampler, load_image_folder


def cub_archive(root: Path) -> Path:
    folder = cub_folder(root / "unpacked")
    with tarfile.open(root / "CUB_200_2011.tgz", "w:gz") as archive:
        archive.add(folder, "CUB_200_2011")
    return root / "CUB_200_2011.tgz"


def birds(root: Path, classes: int = 15, images: int = 4) -> Path:
    for number in range(classes):
        folder = root / f"bird{number:02d}"
        folder.mkdir(parents=True)
        for place, image in enumerate(noise(images + number % 3, 10, 10, 3, seed=number)):
            Image.fromarray(image).save(folder / f"{place}.png")
    return root


def check(capsys, *arguments: object) -> tuple[int, str, str]:
    code = main(["data", "check", *map(str, arguments)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_a_good_folder_is_described_and_an_episode_drawn(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    birds(tmp_path / "birds")
    code, out, err = check(capsys, "birds", "--ways", 2, "--targets", 2, "--image-size", 12)
    assert (code, err) == (0, "")
    assert "folder: class folders, split by seed; images become 3 x 12 x 12" in out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.startswith("  ")}
    parts = [rows[part] for part in ("train", "validation", "test")]
    assert [part[0] for part in parts] == ["10", "2", "3"]
    assert sum(int(part[1]) for part in parts) == sum(4 + i % 3 for i in range(15))
    assert {part[5] for part in parts} == {"0"}
    assert "train --data" in out
    with Image.open("contact-sheet.png") as sheet:
        pixels = np.asarray(sheet)
    # Every image of the task that a sampler draws with this seed is there, enlarged without smoothing: 12 -> 84.
    train = load_image_folder("birds", image_size=12).train
    task = EpisodeSampler(train, 2, 1, 2, seed=0).batch(0)[0]
    for row in range(2):
        images = [*task.support_x[task.support_y == row], *task.target_x[task.target_y == row]]
        for image in images:
            expected = np.kron((image * 255).round().byte().permute(1, 2, 0).numpy(), np.ones((7, 7, 1), np.uint8))
            line = pixels[30 + row * 90 : 30 + row * 90 + 84]
            assert any(np.array_equal(line[:, left : left + 84], expected) for left in range(line.shape[1] - 83))


def test_the_report_counts_what_numpy_counts(tmp_path, capsys):
    birds(tmp_path / "birds")
    code, out, _ = check(capsys, tmp_path / "birds", "--ways", 2, "--out", tmp_path / "a.png", "--json")
    report = json.loads(out)
    assert code == 0
    assert report["contact_sheet"] == str(tmp_path / "a.png")
    for part, images in zip(report["parts"], load_image_folder(tmp_path / "birds"), strict=True):
        counts = np.bincount(images.labels.numpy())
        found = [part[name] for name in ("classes", "images", "smallest", "median", "largest")]
        assert found == [len(counts), counts.sum(), counts.min(), np.median(counts), counts.max()]


def test_broken_images_are_named_and_the_exit_code_is_2(tmp_path, capsys):
    root = birds(tmp_path / "birds")
    (root / "bird03" / "1.png").write_bytes(b"junk")
    whole = (root / "bird11" / "0.png").read_bytes()
    (root / "bird11" / "0.png").write_bytes(whole[: len(whole) // 2])
    code, out, err = check(capsys, root, "--ways", 2, "--out", tmp_path / "a.png")
    assert code == 2
    assert "'bird03/1.png' is not a readable image" in err
    assert "'bird11/0.png' is not a readable image" in err
    assert "Error: 2 images are broken. Replace or remove them" in err
    assert "Contact sheet" not in out
    assert not (tmp_path / "a.png").exists()
    code, out, _ = check(capsys, root, "--ways", 2, "--out", tmp_path / "a.png", "--json")
    assert code == 2
    assert sum(len(part["broken"]) for part in json.loads(out)["parts"]) == 2


def test_an_episode_that_cannot_be_drawn_is_an_error_of_its_part(tmp_path, capsys):
    root = birds(tmp_path / "birds")
    code, _, err = check(capsys, root, "--ways", 5, "--out", tmp_path / "a.png")
    assert code == 2
    assert "Error: ways=5, but validation has only 2 classes" in err
    code, _, err = check(capsys, root, "--ways", 2, "--shots", 40, "--out", tmp_path / "a.png")
    assert code == 2
    assert "but train has 10 with fewer: 'bird00' (4), 'bird01' (" in err


def test_an_image_in_two_parts_is_a_note(tmp_path, capsys):
    root = birds(tmp_path / "birds")
    train, _, test = load_image_folder(root)
    copied = root / train.class_names[0] / "0.png"
    (root / test.class_names[0] / "9.png").write_bytes(copied.read_bytes())
    code, out, _ = check(capsys, root, "--ways", 2, "--out", tmp_path / "a.png")
    assert code == 0
    assert "Note: images that come in two parts: 1, such as" in out
    assert f"{train.class_names[0]}/0.png (train) = {test.class_names[0]}/9.png (test)" in out


def test_images_that_come_again_inside_a_part_are_counted(tmp_path, capsys):
    root = birds(tmp_path / "birds")
    first, second = load_image_folder(root).train.class_names[:2]
    for copy in ("7.png", "8.png"):  # two repeats in the class
        (root / first / copy).write_bytes((root / first / "0.png").read_bytes())
    with Image.open(root / first / "1.png") as image:  # other bytes, the same pixels
        image.save(root / second / "9.bmp")
    code, out, _ = check(capsys, root, "--ways", 2, "--out", tmp_path / "a.png", "--json")
    own, other = sorted(json.loads(out)["notes"])
    assert (code, own) == (
        0,
        "images that come again in another class of their part: 1, such as "
        f"{first}/1.png (train) = {second}/9.bmp (train)",
    )
    assert other == (
        "images that come again in their class, so that a target may equal a support image: 2, such as "
        f"{first}/0.png (train) = {first}/7.png (train)"
    )


def test_conversions_of_pixels_and_files_that_are_not_read_are_told(tmp_path, capsys):
    root = birds(tmp_path / "birds")
    deep = np.linspace(0, 65535, 100).astype(np.uint16).reshape(10, 10)
    exif = Image.Exif()
    exif[274] = 3
    frames = [Image.fromarray(image) for image in noise(3, 10, 10)]
    Image.fromarray(deep).save(root / "bird00" / "deep.png")
    Image.fromarray(deep // 5).save(root / "bird01" / "dim.tif")
    Image.fromarray((deep.T / 65535).astype(np.float32)).save(root / "bird02" / "float.tif")
    Image.merge("LA", [frames[0], frames[1]]).save(root / "bird03" / "icon.png")
    frames[2].save(root / "bird04" / "turned.png", exif=exif)
    frames[0].save(root / "bird05" / "moving.gif", save_all=True, append_images=frames[1:])
    for name in ("a.txt", "b.txt", "c.mp4"):
        (root / "bird06" / name).write_text("x")
    code, out, _ = check(capsys, root, "--ways", 2, "--out", tmp_path / "a.png", "--json")
    assert (code, sorted(json.loads(out)["notes"])) == (
        0,
        [
            "files that are not read: 3, such as bird06/a.txt (2 .txt, 1 .mp4)",
            "images with 16 bits, scaled to 8, and no value above a quarter of white: 1, such as bird01/dim.tif",
            "images with 16 bits, scaled to 8: 1, such as bird00/deep.png",
            "images with an orientation in EXIF, turned upright: 1, such as bird04/turned.png",
            "images with floats in [0, 1], scaled to 8 bits: 1, such as bird02/float.tif",
            "images with several frames, of which the first is read: 1, such as bird05/moving.gif",
            "images with transparency, shown on white: 1, such as bird03/icon.png",
        ],
    )


LAYOUTS = {
    "mini csv": (mini_csv, "mini-imagenet"),
    "mini cache": (lambda root: mini_caches(root, "class_dict"), "mini-imagenet"),
    "tiered": (tiered_pickles, "tieredimagenet"),
    "cub": (cub_folder, "cub"),
    "cub tgz": (cub_archive, "cub"),
    "grocery": (lambda root: write_zip(root / "g.zip", grocery_files()), "grocery"),
    "grocery folder": (lambda root: write_folder(root, grocery_files(published=True)), "grocery"),
    "cifar": (cifar_archive, "cifar-fs"),
    "zip": (lambda root: zipped(birds(root / "b"), root / "a.zip"), "folder"),
}


@pytest.mark.parametrize("layout", [*LAYOUTS, "one pickle"])
def test_layouts_are_recognised(tmp_path, capsys, layout):
    root = tmp_path / "set"
    root.mkdir()
    write, name = LAYOUTS["mini cache" if layout == "one pickle" else layout]
    written = write(root)
    root = written if layout in ("cub tgz", "cifar", "zip", "grocery") else root
    path = root / "mini-imagenet-cache-val.pkl" if layout == "one pickle" else root
    code, out, err = check(capsys, path, "--ways", 1, "--targets", 1, "--out", tmp_path / "a.png")
    assert (code, err) == (0, "")
    assert out.startswith(f"{name}: ")
    assert f"--data{'-root' if name != 'folder' else ''} {root}" in out


def test_a_folder_of_omniglot_is_recognised(tmp_path, capsys):
    (tmp_path / "all").mkdir()
    for name, content in omniglot_files().items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    code, _, err = check(capsys, tmp_path, "--ways", 1, "--targets", 1, "--out", tmp_path / "a.png")
    # Ten classes are too few for the paper's split, which the error says.
    assert (code, "asks for 1623 classes" in err) == (2, True)
    (tmp_path / "omniglot-py" / "images_background" / "Greek").rename(tmp_path / "all" / "Alphabet_of_the_Magi")
    code, _, err = check(capsys, tmp_path / "all", "--ways", 1, "--targets", 1, "--out", tmp_path / "a.png")
    assert (code, "the data set has 3" in err) == (2, True)


def test_a_hostile_pickle_is_refused_by_name(tmp_path, capsys):
    mini_caches(tmp_path, "class_dict")
    path = tmp_path / "mini-imagenet-cache-train.pkl"
    path.write_bytes(pickle.dumps({"image_data": print}))
    code, _, err = check(capsys, path, "--out", tmp_path / "a.png")
    assert code == 2
    assert "asks for 'builtins.print'" in err


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("mini_imagenet", "There is no data set and no file called 'mini_imagenet'. Did you mean 'mini-imagenet'?"),
        ("unknown.zip", "not a readable zip file"),
        ("text.txt", "holds no data set in a layout that metawrap knows"),
        (".", "holds no class folder"),
    ],
)
def test_what_is_no_data_set_is_said(tmp_path, capsys, monkeypatch, path, what):
    monkeypatch.chdir(tmp_path)
    for name in ("unknown.zip", "text.txt"):
        (tmp_path / name).write_text("x")
    code, _, err = check(capsys, path)
    assert code == 2
    assert what in err


def test_the_picture_has_to_go_somewhere(tmp_path, capsys):
    for out in (tmp_path / "none" / "a.png", tmp_path / "a.jpg"):
        code, _, err = check(capsys, birds(tmp_path / out.name, 5), "--out", out)
        assert code == 2
        assert "out: expected a .png file in an existing folder" in err


def test_a_named_set_is_checked_where_its_files_lie(tmp_path, capsys):
    archive = write_zip(tmp_path / "o.zip", omniglot_files())
    code, _, err = check(capsys, "omniglot", "--data-root", archive, "--out", tmp_path / "a.png")
    assert code == 2
    assert "1623 classes" in err
    code, out, _ = check(capsys, "glyphs", "--image-size", 8, "--out", tmp_path / "a.png")
    assert code == 0
    assert "train --data glyphs" in out


def move_rows(folder: Path, source: str, target: str, name: str) -> None:
    rows = (folder / f"{source}.csv").read_text().splitlines(keepends=True)
    (folder / f"{source}.csv").write_text("".join(row for row in rows if name not in row))
    with open(folder / f"{target}.csv", "a") as file:
        file.writelines(row for row in rows if name in row)


def test_training_streamed_and_in_memory_ends_with_the_same_numbers(tmp_path):
    mini_csv(tmp_path / "mini", images=3)
    # One class is too few for a task of two.
    for source, target, name in (
        ("train", "val", "n01558993"),
        ("train", "test", "n01704323"),
        ("test", "train", "n01981276"),
    ):
        move_rows(tmp_path / "mini", source, target, name)
    flags = f"--data=mini-imagenet --data-root={tmp_path / 'mini'} --image-size=20 --ways=2 --train-ways=2 --filters=4"
    flags += " --method=protonet --epochs=1 --iterations=2 --batch=1 --test-norms=own --targets=1 --device=cpu"
    flags += " --validation-tasks=2 --test-tasks=2"

    def numbers(name: str, how: str) -> tuple[object, ...]:
        assert main(["train", *flags.split(), *how.split(), f"--out={tmp_path / name}"]) == 0
        [log] = log_of(tmp_path / name)
        result = json.loads((tmp_path / name / "result.json").read_text())
        return result["test"], log["validation_loss"], log["train_loss"]

    memory = numbers("memory", "--no-stream")
    assert numbers("stream", "--stream --loader-workers=1") == memory
    # mini-ImageNet is normalised unless asked otherwise.
    assert numbers("plain", "--normalise=none")[-1] != memory[-1]
