import base64
import io
import json
import sys
import types
from dataclasses import replace

import numpy as np
import pytest
import tiny_runs
import torch
from PIL import Image
from tiny_runs import interrupt_call
from torch import nn

import metawrap.training.training_loop
from metawrap.errors import MetaWrapError
from metawrap.evaluation_result import EvaluationResult
from metawrap.report.records import read_records
from metawrap.tasks import Task
from metawrap.training.checkpoints import CheckpointFolder, load_checkpoint
from metawrap.training.class_insight import by_class, class_names, principal_plane
from metawrap.training.experiment import build_experiment
from metawrap.training.insight import as_png, final_insight, quartiles, step_counts
from metawrap.training.loaded_run import load
from metawrap.training.run import train
from metawrap.training.run_folder import RunFolder

TINY = replace(tiny_runs.TINY, test_norms="own", options={"msl_epochs": 2})
pytestmark = pytest.mark.usefixtures("tiny_training")


@pytest.fixture(scope="module")
def finished(trained):
    """A run with a TensorBoard log."""
    return trained(TINY, tensorboard=True)


def lines_of(path):
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


def state_after(folder, epoch):
    return load_checkpoint(folder / "checkpoints" / f"epoch-{epoch:04d}.pt").learner


def test_each_epoch_records_the_rates_that_its_checkpoint_holds(finished):
    folder, _ = finished
    for line in lines_of(folder / "insight.jsonl"):
        state = state_after(folder, line["epoch"])
        stored = {
            name.partition(".")[2].replace("/", "."): value
            for name, value in state.items()
            if name.startswith("learning_rates.")
        }
        assert {name: len(rates) for name, rates in line["rates"].items()} == dict.fromkeys(stored, 2)
        for name, rates in line["rates"].items():
            assert rates == pytest.approx(stored[name].tolist(), rel=1e-5)
    assert len({json.dumps(line["rates"]) for line in lines_of(folder / "insight.jsonl")}) == 3


def test_each_epoch_records_the_quartiles_over_channels_of_every_norm_and_step(finished):
    folder, _ = finished
    for line in lines_of(folder / "insight.jsonl"):
        state = state_after(folder, line["epoch"])
        assert len(line["norms"]) == 4
        for layer, parts in line["norms"].items():
            for part, found in parts.items():
                values = state[f"model.{layer}.{part}"].numpy()
                assert values.shape == (2, 4)
                for name, percent in (("low", 25), ("median", 50), ("high", 75)):
                    assert found[name] == pytest.approx(np.percentile(values, percent, axis=1), rel=1e-4, abs=1e-6)


def test_weights_and_losses_of_the_steps_make_the_training_loss(finished):
    folder, _ = finished
    insight, log = (lines_of(folder / name) for name in ("insight.jsonl", "log.jsonl"))
    # Antoniou et al. 2018: 1/K - e/(K E) for all but the last of K = 2 steps, over E = 2 epochs.
    assert [line["step_weights"] for line in insight] == [[0.5, 0.5], [0.25, 0.75], [0, 1]]
    for line, record in zip(insight, log, strict=True):
        pairs = zip(line["step_weights"], line["step_losses"], strict=True)
        assert sum(weight * (loss or 0) for weight, loss in pairs) == pytest.approx(record["train_loss"], rel=1e-5)
    assert insight[2]["step_losses"][0] is None


def test_the_final_test_is_told_step_by_step_and_ends_at_its_result(finished):
    folder, result = finished
    told = json.loads((folder / "final_insight.json").read_text())
    assert [each["steps"] for each in told["steps"]] == [0, 1, 2]
    scores = result["test"]["norms"][told["norm"]]
    for place, name in ((0, "before"), (-1, "after")):
        for part in ("accuracy", "interval"):
            assert told["steps"][place][part] == pytest.approx(scores[name][part], rel=1e-5)


