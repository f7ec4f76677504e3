import json
import shutil
import statistics
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_runs import (
    TINY,
    assert_ended_alike,
    assert_same,
    assert_same_checkpoint,
    interrupt_call,
    log_of,
    without_time,
)
from torch import nn

import metawrap.backbones
import metawrap.training.experiment
import metawrap.training.run
import metawrap.training.training_loop
from metawrap.cli import main
from metawrap.errors import ArgumentError, CheckpointError
from metawrap.evaluation_result import EvaluationResult
from metawrap.report import gather, write_report_page
from metawrap.training import evaluate_run, train, train_seeds
from metawrap.training.checkpoints import Checkpoint, CheckpointFolder, best_epochs, load_checkpoint
from metawrap.training.experiment import build_experiment, build_learner, network_of
from metawrap.training.final_evaluation import final_test, score_of
from metawrap.training.run_folder import write_run
from metawrap.training.run_settings import FREE_ON_RESUME, RunSettings
from metawrap.training.tables import result_text
from metawrap.training.training_loop import _validate

pytestmark = pytest.mark.usefixtures("tiny_training")


@pytest.fixture(scope="module")
def finished(trained):
    return trained(replace(TINY, ensemble=2))


def checkpoints_in(folder):
    return CheckpointFolder(folder / "checkpoints", 9, 9)


def modification_times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_run_leaves_a_log_line_and_a_checkpoint_per_epoch_and_a_result(finished):
    folder, result = finished
    records = log_of(folder)
    assert [(record["epoch"], record["iteration"]) for record in records] == [(1, 2), (2, 4), (3, 6)]
    for name in ("train_loss", "train_accuracy", "validation_accuracy", "validation_interval", "learning_rate"):
        assert all(isinstance(record[name], float) for record in records)
    assert records[0]["learning_rate"] > records[2]["learning_rate"]
    assert [record["skipped_steps"] for record in records] == [0, 0, 0]
    assert 0 < records[0]["seconds"] < records[1]["seconds"] < records[2]["seconds"] <= result["seconds"] + 1e-3
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        f"epoch-000{epoch}.pt" for epoch in (1, 2, 3)
    ]
    assert json.loads((folder / "result.json").read_text()) == result
    assert {"platform", "processor", "cores", "device", "python", "torch", "numpy", "metawrap"} <= set(
        result["machine"]
    )


def test_the_result_has_every_policy_before_and_after_and_averaged(finished):
    _, result = finished
    assert list(result["test"]["norms"]) == ["support", "batch"]
    for scores in result["test"]["norms"].values():
        assert list(scores) == ["before", "after", "ensemble"]
        assert all(0 <= score["accuracy"] <= 1 and score["interval"] >= 0 for score in scores.values())
    assert result["trained_norm"] == "support"


def test_a_network_that_returns_a_dict_is_tested_as_the_one_that_returns_its_logits(finished, tmp_path, monkeypatch):
    class Dict(metawrap.backbones.Conv4):
        def forward(self, x):
            return {"logits": super().forward(x)}

    monkeypatch.setattr(metawrap.training.experiment, "Conv4", Dict)
    result = train(replace(TINY, ensemble=2), tmp_path)
    assert result["test"] == finished[1]["test"]
    [mine, other] = ((folder / "final_insight.json").read_text() for folder in (tmp_path, finished[0]))
    assert json.loads(mine)["episodes"] == json.loads(other)["episodes"] != []


def test_an_interrupted_run_resumes_to_the_same_bits_and_log(finished, tmp_path, monkeypatch):
    folder, _ = finished
    interrupt_call(monkeypatch, metawrap.training.training_loop, "_validate", 2)
    settings = replace(TINY, ensemble=2)
    with pytest.raises(KeyboardInterrupt):
        train(settings, tmp_path)
    assert checkpoints_in(tmp_path).epochs() == [1]
    first_part = log_of(tmp_path)[0]["seconds"]
    torch.manual_seed(123)
    result = train(settings, tmp_path, resume=True)
    assert_same_checkpoint(checkpoints_in(tmp_path).load(3), checkpoints_in(folder).load(3))
    assert without_time(log_of(tmp_path)) == without_time(log_of(folder))
    assert log_of(tmp_path)[0]["seconds"] == first_part < log_of(tmp_path)[1]["seconds"]
    assert result["test"] == finished[1]["test"]


