"""metawrap data check says what it found, and exits with 2 where training would refuse it."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from data_helpers import omniglot_files, write_zip
from PIL import Image
from published import cifar_archive, cub_folder, mini_caches, mini_csv, noise, tiered_pickles

from metawrap.cli import main
from metawrap.data import EpisodeSampler, load_image_folder


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


def test_a_good_folder_is_described_and_an_episode_drawn(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    birds(tmp_path / "birds")
    code, out, err = check(capsys, "birds", "--ways", 2, "--targets", 2, "--image-size", 12)
    assert (code, err) == (0, "")
    assert "folder: class folders, split by seed; images become 3 x 12 x 12" in out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.startswith("  ")}
    assert rows["train"][0] == "10"
    assert rows["validation"][0] == "2"
    assert rows["test"][0] == "3"
    assert sum(int(rows[part][1]) for part in ("train", "validation", "test")) == sum(4 + i % 3 for i in range(15))
    assert {rows[part][5] for part in ("train", "validation", "test")} == {"0"}
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


def test_the_report_counts_what_numpy_counts(tmp_path: Path, capsys) -> None:
    birds(tmp_path / "birds")
    code, out, _ = check(capsys, tmp_path / "birds", "--ways", 2, "--out", tmp_path / "a.png", "--json")
    report = json.loads(out)
    assert code == 0
    assert report["contact_sheet"] == str(tmp_path / "a.png")
    for part, images in zip(report["parts"], load_image_folder(tmp_path / "birds"), strict=True):
        counts = np.bincount(images.labels.numpy())
        found = [part[name] for name in ("classes", "images", "smallest", "median", "largest")]
        assert found == [len(counts), counts.sum(), counts.min(), np.median(counts), counts.max()]


def test_broken_images_are_named_and_the_exit_code_is_2(tmp_path: Path, capsys) -> None:
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


def test_an_episode_that_cannot_be_drawn_is_an_error_of_its_part(tmp_path: Path, capsys) -> None:
    root = birds(tmp_path / "birds")
    code, _, err = check(capsys, root, "--ways", 5, "--out", tmp_path / "a.png")
    assert code == 2
    assert "Error: validation: ways=5, but there are only 2 classes" in err
    code, _, err = check(capsys, root, "--ways", 2, "--shots", 40, "--out", tmp_path / "a.png")
    assert code == 2
    assert "Error: train: Class 'bird" in err


def test_an_image_in_two_parts_is_a_note(tmp_path: Path, capsys) -> None:
    root = birds(tmp_path / "birds")
    train, _, test = load_image_folder(root)
    copied = root / train.class_names[0] / "0.png"
    (root / test.class_names[0] / "9.png").write_bytes(copied.read_bytes())
    code, out, _ = check(capsys, root, "--ways", 2, "--out", tmp_path / "a.png")
    assert code == 0
    assert "Note: images that come in two parts: 1, such as" in out
    assert f"{train.class_names[0]}/0.png (train) = {test.class_names[0]}/9.png (test)" in out


@pytest.mark.parametrize("layout", ["mini csv", "mini cache", "tiered", "cub", "cifar", "omniglot", "one pickle"])
def test_layouts_are_recognised(tmp_path: Path, capsys, layout: str) -> None:
    root = tmp_path / "set"
    root.mkdir()
    if layout == "mini csv":
        mini_csv(root)
    elif layout in ("mini cache", "one pickle"):
        mini_caches(root, "class_dict")
    elif layout == "tiered":
        tiered_pickles(root)
    elif layout == "cub":
        cub_folder(root)
    elif layout == "cifar":
        root = cifar_archive(root)
    else:
        folder = root
        for name, content in omniglot_files().items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
    path = root / "mini-imagenet-cache-val.pkl" if layout == "one pickle" else root
    code, out, err = check(capsys, path, "--ways", 1, "--targets", 1, "--out", tmp_path / "a.png")
    if layout == "omniglot":  # Ten classes are too few for the paper's split, which the error says.
        assert (code, "asks for 1623 classes" in err) == (2, True)
        return
    names = {
        "mini": "mini-imagenet",
        "one ": "mini-imagenet",
        "tier": "tieredimagenet",
        "cub": "cub",
        "cifa": "cifar-fs",
    }
    assert (code, err) == (0, "")
    assert out.startswith(f"{names[layout[:4]]}: ")
    assert f"--data-root {root}" in out


def test_a_hostile_pickle_is_refused_by_name(tmp_path: Path, capsys) -> None:
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
def test_what_is_no_data_set_is_said(tmp_path: Path, capsys, monkeypatch, path: str, what: str) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("unknown.zip", "text.txt"):
        (tmp_path / name).write_text("x")
    code, _, err = check(capsys, path)
    assert code == 2
    assert what in err


def test_the_picture_has_to_go_somewhere(tmp_path: Path, capsys) -> None:
    for out in (tmp_path / "none" / "a.png", tmp_path / "a.jpg"):
        code, _, err = check(capsys, birds(tmp_path / out.name, 5), "--out", out)
        assert code == 2
        assert "out: expected a .png file in an existing folder" in err


def test_a_named_set_is_checked_where_its_files_lie(tmp_path: Path, capsys) -> None:
    archive = write_zip(tmp_path / "o.zip", omniglot_files())
    code, _, err = check(capsys, "omniglot", "--data-root", archive, "--out", tmp_path / "a.png")
    assert code == 2
    assert "1623 classes" in err
    code, out, _ = check(capsys, "glyphs", "--image-size", 8, "--out", tmp_path / "a.png")
    assert code == 0
    assert "train --data glyphs" in out


def test_help_of_data_check_fits_on_a_screen(capsys) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["data", "check", "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 112


def test_training_streamed_and_in_memory_ends_with_the_same_numbers(tmp_path: Path, capsys) -> None:
    mini_csv(tmp_path / "mini", images=3)
    flags = [
        "--data=mini-imagenet",
        f"--data-root={tmp_path / 'mini'}",
        "--image-size=20",
        "--ways=2",
        "--train-ways=2",
    ]
    flags += ["--method=protonet", "--filters=4", "--epochs=1", "--iterations=2", "--batch=1", "--test-norms=own"]
    flags += ["--validation-tasks=2", "--test-tasks=2", "--device=cpu"]
    results = []
    for part in ("val", "test"):  # One class is too few for a task of two.
        rows = (tmp_path / "mini" / "train.csv").read_text().splitlines()
        name = "n01558993" if part == "val" else "n01704323"
        kept = [row for row in rows if name not in row]
        moved = [row for row in rows if name in row]
        (tmp_path / "mini" / "train.csv").write_text("\n".join(kept) + "\n")
        with open(tmp_path / "mini" / f"{part}.csv", "a") as file:
            file.write("\n".join(moved) + "\n")
    rows = (tmp_path / "mini" / "test.csv").read_text().splitlines()
    (tmp_path / "mini" / "test.csv").write_text("\n".join(row for row in rows if "n01981276" not in row) + "\n")
    with open(tmp_path / "mini" / "train.csv", "a") as file:
        file.write("\n".join(row for row in rows if "n01981276" in row) + "\n")
    for name, how in (("memory", ["--no-stream"]), ("stream", ["--stream", "--loader-workers=1"])):
        assert main(["train", *flags, *how, f"--out={tmp_path / name}"]) == 0
        result = json.loads((tmp_path / name / "result.json").read_text())
        log = json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[0])
        results.append((result["test"], log["train_loss"], log["validation_loss"]))
    assert results[0] == results[1]
    plain = tmp_path / "plain"
    assert main(["train", *flags, "--normalise=none", f"--out={plain}"]) == 0
    log = json.loads((plain / "log.jsonl").read_text().splitlines()[0])
    assert log["train_loss"] != results[0][1]  # mini-ImageNet is normalised unless asked otherwise.
    capsys.readouterr()