def test_an_interrupted_run_has_the_same_insight_as_one_that_was_not(finished, tmp_path, monkeypatch):
    interrupt_call(monkeypatch, metawrap.training.training_loop, "_snapshot", 2)
    with pytest.raises(KeyboardInterrupt):
        train(TINY, tmp_path)
    with open(tmp_path / "insight.jsonl", "a") as handle:
        handle.write('{"epoch": 2, "rates": {"never": [1.0]}}\n{"epoch": 3, "torn')
    train(TINY, tmp_path, resume=True)
    for name in ("insight.jsonl", "final_insight.json"):
        assert (tmp_path / name).read_text() == (finished[0] / name).read_text()


def test_resuming_keeps_the_command_that_started_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["metawrap", "train", "--first"])
    RunFolder(tmp_path, TINY).begin([], dict)
    monkeypatch.setattr(sys, "argv", ["metawrap", "train", "--resume"])
    RunFolder(tmp_path, TINY).begin([], dict)
    [run] = read_records(tmp_path)
    assert run.command.endswith("train --first")


def build_without_norms(ways):
    return nn.Sequential(nn.Flatten(), nn.Linear(256, ways))


@pytest.mark.parametrize("method", ["maml", "protonet", "meta-sgd"])
def test_a_method_records_what_it_has_and_no_more(tmp_path, method):
    options = {"maml": {}, "protonet": {}, "meta-sgd": {"inner_lr": 0.1}}[method]
    model = None if method == "protonet" else f"{__name__}:build_without_norms"
    settings = replace(TINY, method=method, epochs=1, options={}, inner_steps=None, model=model, **options)
    train(settings, tmp_path)
    [run] = read_records(tmp_path)
    [epoch] = run.epochs
    assert epoch.step_weights == []
    if method == "meta-sgd":
        rates = epoch.rates["1.weight"]
        values = state_after(tmp_path, 1)["learning_rates.1/weight"].numpy()
        assert values.shape == (1, 5, 256)
        assert [rates.low, rates.median, rates.high] == [
            [pytest.approx(np.percentile(values, p), rel=1e-4)] for p in (25, 50, 75)
        ]
    else:
        assert epoch.rates == {}
    assert len(epoch.norms) == (4 if method == "protonet" else 0)
    assert sorted(run.steps) == {"maml": [0, 1, 2, 3, 4, 5], "protonet": [], "meta-sgd": [0, 1]}[method]
    assert len(run.episodes) in (1, 2)
    assert sum(count.targets for count in run.right) == 5 * min(TINY.test_tasks, 100) * TINY.targets
    placed = [each.at for episode in run.episodes for each in episode.support + episode.target if each.at]
    assert len(placed) == (10 * len(run.episodes) if method == "protonet" else 0)
    if method == "protonet":
        task = build_experiment(settings).test.batch(0)[0]
        learner = load(tmp_path).learner
        with torch.no_grad():
            rows = [learner.embedding.of(x, "running") for x in (task.support_x, task.target_x)]
        rows = torch.cat(rows).double().numpy()
        left, values, _ = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
        assert np.abs(placed[:10]) == pytest.approx(np.abs(left[:, :2] * values[:2]), rel=1e-3, abs=1e-4)


class RememberedLogits:
    """A learner whose predictions are given: one (targets, ways) tensor for each task of a batch."""

    settings = types.SimpleNamespace(default_steps=None, norm="batch")

    def __init__(self, tasks, logits):
        self.known = [(task.target_x, logit) for task, logit in zip(tasks, logits, strict=True)]

    def evaluate(self, tasks, *, keep_predictions=False):
        flat = [task for batch in tasks for task in ([batch] if isinstance(batch, Task) else batch)]
        logits = [next(logit for x, logit in self.known if torch.equal(x, task.target_x)) for task in flat]
        per_task = torch.stack([(p.argmax(1) == t.target_y).double().mean() for p, t in zip(logits, flat, strict=True)])
        return EvaluationResult.of({"accuracy": per_task}, per_task, norm="batch", steps=None, predictions=logits)