def test_log_lines_beyond_the_checkpoint_are_cut_when_resuming(tmp_path, monkeypatch):
    train(replace(TINY, epochs=2), tmp_path)
    reference = log_of(tmp_path)
    (tmp_path / "checkpoints" / "epoch-0002.pt").unlink()
    (tmp_path / "result.json").unlink()
    with open(tmp_path / "log.jsonl", "a") as handle:
        handle.write('{"epoch": 3, "torn')
    train(replace(TINY, epochs=2), tmp_path, resume=True)
    assert without_time(log_of(tmp_path)) == without_time(reference)


def test_resuming_a_finished_run_returns_its_result_without_training(finished, monkeypatch, capsys):
    folder, result = finished
    monkeypatch.setattr(metawrap.training.run, "build_experiment", None)
    assert train(replace(TINY, ensemble=2), folder, resume=True) == result
    assert "is finished" in capsys.readouterr().err


@pytest.mark.slow
def test_a_torn_newest_checkpoint_is_reported_and_its_epoch_repeated(finished, tmp_path, capsys):
    folder, _ = finished
    settings = replace(TINY, ensemble=2)
    train(settings, tmp_path)
    newest = tmp_path / "checkpoints" / "epoch-0003.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    train(settings, tmp_path, resume=True)
    assert "Skipped: " in capsys.readouterr().err
    assert_same(load_checkpoint(newest).learner, load_checkpoint(folder / "checkpoints/epoch-0003.pt").learner)


@pytest.mark.parametrize(
    "change", [{"ways": 6}, {"seed": 1}, {"epochs": 2}, {"options": {"msl_epochs": 2}}, {"norm": "running"}]
)
def test_resuming_with_another_setting_is_refused_by_name_and_changes_nothing(finished, change):
    folder, _ = finished
    before = modification_times(folder)
    name = next(iter(change))
    with pytest.raises(CheckpointError, match=f"^{name}: the run was started with .*--out"):
        train(replace(TINY, **change), folder, resume=True)
    assert modification_times(folder) == before


def test_an_extended_run_ends_as_one_of_the_whole_length(tmp_path):
    # Without a schedule of the outer rate, no epoch depends on the number of epochs.
    settings = replace(TINY, options={"cosine_annealing": False})
    train(settings, tmp_path / "whole")
    train(replace(settings, epochs=1), tmp_path / "extended")
    train(settings, tmp_path / "extended", resume=True)
    assert_ended_alike(tmp_path / "whole", tmp_path / "extended")


def test_an_extended_run_follows_the_schedule_of_its_new_length(finished, tmp_path):
    train(replace(TINY, epochs=1), tmp_path)
    [[before]] = [group.runs for group in gather([tmp_path])]
    write_run(tmp_path, TINY, None)  # As while it trains on.
    [[during]] = [group.runs for group in gather([tmp_path])]
    assert before.scores
    assert not during.scores
    assert main(["train", "--out", str(tmp_path), "--resume", "--epochs", "3", "-q"]) == 0
    rates = [[record["learning_rate"] for record in log_of(folder)][1:] for folder in (tmp_path, finished[0])]
    assert rates[0] == rates[1]


def test_settings_that_do_not_touch_training_may_change():
    assert "device" in FREE_ON_RESUME
    replace(TINY, device="cuda", keep=1, test_tasks=9).check_resumes(TINY.to_dict())


def test_a_folder_with_a_run_is_not_overwritten(finished):
    with pytest.raises(CheckpointError, match=r"already has a run.*--resume.*--out"):
        train(TINY, finished[0])


def test_resuming_in_an_empty_folder_starts_the_run(tmp_path):
    train(replace(TINY, epochs=1), tmp_path / "new", resume=True)
    assert len(log_of(tmp_path / "new")) == 1


def test_settings_survive_json_and_unknown_ones_are_named():
    assert RunSettings.from_dict(json.loads(json.dumps(TINY.to_dict()))) == TINY
    with pytest.raises(CheckpointError, match="'colour'"):
        RunSettings.from_dict({**TINY.to_dict(), "colour": 1})


