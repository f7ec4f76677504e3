import copy
import json
import random

import numpy as np
import pytest
import torch
from tiny_runs import TINY, assert_ended_alike, assert_same, log_of, refusal
from torch import nn
from torch.utils.data import DataLoader

import metawrap
from metawrap import MAMLPlusPlus, Task, TaskBatch
from metawrap.data import EpisodeSampler, load_glyphs
from metawrap.errors import ArgumentError, CheckpointError, DataError
from metawrap.report import gather, write_report_page
from metawrap.training import Callback, EarlyStopping
from metawrap.training import train as train_by_names
from metawrap.training.checkpoints import load_checkpoint

pytestmark = pytest.mark.usefixtures("tiny_training")


def task(draw=torch.randn):
    x, y = draw(6, 4), torch.arange(3).repeat(2)
    return Task(x, y, x + 0.1 * draw(6, 4), y)


def batches(count, tasks=2):
    return [TaskBatch(tuple(task() for _ in range(tasks))) for _ in range(count)]


def make_learner(epochs=3, **how):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))
    how = {"inner_steps": 1, "epochs": epochs, "iterations_per_epoch": 2, "engine": "functional"} | how
    return MAMLPlusPlus(model, **how)


class Drawn:
    """Tasks without an end, from all three global generators. Its length is not known, as that of some DataLoaders."""

    def __len__(self):
        raise TypeError

    def __iter__(self):
        while True:
            yield [task(lambda *size: torch.randn(*size) * random.random() + np.random.rand())]