def test_the_first_task_and_the_hardest_are_kept_with_images_labels_and_predictions():
    sampler = build_experiment(replace(TINY, targets=2)).test
    tasks = list(sampler.batch(0))
    generator = torch.Generator().manual_seed(3)
    logits = [torch.randn(10, 5, generator=generator) for _ in tasks]
    logits[2] = nn.functional.one_hot((tasks[2].target_y + 1) % 5, 5).float()  # All wrong.
    told = final_insight(RememberedLogits(tasks, logits), sampler, 4)
    assert told["steps"] == []
    assert [(each["task"], each["why"]) for each in told["episodes"]] == [
        (1, "the first test task"),
        (3, "the test task with most errors"),
    ]
    for episode, number in zip(told["episodes"], (0, 2), strict=True):
        task, guess = tasks[number], logits[number].numpy()
        names = sampler.images.class_names
        assert episode["classes"] == [names[number] for number in task.classes]
        assert [each["label"] for each in episode["target"]] == task.target_y.tolist()
        assert [each["prediction"] for each in episode["target"]] == guess.argmax(1).tolist()
        shares = np.exp(guess) / np.exp(guess).sum(1, keepdims=True)
        assert [each["probability"] for each in episode["target"]] == pytest.approx(shares.max(1), rel=1e-5)
        for part in ("support", "target"):
            for each, image in zip(episode[part], getattr(task, f"{part}_x"), strict=True):
                shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(each["png"]))))
                assert np.array_equal(shown, (image[0].numpy() * 255).round())


def test_classes_and_confusions_are_those_of_a_count_in_numpy():
    sampler = build_experiment(replace(TINY, targets=2)).test
    tasks = list(sampler.batch(0))
    generator = torch.Generator().manual_seed(4)
    logits = [torch.randn(10, 5, generator=generator) for _ in tasks]
    told = final_insight(RememberedLogits(tasks, logits), sampler, 4)["classes"]
    names = np.array(sampler.images.class_names)
    true = np.array([[names[number] for number in np.array(task.classes)[task.target_y]] for task in tasks])
    guessed = np.array(
        [[names[number] for number in np.array(t.classes)[p.argmax(1)]] for t, p in zip(tasks, logits, strict=True)]
    )
    together = {name: [name in names[list(task.classes)] for task in tasks] for name in np.unique(true)}
    right = {name: ((true == name) & (guessed == name)).sum() for name in together}
    rows = sorted((right[name] / (true == name).sum(), name) for name in together)
    assert told["count"] == len(rows)
    assert [each["class"] for each in told["shown"]] == [name for _, name in rows]
    for each in told["shown"]:
        assert (each["targets"], each["right"]) == ((true == each["class"]).sum(), right[each["class"]])
    pairs = {(a, b) for a, b in zip(true.flat, guessed.flat, strict=True) if a != b}
    assert {(each["class"], each["taken_for"]) for each in told["confusions"]} == pairs
    for each in told["confusions"]:
        a, b = each["class"], each["taken_for"]
        assert each["times"] == ((true == a) & (guessed == b)).sum()
        assert each["targets"] == (true[np.logical_and(together[a], together[b])] == a).sum()
    assert [each["times"] for each in told["confusions"]] == sorted(
        (e["times"] for e in told["confusions"]), reverse=True
    )


def test_the_records_of_many_classes_are_small():
    tasks = [
        Task(torch.zeros(1), torch.zeros(1), torch.zeros(2), torch.tensor([0, 1]), classes=(n, n + 1))
        for n in range(500)
    ]
    told = by_class(tasks, [np.array([1, 1])] * 500, [f"{number:03}" for number in range(501)])
    assert told["count"] == 501
    assert len(told["shown"]) == len(told["confusions"]) == 60
    # The last class alone is always right; of the others every second target is.
    assert (told["shown"][0]["class"], told["shown"][-1]["class"]) == ("000", "500")


def test_the_plane_has_the_distances_of_a_singular_value_decomposition():
    rows = np.random.default_rng(0).normal(size=(7, 40)) * np.linspace(3, 0.1, 40)
    left, values, _ = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    plane, shares = principal_plane(rows)
    assert np.abs(plane) == pytest.approx(np.abs(left[:, :2] * values[:2]))
    assert shares == pytest.approx(values[:2] ** 2 / (values**2).sum())
    assert all(plane[np.abs(plane).argmax(0), [0, 1]] > 0)
    assert principal_plane(np.ones((3, 2))) is None
    assert principal_plane(np.full((3, 2), np.nan)) is None