@pytest.mark.parametrize(
    ("method", "own", "norm"),
    [
        *((name, {}, "batch") for name in ("maml++", "maml", "fomaml", "meta-sgd", "anil", "reptile", "lstm")),
        ("maml++", {"preset": "authors_code"}, "batch"),
        ("maml++", {"preset": "paper"}, "running"),
        ("maml++", {"norm": "support"}, "support"),
        ("protonet", {}, "running"),
    ],
)
def test_settings_of_metawrap_0_1_keep_the_norm_that_was_its_default(method, own, norm):
    settings = RunSettings(method=method, **own)
    stored = settings.to_dict()
    del stored["resize"], stored["weights"]  # Unknown to 0.1.
    read = RunSettings.from_dict(stored)
    assert build_learner(read, nn.Linear(4, 3)).settings.norm == norm
    read.check_resumes(stored)
    assert RunSettings.from_dict(settings.to_dict()) == settings


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ways": 1}, "ways: expected a whole number of at least 2, but got 1"),
        ({"epochs": 0}, "epochs: expected a whole number of at least 1"),
        ({"method": "mamba"}, r"method: expected one of maml\+\+, maml, .*, but got 'mamba'"),
        ({"norm": "layer"}, "norm: expected 'batch', 'running', 'support', 'task' or 'task_layer'"),
        ({"seed": -1}, "seed: expected a whole number of at least 0, but got -1"),
    ],
)
def test_impossible_settings_name_the_argument_and_what_was_expected(change, words):
    with pytest.raises(ArgumentError, match=words):
        replace(TINY, **change)


def test_an_unknown_method_option_is_named_with_the_known_ones():
    with pytest.raises(ArgumentError, match=r"no option 'colour'; it has .*msl_epochs"):
        build_experiment(replace(TINY, options={"colour": 1}))


@pytest.mark.parametrize(("device", "words"), [("gpu7", "device: expected auto, cpu"), ("cuda:99", "cuda")])
def test_an_impossible_device_is_named(device, words):
    if device.startswith("cuda") and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ArgumentError, match=words):
        build_experiment(replace(TINY, device=device))


def test_validation_and_test_tasks_do_not_depend_on_the_seed_but_training_tasks_do():
    one, other = (build_experiment(replace(TINY, seed=seed)) for seed in (0, 1))
    for name, same in (("validation", True), ("test", True), ("train", False)):
        batches = [getattr(each, name).batch(0)[0].support_x for each in (one, other)]
        assert torch.equal(*batches) is same
    names = [set(getattr(one, name).images.class_names) for name in ("train", "validation", "test")]
    assert len(names[0] | names[1] | names[2]) == len(names[0]) + len(names[1]) + len(names[2])


def with_ways(ways):
    return nn.Sequential(nn.Flatten(), nn.Linear(256, ways))


def without_ways():
    return nn.Sequential(nn.Flatten(), nn.Linear(256, 5))


def not_a_module():
    return "network"


def test_a_users_factory_is_called_with_ways_only_if_it_takes_them():
    assert network_of(replace(TINY, ways=7, model=f"{__name__}:with_ways")).model[1].out_features == 7
    assert network_of(replace(TINY, ways=7, model=f"{__name__}:without_ways")).model[1].out_features == 5


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("just_a_name", "expected 'package.module:factory', such as 'torchvision.models:resnet18'"),
        ("torchvision.models:resnet19", "no function or class named 'resnet19'. Did you mean 'resnet18'?"),
        ("no_such_module_here:build", "cannot import 'no_such_module_here'.*folder"),
        (f"{__name__}:absent", "has no function or class named 'absent'"),
        (f"{__name__}:not_a_module", "returned str, expected a torch.nn.Module"),
    ],
)
def test_a_wrong_factory_is_explained(name, words):
    with pytest.raises(ArgumentError, match=words):
        network_of(replace(TINY, model=name))


class RememberedLogits:
    """A learner whose weights are its predictions: one (targets, ways) tensor per task."""

    settings = types.SimpleNamespace(default_steps=5)

    def load_state_dict(self, state):
        self.logits = state["logits"]

    def evaluate(self, tasks, *, norm=None, steps=None, keep_predictions=False):
        labels = [task.target_y for batch in tasks for task in batch]
        per_task = torch.stack([(p.argmax(1) == y).double().mean() for p, y in zip(self.logits, labels, strict=True)])
        if steps == 0:
            per_task = per_task * 0
        return EvaluationResult.of({"accuracy": per_task}, per_task, norm=norm, steps=steps, predictions=self.logits)


