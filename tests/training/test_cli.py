import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_runs import refusal

import metawrap
from metawrap.cli import main
from metawrap.cli.arguments import build_parser
from metawrap.engines import ENGINES
from metawrap.evaluation_result import EvaluationResult
from metawrap.training.checkpoints import CheckpointFolder
from metawrap.training.progress import Progress, duration, percent
from metawrap.training.run_folder import read_run
from metawrap.training.run_settings import RunSettings
from metawrap.training.tables import render_table, result_text, score_text, summarise_seeds

FLAGS = [
    *("--model", "small_network:build", "--image-size", "8", "--inner-steps", "1", "--device", "cpu"),
    *("--epochs", "1", "--iterations", "1", "--batch", "1", "--validation-tasks", "2", "--test-tasks", "2"),
]
MODEL = FLAGS[:2]
SMALL = ["inspect", "--model", "small_network:build"]


def write_module(name, text):
    sys.modules.pop(name, None)
    Path(f"{name}.py").write_text(text)


@pytest.fixture(autouse=True)
def _folder_with_a_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    write_module(
        "small_network",
        "from torch import nn\ndef build(ways): return nn.Sequential(nn.Flatten(), nn.Linear(64, ways))\n",
    )
    with torch.random.fork_rng():
        yield


def complaint(capsys):
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_train_prints_a_table_before_and_after_and_evaluate_prints_it_again(capsys):
    assert main(["train", *FLAGS, "--out", "run"]) == 0
    first = capsys.readouterr().out
    columns = ("before adaptation", "after adaptation", "support (inductive) *", "batch (transductive)")
    assert not [words for words in (*columns, "run/result.json") if words not in first]
    assert main(["evaluate", "run", *MODEL, "--out", "again.json"]) == 0
    second = capsys.readouterr().out
    assert second.strip().splitlines()[:6] == first.strip().splitlines()[:6]
    assert json.loads(Path("again.json").read_text())["test"] == json.loads(Path("run/result.json").read_text())["test"]


def test_resume_takes_the_stored_settings_and_refuses_other_ones(capsys):
    assert main(["train", *FLAGS, "--out", "run"]) == 0
    assert main(["train", "--out", "run", "--resume", *MODEL]) == 0
    assert main(["train", "--out", "run", "--resume", *MODEL, "--ways", "4"]) == 2
    assert complaint(capsys).startswith("Error: ways: the run was started with 5, but is resumed with 4.")


@pytest.mark.parametrize(
    "flags", [[], ["--device", "cpu"], ["--keep", "2", "--test-tasks", "4"], ["--tensorboard"], MODEL]
)
def test_resume_of_a_run_that_is_not_there_stops_unless_settings_are_given(capsys, flags):
    said = refusal(capsys, ["train", "--resume", "--out", "typo", *flags])
    assert said == "There is no run in 'typo' (no run.json). Start one with: metawrap train --out typo"
    assert not Path("typo").exists()
    if not flags:
        assert main(["train", *FLAGS, "--resume", "--out", "typo"]) == 0  # As `make train` does.
        assert "There is no run in 'typo' yet: --resume starts one." in capsys.readouterr().err


def test_seeds_train_a_run_each_and_resume_without_repeating_them(capsys):
    assert main(["train", *FLAGS, "--out", "runs", "--seeds", "0,2"]) == 0
    assert "mean over seeds 0, 2" in capsys.readouterr().out
    assert read_run(Path("runs"))[1] == [0, 2]
    assert main(["train", "--out", "runs", "--resume", *MODEL]) == 0
    assert "mean over seeds 0, 2" in capsys.readouterr().out
    assert sorted(path.name for path in Path("runs").iterdir()) == ["result.json", "run.json", "seed-0", "seed-2"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["train", "--data", "no-such-data"], "'no-such-data' is neither a data set"),
        (["train", "--ways", "1"], "ways: expected a whole number of at least 2, but got 1"),
        (["train", "--ways", "1000", "--device", "cpu"], "ways=1000, but train has only 240 classes"),
        (["train", "--model", "nothing"], "model: expected 'package.module:factory'"),
        (["train", *FLAGS, "--preset", "mine"], "preset: expected one of"),
        (["train", *FLAGS, "--set", "colour=1"], "has no option 'colour'"),
        (["evaluate", "nowhere"], "There is no run in 'nowhere'"),
        (["inspect", "--model", "nothing"], "model: expected 'package.module:factory'"),
        ([*SMALL, "--set", "colour=1"], "has no option 'colour'"),
        ([*SMALL, "--input-shape", "3,3"], "without the batch axis"),
        (["inspect", "--model", "torch.nn:Identity"], "Identity has no parameter to adapt"),
        ([*SMALL, "--html", "no/page.html"], "html: cannot write 'no/page.html'"),
        *(
            (["inspect", "--model", f"{name}:build"], "Run from the folder that holds it, or install it.")
            for name in ("absent", "absent.inner", "small_network.inner")
        ),
    ],
)
def test_an_error_is_one_line_with_exit_code_2_and_no_traceback(capsys, flags, words):
    assert words in refusal(capsys, flags)
    assert not Path("runs").exists()