class Interrupt(Callback):
    """Stops the process, so to say, after an epoch, and leaves other random states behind."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_epoch_end(self, state):
        if state.epoch == self.epoch:
            raise KeyboardInterrupt

    def on_train_end(self, state):
        random.seed(9), np.random.seed(9), torch.manual_seed(9)


def test_a_run_trains_as_a_loop_by_hand(tmp_path):
    tasks, validation = batches(4), batches(3)
    learner = make_learner()
    by_hand = copy.deepcopy(learner)
    torch.manual_seed(1)
    metawrap.train(learner, tasks, validation, out=tmp_path)
    torch.manual_seed(1)
    losses = []
    for number in range(6):
        losses.append(by_hand.meta_step(tasks[number % 4]).loss)
        if number % 2:
            losses.append(by_hand.evaluate(validation).loss)
    logged = log_of(tmp_path)
    assert [each["validation_loss"] for each in logged] == losses[2::3]
    assert logged[1]["train_loss"] == (losses[3] + losses[4]) / 2
    assert_same(load_checkpoint(tmp_path / "checkpoints/epoch-0003.pt").learner, by_hand.state_dict())


@pytest.mark.sampled(2)
@pytest.mark.parametrize("source", ["sampler", "list", "drawn", "loader"])
def test_a_run_that_is_interrupted_and_resumed_ends_with_the_same_bits(source, tmp_path):
    if source == "sampler":
        images = load_glyphs((6, 4, 4)).train
        parts = [EpisodeSampler(images, 3, 1, 1, 2, seed=seed) for seed in range(3)]
    else:
        fixed = batches(3)  # A pass of three does not fit epochs of two.
        train = {"list": lambda: fixed, "drawn": Drawn, "loader": lambda: shuffled(fixed[:2])}[source]
        parts = [train, batches(2), batches(2)]
    first = nn.Sequential(nn.Flatten(), nn.Linear(784, 4)) if source == "sampler" else nn.Identity()
    how = {"test_norms": "own"} | ({"validation_tasks": 4, "test_tasks": 4} if source == "sampler" else {})

    def run(out, resume=False, callbacks=()):
        learner = make_learner()
        learner = MAMLPlusPlus(nn.Sequential(first, learner.unwrap()), inner_steps=1, epochs=3, iterations_per_epoch=2)
        train, *others = parts
        train = train if source == "sampler" else train()
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        return metawrap.train(learner, train, *others, out=out, resume=resume, callbacks=callbacks, **how)

    run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "resumed", callbacks=[Interrupt(1)])
    run(tmp_path / "resumed", resume=True)
    assert_ended_alike(tmp_path / "whole", tmp_path / "resumed")


def shuffled(tasks):
    return DataLoader(tasks, batch_size=None, shuffle=True)


class Recorded(Callback):
    def __init__(self, stop_at=None):
        self.calls, self.stop_at = [], stop_at

    def on_train_start(self, state):
        self.calls.append(("start", state.epoch))

    def on_epoch_end(self, state):
        self.calls.append(("epoch", state.epoch, state.record["epoch"]))
        if state.epoch == self.stop_at:
            state.stop("enough")

    def on_train_end(self, state):
        self.calls.append(("end", state.result is not None))


def test_a_callback_stops_a_run_which_is_then_finished_and_can_be_extended(tmp_path):
    parts, recorded = (batches(2), batches(1), batches(1)), Recorded(stop_at=2)
    result = metawrap.train(make_learner(), *parts, out=tmp_path, callbacks=[recorded])
    assert recorded.calls == [("start", 0), ("epoch", 1, 1), ("epoch", 2, 2), ("end", True)]
    assert [each.get("stopped") for each in log_of(tmp_path)] == [None, "enough"]
    learner = make_learner()
    assert metawrap.train(learner, *parts, out=tmp_path, resume=True) == result
    best = load_checkpoint(tmp_path / f"checkpoints/epoch-000{result['test']['epoch']}.pt")
    assert_same(learner.state_dict(), best.learner)
    (tmp_path / "result.json").unlink()  # As if it had been killed before the test.
    again = metawrap.train(make_learner(), *parts, out=tmp_path, resume=True)
    assert again["test"] == result["test"]
    metawrap.train(make_learner(epochs=4), *parts, out=tmp_path, resume=True, callbacks=[recorded])
    assert recorded.calls[4:] == [("start", 2), ("epoch", 3, 3), ("epoch", 4, 4), ("end", True)]


def test_an_error_of_a_callback_reaches_the_caller_and_costs_no_epoch(tmp_path):
    class Failing(Callback):
        def on_epoch_end(self, state):
            raise RuntimeError("no network")

    recorded = Recorded()
    with pytest.raises(RuntimeError, match="no network"):
        metawrap.train(make_learner(), batches(2), out=tmp_path, callbacks=[recorded, Failing()])
    assert recorded.calls == [("start", 0), ("epoch", 1, 1), ("end", False)]
    assert load_checkpoint(tmp_path / "checkpoints/epoch-0001.pt").epoch == len(log_of(tmp_path)) == 1


def test_early_stopping_waits_for_the_best_epoch_to_be_so_long_ago(tmp_path):
    history = [{"validation_accuracy": value} for value in (0.2, 0.6, 0.5, 0.6, 0.3)]
    state = metawrap.training.TrainingState(None, tmp_path, 9, [])
    stopped = []
    for record in history:
        state.history.append(record)
        EarlyStopping(patience=3).on_epoch_end(state)
        stopped.append(state.stopped)
    assert stopped == [None] * 4 + ["validation has not improved since epoch 2"]
    with pytest.raises(ArgumentError, match="EarlyStopping needs validation tasks"):
        metawrap.train(make_learner(), batches(2), out=tmp_path, callbacks=[EarlyStopping()])


def test_named_runs_take_callbacks_too(tmp_path):
    recorded = Recorded(stop_at=1)
    train_by_names(TINY, tmp_path, callbacks=[recorded])
    assert recorded.calls == [("start", 0), ("epoch", 1, 1), ("end", True)]


def test_each_metric_is_logged_and_tested_beside_the_accuracy(tmp_path):
    def first_class(prediction, y):
        return (prediction.argmax(1) == 0).double().mean()

    metrics = {
        "loss_of_two": lambda prediction, y: 2 * nn.functional.cross_entropy(prediction, y),
        "zeros": first_class,
    }
    learner, (validation, test) = make_learner(), (batches(3), batches(3))
    result = metawrap.train(learner, batches(2), validation, test, out=tmp_path, metric=metrics, test_norms="own")
    log, best = log_of(tmp_path), result["test"]["epoch"]
    for found, tasks in ((log[best - 1], validation), (result["test"]["norms"]["support"]["after"], test)):
        expected = learner.evaluate(tasks, metric=metrics).metrics
        shown = found.get("validation_metrics") or found["metrics"]
        assert shown == {name: value.mean for name, value in expected.items()}
    assert log[best - 1]["validation_accuracy"] == learner.evaluate(validation).accuracy


def test_a_regression_without_validation_or_test_keeps_the_newest_epoch_and_has_a_report(tmp_path):
    def rows():
        x = torch.randn(5, 1)
        return Task(x, 2 * x, x, 2 * x)

    learner = MAMLPlusPlus(
        nn.Linear(1, 1), epochs=2, iterations_per_epoch=1, loss_fn=nn.functional.mse_loss, multi_step_loss=False
    )
    result = metawrap.train(learner, [[rows(), rows()]], out=tmp_path)
    assert "test" not in result
    assert result["best_validation"] == {"epoch": 2, "accuracy": None}
    assert_same(learner.state_dict(), load_checkpoint(tmp_path / "checkpoints/epoch-0002.pt").learner)
    write_report_page(gather([tmp_path]), tmp_path / "report.html")
    assert "tasks on list of 1" in (tmp_path / "report.html").read_text()
    tested = metawrap.train(make_learner(), batches(2), test=[[rows()]] and batches(1), out=tmp_path / "other")
    assert tested["test"]["epoch"] == 3


def test_a_run_of_objects_says_that_they_must_be_given_again(tmp_path, capsys):
    metawrap.train(make_learner(epochs=1), batches(2), batches(1), out=tmp_path)
    with pytest.raises(CheckpointError, match=r"metawrap\.train\(learner, train, .*resume=True\)"):
        metawrap.load(tmp_path)
    capsys.readouterr()
    for command in (["evaluate", tmp_path], ["train", "--resume", "--out", tmp_path]):
        assert "Python objects" in refusal(capsys, command)


def test_a_run_is_resumed_with_the_same_objects_alone(tmp_path):
    images = load_glyphs((6, 4, 4)).train

    def run(learner, seed=0, images=images, resume=True, **how):
        model = nn.Sequential(nn.Flatten(), nn.Linear(784, 3))
        learner = MAMLPlusPlus(model, inner_steps=1, epochs=1, iterations_per_epoch=2, **learner)
        sampler = EpisodeSampler(images, 3, 1, 1, 2, seed=seed)
        metawrap.train(learner, sampler, out=tmp_path, resume=resume, **how)

    run({}, resume=False)
    run({})
    with pytest.raises(CheckpointError, match=r"^options.inner_lr: the run was started with 0.1, but is .* 0.5"):
        run({"inner_lr": 0.5})
    with pytest.raises(CheckpointError, match=r"^objects.loss_fn: .*'cross_entropy'.*'nll_loss'"):
        run({"loss_fn": nn.functional.nll_loss})
    with pytest.raises(CheckpointError, match=r"^seed: "):
        run({}, seed=1)
    with pytest.raises(DataError, match="data differ"):
        run({}, images=images.subset([1, 0, 2, 3, 4, 5]))
    with pytest.raises(CheckpointError, match="already has a run"):
        run({}, resume=False)
    names = tmp_path / "names"
    names.mkdir()
    (names / "run.json").write_text(json.dumps({"settings": TINY.to_dict(), "seeds": None}))
    with pytest.raises(CheckpointError, match="was made by `metawrap train`"):
        metawrap.train(make_learner(), batches(2), out=names, resume=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"learner": nn.Linear(2, 2)}, r"learner: expected a learner .* got Linear\. Wrap it first"),
        ({"train": Drawn}, "train: expected an EpisodeSampler"),
        ({"train": []}, "train: list gives no batch"),
        ({"train": iter(batches(1)), "epochs": 1}, "train: .* gives no batch after 1 of them. An iterator"),
        (
            {"train": [[Task(torch.ones(3, 7), torch.arange(3), torch.ones(3, 7), torch.arange(3))]]},
            "train: the network",
        ),
        ({"validation": iter(batches(1))}, "validation: expected tasks that can be gone through after each epoch"),
        ({"validation": batches(1), "validation_tasks": 3}, "validation: expected at least 3 tasks, but got 2"),
        ({"test_tasks": 3}, "test_tasks: is 3, but there are no tasks"),
        ({"validation": batches(1), "metric": lambda prediction, y: "good"}, "metric: expected one number"),
        ({"callbacks": Recorded()}, "callbacks: expected a list"),
        ({"callbacks": [Recorded]}, "callbacks: expected objects with on_train_start"),
        ({"epochs": 0}, "epochs: expected a whole number of at least 1"),
        ({"keep": 0}, "keep: expected a whole number of at least 1"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_written(arguments, words, tmp_path):
    given = {"learner": make_learner(), "train": batches(2), "out": tmp_path / "run"} | arguments
    with pytest.raises(ArgumentError, match=words):
        metawrap.train(**given)
    assert given["train"] is not arguments.get("train") or not list(tmp_path.glob("run/checkpoints/*"))