def test_the_best_checkpoint_is_tested_and_the_best_ones_are_averaged(tmp_path):
    tasks = build_experiment(TINY).test
    labels = [task.target_y for task in tasks.batch(0)]
    generator = torch.Generator().manual_seed(5)
    folder, history, logits = CheckpointFolder(tmp_path, 9, 9), [], []
    for epoch, accuracy in enumerate([0.3, 0.9, 0.5, 0.1], start=1):
        history.append({"epoch": epoch, "validation_accuracy": accuracy})
        logits.append(torch.randn(4, 5, 5, generator=generator))
        folder.save(Checkpoint({}, {"logits": logits[-1]}, {}, None, {}, list(history), 0.0))
    learner = RememberedLogits()
    test = final_test(learner, tasks, 4, folder, history, ensemble=2, norms=("batch",))
    assert (test["epoch"], test["ensemble_epochs"], test["tasks"]) == (2, [2, 3], 4)
    right = np.stack(labels).astype(int)
    for column, chosen in (("after", logits[1]), ("ensemble", (logits[1] + logits[2]) / 2)):
        per_task = (chosen.numpy().argmax(-1) == right).mean(axis=1)
        assert test["norms"]["batch"][column]["accuracy"] == pytest.approx(per_task.mean())
        expected = 1.96 * per_task.std(ddof=1) / np.sqrt(4)
        assert test["norms"]["batch"][column]["interval"] == pytest.approx(expected)
    assert test["norms"]["batch"]["before"]["accuracy"] == 0
    assert torch.equal(learner.logits, logits[1])


def test_a_run_without_an_accuracy_is_judged_by_its_loss_in_every_place(tmp_path, monkeypatch, capsys):
    def with_own_loss(*args):
        learner = build_learner(*args)
        learner.loss_fn = lambda p, y: nn.functional.cross_entropy(p, y) + 1
        return learner

    monkeypatch.setattr(metawrap.training.experiment, "build_learner", with_own_loss)
    result = train_seeds(replace(TINY, ensemble=2, test_norms="own"), [0], tmp_path)
    printed = capsys.readouterr().err
    tested = []
    for seed, own in result["results"].items():
        log = log_of(tmp_path / f"seed-{seed}")
        assert {record[f"{part}_accuracy"] for record in log for part in ("train", "validation")} == {None}
        losses = [record["validation_loss"] for record in log]
        assert own["test"]["epoch"] == 1 + int(np.argmin(losses))
        score = own["test"]["norms"]["support"]
        assert (list(score), score["after"]["accuracy"]) == (["before", "after"], None)
        assert score["after"]["loss"] > 1
        assert f"loss {score['after']['loss']:.4g}" in result_text(own)
        assert f"validation loss {losses[0]:.3f}, " in printed
        tested.append(score["after"]["loss"])
    assert f"loss {np.mean(tested):.4g}" in result_text(result)
    assert "accuracy " not in printed
    assert json.loads((tmp_path / "seed-0" / "final_insight.json").read_text())["episodes"] == []
    write_report_page(gather([tmp_path]), tmp_path / "report.html")


def test_of_epochs_without_a_finite_loss_none_is_the_best():
    history = [{"validation_accuracy": None, "validation_loss": loss} for loss in (None, 3.0, 2.0, 2.0)]
    assert best_epochs(history, 4) == [3, 4, 2, 1]


def test_a_lost_best_checkpoint_is_an_error_and_not_a_silent_second_best(tmp_path):
    folder = CheckpointFolder(tmp_path, 9, 9)
    with pytest.raises(CheckpointError, match=r"best checkpoint \(epoch 1\) is not in"):
        final_test(None, None, 4, folder, [{"validation_accuracy": 0.5}])


def test_score_of_matches_a_count_by_hand():
    logits = [torch.eye(2), torch.eye(2)]
    score = score_of(logits, [torch.tensor([0, 1]), torch.tensor([0, 0])])
    assert score["accuracy"] == 0.75
    assert score["interval"] == pytest.approx(1.96 * statistics.stdev([1.0, 0.5]) / 2**0.5)


def test_seeds_are_summarised_by_mean_and_sample_deviation_and_resume(tmp_path):
    settings = replace(TINY, epochs=1)
    summary = train_seeds(settings, [0, 3], tmp_path)
    for norm in ("batch", "support"):
        results = [json.loads((tmp_path / f"seed-{seed}" / "result.json").read_text()) for seed in (0, 3)]
        values = [result["test"]["norms"][norm]["after"]["accuracy"] for result in results]
        after = summary["summary"]["norms"][norm]["after"]
        assert after["mean"] == pytest.approx(np.mean(values))
        assert after["deviation"] == pytest.approx(np.std(values, ddof=1))
    assert train_seeds(settings, [0, 3], tmp_path, resume=True)["summary"] == summary["summary"]
    with pytest.raises(CheckpointError, match="already has a run"):
        train_seeds(settings, [0, 3], tmp_path)
    with pytest.raises(CheckpointError, match=r"one run per seed.*seed-0"):
        evaluate_run(tmp_path)