FAULTY = """
from torch import nn
class Sized(nn.Linear):
    def __init__(self, width): super().__init__(width, 5)
class Both(Sized):
    def __init__(self, ways, *, width): super().__init__(width)
def three(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
def fails(): raise RuntimeError("first\\nsecond.")
def leaves(): raise SystemExit
def lacks(): import absent_package
def lazy(): return nn.Sequential(nn.LazyLinear(5))
"""


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Sized", "cannot be called without arguments (missing a required argument: 'width'). Write a function that"),
        ("Both", "cannot be called with ways alone (missing a required"),
        ("fails", "'faulty:fails' fails when it is called: RuntimeError: first second. Correct it"),
        ("leaves", "'faulty:leaves' fails when it is called: SystemExit. Correct it"),
        ("lacks", "fails when it is called: ModuleNotFoundError: No module named 'absent_package'. "),
    ],
)
@pytest.mark.parametrize("command", ["inspect", "train"])
def test_a_factory_that_fails_is_explained_in_one_line(capsys, command, name, words):
    write_module("faulty", FAULTY)
    line = refusal(capsys, [command, "--model", f"faulty:{name}"])
    assert line.startswith("model: ")
    assert words in line
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def build(:", "SyntaxError: invalid syntax (faulty.py, line 1)). Correct it there; -v shows the line."),
        ("1 / 0", "ZeroDivisionError: division by zero). Correct it"),
        ("raise SystemExit(3)", "SystemExit: 3). Correct it"),
        ("from torch import absent", "ImportError: cannot import name 'absent' from 'torch'"),
        ("import absent_package", "'absent_package'). Install 'absent_package', or correct the import."),
    ],
)
def test_a_file_that_cannot_be_imported_is_explained_in_one_line(capsys, text, words):
    write_module("faulty", text)
    line = refusal(capsys, ["inspect", "--model", "faulty:build"])
    assert line.startswith("model: cannot import 'faulty' (")
    assert words in line
    assert "folder" not in line


@pytest.mark.parametrize("name", ["loss_fn", "optimizer", "scheduler", "wrapping.swap"])
def test_options_that_take_python_objects_are_not_offered(capsys, name):
    refused, unknown = (refusal(capsys, [*SMALL, "--set", option]) for option in (f"{name}=x", "colour=1"))
    assert refused.startswith(f"options: '{name}' takes Python objects, which a run cannot store.")
    offered = [line.partition(", ")[2].rstrip(".").split(", ") for line in (refused, unknown)]
    assert all("msl_epochs" in names and name not in names[1:] for names in offered)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--set", "outputs.head_init=stored"], 'options: outputs.head_init="stored" keeps a head for each task'),
        (["--image-size", "9"], "model: the network fails on inputs of shape (5, 1, 9, 9): RuntimeError: "),
        (["--model", "faulty:three"], "ways: support_y holds labels 0..4, but the model has 3 outputs."),
        (["--set", "inner_update.betas=1"], "inner_update.betas: expected two numbers"),
        (["--set", "workers=2"], "options: MAMLPlusPlus has no option 'workers'. Did you mean 'execution.workers'?"),
        (["--set", "execution.worker=2"], "options: MAMLPlusPlus has no option 'execution.worker'. Did you mean"),
        (["--set", "execution=2"], "--set execution=2: execution: expected a mapping of its fields"),
    ],
)
@pytest.mark.parametrize("seeds", [[], ["--seeds", "0,1"]])
def test_what_cannot_be_trained_leaves_no_folder_behind(capsys, flags, words, seeds):
    write_module("faulty", FAULTY)
    assert refusal(capsys, ["train", *FLAGS, *flags, *seeds, "--out", "run"]).startswith(words)
    assert not Path("run").exists()


