"""Recipes: what is packaged says what was published, and what a file may not say is refused with its place."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import matplotlib.pyplot as plt
import pytest
import torch
import yaml
from forked import compare_in_forks
from tiny_runs import refusal

from metawrap import ArgumentError
from metawrap.backbones import Conv4
from metawrap.cli import main
from metawrap.recipes import load_recipe, recipe_names, recipe_text
from metawrap.recipes.yaml_file import Given
from metawrap.settings.settings import NormPolicy
from metawrap.training.experiment import build_learner
from metawrap.training.plots import draw_study
from metawrap.training.run_settings import METHODS, RunSettings
from metawrap.training.study import largest_fall, study_table

# Written by hand from the paper's tables and from the authors' released configurations, not from the recipes.
SETTINGS = {
    # data, ways, shots: (published MAML, MAML++), tasks, filters, targets, inner rate, MSL epochs, clamp, side, tasks
    ("omniglot", 20, 1): ((91.27, 97.65), 8, 64, 1, 0.1, 10, None, 28, 16),
    ("omniglot", 20, 5): ((98.78, 99.33), 8, 64, 1, 0.1, 10, None, 28, 16),
    ("omniglot", 5, 1): ((98.57, 99.47), 8, 64, 1, 0.1, 10, None, 28, 16),
    ("omniglot", 5, 5): ((99.82, 99.85), 8, 64, 1, 0.1, 10, None, 28, 16),
    ("mini-imagenet", 5, 1): ((48.64, 52.40), 2, 48, 15, 0.01, 15, 10, 84, 4),
    ("mini-imagenet", 5, 5): ((64.78, 67.15), 2, 48, 15, 0.01, 15, 10, 84, 2),
}
# Which of MSL, LSLR, BNWB, BNRS, CA are on, and the epochs of DA; and what was published for Omniglot 20-way 1-shot.
PARTS = {
    "maml": ("", 0, 91.27),
    "maml-msl": ("MSL", 0, 91.53),
    "maml-lslr": ("LSLR", 0, 95.77),
    "maml-bnwb-bnrs": ("BNWB BNRS", 0, 95.35),
    "maml-ca": ("CA", 0, 93.03),
    "maml-da": ("", 50, 92.3),
    "mamlpp": ("MSL LSLR BNWB BNRS CA", 0, 97.65),
    "mamlpp-paper": ("MSL LSLR BNWB BNRS CA", 50, 97.65),
}
SWITCHES = {
    "MSL": "multi_step_loss",
    "LSLR": "learn_inner_lr",
    "BNWB": "per_step_norm_affine",
    "BNRS": "per_step_norm_statistics",
    "CA": "cosine_annealing",
}
STEPS = {1: 51.05, 2: 51.49, 3: 51.11, 4: 51.65, 5: 52.40}
NAMES = [f"{data}-{ways}way-{shots}shot-{part}" for data, ways, shots in SETTINGS for part in PARTS]
OTHERS = {
    *(f"mini-imagenet-5way-1shot-mamlpp-steps{steps}" for steps in STEPS),
    *(f"omniglot-20way-{s}shot-{what}" for s in (1, 5) for what in ("strided-maml", "strided-mamlpp", "stability")),
}
POLICIES = ("batch", "support", "running", "task", "task_layer")
OWN = {"norms", *(f"norms-{norm.replace('_', '-')}" for norm in POLICIES)}


def learner_of(settings: RunSettings) -> Any:
    small = Conv4(3 if settings.data == "mini-imagenet" else 1, 28, settings.ways, 4, settings.backbone != "conv4")
    return build_learner(settings, small)


def test_every_published_experiment_is_packaged_beside_our_own_study():
    assert set(recipe_names()) == {*NAMES, *OTHERS, *OWN}


def test_the_runs_of_the_norms_study_differ_in_the_policy_alone():
    assert set(get_args(NormPolicy)) == {*POLICIES}
    runs = [each.settings() for each in load_recipe("norms").runs]
    assert [each.norm for each in runs] == [*POLICIES]
    assert len({repr(replace(each, norm=None, recipe=None)) for each in runs}) == 1
    assert runs[0].validation_alone > 0


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_builds_the_learner_that_the_tables_describe(name):
    found = re.fullmatch(r"(.+)-(\d+)way-(\d)shot-(.+)", name)
    key, part = (found[1], int(found[2]), int(found[3])), found[4]
    numbers, tasks, filters, targets, inner_lr, msl_epochs, clamp, side, tasks_of_text = SETTINGS[key]
    text = part.endswith("paper")
    on, first_order, published = PARTS[part]
    recipe = load_recipe(name)
    s = recipe.settings()
    assert (s.data, s.ways, s.shots, s.recipe, recipe.seeds) == (*key, name, (0, 1, 2))
    assert (s.filters, s.targets, s.image_size, s.backbone) == (filters, targets, side, "conv4")
    epochs, test_tasks, ensemble, batch = (150, 500, 0, tasks_of_text) if text else (100, 600, 5, tasks)
    assert (s.epochs, s.iterations_per_epoch, s.test_tasks) == (epochs, 500, test_tasks)
    assert (s.ensemble, s.tasks_per_batch) == (ensemble, batch)

    learner = learner_of(s)
    assert type(learner).__name__ == ("MAMLPlusPlus" if part.startswith("mamlpp") else "MAML")
    made = learner.settings
    expected = set(on.split())
    if (key[0], part) == ("mini-imagenet", "mamlpp"):
        expected.remove("CA")  # In the released configuration the rate goes from 0.001 to 0.001.
    assert {each for each, switch in SWITCHES.items() if getattr(made, switch)} == expected
    assert made.first_order_epochs == first_order
    assert (made.inner_steps, made.inner_lr, made.meta_lr) == (5, inner_lr, 0.001)
    assert made.norm == ("running" if text else "batch")
    assert made.outer_update.betas == ((0.9, 0.99) if text else (0.9, 0.999))
    assert made.outer_update.max_grad_value == (None if text else clamp)
    if "MSL" in expected:
        assert made.msl_epochs == msl_epochs
    if "CA" in expected:
        assert made.min_meta_lr == 1e-5

    if key == ("omniglot", 20, 1):
        assert recipe.published == published
    elif part in ("maml", "mamlpp", "mamlpp-paper"):
        assert recipe.published == numbers[part != "maml"]
    else:
        assert recipe.published is None
    assert (recipe.source is not None) == (recipe.published is not None)


@pytest.mark.parametrize(("steps", "published"), STEPS.items())
def test_the_ablation_of_inner_steps_differs_in_them_alone(steps, published):
    recipe = load_recipe(f"mini-imagenet-5way-1shot-mamlpp-steps{steps}")
    assert recipe.published == published
    assert learner_of(recipe.settings()).settings.inner_steps == steps
    whole = load_recipe("mini-imagenet-5way-1shot-mamlpp").settings().to_dict()
    own = recipe.settings().to_dict()
    assert {name for name in own if own[name] != whole[name]} <= {"inner_steps", "recipe"}


@pytest.mark.parametrize("shots", [1, 5])
def test_the_stability_study_is_both_methods_on_the_strided_backbone_over_three_seeds(shots):
    study = load_recipe(f"omniglot-20way-{shots}shot-stability")
    assert study.seeds == (0, 1, 2)
    settings = [each.settings() for each in study.runs]
    assert [(s.method, s.backbone, s.ways, s.shots) for s in settings] == [
        (method, "conv4-strided", 20, shots) for method in ("maml", "maml++")
    ]
    for s in settings:
        learner_of(s)


@pytest.mark.parametrize("name", ["omniglot-20way-1shot-mamlpp", "mini-imagenet-5way-5shot-mamlpp-paper"])
def test_what_is_shown_is_itself_a_recipe_with_the_same_settings(name, tmp_path):
    shown = tmp_path / "shown.yaml"
    shown.write_text(recipe_text(load_recipe(name)))
    again = load_recipe(str(shown))
    assert again.settings().to_dict() | {"recipe": name} == load_recipe(name).settings().to_dict()
    assert again.published == load_recipe(name).published
    values = yaml.safe_load(shown.read_text())
    # Every setting that a run has stands there.
    assert set(RunSettings().to_dict()) - {"options", "recipe"} <= set(values)


def written(folder: Path, text: str | bytes, name: str = "my.yaml") -> str:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ways: 5\nepocs: 3\n", r"my\.yaml, line 2: epocs: is neither .* Did you mean 'epochs'\?"),
        ("titel: x\n", r"line 1: titel: .*Did you mean 'title'\?"),
        ("msl_epoch: 3\n", r"line 1: msl_epoch: .*Did you mean 'msl_epochs'\?"),
        ("batch: 3\n", r"line 1: batch: .*Did you mean 'tasks_per_batch'\?"),
        ("epochs: ten\n", r"line 1: epochs: expected a whole number of at least 1, but got 'ten'"),
        ("epochs: 1.5\n", r"line 1: epochs: expected a whole number of at least 1"),
        ("epochs: true\n", r"line 1: epochs: expected a whole number of at least 1, but got True"),
        ("rotations: 1\n", r"line 1: rotations: expected True or False, but got 1"),
        ("multi_step_loss: 'on'\n", r"line 1: multi_step_loss: expected True or False, but got 'on'"),
        ("outer_update: {betas: [0.9]}\n", r"outer_update\.betas: expected two numbers from 0 .*, but got \[0\.9\]"),
        ("outer_update.betas: [0.9]\n", r"line 1: outer_update\.betas: expected two numbers"),
        ("ways: 5\nexecution: {workers: 0}\n", r"line 2: execution\.workers: expected a whole number of at least 1"),
        ("execution: {worker: 2}\n", r"line 1: execution\.worker: is neither .* Did you mean 'execution\.workers'\?"),
        ("workers: 2\n", r"line 1: workers: is neither .* Did you mean 'execution\.workers'\?"),
        ("inner_optimizer: adam\n", r"line 1: inner_optimizer: is neither .* Did you mean 'inner_update\.rule'\?"),
        ("execution: 5\n", r"line 1: execution: expected a mapping of its fields \(memory, .*\), but got 5"),
        ("wrapping: {swap: x}\n", r"line 1: wrapping\.swap: takes Python objects"),
        ("ways: 1\n", r"line 1: ways: expected a whole number of at least 2, but got 1"),
        ("method: mamml\n", r"line 1: method: there is no 'mamml'\. Did you mean 'maml'\?"),
        ("method: protonet\nmsl_epochs: 3\n", r"line 2: msl_epochs: is neither .* ProtoNet"),
        ("loss_fn: x\n", r"line 1: loss_fn: takes Python objects"),
        ("options: {a: 1}\n", r"line 1: options: write the keywords of the method themselves"),
        ("ways: 5\nways: 6\n", r"line 2: ways: stands twice, first in line 1"),
        ("ways: !!python/object/apply:os.system ['true']\n", r"line 1: the tag .* is not allowed"),
        ("title: !!str x\n", r"line 1: the tag .* is not allowed"),
        ("title: &a x\nsource: *a\n", r"line 2: the alias \*a is not allowed"),
        ("1: 5\n", r"line 1: expected the name of a field, but got '1'"),
        ("- ways\n", r"expected lines such as 'epochs: 10'"),
        ("ways: [1\n", r"my\.yaml, line \d: "),
        ("a: " + "[" * 5000, r"nested too deeply"),
        ("x" * 70_000, r"at most 64 kB"),
        (b"title: \xff\xfe", r"is no text file"),
        ("extends: omniglot-20way-1shot-mam\n", r"line 1: there is no recipe .* Did you mean '.*-1shot-maml'"),
        ("extends: my.yaml\n", r"line 1: extends: goes round in a circle"),
        ("extends: omniglot-20way-1shot-stability\n", r"line 1: extends: .* is a study"),
        ("runs: [omniglot-20way-1shot-stability]\n", r"line 1: runs: .* is a study itself"),
        ("runs: []\n", r"line 1: runs: expected different recipes"),
        ("seeds: [0, 0]\n", r"line 1: seeds: expected different whole numbers"),
    ],
)
def test_what_a_recipe_may_not_say_is_refused_with_its_line(text, words, tmp_path):
    with pytest.raises(ArgumentError, match=words) as refused:
        load_recipe(written(tmp_path, text))
    assert "\n" not in str(refused.value)


def test_a_group_that_is_extended_keeps_the_fields_that_are_not_named(tmp_path):
    written(tmp_path, "outer_update: {max_grad_value: 10, betas: [0.8, 0.9]}\nexecution: {workers: 2}\n", "base.yaml")
    recipe = load_recipe(written(tmp_path, "extends: base.yaml\nouter_update: {max_grad_value: null}\n"))
    changes = {"execution.channels_last": Given(True, "--set")}
    settings = recipe.settings(changes)
    assert settings.options == {
        "outer_update": {"max_grad_value": None, "betas": [0.8, 0.9]},
        "execution": {"workers": 2, "channels_last": True},
    }
    made = learner_of(settings).settings
    assert made.outer_update.betas == (0.8, 0.9)
    assert (made.execution.workers, made.execution.channels_last) == (2, True)


def test_an_exponent_is_a_number_and_a_date_a_word(tmp_path):
    recipe = load_recipe(written(tmp_path, "meta_lr: 1e-3\nmin_meta_lr: 1E-5\ndata: 2026-01-01\n"))
    settings = recipe.settings()
    assert (settings.meta_lr, settings.options["min_meta_lr"], settings.data) == (0.001, 0.00001, "2026-01-01")


def test_a_recipe_extends_another_and_keeps_what_it_does_not_say(tmp_path):
    written(tmp_path, "title: base\npublished: 50\nways: 7\nshots: 2\nmsl_epochs: 3\nseeds: [4]\n", "base.yaml")
    written(tmp_path, "extends: base.yaml\nshots: 3\n", "middle.yaml")
    recipe = load_recipe(written(tmp_path, "extends: middle.yaml\nmsl_epochs: 4\n"))
    settings = recipe.settings()
    assert (settings.ways, settings.shots, settings.options, recipe.seeds) == (7, 3, {"msl_epochs": 4}, (4,))
    assert (recipe.title, recipe.published) == (None, None)  # They were the base's own.


TINY = """
title: Tiny
data: glyphs
image_size: 16
ways: 3
filters: 4
method: maml
inner_steps: 2
epochs: 2
iterations_per_epoch: 1
tasks_per_batch: 1
validation_tasks: 2
test_tasks: 2
test_norms: own
device: cpu
"""


@pytest.fixture
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        yield


@pytest.mark.usefixtures("_in_folder")
def test_train_runs_a_packaged_recipe_with_overrides_and_records_its_name(capsys, tmp_path):
    small = {"filters": 4, "image_size": 16, "epochs": 2, "iterations_per_epoch": 1, "validation_tasks": 2}
    small |= {"test_tasks": 2, "msl_epochs": 1, "test_norms": "own", "inner_steps": 1, "keep": 2}
    sets = [word for name, value in small.items() for word in ("--set", f"{name}={value}")]
    command = ["train", "--recipe", "omniglot-20way-1shot-mamlpp", *sets, "--data", "glyphs", "--ways", "3"]
    command += ["--batch", "1", "--seed", "5", "--device", "cpu", "--out", "run"]
    assert main(command) == 0
    assert "3-way 1-shot" in capsys.readouterr().out
    run = json.loads(Path("run/run.json").read_text())
    assert run["seeds"] is None  # --seed asks for one run in the place of the recipe's three.
    given = {"recipe": "omniglot-20way-1shot-mamlpp", "data": "glyphs", "ways": 3, "seed": 5, "tasks_per_batch": 1}
    given |= {"preset": "authors_code", "norm": "batch", "epochs": 2, "options": {"msl_epochs": 1}}
    assert given.items() <= run["settings"].items()
    assert len(Path("run/log.jsonl").read_text().splitlines()) == 2
    assert main([*command, "--resume"]) == 0
    assert main(["train", "--out", "run", "--resume"]) == 0
    capsys.readouterr()
    assert "shots: the run was started with 1" in refusal(capsys, [*command, "--resume", "--shots", "2"])


@pytest.mark.usefixtures("_in_folder")
def test_the_seeds_of_a_recipe_make_a_run_each(tmp_path):
    path = written(tmp_path, TINY + "seeds: [0, 3]\n")
    assert main(["train", "--recipe", path, "--set", "epochs=1", "--quiet"]) == 0
    assert sorted(each.name for each in Path("runs/my").iterdir()) == ["result.json", "run.json", "seed-0", "seed-3"]


@pytest.mark.usefixtures("_in_folder")
def test_a_study_trains_each_run_with_each_seed_and_outlives_one_that_fails(tmp_path, capsys, monkeypatch):
    compare_in_forks(monkeypatch)
    written(tmp_path, TINY, "plain.yaml")
    wild = TINY.replace("iterations_per_epoch: 1", "iterations_per_epoch: 3")
    wild += "inner_lr: 1e38\nouter_update: {max_skipped_steps: 2}\n"
    written(tmp_path, wild, "wild.yaml")
    path = written(tmp_path, "title: Study\nruns: [plain.yaml, wild.yaml]\nseeds: [1]\n", "both.yaml")
    assert main(["train", "--recipe", path, "--out", "both"]) == 0
    printed = capsys.readouterr()
    runs = json.loads(Path("both/study.json").read_text())["runs"]
    assert [(Path(run["experiment"]).name, run["seed"], run["error"] is None) for run in runs] == [
        ("plain", 1, True),
        ("wild", 1, False),
    ]
    logged = [json.loads(line) for line in Path("both/plain/seed-1/log.jsonl").read_text().splitlines()]
    assert runs[0]["validation"] == [line["validation_accuracy"] for line in logged]
    assert json.loads(Path("both/plain/result.json").read_text())["summary"]["seeds"] == [1]
    assert not Path("both/wild/result.json").exists()
    assert Path("both/study.png").stat().st_size > 10_000
    assert "stopped" in printed.out
    [plain, wild] = csv.DictReader(Path("both/study.csv").read_text().splitlines())
    assert float(plain["accuracy"]) == runs[0]["test"]["accuracy"]
    assert float(plain["best_validation"]) == max(runs[0]["validation"])
    assert (wild["accuracy"], wild["error"]) == ("", runs[1]["error"])
    assert "stopped" in Path("both/study.tex").read_text()
    command = ["train", "--recipe", path, "--out", "both"]
    assert "already has a study. Continue it with --resume" in refusal(capsys, command)
    assert "is what a study compares" in refusal(capsys, [*command, "--method", "maml"])


def run_of(method: str, seed: int, validation: list[Any], error: str | None = None) -> dict[str, Any]:
    test = None if error else {"accuracy": validation[-1], "interval": 0.01, "loss": 1.5}
    run = {"experiment": method, "method": method, "seed": seed, "validation": validation, "error": error, "test": test}
    run |= {"alone": [], "meta_steps": [7 * (epoch + 1) for epoch in range(len(validation))], "planned": 21}
    return run | {"data": "omniglot", "ways": 20, "shots": 1}


def test_the_table_of_a_study_has_the_mean_over_seeds_and_the_largest_fall():
    lines = study_table(
        [run_of("A", 0, [0.5, 0.9, 0.7]), run_of("A", 1, [0.5, 0.6, 0.8]), run_of("B", 0, [0.5], "Error: it diverged.")]
        + [run_of("C", seed, [None]) for seed in (0, 1)]
    ).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:8]]
    assert cells[0] == ["A", "0", "70.00 ± 1.00 %", "90.00 %", "20.00 %"]
    assert cells[1][-1] == "0.00 %"
    assert cells[2] == ["A", "mean of 2", "75.00 ± 7.07 %", "", ""]  # sqrt(2) * 0.05
    assert cells[3] == ["B", "0", "stopped", "50.00 %", "0.00 %"]
    assert cells[4:] == [["C", seed, "loss 1.5", "", ""] for seed in "01"]
    assert lines[-1] == "B, seed 0: Error: it diverged."


def test_the_largest_fall_is_from_the_best_before_it():
    assert largest_fall([0.2, 0.8, 0.9, 0.5, 0.95, 0.9]) == pytest.approx(0.4)
    assert largest_fall([]) == 0


def test_the_plot_of_a_study_is_drawn_where_there_is_something_to_draw(tmp_path):
    assert draw_study([run_of("A", 0, [0.5]), run_of("B", 0, [0.1, 0.2], "stopped")], tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert not draw_study([run_of("A", 0, [], "stopped")], tmp_path / "b.png")
    both = [run_of("A", 0, [0.5]) | {"alone": [0.3]}, run_of("B", 0, [0.4]) | {"alone": [0.4]}]
    assert draw_study(both, tmp_path / "c.png")
    widths = [plt.imread(tmp_path / f"{name}.png").shape[1] for name in "ac"]
    assert widths[0] < widths[1]  # The second panel.


@pytest.mark.usefixtures("_in_folder")
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--recipe", "omniglot-20way-1shot-mamlp"], "Did you mean 'omniglot-20way-1shot-mamlpp'?"),
        (["--recipe", "absent.yaml"], "absent.yaml: cannot be read (No such file or directory)"),
        (["--recipe", "mini-imagenet-5way-1shot-maml", "--data-root", "nowhere"], "mini-imagenet"),
        (["--recipe", "omniglot-5way-1shot-maml", "--set", "epocs=3"], "--set epocs=3: epocs: is neither"),
        (["--recipe", "omniglot-5way-1shot-maml", "--ways", "1"], "--ways: ways: expected a whole number"),
        (["--set", "epochs=ten"], "--set epochs=ten: epochs: expected a whole number of at least 1"),
        (["--set", "epochs=3", "--epochs", "4"], "epochs: is also given by a flag, as 4."),
        (["--set", "msl_epoch=3", "--device", "cpu"], "has no option 'msl_epoch'. Did you mean 'msl_epochs'?"),
    ],
)
def test_a_mistake_beside_a_recipe_is_one_line(flags, words, capsys):
    assert words in refusal(capsys, ["train", *flags, "--quiet"])
    assert not Path("runs").exists()


def test_recipes_lists_every_name_with_what_was_published(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    listed = {line.split()[0]: line for line in lines if line.startswith("  ")}
    assert set(listed) == set(recipe_names())
    assert listed["omniglot-20way-1shot-mamlpp"].endswith("97.65 ± 0.05")
    title = max(number for number, line in enumerate(lines) if line == "MAML++")
    assert listed["omniglot-20way-1shot-mamlpp"] in lines[title : lines.index("", title)]
    assert set(METHODS) >= {load_recipe(name).settings().method for name in NAMES}
