import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import metawrap
from metawrap.cli import main
from metawrap.cli.arguments import build_parser
from metawrap.training.checkpoints import CheckpointFolder
from metawrap.training.progress import Progress, duration, percent
from metawrap.training.run_folder import read_run
from metawrap.training.run_settings import RunSettings
from metawrap.training.tables import render_table, result_table, seeds_table, summarise_seeds

FLAGS = [
    *("--model", "small_network:build", "--image-size", "8", "--inner-steps", "1", "--device", "cpu"),
    *("--epochs", "1", "--iterations", "1", "--batch", "1", "--validation-tasks", "2", "--test-tasks", "2"),
]


@pytest.fixture(autouse=True)
def _folder_with_a_network(tmp_path, monkeypatch):
    (tmp_path / "small_network.py").write_text(
        "from torch import nn\ndef build(ways): return nn.Sequential(nn.Flatten(), nn.Linear(64, ways))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "small_network", raising=False)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    with torch.random.fork_rng():
        yield


def complaint(capsys):
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_train_prints_a_table_before_and_after_and_evaluate_prints_it_again(capsys):
    assert main(["train", *FLAGS, "--out", "run"]) == 0
    first = capsys.readouterr().out
    for words in (
        "before adaptation",
        "after adaptation",
        "batch (transductive) *",
        "running",
        "support",
        "run/result.json",
    ):
        assert words in first
    assert main(["evaluate", "run", "--out", "again.json"]) == 0
    second = capsys.readouterr().out
    assert second.strip().splitlines()[:6] == first.strip().splitlines()[:6]
    assert json.loads(Path("again.json").read_text())["test"] == json.loads(Path("run/result.json").read_text())["test"]


def test_resume_takes_the_stored_settings_and_refuses_other_ones(capsys):
    assert main(["train", *FLAGS, "--out", "run"]) == 0
    assert main(["train", "--out", "run", "--resume"]) == 0
    assert main(["train", "--out", "run", "--resume", "--ways", "4"]) == 2
    assert complaint(capsys).startswith("Error: ways: the run was started with 5, but is resumed with 4.")


def test_seeds_train_a_run_each_and_resume_without_repeating_them(capsys):
    assert main(["train", *FLAGS, "--out", "runs", "--seeds", "0,2"]) == 0
    assert "mean over seeds 0, 2" in capsys.readouterr().out
    assert read_run(Path("runs"))[1] == [0, 2]
    assert main(["train", "--out", "runs", "--resume"]) == 0
    assert "mean over seeds 0, 2" in capsys.readouterr().out
    assert sorted(path.name for path in Path("runs").iterdir()) == ["result.json", "run.json", "seed-0", "seed-2"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["train", "--data", "no-such-data"], "'no-such-data' is neither a data set"),
        (["train", "--ways", "1"], "ways: expected at least 2, but got 1"),
        (["train", "--ways", "1000", "--device", "cpu"], "ways=1000, but there are only"),
        (["train", "--model", "nothing"], "model: expected 'package.module:factory'"),
        (["train", *FLAGS, "--preset", "mine"], "preset: expected one of"),
        (["train", *FLAGS, "--set", "colour=1"], "has no option 'colour'"),
        (["evaluate", "nowhere"], "There is no run in 'nowhere'"),
        (["inspect", "--model", "nothing"], "model: expected 'package.module:factory'"),
        (["inspect", "--model", "small_network:build", "--set", "colour=1"], "has no option 'colour'"),
        (["inspect", "--model", "small_network:build", "--input-shape", "3,3"], "without the batch axis"),
        (["inspect", "--model", "torch.nn:Identity"], "Identity has no parameter to adapt"),
        (["inspect", "--model", "small_network:build", "--html", "no/page.html"], "html: cannot write 'no/page.html'"),
    ],
)
def test_an_error_is_one_line_with_exit_code_2_and_no_traceback(capsys, flags, words):
    assert main(flags) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = printed.err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("Error: ")
    assert words in lines[0]
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
def test_a_factory_that_fails_is_explained_in_one_line(capsys, monkeypatch, command, name, words):
    monkeypatch.delitem(sys.modules, "faulty", raising=False)
    Path("faulty.py").write_text(FAULTY)
    assert main([command, "--model", f"faulty:{name}"]) == 2
    printed = capsys.readouterr().err.strip()
    assert printed.startswith("Error: model: ")
    assert words in printed
    assert "\n" not in printed
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def build(:", "SyntaxError: invalid syntax (faulty.py, line 1)). Correct it there; -v shows the line."),
        ("1 / 0", "ZeroDivisionError: division by zero). Correct it"),
        ("raise SystemExit(3)", "SystemExit: 3). Correct it"),
        ("from torch import absent", "ImportError: cannot import name 'absent' from 'torch'"),
        (
            "import absent_package",
            "'absent_package'). Install 'absent_package', or correct the import.",
        ),
    ],
)
def test_a_file_that_cannot_be_imported_is_explained_in_one_line(capsys, monkeypatch, text, words):
    monkeypatch.delitem(sys.modules, "faulty", raising=False)
    Path("faulty.py").write_text(text)
    assert main(["inspect", "--model", "faulty:build"]) == 2
    printed = capsys.readouterr().err.strip()
    assert printed.startswith("Error: model: cannot import 'faulty' (")
    assert words in printed
    assert "folder" not in printed
    assert "\n" not in printed


