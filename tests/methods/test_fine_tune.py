"""FineTune: pre-training against plain cross-entropy on all examples, fine-tuning against a torch.optim loop."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from face import assert_same_state, fingerprint, snapshot
from method_cases import (
    CLASSES,
    assert_a_failed_call_changes_nothing,
    assert_fitted_by_torch,
    assert_same_gradients,
    conv_tasks,
    mlp,
    net,
    vector_tasks,
)
from torch import nn

from metawrap import (
    ArgumentError,
    FineTune,
    MetaWrapWarning,
    MultiTask,
    Task,
    TaskBatch,
    TaskError,
    UnsupportedModuleError,
)
from metawrap.data import EpisodeSampler, LabelledImages
from metawrap.training.experiment import build_learner
from metawrap.training.run_settings import RunSettings

METHODS = [(FineTune, {"tune": "head"}), (FineTune, {"tune": "full"}), (MultiTask, {})]


def test_joint_gradient_is_that_of_plain_cross_entropy_on_all_examples():
    model, batch = mlp(), vector_tasks(2, classes=CLASSES)
    learner = FineTune(model, classes=6)
    learner.evaluate(batch[:1])
    found = learner(batch)
    found.loss.backward()

    table = learner.table
    weight, bias = (p.detach().clone().requires_grad_() for p in (table.weight, table.bias))
    assert weight.shape == (6, 5)
    plain = copy.deepcopy(model)
    x = torch.cat([part for task in batch for part in (task.support_x, task.target_x)])
    y = torch.tensor([task.classes[int(label)] for task in batch for label in [*task.support_y, *task.target_y]])
    loss = F.cross_entropy(plain.body(x) @ weight.T + bias, y)
    loss.backward()
    torch.testing.assert_close(found.loss, loss, rtol=1e-9, atol=0)
    torch.testing.assert_close(table.weight.grad, weight.grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(table.bias.grad, bias.grad, rtol=1e-9, atol=1e-12)
    assert_same_gradients(learner.model.body, plain.body)
    assert learner.model.head.weight.grad is None or not learner.model.head.weight.grad.any()
    # Among the task's own classes.
    right = 0.0
    for task in batch:
        logits = (plain.body(task.target_x) @ weight.T + bias)[:, list(task.classes)]
        right += float((logits.argmax(1) == task.target_y).double().mean()) / 2
    assert float(found.accuracy) == pytest.approx(right)


def test_without_classes_the_gradient_is_that_of_the_network_itself_on_all_examples():
    model, batch = net(), conv_tasks(2)
    learner = FineTune(model, classes="shared")
    found = learner(batch)
    found.loss.backward()
    plain = copy.deepcopy(model).train()
    losses = [
        F.cross_entropy(plain(torch.cat([t.support_x, t.target_x])), torch.cat([t.support_y, t.target_y]))
        for t in batch
    ]
    loss = sum(losses) / 2
    loss.backward()
    torch.testing.assert_close(found.loss, loss, rtol=1e-9, atol=0)
    for name, parameter in plain.named_parameters():
        got = learner.model.get_parameter(name).grad
        torch.testing.assert_close(got, parameter.grad, rtol=1e-9, atol=1e-10)
    # The statistics too, as ordinary training keeps them.
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(learner.model.get_buffer(name), buffer, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("tune", ["head", "full"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_fine_tuning_is_a_torch_loop(tune, optimizer):
    batch = conv_tasks(3, classes=CLASSES)
    learner = FineTune(net(), tune=tune, inner_steps=4, inner_lr=0.05, inner_optimizer=optimizer)
    for _ in range(3):
        learner.meta_step(batch[:2])
    task = batch[2]
    adapted = learner.adapt(task.support_x, task.support_y)

    plain = learner.unwrap().eval()
    parameters = plain.linear.parameters() if tune == "head" else plain.parameters()
    made = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer](parameters, lr=0.05)
    assert_fitted_by_torch(adapted, plain, task, made)
    torch.testing.assert_close(adapted(task.target_x), plain(task.target_x), rtol=1e-9, atol=1e-12)
    assert not torch.equal(adapted.linear.weight, learner.model.linear.weight)
    body_moved = not torch.equal(adapted.conv0.conv.weight, learner.model.conv0.conv.weight)
    assert body_moved == (tune == "full")


def test_the_table_grows_and_the_optimizer_with_it():
    batch = vector_tasks(3, classes=CLASSES)
    grown = FineTune(mlp(), meta_lr=0.01)
    grown.meta_step([batch[0]])
    weight = grown.table.weight
    before = weight.detach().clone()
    average = grown.optimizer.state[weight]["exp_avg"].clone()
    assert weight.shape == (5, 5)
    grown._check_trainable(TaskBatch((batch[2],)))
    assert grown.table.weight is weight
    assert_same_state(weight[:5].detach(), before)
    assert_same_state(grown.optimizer.state[weight]["exp_avg"], torch.cat([average, torch.zeros(3, 5).double()]))
    grown.meta_step([batch[2]])
    assert grown.table.weight.shape == (8, 5)
    assert not torch.equal(weight[5:].detach(), before[:3])


def test_an_optimizer_that_remembers_in_another_form_starts_anew_for_a_table_that_grows():
    learner = FineTune(mlp(), optimizer=lambda parameters: torch.optim.Adafactor(parameters))
    for task in vector_tasks(3, classes=CLASSES):
        learner.meta_step([task])
    assert learner.table.weight.shape == (8, 5)


def test_an_earlier_state_of_a_grown_table_can_be_loaded():
    tasks = vector_tasks(3, classes=CLASSES)
    learner = FineTune(mlp())
    learner.meta_step(tasks[:1])
    early = copy.deepcopy(learner.state_dict())
    learner.meta_step(tasks[2:])
    learner.load_state_dict(early)
    assert learner.table.weight.shape == (5, 5)
    learner.meta_step(tasks)
    assert learner.table.weight.shape == (8, 5)


def test_what_an_optimizer_of_ones_own_would_miss_is_said():
    [first, _, last] = vector_tasks(3, classes=CLASSES)
    learner = FineTune(mlp())
    with pytest.warns(MetaWrapWarning, match=r"makes table\.weight, table\.bias.*learner\.optimizer"):
        learner([first])
    before = fingerprint(learner)
    with pytest.raises(ArgumentError, match=r"at least 8, but got None.*sampler\.num_classes"):
        learner([last])
    assert fingerprint(learner) == before


class Squeezed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).squeeze(1)


def test_full_tuning_of_regression_needs_no_head():
    torch.manual_seed(0)
    model = Squeezed().double()
    x = torch.linspace(-1, 1, 8, dtype=torch.float64)[:, None]
    batch = [Task(x, a * x[:, 0], x, a * x[:, 0]) for a in (1.0, 0.8)]
    learner = FineTune(model, tune="full", loss_fn=F.mse_loss, meta_lr=0.03)
    losses = [learner.meta_step(batch).loss for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]
    found = learner.evaluate(batch[0], keep_predictions=True).predictions[0]
    torch.testing.assert_close(learner.adapt(x, batch[0].support_y)(x).detach(), found, rtol=1e-9, atol=1e-9)
    with pytest.raises(UnsupportedModuleError, match="Name the head with head="):
        FineTune(model, loss_fn=F.mse_loss).meta_step(batch)


def test_episodes_name_the_classes_that_their_images_are_of():
    images = torch.arange(6 * 4, dtype=torch.uint8).repeat_interleave(4).view(24, 1, 2, 2)
    data = LabelledImages(images, torch.arange(6).repeat_interleave(4), tuple("abcdef"))
    sampler = EpisodeSampler(data, ways=3, shots=1, targets=2, tasks_per_batch=2, rotations=True)
    assert sampler.num_classes == 24
    for batch in sampler.batches(5):
        for task in batch:
            for x, y in ((task.support_x, task.support_y), (task.target_x, task.target_y)):
                shown = (x[:, 0, 0, 0] * 255).round().long() // 4
                assert shown.tolist() == [task.classes[label] % 6 for label in y.tolist()]
            assert task.map(torch.clone).classes == task.classes == task.to("cpu").classes
    run = build_learner(RunSettings(method="fine-tune"), net(), sampler.num_classes)
    assert run.options["classes"] == 24


def test_turned_classes_have_numbers_of_their_own():
    images = torch.tensor([[[[10, 20], [30, 40]]]], dtype=torch.uint8).repeat(2, 1, 1, 1)
    data = LabelledImages(images, torch.zeros(2, dtype=torch.long), ("a",))
    sampler = EpisodeSampler(data, ways=4, rotations=True)
    task = sampler.batch(0)[0]
    for label, number in enumerate(task.classes):
        turned = torch.rot90(images[0, 0], number)
        assert torch.equal((task.support_x[label, 0] * 255).round().to(torch.uint8), turned)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("classes", [None, 8])
@pytest.mark.parametrize(("method", "options"), METHODS)
def test_what_was_evaluated_before_makes_no_difference_to_training(method, options, classes):
    tasks = vector_tasks(3, classes=[(0, 1, 2), (3, 1, 4), (5, 6, 7)])
    new = replace(vector_tasks(1)[0], classes=(97, 98, 99))
    first, other = (method(mlp(), classes=classes, **options) for _ in range(2))
    first.evaluate([new])
    first.adapt(new.support_x, new.support_y)
    first.eval()([new])
    first.train()
    for batch in ([tasks[0]], tasks):
        assert first.meta_step(batch).loss == other.meta_step(batch).loss
        assert first.table.classes == other.table.classes == (classes or 1 + max(max(t.classes) for t in batch))
    assert_same_state(dict(first.state_dict()), dict(other.state_dict()))
    assert_same_state(first.optimizer.state_dict(), other.optimizer.state_dict())


def test_with_classes_a_task_without_is_refused_whatever_was_evaluated():
    [plain], [named] = vector_tasks(1), vector_tasks(1, classes=CLASSES)
    for evaluated in ([], [named]):
        learner = FineTune(mlp(), classes=5)
        for task in evaluated:
            learner.evaluate(task)
        with pytest.raises(TaskError, match="classes: a task without them"):
            learner.meta_step([plain])


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("part", ["support_x", "target_x"])
def test_a_failed_call_takes_back_a_table_that_was_made_or_that_grew(trained, part):
    [first, middle, last] = vector_tasks(3, classes=CLASSES)
    learner, twin = FineTune(mlp(), meta_lr=0.01), FineTune(mlp(), meta_lr=0.01)
    for one in (learner, twin) if trained else ():
        one.meta_step([first])
    broken = replace(last, **{part: getattr(last, part)[:, :3]})
    assert_a_failed_call_changes_nothing(learner, learner.meta_step, [middle, broken])
    assert learner.table.classes == (5 if trained else 0)
    if not trained:
        with pytest.warns(MetaWrapWarning, match="makes table"):
            assert_a_failed_call_changes_nothing(learner, learner, [middle, broken])
    for batch in ([middle], [last]):
        assert learner.meta_step(batch).loss == twin.meta_step(batch).loss
    assert_same_state(dict(learner.state_dict()), dict(twin.state_dict()))


def test_a_scheduler_that_fails_takes_the_whole_step_back():
    class Late(torch.optim.lr_scheduler.LRScheduler):
        def get_lr(self):
            if self.last_epoch > 0:
                raise RuntimeError("late")
            return [group["lr"] for group in self.optimizer.param_groups]

    [task] = vector_tasks(1, classes=CLASSES)
    learner = FineTune(mlp(), scheduler=Late, iterations_per_epoch=1)
    before = snapshot(dict(learner.state_dict()))
    with pytest.raises(RuntimeError, match="late"):
        learner.meta_step([task])
    assert learner.iteration == 0
    assert_same_state(dict(learner.state_dict()), before)


@pytest.mark.parametrize(("method", "options"), METHODS)
@pytest.mark.parametrize("norm", ["batch", "running", "support"])
def test_backward_of_an_evaluation_loss_fails_loudly(method, options, norm):
    learner, batch = method(net(), norm=norm, inner_steps=2, **options).eval(), conv_tasks(1)
    output = learner(batch)
    assert float(output.loss) == pytest.approx(learner.evaluate(batch).loss, rel=1e-9)
    with pytest.raises(RuntimeError, match="does not require grad"):
        output.loss.backward()


def test_tasks_that_do_not_go_together_are_refused_by_name():
    plain, [named] = vector_tasks(1), vector_tasks(1, classes=CLASSES)
    learner = FineTune(mlp(), classes=5)
    learner.meta_step([named])
    before = fingerprint(learner)
    with pytest.raises(TaskError, match="classes: a task without them"):
        learner.meta_step(plain)
    with pytest.raises(TaskError, match="class number 7, but there are classes=5"):
        learner.meta_step([replace(named, classes=(0, 1, 7))])
    with pytest.raises(TaskError, match=r"holds labels 0\.\.2, but the task names 2 classes"):
        learner.meta_step([replace(named, classes=(0, 1))])
    assert fingerprint(learner) == before
    for wrong in ((0, 0, 1), (-1, 2, 3), (), ("a",), 3):
        with pytest.raises(TaskError, match="classes: expected the number of each label's class"):
            replace(named, classes=wrong)


def test_describes_what_is_tuned():
    learner = FineTune(net())
    learner.meta_step(conv_tasks(1, classes=CLASSES))
    told = learner.describe()
    assert set(told.adapted) == {"linear.weight", "linear.bias"}
    assert told.settings["tune"] == "head"
    assert told.settings["inner_optimizer"] == "sgd"
    whole = FineTune(net(), tune="full")
    whole.meta_step(conv_tasks(1, classes=CLASSES))
    assert set(whole.describe().adapted) == set(dict(net().named_parameters()))
