"""Run folders of a stranger, or of a disk that forgets: no write goes through a link, and every record has a form."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import report_runs as made
import torch
from bird_runs import FLAGS, write_birds
from matplotlib.figure import Figure
from tiny_runs import refusal

import metawrap
from metawrap.cli import main
from metawrap.errors import ArgumentError, CheckpointError, printable
from metawrap.report import gather, write_report_page
from metawrap.report.page import render
from metawrap.report.pictures import _draw_episode
from metawrap.training.experiment import find_device
from metawrap.training.plots import save_figure
from metawrap.training.run_folder import RunFolder

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX links and pipes")


RESUME = ["train", "--resume", "--out", "run"]


def change(path: str, edit: Callable[[Any], Any]) -> None:
    file = Path(path)
    file.write_text(json.dumps(edit(json.loads(file.read_text()))))


SETTINGS = {
    "no table": 7,
    "no value": None,
    "a list": ["ways", 5],
    "huge ways": {"ways": 10**30},
    "nested ways": {"ways": {"ways": 5}},
    "text as epochs": {"epochs": "2"},
    "a seed that torch has not": {"seed": 2**64},
    "a rate beyond single precision": {"inner_lr": 1e39},
    "options as a list": {"options": [1]},
    "unknown": {"__class__": "x"},
}


@pytest.mark.parametrize("wrong", SETTINGS.values(), ids=SETTINGS)
def test_settings_of_a_wrong_type_are_one_error_in_words(
    place: Path, capsys: pytest.CaptureFixture[str], wrong: Any
) -> None:
    change(
        "run/run.json",
        lambda found: found | {"settings": found["settings"] | wrong if isinstance(wrong, dict) else wrong},
    )
    for command in (["evaluate", "run"], RESUME):
        assert "stored settings" in (said := refusal(capsys, command)) or "run.json' is damaged" in said
    with pytest.raises(CheckpointError):
        metawrap.load("run")


FILES = ["run.json", "data.json", "log.jsonl", "insight.jsonl", "result.json", "final_insight.json"]
RUN_FILES = {
    "seeds": lambda found: found | {"seeds": 7},
    "no seed": lambda found: found | {"seeds": []},
    "seeds of text": lambda found: found | {"seeds": ["../../elsewhere"]},
    "negative seed": lambda found: found | {"seeds": [-1]},
    "a list": lambda found: [found],
    "a number": lambda _: 1e308,
}


@pytest.mark.parametrize("edit", RUN_FILES.values(), ids=RUN_FILES)
def test_a_run_file_of_a_wrong_form_is_one_error_in_words(
    place: Path, capsys: pytest.CaptureFixture[str], edit: Callable[[Any], Any]
) -> None:
    change("run/run.json", edit)
    for command in (["evaluate", "run"], RESUME):
        assert "run.json' is damaged" in refusal(capsys, command)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"settings": ' * 5_000, "\x00", "9" * 10_000, '{"settings": NaN}'])
def test_a_file_that_is_hardly_json_is_one_error_in_words(
    place: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    for name in ("run.json", "data.json"):
        shutil.copytree("run", name)
        Path(name, name).write_text(text)
        assert f"{name}' is damaged" in refusal(capsys, ["evaluate", name])
    for name in ("result.json", "log.jsonl", "insight.jsonl", "final_insight.json"):
        Path("run", name).write_text(text)
    assert main(RESUME) == 0  # The checkpoints decide; the result is made again.
    assert json.loads(Path("run/result.json").read_text())["test"]["tasks"] == 2


RESULTS = {
    "no test": lambda found: found | {"test": 7},
    "no norms": lambda found: found | {"test": found["test"] | {"norms": {}}},
    "text as accuracy": lambda found: json.loads(json.dumps(found).replace('"accuracy": ', '"accuracy": "x", "y": ')),
    "settings": lambda found: found | {"settings": None},
    "norm": lambda found: found | {"trained_norm": ["batch"]},
}


@pytest.mark.parametrize("edit", RESULTS.values(), ids=RESULTS)
def test_a_result_of_a_wrong_form_is_made_again(place: Path, edit: Callable[[Any], Any]) -> None:
    before = json.loads(Path("run/result.json").read_text())
    change("run/result.json", edit)
    assert main(RESUME) == 0
    assert json.loads(Path("run/result.json").read_text())["test"] == before["test"]


@pytest.mark.parametrize("history", [7, [7], [{}], [{"validation_accuracy": "high"}] * 2, {"a": 1}])
def test_a_checkpoint_whose_history_has_no_form_is_damaged(place: Path, history: Any) -> None:
    for path in Path("run/checkpoints").iterdir():
        content = torch.load(path) | {"history": history}
        content.pop("checksum")
        torch.save(content, path)
    with pytest.raises(CheckpointError, match="None of the 2 checkpoints"):
        metawrap.load("run")


@posix
@pytest.mark.parametrize(
    "name", ["run.json", "data.json", "log.jsonl", "insight.jsonl", "result.json", "final_insight.json"]
)
def test_a_pipe_in_place_of_a_file_blocks_nothing(place: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    Path("run", name).unlink()
    os.mkfifo(Path("run", name))
    command = ["evaluate", "run"] if name.endswith("a.json") or name == "run.json" else ["report", "run"]
    if command[0] == "evaluate":
        assert name in refusal(capsys, command)
    else:
        assert main(command) == 0
        capsys.readouterr()
    os.mkfifo("recipe.yaml")
    assert "recipe.yaml" in refusal(capsys, ["train", "--recipe", "recipe.yaml"])


def save_blank(save: Callable[..., None], _: Any, path: Path, dpi: int) -> None:
    """A picture that takes no seconds to draw."""
    save(Figure(figsize=(1, 1)), path, dpi)


@posix
def test_nothing_is_written_through_a_link_of_a_run(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("secret").write_text("mine")
    Path("empty").mkdir()
    pictures = [f"report-{name}.png" for name in ("curves", "rates", "steps", "msl", "norms", "episode")]
    pages = ["report.html", *pictures, *(f".{name}.{os.getpid()}.tmp" for name in ("report.html", *pictures))]
    written = ["log.jsonl", "insight.jsonl", "result.json", "final_insight.json"]
    written += [f".{name}.{os.getpid()}.tmp" for name in ("run.json", *written)]
    shutil.copytree("run", "resumed")
    Path("resumed/checkpoints/epoch-0002.pt").unlink()
    for run, names in (("run", pages), ("resumed", written)):
        for name in names:
            Path(run, name).unlink(missing_ok=True)
            Path(run, name).symlink_to(place / "secret")
    monkeypatch.setattr("metawrap.report.pictures.save_figure", partial(save_blank, save_figure))
    assert main(["report", "run", "--png", "run"]) == 0
    assert main(["train", "--resume", "--out", "resumed"]) == 0
    assert Path("secret").read_text() == "mine"
    assert [name for name in ("report.html", "report-curves.png") if Path("run", name).is_symlink()] == []
    assert [name for name in written[:4] if Path("resumed", name).is_symlink()] == []
    for name in ("insight.jsonl", "log.jsonl"):  # A link to a file that is not there yet.
        (target := Path("run", name)).unlink()
        target.symlink_to(place / "made")
    Path("run/checkpoints/epoch-0002.pt").unlink()
    assert main(RESUME) in (0, 2)
    assert not Path("made").exists()
    for name in ("checkpoints", "tensorboard"):
        shutil.rmtree(Path("run", name), ignore_errors=True)
        Path("run", name).symlink_to(place / "empty")
        capsys.readouterr()
        assert f"'run/{name}' is a symbolic link" in refusal(capsys, RESUME)
        Path("run", name).unlink()
    assert list(Path("empty").iterdir()) == []


def test_a_report_of_three_thousand_classes_is_not_larger_than_its_files_times_a_hundred(tmp_path: Path) -> None:
    run = made.make_run(tmp_path / "run")
    final = made.final(0)
    final["episodes"][0]["classes"] = [str(number) for number in range(3000)]
    made.write(run / "final_insight.json", final)
    page = render(gather([run]), "")
    assert len(page) < 300_000
    assert "and 2900 classes more" in page
    assert "<table class=confusion>" not in page
    assert _draw_episode(figure := Figure(), gather([run]))
    assert len(figure.axes) <= 20 * 40


def test_numbers_beyond_any_measurement_are_left_out_of_a_report(tmp_path: Path) -> None:
    run = made.make_run(tmp_path / "run")
    for name in ("result.json", "final_insight.json", "log.jsonl", "insight.jsonl"):
        text = (run / name).read_text()
        for number in ("0.81", "0.5", "1.3", "0.4", "61.5", "0.9"):
            text = text.replace(number, "1e308")
        (run / name).write_text(text)
    write_report_page(gather([run]), tmp_path / "page.html")
    assert "1e308" not in (tmp_path / "page.html").read_text()


def test_control_characters_of_names_are_printed_as_escapes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    odd = "\x1b]0;owned\x07\x1b[2J\u202e"
    write_birds(tmp_path / "birds", [f"bird{number}{odd}" for number in range(6)])
    (tmp_path / "birds" / f"bird0{odd}" / f"{odd}.png").write_bytes(b"broken")
    assert main(["data", "check", "birds", "--ways", "2", "--targets", "1"]) == 2
    assert main(["train", *FLAGS, "--ways", "9", "--out", "run"]) == 2
    printed = "".join(capsys.readouterr())
    assert not {"\x1b", "\x07", "\u202e"} & set(printed)
    assert "bird0\\x1b]0;owned\\x07\\x1b[2J\\u202e" in printed
    assert printable("é 漢 ±\n") == "é 漢 ±\n"


BAD: list[tuple[list[str], str]] = [
    (["train", "--out", ""], "argument --out: expected a path"),
    (["evaluate", ""], "argument RUN: expected a path"),
    (["report", "run", "--out", ""], "argument --out: expected a path"),
    (["train", "--inner-lr", "1e39"], "inner_lr: expected a number of at most 3.4e+38"),
    (["train", "--meta-lr=-1e39"], "meta_lr: expected a number of at least -3.4e+38"),
    (["train", "--seed", str(2**64)], "seed: expected a number of at most 9,223,372,036,854,775,807"),
    (["train", "--ways", str(10**30)], "ways: expected a number of at most 2,147,483,647"),
    (["train", "--image-size", "16", "--set", f"msl_epochs={10**30}"], "msl_epochs: expected"),
    (["train", "--set", "ways=" + "[" * 100_000], "nested too deeply"),
    (["train", "--set", 'ways={"ways": {"ways": 5}}'], "ways: expected"),
    (["train", "--set", 'options={"options": {}}'], "options"),
    (["train", "--device", "meta"], "device: 'meta' was asked for, but torch cannot use it here"),
    (["train", "--image-size", "16", "--filters", "2000000000"], "does not fit into memory with"),
    (["train", "--data", "x" * 5000], "x"),
    (["train", "--out", "x" * 5000], "cannot be used (File name too long)"),
    (["train", "--resume", "--out", "x" * 5000], "cannot be used (File name too long)"),
    (["evaluate", "x" * 5000], "x"),
    (["report", "x" * 5000], "x"),
    (["train", "--recipe", f"{'x' * 5000}.yaml"], "cannot be read (File name too long)"),
    (["data", "check", "x" * 5000], "x"),
]


@pytest.mark.parametrize(("command", "words"), BAD, ids=[f"{c[0]} {c[1][:9]} {n}" for n, (c, _) in enumerate(BAD)])
def test_what_no_machine_can_do_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code = main([*command, *(["--device", "cpu"] if command[0] == "train" and "--device" not in command else [])])
    except SystemExit as error:
        code = error.code
    [line] = capsys.readouterr().err.strip().splitlines()
    assert (code, words in line) == (2, True), line
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this machine has it")
def test_a_device_that_is_not_there_is_refused() -> None:
    for name in ("mps", "xpu", "cuda:77", "vulkan"):
        with pytest.raises(ArgumentError, match=f"device: '{name}' was asked for"):
            find_device(name)


@pytest.mark.parametrize("loss", ["gone", "emptied", "a file"])
def test_a_run_folder_that_is_lost_while_training_is_said_as_it_is(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    real = RunFolder.append

    def lost(folder: RunFolder, record: dict[str, Any], insight: dict[str, Any]) -> None:
        if record["epoch"] == 2:
            shutil.rmtree("new")
            if loss == "emptied":
                Path("new").mkdir()
            if loss == "a file":
                Path("new").write_text("")
        real(folder, record, insight)

    monkeypatch.setattr(RunFolder, "append", lost)
    assert main(["train", *FLAGS, "--out", "new"]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"Error: 'new' {'was emptied' if loss == 'emptied' else 'is gone'} while the run trained")
    assert not Path("new/log.jsonl").exists()