@pytest.mark.parametrize("name", ["absent", "absent.inner", "small_network.inner"])
def test_only_a_file_that_is_not_there_is_looked_for_in_another_folder(capsys, name):
    assert main(["inspect", "--model", f"{name}:build"]) == 2
    assert complaint(capsys).endswith("Run from the folder that holds it, or install it.")


@pytest.mark.parametrize("name", ["loss_fn", "optimizer", "scheduler", "wrapping.swap"])
def test_options_that_take_python_objects_are_not_offered(capsys, name):
    flags = ["inspect", "--model", "small_network:build", "--set"]
    assert main([*flags, f"{name}=x"]) == 2
    refused = complaint(capsys)
    assert refused.startswith(f"Error: options: '{name}' takes Python objects, which a run cannot store.")
    assert main([*flags, "colour=1"]) == 2
    offered = [line.partition(", ")[2].rstrip(".").split(", ") for line in (refused, complaint(capsys))]
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
def test_what_cannot_be_trained_leaves_no_folder_behind(capsys, monkeypatch, flags, words, seeds):
    monkeypatch.delitem(sys.modules, "faulty", raising=False)
    Path("faulty.py").write_text(FAULTY)
    assert main(["train", *FLAGS, *flags, *seeds, "--out", "run"]) == 2
    printed = capsys.readouterr().err.strip()
    assert printed.startswith(f"Error: {words}")
    assert "\n" not in printed
    assert not Path("run").exists()


def test_inspect_hints_at_ways_only_where_the_network_has_fewer_outputs(capsys):
    Path("outputs.py").write_text(
        "from torch import nn\ndef three(): return nn.Linear(4, 3)\n"
        "def flat(): return nn.Sequential(nn.Linear(4, 5), nn.Flatten(0))\n"
    )
    hint = "--ways sets how many classes a task has, --train-ways in training."
    for options in ([], ["--set", "outputs.mask_unused_outputs=true"]):
        assert main(["inspect", "--model", "outputs:three", "--input-shape", "4", *options]) == 2
        assert complaint(capsys).endswith(hint)
    assert main(["inspect", "--model", "outputs:flat", "--input-shape", "4", *options]) == 2
    told = complaint(capsys)
    assert told.startswith("Error: mask_unused_outputs=True needs logits of shape")
    assert "--ways" not in told


