"""`metawrap compare`: what each method's run is made of, and what is written of them all."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import compare_in_forks

from metawrap import ArgumentError, CheckpointError
from metawrap.cli import main
from metawrap.training.comparison import compare, settings_by_method
from metawrap.training.plots import draw_comparison
from metawrap.training.run_settings import RunSettings
from metawrap.training.tables import comparison_table

COMMON = RunSettings(epochs=4, filters=8)


def row(name: str, accuracy: float, **changes: Any) -> dict[str, Any]:
    return {
        "method": name,
        "name": name,
        "error": None,
        "accuracy": accuracy,
        "interval": 0.0123,
        "norm": "batch",
        "validation": [(1.0, 0.2), (2.0, accuracy)],
        "parameters": 12345,
        "step_seconds": 0.25,
        "peak_mib": 512.4,
        "meta_steps": 400,
        "seconds": 90.0,
        "settings": COMMON.to_dict(),
    } | changes


def test_each_method_gets_the_common_settings_and_its_own():
    overrides = {"protonet": {"budget": 200, "meta_lr": 0.003, "distance": "cosine"}}
    runs = settings_by_method(["maml", "protonet"], COMMON, 100, overrides)
    assert list(runs) == ["maml", "protonet"]
    assert runs["maml"] == RunSettings(epochs=4, filters=8, method="maml", iterations_per_epoch=25, test_norms="own")
    assert runs["protonet"].iterations_per_epoch == 50
    assert runs["protonet"].meta_lr == 0.003
    assert runs["protonet"].options == {"distance": "cosine"}


@pytest.mark.parametrize(
    ("methods", "budget", "overrides", "words"),
    [
        (["maml", "magic"], 100, {}, "methods: expected some of maml\\+\\+, .*, but got 'magic'"),
        (["maml", "maml"], 100, {}, "methods: expected different names"),
        ([], 100, {}, "methods: expected different names, at least one, but got none"),
        (["maml"], 102, {}, "budget: expected meta-steps in 4 equal parts.*102 for maml"),
        (["maml"], 2, {}, "budget: expected meta-steps in 4 equal parts"),
        (["maml"], 100, {"maml": {"budget": "many"}}, "budget: expected meta-steps"),
        (["maml"], 100, {"maml": {"shots": 3}}, "set: shots is what the methods are compared on"),
        (["maml"], 100, {"protonet": {"budget": 100}}, "set: 'protonet' is not one of --methods maml"),
    ],
)
def test_what_cannot_be_compared_is_named(methods, budget, overrides, words):
    with pytest.raises(ArgumentError, match=words):
        settings_by_method(methods, COMMON, budget, overrides)


def test_the_table_is_markdown_with_the_best_first_and_failures_below():
    text = comparison_table([row("One", 0.5), row("Two", 0.75), row("Three", 0.1, error="Error: it does not fit.")])
    lines = text.splitlines()
    assert lines[2].split("|")[1:3] == [" method ", "       accuracy "]
    assert [line.split("|")[1].strip() for line in lines[4:6]] == ["Two", "One"]
    cells = [cell.strip() for cell in lines[4].split("|")]
    assert cells[2:9] == ["75.00 ± 1.23 %", "batch", "12,345", "0.250", "512", "400", "1.5"]
    assert lines[-1] == "Three failed: Error: it does not fit."
    assert comparison_table([row("Three", 0.1, error="why")]) == "Three failed: why"
    lost = [row(name, None, loss=loss, validation=[(1.0, None)]) for name, loss in (("A", 0.75), ("B", 0.5))]
    assert [line.split()[1:5] for line in comparison_table(lost).splitlines()[4:6]] == [
        [name, "|", "loss", loss] for name, loss in (("B", "0.5"), ("A", "0.75"))
    ]


def test_the_plot_takes_any_accuracy(tmp_path):
    rows = [row(str(index), value, validation=[(1.0, 0.0), (2.0, 1.0)]) for index, value in enumerate((0.0, 1.0))]
    assert draw_comparison(rows, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert not draw_comparison([row("x", 0.1, error="why"), row("y", None)], tmp_path / "b.png")


@pytest.mark.slow
def test_a_comparison_trains_tests_continues_and_outlives_a_method_that_fails(capsys, tmp_path, monkeypatch):
    (tmp_path / "small.py").write_text(
        "from torch import nn\n"
        "def build(ways): return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, ways))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    compare_in_forks(monkeypatch, but="fomaml")
    flags = ["compare", "--methods", "protonet,fomaml", "--budget", "2", "--epochs", "2", "--model", "small:build"]
    flags += ["--image-size", "8", "--validation-tasks", "2", "--test-tasks", "2", "--batch", "1", "--device", "cpu"]
    flags += ["--set", "fomaml.inner_update.momentum=2", "--out", "out", "--jobs", "2"]
    with torch.random.fork_rng():
        assert main(flags) == 0
        printed = capsys.readouterr().out
        assert "| ProtoNet" in printed
        assert "First-order MAML failed: Error: inner_update.momentum: expected a number from 0 up to" in printed
        done, failed = json.loads(Path("out/comparison.json").read_text())["rows"]
        result = json.loads(Path("out/protonet/result.json").read_text())
        assert done["accuracy"] == result["test"]["norms"]["running"]["after"]["accuracy"]
        assert done["parameters"] == 64 * 8 + 8  # The head plays no part.
        assert done["meta_steps"] == 2
        assert done["peak_mib"] > 50
        assert len(done["validation"]) == 2
        assert "inner_update.momentum" in failed["error"]
        assert Path("out/comparison.png").stat().st_size > 10_000
        assert "| ProtoNet" in Path("out/comparison.md").read_text()
        [first, second] = csv.DictReader(Path("out/comparison.csv").read_text().splitlines())
        assert (float(first["accuracy"]), int(first["parameters"])) == (done["accuracy"], done["parameters"])
        assert second["error"] == failed["error"]
        assert r"ProtoNet & " in Path("out/comparison.tex").read_text()
        compare_in_forks(monkeypatch)
        with pytest.raises(CheckpointError, match=r"image_size: the run was started with 8"):
            compare({"protonet": RunSettings(method="protonet", epochs=3)}, "out")
        flags[flags.index("fomaml.inner_update.momentum=2")] = "fomaml.inner_update.momentum=0.5"
        assert main([*flags, "--set", "fomaml.inner_steps=1"]) == 0
        assert "| First-order MAML" in capsys.readouterr().out
    assert Path("out/protonet/result.json").stat().st_mtime < Path("out/comparison.json").stat().st_mtime


def test_a_comparison_over_seeds_is_a_study_of_its_methods(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    compare_in_forks(monkeypatch)
    flags = [
        "compare",
        "--methods",
        "protonet,fomaml",
        "--budget",
        "1",
        "--epochs",
        "1",
        "--filters",
        "4",
        "--batch",
        "1",
    ]
    flags += ["--validation-tasks", "2", "--test-tasks", "2", "--device", "cpu", "--out", "out", "--seeds"]
    with torch.random.fork_rng():
        assert main([*flags, "0,3"]) == 0
        assert "| mean of 2 |" in capsys.readouterr().out
        rows = list(csv.DictReader(Path("out/study.csv").read_text().splitlines()))
        assert [(row["experiment"], row["seed"]) for row in rows] == [
            (method, seed) for method in ("protonet", "fomaml") for seed in ("0", "3")
        ]
        for row in rows:
            tested = json.loads(Path(f"out/{row['experiment']}/seed-{row['seed']}/result.json").read_text())["test"]
            assert float(row["accuracy"]) == tested["norms"][row["norm"]]["after"]["accuracy"]
        assert main([*flags, "0,1"]) == 2
        assert "seeds: the study was started with [0, 3]" in capsys.readouterr().err
        assert main(flags[:-1]) == 2
        assert "'out/protonet' has a run over seeds" in capsys.readouterr().err
    assert json.loads(Path("out/protonet/run.json").read_text())["seeds"] == [0, 3]