def test_a_turned_class_has_a_name_of_its_own():
    assert class_names(["a", "b", "c"], [2, 4, 9]) == ["c", "b turned by 90°", "a turned by 270°"]


def test_of_a_large_episode_some_images_are_kept_and_all_predictions():
    sampler = build_experiment(replace(TINY, targets=9)).test
    tasks = list(sampler.batch(0))
    learner = RememberedLogits(tasks, [torch.eye(5).repeat_interleave(9, 0)] * 4)
    [episode] = final_insight(learner, sampler, 4)["episodes"]
    assert len(episode["target"]) == 45
    assert sorted(each["label"] for each in episode["target"] if each["png"]) == [n for n in range(5) for _ in range(5)]


@pytest.mark.parametrize(
    ("steps", "counts"),
    [(1, [0, 1]), (5, [0, 1, 2, 3, 4, 5]), (50, [0, 1, 2, 5, 10, 20, 50]), (30, [0, 1, 2, 5, 10, 20, 30])],
)
def test_few_numbers_of_steps_are_tested(steps, counts):
    assert step_counts(steps) == counts


def test_quartiles_are_those_of_numpy_and_none_where_a_value_is_not_finite():
    values = torch.randn(3, 7, 2, generator=torch.Generator().manual_seed(0))
    found = quartiles(values)
    for name, percent in (("low", 25), ("median", 50), ("high", 75)):
        assert found[name] == pytest.approx(np.percentile(values.numpy().reshape(3, -1), percent, axis=1), rel=1e-4)
    values[1, 0, 0] = torch.nan
    assert quartiles(values)["median"][1] is None


def test_colours_reach_the_image_and_other_ranges_are_stretched():
    image = torch.tensor([0.0, 0.2, 0.4, 0.6, 0.8, 1.0]).view(3, 1, 2)
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(as_png(image)))))
    assert shown.tolist() == [[[0, 102, 204], [51, 153, 255]]]
    stretched = np.asarray(Image.open(io.BytesIO(base64.b64decode(as_png(image * 4 - 2)))))
    assert np.array_equal(stretched, shown)


def scalars_of(folder):
    """{tag: [(step, value), ...]}, as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def assert_shows_the_log(folder):
    scalars, log, insight = scalars_of(folder), lines_of(folder / "log.jsonl"), lines_of(folder / "insight.jsonl")
    for tag, name in (("accuracy/validation", "validation_accuracy"), ("loss/train", "train_loss")):
        assert [step for step, _ in scalars[tag]] == [1, 2, 3]
        assert [value for _, value in scalars[tag]] == pytest.approx([record[name] for record in log], rel=1e-6)
    for name, rates in insight[0]["rates"].items():
        for step in range(len(rates)):
            shown = scalars[f"rates/{name}/step {step + 1}"]
            assert shown == [(line["epoch"], pytest.approx(line["rates"][name][step], rel=1e-6)) for line in insight]


def test_tensorboard_shows_the_log_and_the_rates(finished):
    assert_shows_the_log(finished[0])


@pytest.mark.sampled(1)
@pytest.mark.parametrize("asked_before", [True, False])
def test_tensorboard_has_each_epoch_once_after_resuming(tmp_path, asked_before, monkeypatch):
    # The second epoch has been logged, but not saved.
    interrupt_call(monkeypatch, CheckpointFolder, "save", 2)
    with pytest.raises(KeyboardInterrupt):
        train(TINY, tmp_path, tensorboard=asked_before)
    train(TINY, tmp_path, resume=True, tensorboard=not asked_before)
    assert_shows_the_log(tmp_path)


def test_without_tensorboard_the_way_to_install_it_is_named_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MetaWrapError, match=r'pip install "metawrap\[tensorboard\]".*--tensorboard'):
        train(TINY, tmp_path / "out", tensorboard=True)
    assert not (tmp_path / "out").exists()