def test_a_reader_that_leaves_early_ends_the_command_quietly(capsys, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as unread:
        monkeypatch.setattr(sys, "stdout", unread)
        assert main(["inspect", "--model", "small_network:build"]) == 141
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
    assert main(["evaluate", "run"]) == 2
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
    assert hint.endswith("train --out run --resume")
    assert main(["train", "--out", "run", "--resume"]) == 0
    assert CheckpointFolder(Path("run/checkpoints"), 1, 1).epochs() == [1, 2, 3]


@pytest.mark.parametrize("command", ["train", "evaluate", "inspect", "report"])
def test_help_fits_on_a_screen(capsys, command):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 50
    assert max(map(len, lines)) <= 120


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("    ")]
    assert listed == ["train", "compare", "evaluate", "inspect", "report", "data", "recipes"]


def test_inspect_prints_the_table_of_the_wrapped_network(capsys):
    assert main(["inspect", "--model", "small_network:build", "--ways", "3", "--inner-steps", "2"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "\x1b" not in printed.out
    lines = printed.out.splitlines()
    assert lines[0] == 'MAMLPlusPlus(preset="authors_code") around Sequential'
    assert lines[4].split() == ["1", "Linear", "3x64,", "3", "195", "4", "adapted"]
    assert [line.split(maxsplit=1)[1] for line in lines if line.startswith("head ")] == ["known after the first task"]


def test_inspect_with_an_input_shape_looks_at_a_task(capsys):
    flags = ["--model", "small_network:build", "--input-shape", "1,8,8", "--method", "maml", "--set", "adapt_norm=true"]
    assert main(["inspect", *flags]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith('MAML(preset="maml") around Sequential')
    assert "adapted, the head" in printed
    assert "its gradient is that of functional" in printed
    assert "adapt_norm=True" in printed


def test_inspect_colours_a_terminal_unless_it_is_asked_not_to(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    flags = ["inspect", "--model", "small_network:build"]
    assert main(flags) == 0
    assert "\x1b[32madapted" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    assert main(flags) == 0
    assert "\x1b[32m" not in capsys.readouterr().out


def test_inspect_writes_json_and_a_page(capsys):
    flags = ["--model", "small_network:build", "--input-shape", "64", "--json", "--html", "page.html"]
    assert main(["inspect", *flags, "--method", "fomaml"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["head"] == "1"
    assert [row["numbers"] for row in found["modules"]] == [0, 0, 5 * 64 + 5]
    page = Path("page.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "FOMAML(preset=&#34;fomaml&#34;) around Sequential" in page


def test_inspect_says_unused_parameters_in_the_table_alone(capsys):
    Path("aside.py").write_text(
        "from torch import nn\nclass Aside(nn.Linear):\n    def __init__(self):\n        super().__init__(4, 5)\n"
        "        self.spare = nn.Linear(2, 2)\n"
    )
    assert main(["inspect", "--model", "aside:Aside", "--input-shape", "4"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "the support loss does not depend on 'spare.weight'" in printed.out


def test_inspect_prints_the_refusal_of_a_module(capsys):
    Path("refused.py").write_text("from torch import nn\ndef lazy(): return nn.Sequential(nn.LazyLinear(5))\n")
    assert main(["inspect", "--model", "refused:lazy"]) == 2
    assert complaint(capsys).startswith("Error: '0' (LazyLinear) is lazy and not initialised yet. Run the model once")


def test_flags_that_are_not_given_leave_no_setting_behind():
    arguments = vars(build_parser().parse_args(["train"]))
    assert not set(arguments) & set(RunSettings().to_dict())


def test_every_setting_of_a_run_has_a_flag():
    words = ["--data", "--data-root", "--split", "--normalise", "--preset", "--engine", "--model", "--device"]
    numbers = [
        "--ways",
        "--train-ways",
        "--shots",
        "--targets",
        "--filters",
        "--image-size",
        "--inner-steps",
        "--inner-lr",
    ]
    numbers += ["--meta-lr", "--epochs", "--iterations", "--batch", "--validation-tasks", "--test-tasks", "--seed"]
    numbers += ["--inner-lr", "--keep", "--ensemble", "--loader-workers"]
    given = [f"{flag}=x" for flag in words] + [f"{flag}=2" for flag in numbers]
    given += [
        "--method=maml",
        "--norm=batch",
        "--backbone=conv4",
        "--test-norms=own",
        "--set=a=1",
        "--no-rotations",
        "--recipe=x",
        "--stream",
    ]
    assert set(RunSettings().to_dict()) <= set(vars(build_parser().parse_args(["train", *given])))


def test_set_reads_numbers_switches_and_words():
    arguments = build_parser().parse_args(["train", "--set=a=1.5", "--set=b=true", "--set=c=word", "--set=d=[1,2]"])
    assert dict(arguments.options) == {"a": 1.5, "b": True, "c": "word", "d": [1, 2]}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--seeds", "0,x"], "expected whole numbers such as 0,1,2, but got '0,x'"),
        (["--seeds", "1,1"], "expected different numbers"),
        (["--seeds", "0,1", "--seed", "3"], "not allowed with"),
        (["--set", "colour"], "expected NAME=VALUE"),
        (["--method", "magic"], "invalid choice"),
    ],
)
def test_flags_that_cannot_be_read_are_explained(capsys, flags, words):
    with pytest.raises(SystemExit, match="2"):
        main(["train", *flags])
    assert words in complaint(capsys)


@pytest.mark.parametrize("shape", ["3,x", "3,0", ""])
def test_an_input_shape_that_cannot_be_read_is_explained(capsys, shape):
    with pytest.raises(SystemExit, match="2"):
        main(["inspect", "--model", "small_network:build", "--input-shape", shape])
    assert "expected positive whole numbers such as 3,84,84" in complaint(capsys)


def test_the_module_runs_as_a_command():
    environment = os.environ | {"PYTHONPATH": str(Path(metawrap.__file__).parents[1])}
    command = [sys.executable, "-m", "metawrap", "--version"]
    assert subprocess.check_output(command, env=environment, text=True) == f"metawrap {metawrap.__version__}\n"


def test_columns_are_aligned_to_the_left_then_to_the_right():
    table = render_table(["norm", "accuracy"], [["batch", "9 %"], ["running", "99.25 %"]])
    assert table == "norm     accuracy\n-------  --------\nbatch         9 %\nrunning   99.25 %"


def scores(before, after, **more):
    return {
        name: {"accuracy": value, "interval": 0.0125}
        for name, value in dict(before=before, after=after, **more).items()
    }


def test_the_result_table_marks_the_trained_policy_and_names_the_ensemble():
    test = {"tasks": 600, "epoch": 7, "ensemble_epochs": [7, 5, 2], "norms": {}}
    test["norms"] = {norm: scores(0.2, 0.975, ensemble=0.98) for norm in ("batch", "running", "support")}
    lines = result_table(RunSettings(), test, "running").splitlines()
    assert lines[0] == "MAML++ on glyphs, 5-way 1-shot: 600 tasks of unseen classes, best epoch 7 of 10"
    assert lines[2].split("  ")[-1] == "3 best averaged"
    assert lines[4].endswith("   20.00 ± 1.25 %    97.50 ± 1.25 %   98.00 ± 1.25 %")
    assert [line.startswith("running (inductive) *") for line in lines].count(True) == 1
    assert "chance is 20 %" in lines[-1]
    assert len({len(line) for line in lines[2:7]}) == 1


def test_the_seeds_table_shows_mean_and_deviation_and_none_for_one_seed():
    results = {seed: {"test": {"norms": {"batch": scores(0.2, after)}}} for seed, after in ((0, 0.9), (1, 0.94))}
    assert "92.00 ± 2.83 %" in seeds_table(RunSettings(), summarise_seeds(results), "batch")
    assert "90.00 %" in seeds_table(RunSettings(), summarise_seeds({0: results[0]}), "batch")


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (59.4, "59 s"), (60, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")]
)
def test_durations_are_words(seconds, words):
    assert duration(seconds) == words


def test_percent_rounds_and_knows_nothing_as_none():
    assert percent(0.9765) == "97.7 %"
    assert percent(None) == "none"
