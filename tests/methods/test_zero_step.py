"""ZeroStep: the plain supervised gradient, and chance on shuffled labels."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from face import fingerprint
from method_cases import MLP, assert_same_gradients, conv_tasks, net, vector_tasks

from metawrap import TaskError, ZeroStep


def test_gradient_is_the_plain_supervised_one_on_the_targets():
    model, batch = net(), conv_tasks(2)
    learner = ZeroStep(model)
    found = learner(batch)
    found.loss.backward()
    plain = copy.deepcopy(model).train()
    loss = sum(F.cross_entropy(plain(task.target_x), task.target_y) for task in batch) / 2
    loss.backward()
    torch.testing.assert_close(found.loss, loss, rtol=1e-9, atol=0)
    assert_same_gradients(learner.model, plain)
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(learner.model.get_buffer(name), buffer, rtol=1e-9, atol=1e-12)


def test_shuffled_labels_leave_chance():
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(0)
    learner = ZeroStep(MLP().double(), meta_lr=0.01)
    tasks = []
    for task in vector_tasks(150, targets=4):
        order = torch.randperm(3, generator=generator)
        tasks.append(replace(task, support_y=order[task.support_y], target_y=order[task.target_y]))
    for start in range(0, 100, 4):
        learner.meta_step(tasks[start : start + 4])
    found = learner.evaluate(tasks[100:])
    assert abs(found.mean - 1 / 3) < 0.1
    assert found.steps is None


@pytest.mark.parametrize("norm", ["batch", "running"])
def test_no_support_set_plays_a_part(norm):
    [task] = conv_tasks(1)
    other = replace(task, support_x=torch.randn_like(task.support_x), support_y=task.support_y.flip(0))
    one, two = ZeroStep(net(), norm=norm), ZeroStep(net(), norm=norm)
    assert one.meta_step([task]).loss == two.meta_step([other]).loss
    assert fingerprint(one.model, ids=False) == fingerprint(two.model, ids=False)


def test_learns_where_labels_mean_the_same():
    learner, batch = ZeroStep(net(), meta_lr=0.02), conv_tasks(1)
    losses = [learner.meta_step(batch).loss for _ in range(30)]
    assert losses[-1] < 0.6 * losses[0]


def test_more_classes_than_outputs_are_refused() -> None:
    with pytest.raises(TaskError, match=r"target_y holds labels 0\.\.3, but the model has 3 outputs"):
        ZeroStep(net()).meta_step(conv_tasks(1, ways=4))