def test_evaluating_a_run_again_gives_the_result_of_its_final_test(finished):
    folder, result = finished
    before = modification_times(folder)
    again = evaluate_run(folder)
    assert again["test"] == result["test"]
    assert again["settings"] == result["settings"]
    only = evaluate_run(folder, ["support"], ensemble=0)
    assert list(only["test"]["norms"]) == ["support"]
    assert only["test"]["norms"]["support"]["after"] == result["test"]["norms"]["support"]["after"]
    assert modification_times(folder) == before


def test_a_checkpoint_of_another_network_is_refused_with_the_reason(finished):
    with pytest.raises(CheckpointError, match=r"not the one that the checkpoint of epoch .*size mismatch.*same size"):
        evaluate_run(finished[0], image_size=48)


def test_evaluating_what_is_not_a_run_says_how_to_start_one(tmp_path):
    with pytest.raises(CheckpointError, match=r"no run in .*metawrap train --out"):
        evaluate_run(tmp_path / "nothing")


@pytest.mark.parametrize("part", ["optimizer", "rng"])
def test_a_checkpoint_whose_optimizer_or_random_state_fits_no_more_is_one_error(finished, tmp_path, part):
    shutil.copytree(finished[0], tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    checkpoints = checkpoints_in(tmp_path / "run")
    stored = checkpoints.load(3)
    damage = {"optimizer": {"state": {}, "param_groups": []}, "rng": {"cpu": torch.zeros(3), "cuda": []}}[part]
    checkpoints.save(replace(stored, history=stored.history, **{part: damage}))
    with pytest.raises(CheckpointError, match=r"epoch 3 cannot be resumed.*--out"):
        train(replace(TINY, ensemble=2), tmp_path / "run", resume=True)


def test_no_more_tasks_are_validated_alone_than_there_are() -> None:
    assert replace(TINY, validation_tasks=6, validation_alone=6).validation_alone == 6
    with pytest.raises(ArgumentError, match=r"validation_alone: expected at most validation_tasks=6, but got 7"):
        replace(TINY, validation_tasks=6, validation_alone=7)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("norm", ["batch", "task"])
def test_validation_alone_hands_each_target_to_the_adapted_network_by_itself(norm):

    experiment = build_experiment(replace(TINY, norm=norm, validation_tasks=20))
    found = _validate(experiment, replace(TINY, validation_tasks=20, validation_alone=6))
    tasks = [task for batch in experiment.validation.batches(1) for task in batch]
    counts = {"validation_alone_accuracy": tasks[:6], "validation_accuracy": tasks}
    hits = {"validation_alone_accuracy": 0, "validation_accuracy": 0}
    for name, own in counts.items():
        for task in own:
            adapted = experiment.learner.adapt(task.support_x, task.support_y)
            parts = task.target_x.split(1 if "alone" in name else len(task.target_x))
            predicted = torch.cat([adapted(part).argmax(-1) for part in parts])
            hits[name] += int((predicted == task.target_y).sum())
    assert {name: found[name] for name in hits} == {
        name: pytest.approx(hits[name] / (5 * len(own))) for name, own in counts.items()
    }


def test_a_validation_loss_that_is_not_finite_is_null_in_the_log(tmp_path, monkeypatch):
    real = metawrap.training.training_loop.evaluate_shared
    monkeypatch.setattr(
        metawrap.training.training_loop, "evaluate_shared", lambda *args: replace(real(*args), loss=float("nan"))
    )
    train(replace(TINY, epochs=1), tmp_path)
    text = (tmp_path / "log.jsonl").read_text()
    assert "NaN" not in text
    assert json.loads(text)["validation_loss"] is None


def test_the_same_seed_gives_the_same_run_and_another_another(tmp_path):
    settings = replace(TINY, epochs=2)
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        train(replace(settings, seed=seed), tmp_path / name)
    one, two, other = (checkpoints_in(tmp_path / name).load(2) for name in ("one", "two", "other"))
    assert_same_checkpoint(one, two)
    assert without_time(log_of(tmp_path / "one")) == without_time(log_of(tmp_path / "two"))
    pairs = ((value, other.learner[name]) for name, value in one.learner.items())
    assert any(isinstance(value, torch.Tensor) and not torch.equal(value, changed) for value, changed in pairs)