def test_inspect_hints_at_ways_only_where_the_network_has_fewer_outputs(capsys):
    write_module(
        "outputs",
        "from torch import nn\ndef three(): return nn.Linear(4, 3)\n"
        "def flat(): return nn.Sequential(nn.Linear(4, 5), nn.Flatten(0))\n",
    )
    hint = "--ways sets how many classes a task has."
    masked = ["--set", "outputs.mask_unused_outputs=true"]
    for options in ([], masked):
        assert refusal(capsys, ["inspect", "--model", "outputs:three", "--input-shape", "4", *options]).endswith(hint)
    told = refusal(capsys, ["inspect", "--model", "outputs:flat", "--input-shape", "4", *masked])
    assert told.startswith("mask_unused_outputs=True needs logits of shape")
    assert "--ways" not in told


def test_a_reader_that_leaves_early_ends_the_command_quietly(capsys, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as unread:
        monkeypatch.setattr(sys, "stdout", unread)
        assert main(SMALL) == 141
        unread.write("what is still in the buffer")
    assert capsys.readouterr().err == ""


def test_verbose_shows_the_traceback_too(capsys):
    assert main(["evaluate", "nowhere", "-v"]) == 2
    printed = capsys.readouterr().err
    assert "Traceback" in printed
    assert printed.strip().splitlines()[-1].startswith("Error: There is no run")


def test_training_that_diverges_ends_with_an_explained_error(capsys):
    flags = [*FLAGS, "--iterations", "9", "--inner-lr", "1e38", "--inner-steps", "4", "--engine", "functional"]
    flags += ["--set", "outer_update.max_skipped_steps=3"]
    assert main(["train", *flags, "--out", "run"]) == 2
    assert complaint(capsys).startswith("Error: ")
    assert not list(Path("run").glob("checkpoints/*.pt"))


def test_a_checkpoint_with_code_inside_is_refused_by_evaluate(capsys):
    assert main(["train", *FLAGS, "--out", "run"]) == 0
    torch.save({"format": "metawrap-checkpoint", "version": 1, "learner": Path("x")}, "run/checkpoints/epoch-0001.pt")
    assert main(["evaluate", "run", *MODEL]) == 2
    assert complaint(capsys).startswith("Error: None of the 1 checkpoints")


def test_an_interrupt_before_the_run_began_says_that_nothing_was_written(capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("metawrap.cli.commands.train", interrupted)
    assert main(["train", *FLAGS, "--out", "run"]) == 130
    assert "nothing was written" in complaint(capsys)


def test_an_interrupt_in_the_middle_names_the_saved_epochs_and_the_command(capsys, monkeypatch):
    flags = [*FLAGS, "--epochs", "3", "--out", "run"]
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "end_epoch", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(["train", *flags]) == 130
    hint = complaint(capsys)
    assert hint.startswith("Stopped. 1 of 3 epochs are saved; continue with: ")
    assert hint.endswith("train --out run --resume --model small_network:build")
    assert main(["train", "--out", "run", "--resume", *MODEL]) == 0
    assert CheckpointFolder(Path("run/checkpoints"), 1, 1).epochs() == [1, 2, 3]


@pytest.mark.parametrize("command", ["train", "inspect"])
def test_help_names_every_engine_and_who_chooses(capsys, command):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    [line] = [line for line in capsys.readouterr().out.splitlines() if "--engine" in line]
    assert {"auto", "chooses", *ENGINES} <= set(line.replace("(", " ").replace(",", " ").split())


@pytest.mark.parametrize(
    ("name", "meant"),
    [("proto-net", "protonet"), ("MAMLPlusPlus", "maml++"), ("mamlpp", "maml++"), ("Fine_Tune", "fine-tune")],
)
def test_a_method_is_found_by_the_name_of_its_class_or_of_a_recipe(capsys, name, meant):
    for flags in (["train", "--method", name], ["compare", "--methods", name, "--budget", "1"]):
        try:
            code = main(flags)
        except SystemExit as error:
            code = error.code
        assert code == 2
        assert re.search(rf"Did you mean '?{re.escape(meant)}'?\?\n$", capsys.readouterr().err)


def test_no_command_shows_the_help(capsys):
    assert main([]) == 2
    shown = capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert shown == capsys.readouterr().out


def test_one_task_has_no_interval():
    score = {"accuracy": 0.5, "interval": float("nan")}
    assert score_text(score, "accuracy", "interval") == "50.00 %"
    found = EvaluationResult.of({"accuracy": torch.tensor([0.5])}, torch.tensor([1.0]), norm="batch", steps=1)
    assert str(found) == 'accuracy 50.00 % (1 task, 1 inner steps, norm="batch", transductive)'


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("    ")]
    classifiers = ["adapt", "predict", "serve"]
    assert listed == ["train", "compare", "evaluate", *classifiers, "inspect", "report", "data", "recipes"]


def test_inspect_prints_the_table_of_the_wrapped_network(capsys):
    assert main([*SMALL, "--ways", "3", "--inner-steps", "2"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "\x1b" not in printed.out
    lines = printed.out.splitlines()
    assert lines[0] == 'MAMLPlusPlus(preset="inductive") around Sequential'
    assert lines[4].split() == ["1", "Linear", "3x64,", "3", "195", "4", "adapted"]
    assert [line.split(maxsplit=1)[1] for line in lines if line.startswith("head ")] == ["known after the first task"]


def test_inspect_with_an_input_shape_looks_at_a_task(capsys):
    assert (
        main([*SMALL, "--input-shape", "1,8,8", "--method", "maml", "--engine", "higher", "--set", "adapt_norm=true"])
        == 0
    )
    printed = capsys.readouterr().out
    assert printed.startswith('MAML(preset="maml") around Sequential')
    for words in ("adapted, the head", "its gradient is that of functional", "adapt_norm=True"):
        assert words in printed


def test_inspect_colours_a_terminal_unless_it_is_asked_not_to(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert main(SMALL) == 0
    assert "\x1b[32madapted" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    assert main(SMALL) == 0
    assert "\x1b[32m" not in capsys.readouterr().out


def test_inspect_writes_json_and_a_page(capsys):
    assert main([*SMALL, "--input-shape", "64", "--json", "--html", "page.html", "--method", "fomaml"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["head"] == "1"
    assert [row["numbers"] for row in found["modules"]] == [0, 0, 5 * 64 + 5]
    page = Path("page.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "FOMAML(preset=&#34;fomaml&#34;) around Sequential" in page


def test_inspect_says_unused_parameters_in_the_table_alone(capsys):
    write_module(
        "aside",
        "from torch import nn\nclass Aside(nn.Linear):\n    def __init__(self):\n        super().__init__(4, 5)\n"
        "        self.spare = nn.Linear(2, 2)\n",
    )
    assert main(["inspect", "--model", "aside:Aside", "--input-shape", "4"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "the support loss does not depend on 'spare.weight'" in printed.out


def test_inspect_prints_the_refusal_of_a_module(capsys):
    write_module("faulty", FAULTY)
    line = refusal(capsys, ["inspect", "--model", "faulty:lazy"])
    assert line.startswith("'0' (LazyLinear) is lazy and not initialised yet. Run the model once")


def test_flags_that_are_not_given_leave_no_setting_behind():
    arguments = vars(build_parser().parse_args(["train"]))
    assert not set(arguments) & set(RunSettings().to_dict())


def test_every_setting_of_a_run_has_a_flag():
    words = "data data-root split normalise preset engine model weights device recipe"
    numbers = "ways train-ways shots targets filters image-size inner-steps inner-lr meta-lr epochs iterations batch "
    numbers += "validation-tasks validation-alone test-tasks seed keep ensemble loader-workers"
    given = [f"--{flag}=x" for flag in words.split()] + [f"--{flag}=2" for flag in numbers.split()]
    given += ["--method=maml", "--norm=batch", "--backbone=conv4", "--test-norms=own", "--set=a=1"]
    given += ["--no-rotations", "--stream", "--resize=crop"]
    assert set(RunSettings().to_dict()) <= set(vars(build_parser().parse_args(["train", *given])))


def test_set_reads_numbers_switches_and_words():
    arguments = build_parser().parse_args(["train", "--set=a=1.5", "--set=b=true", "--set=c=word", "--set=d=[1,2]"])
    assert dict(arguments.options) == {"a": 1.5, "b": True, "c": "word", "d": [1, 2]}


def test_the_module_runs_as_a_command():
    environment = os.environ | {"PYTHONPATH": str(Path(metawrap.__file__).parents[1])}
    command = [sys.executable, "-m", "metawrap", "--version"]
    assert subprocess.check_output(command, env=environment, text=True) == f"metawrap {metawrap.__version__}\n"


def test_columns_are_aligned_to_the_left_then_to_the_right():
    table = render_table(["norm", "accuracy"], [["batch", "9 %"], ["running", "99.25 %"]])
    assert table == "norm     accuracy\n-------  --------\nbatch         9 %\nrunning   99.25 %"


def scores(**accuracies):
    return {name: {"accuracy": value, "interval": 0.0125} for name, value in accuracies.items()}


def text_of(trained_norm, **result):
    return result_text({"settings": RunSettings().to_dict(), "trained_norm": trained_norm, **result})


def test_the_result_table_marks_the_trained_policy_and_names_the_ensemble():
    norms = {norm: scores(before=0.2, after=0.975, ensemble=0.98) for norm in ("batch", "running", "support")}
    test = {"tasks": 600, "epoch": 7, "ensemble_epochs": [7, 5, 2], "norms": norms}
    lines = text_of("running", test=test).splitlines()
    assert lines[0] == "MAML++ on glyphs, 5-way 1-shot: 600 tasks of unseen classes, best epoch 7 of 10"
    assert lines[2].split("  ")[-1] == "3 best averaged"
    assert lines[4].endswith("   20.00 ± 1.25 %    97.50 ± 1.25 %   98.00 ± 1.25 %")
    assert [line.startswith("running (inductive) *") for line in lines].count(True) == 1
    assert "chance is 20 %" in lines[-1]
    assert len({len(line) for line in lines[2:7]}) == 1


@pytest.mark.parametrize(
    ("after", "hint"),
    [
        (
            {"task_layer": 0.23, "batch": 0.22},
            "Hint: task_layer may be at chance: train longer, or try another --meta-lr.",
        ),
        (
            {"task_layer": 0.90, "support": 0.93},
            "Hint: support is better than task_layer. Train with it: --norm support",
        ),
        ({"task_layer": 0.90, "batch": 0.93}, None),  # A transductive policy sees more of the targets.
        (
            {"task_layer": 0.95, "running": 0.82},
            "Hint: running is far below task_layer: predict under task_layer, as in training.",
        ),
        ({"task_layer": 0.95, "batch": 0.97, "running": 0.84}, None),  # The intervals of 1.25 points overlap.
    ],
)
def test_one_line_of_hint_stands_under_a_weak_policy_and_none_where_all_is_well(after, hint):
    norms = {norm: scores(after=value) for norm, value in after.items()}
    lines = text_of("task_layer", test={"tasks": 600, "epoch": 7, "ensemble_epochs": [], "norms": norms}).splitlines()
    assert [line for line in lines if line.startswith("Hint")] == ([hint] if hint else [])
    assert all(len(line) <= 80 for line in lines[1:])


def test_the_seeds_table_shows_mean_and_deviation_and_none_for_one_seed():
    norms = {seed: {"batch": scores(before=0.2, after=after)} for seed, after in ((0, 0.9), (1, 0.94))}
    results = {seed: {"test": {"norms": each}} for seed, each in norms.items()}
    assert "92.00 ± 2.83 %" in text_of("batch", summary=summarise_seeds(results))
    assert "90.00 %" in text_of("batch", summary=summarise_seeds({0: results[0]}))


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (59.4, "59 s"), (60, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")]
)
def test_durations_are_words(seconds, words):
    assert duration(seconds) == words


def test_percent_rounds_and_knows_nothing_as_none():
    assert percent(0.9765) == "97.7 %"
    assert percent(None) == "none"
