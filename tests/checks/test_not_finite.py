"""What is not finite is skipped, explained (task, inner step, layer, operation), and ends a run with nothing lost."""

import json

import pytest
import torch
from torch import nn

from metawrap import FOMAML, MAML, DivergedError, MAMLPlusPlus, ProtoNet, Reptile, Task
from metawrap.cli import main
from metawrap.training.checkpoints import load_checkpoint


class Bursts(nn.Module):
    """Its second layer leaves the range of float32 once an input is above 100: exp(exp(5)) is no number there."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.burst = Burst()

    def forward(self, x):
        return self.head(self.burst(self.second(torch.tanh(self.first(x))), x))


class Burst(nn.Module):
    def forward(self, x, inputs):
        return x * torch.where(inputs.amax() > 100, torch.inf, 1.0)


def task(classes, scale=1.0, shift=0.0):
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(1)) * scale
    y = torch.tensor([0, 1, 0, 1])
    return Task(x, y, x + shift, y, classes=classes)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("engine", ["functional", "higher"])
def test_the_task_its_classes_the_inner_step_and_the_layer_are_named(engine):
    learner = MAMLPlusPlus(Bursts(), inner_steps=3, engine=engine)
    tasks = [task((4, 9)), task((7, 2), scale=1000.0), task((1, 3))]
    before = {name: value.clone() for name, value in learner.named_parameters()}
    assert learner.meta_step(tasks).skipped
    [found] = learner.find_trouble(tasks)
    assert (found.task, found.classes, found.step) == (1, (7, 2), 0)
    text = "task 2 of the batch (classes 7, 2): in inner step 1 the output of 'burst' (Burst) not finite"
    assert str(found) == text
    assert all(torch.equal(value, before[name]) for name, value in learner.named_parameters())
    assert all(not module._forward_hooks for module in learner.modules())
    assert learner.find_trouble([tasks[0], tasks[2]]) == []


def test_an_inner_loop_that_explodes_is_reported_at_the_step_that_a_hand_written_one_explodes_at():
    model, rate = nn.Sequential(nn.Linear(3, 2)), 1e12

    def square(prediction, y):
        return (prediction - y[:, None]).square().mean()

    one = task(None)
    pair = [p.detach().clone().requires_grad_() for p in model.parameters()]
    step = -1
    while all(value.isfinite().all() for value in pair):
        step += 1
        loss = square(one.support_x @ pair[0].T + pair[1], one.support_y)
        gradients = torch.autograd.grad(loss, pair)
        pair = [(w - rate * g).detach().requires_grad_() for w, g in zip(pair, gradients, strict=True)]
    assert 1 <= step < 9
    learner = FOMAML(model, inner_steps=10, inner_lr=rate, loss_fn=square)
    assert learner.meta_step([one]).skipped
    [found] = learner.find_trouble([one])
    assert found.step == step
    assert "the update of '0." in found.place


def test_what_is_not_finite_on_the_target_set_or_in_the_gradient_alone_is_named():
    learner = MAML(Bursts(), inner_steps=1)
    [found] = learner.find_trouble([task((0, 1), shift=1000.0)])
    assert (found.step, found.place) == (None, "on the target set, the output of 'burst' (Burst)")
    prototypes = ProtoNet(nn.Sequential(nn.Linear(3, 4), Root()), embedding="output")
    flat = task((5, 6), scale=0.0)
    with torch.no_grad():
        prototypes.model[0].bias.zero_()
    assert prototypes.meta_step([flat]).skipped
    [found] = prototypes.find_trouble([flat])
    assert found.place.startswith("the meta-gradient of 'model.0.weight'")
    broken = task((5, 6), scale=float("nan"))
    assert "support_x holds values" in str(learner.find_trouble([broken])[0])


class Root(nn.Module):
    """The derivative of a root at 0 is infinite, and that times 0 is no number."""

    def forward(self, x):
        return (x * x).sqrt()


WORDS = r"'(Sqrt|Mul)Backward0' \(.*test_not_finite\.py, line \d+: return \(x \* x\)"


@pytest.mark.parametrize("method", [MAML, Reptile, ProtoNet])
def test_anomaly_detection_names_the_operation_and_its_line_and_leaves_the_learner_as_it_was(method):
    learner = method(nn.Sequential(nn.Linear(3, 2), Root(), nn.Linear(2, 2)), outer_update={"detect_anomaly": True})
    with torch.no_grad():
        learner.model[0].bias.zero_()
    before = {name: value.clone() for name, value in learner.named_parameters()}
    with pytest.raises(DivergedError, match=WORDS):
        learner.meta_step([task((0, 1), scale=0.0)])
    assert all(torch.equal(value, before[name]) for name, value in learner.named_parameters())
    assert learner.iteration == 0
    assert not torch.is_anomaly_enabled()


def test_anomaly_detection_changes_no_gradient():
    learners = []
    for detect in (False, True):
        torch.manual_seed(3)
        learners.append(MAMLPlusPlus(Bursts(), inner_steps=2, outer_update={"detect_anomaly": detect}))
        learners[-1].meta_step([task((0, 1)), task((2, 3), scale=0.5)])
    for one, other in zip(learners[0].parameters(), learners[1].parameters(), strict=True):
        assert torch.equal(one, other)


BREAKS = """
import torch
from torch import nn

class Breaks(nn.Module):
    def __init__(self, ways):
        super().__init__()
        self.flatten, self.head = nn.Flatten(), nn.Linear(64, ways)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        return self.head(self.flatten(x)) * (float("nan") if self.head.weight.abs().max() > 0.2 else 1.0)

def build(ways):
    return Breaks(ways)
"""


# torch validates, and warns of, sparse tensors that another test has pickled in this process.
@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
@pytest.mark.filterwarnings("default::metawrap.MetaWrapWarning")
def test_a_run_that_diverges_logs_the_classes_stops_after_the_set_number_and_keeps_the_last_good_epoch(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "breaks_when_large.py").write_text(BREAKS)
    monkeypatch.chdir(tmp_path)
    flags = ["--model", "breaks_when_large:build", "--image-size", "8", "--ways", "2", "--inner-steps", "1"]
    flags += ["--inner-lr", "0.001", "--meta-lr", "0.03", "--epochs", "30", "--iterations", "4", "--batch", "2"]
    flags += [
        "--validation-tasks",
        "2",
        "--test-tasks",
        "2",
        "--device",
        "cpu",
        "--set",
        "outer_update.max_skipped_steps=6",
    ]
    assert main(["train", *flags, "--out", "run"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("Error: At least 6 meta-steps in a row")
    assert "the output of the model not finite" in said[-1]
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    good = [record for record in records if not record["skipped_steps"]]
    assert good
    assert all("not_finite" not in record for record in good)
    noted = [each for record in records[len(good) :] for each in record["not_finite"]]
    explained = [line for line in said if line.startswith("Skipped meta-step ")]
    assert explained
    for each in noted:
        assert len(each["classes"]) == 2
        assert each["step"] == 0
        assert f"(classes {each['classes'][0]}, {each['classes'][1]})" in each["text"]
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    assert all(value.isfinite().all() for name, value in load_checkpoint(newest).learner.items() if "weight" in name)
