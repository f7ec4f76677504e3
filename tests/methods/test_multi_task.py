"""MultiTask against a loop written by hand, with a head for each task, and with weight vectors for each class."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from face import assert_same_state, fingerprint
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

from metawrap import ArgumentError, MultiTask, TaskError

IDS = ["a.b", 1, "1"]


def test_a_run_with_heads_is_that_of_a_loop_by_hand():
    model, batch = mlp(), vector_tasks(3, id=IDS)
    learner = MultiTask(model, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.3, momentum=0.9))
    body = copy.deepcopy(model.body)
    heads = {key: copy.deepcopy(model.head) for key in IDS}
    made = torch.optim.SGD([*body.parameters(), *(p for h in heads.values() for p in h.parameters())], 0.3, 0.9)
    for shown in ([batch[0], batch[1]], [batch[1], batch[2]], batch):
        made.zero_grad()
        losses = []
        for task in shown:
            x, y = torch.cat([task.support_x, task.target_x]), torch.cat([task.support_y, task.target_y])
            losses.append(F.cross_entropy(heads[task.id](body(x)), y))
        loss = sum(losses) / len(losses)
        loss.backward()
        metrics = learner.meta_step(shown)
        torch.testing.assert_close(metrics.loss, float(loss.detach()), rtol=1e-9, atol=0)
        assert_same_gradients(learner.model.body, body)
        made.step()
    for key, head in heads.items():
        found = learner.heads.of(key, dict(head.named_parameters()))
        assert set(found) == {"weight", "bias"}
        for name, parameter in head.named_parameters():
            torch.testing.assert_close(found[name].grad, parameter.grad, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(found[name].detach(), parameter.detach(), rtol=1e-9, atol=1e-12)
    assert_same_state(learner.model.head.weight.detach(), model.head.weight.detach())


def test_gradient_by_classes_is_that_of_a_softmax_over_the_tasks_own_classes():
    model, batch = mlp(), vector_tasks(2, classes=CLASSES)
    learner = MultiTask(model, classes=6)
    learner.evaluate(batch[:1])
    found = learner(batch)
    found.loss.backward()
    weight, bias = (p.detach().clone().requires_grad_() for p in (learner.table.weight, learner.table.bias))
    plain, losses = copy.deepcopy(model), []
    for task in batch:
        x, y = torch.cat([task.support_x, task.target_x]), torch.cat([task.support_y, task.target_y])
        rows = [weight[number] for number in task.classes]
        logits = torch.stack([plain.body(x) @ row + bias[n] for row, n in zip(rows, task.classes, strict=True)], 1)
        losses.append(-(logits.log_softmax(1)[torch.arange(len(y)), y]).mean())
    loss = sum(losses) / 2
    loss.backward()
    torch.testing.assert_close(found.loss, loss, rtol=1e-9, atol=0)
    torch.testing.assert_close(learner.table.weight.grad, weight.grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(learner.table.bias.grad, bias.grad, rtol=1e-9, atol=1e-12)
    assert_same_gradients(learner.model.body, plain.body)


@pytest.mark.parametrize("task_id", [None, "a.b", "new"])
def test_a_task_is_fitted_by_a_torch_loop_on_its_head(task_id):
    batch = conv_tasks(3, id=IDS)
    learner = MultiTask(net(), inner_steps=4, inner_lr=0.05, meta_lr=0.05)
    for _ in range(3):
        learner.meta_step(batch)
    task = batch[2]
    adapted = learner.adapt(task.support_x, task.support_y, task_id=task_id)
    plain = learner.unwrap().eval()
    if task_id == "a.b":
        with torch.no_grad():
            for name, value in learner.heads.of("a.b", {"weight": 0, "bias": 0}).items():
                plain.linear.get_parameter(name).copy_(value)
    made = torch.optim.SGD(plain.linear.parameters(), lr=0.05)
    assert_fitted_by_torch(adapted, plain, task, made)
    again = learner.evaluate(replace(task, id=task_id), keep_predictions=True).predictions[0]
    torch.testing.assert_close(again, plain(task.target_x).detach(), rtol=1e-9, atol=1e-12)


def test_heads_and_table_together_are_restored_in_their_order():
    [first, second, third] = vector_tasks(3, id=IDS)
    mixed = [first, replace(second, id=None, classes=(1, 2, 5)), third]

    def build() -> MultiTask:
        return MultiTask(mlp(), classes=6)

    learner, fresh = build(), build()
    for batch in ([first], mixed):
        learner.meta_step(batch)
    fresh.load_state_dict(learner.state_dict())
    fresh.optimizer.load_state_dict(copy.deepcopy(learner.optimizer.state_dict()))
    assert fresh.meta_step([third]).loss == learner.meta_step([third]).loss
    assert_same_state(fresh.state_dict(), learner.state_dict())
    learner = build()
    learner.meta_step([first])
    early = copy.deepcopy(learner.state_dict())
    learner.meta_step(mixed)
    learner.load_state_dict(early)
    held = {id(p) for group in learner.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in learner.parameters()}
    assert set(map(id, learner.optimizer.state)) <= held
    assert len(list(learner.heads.parameters())) == 2
    assert learner.table.classes == 0
    learner.meta_step(mixed)


@pytest.mark.parametrize("trained", [False, True])
def test_a_failed_call_takes_back_heads_and_table(trained):
    [first, second, third] = vector_tasks(3, id=IDS)
    named = replace(second, id=None, classes=(1, 2, 5))
    learner, twin = MultiTask(mlp(), meta_lr=0.01), MultiTask(mlp(), meta_lr=0.01)
    for one in (learner, twin) if trained else ():
        one.meta_step([first, replace(named, classes=(0, 1, 2))])
    broken = replace(third, target_x=third.target_x[:, :3])
    for batch in ([second, broken], [named, broken], [first, broken]):
        assert_a_failed_call_changes_nothing(learner, learner.meta_step, batch)
    for batch in ([third], [named, second]):
        assert learner.meta_step(batch).loss == twin.meta_step(batch).loss
    assert_same_state(dict(learner.state_dict()), dict(twin.state_dict()))
    assert_same_state(learner.optimizer.state_dict(), twin.optimizer.state_dict())


def test_tasks_with_neither_id_nor_classes_are_refused_by_name():
    learner = MultiTask(mlp())
    before = fingerprint(learner)
    with pytest.raises(TaskError, match=r"neither an id nor classes.*id=\.\.\.\), or with classes="):
        learner.meta_step(vector_tasks(1))
    assert fingerprint(learner) == before
    assert learner.evaluate(vector_tasks(1)).tasks == 1  # A new task needs neither.


def test_an_id_without_any_head_is_refused_by_adapt() -> None:
    learner, [task] = MultiTask(mlp()), vector_tasks(1, classes=CLASSES)
    learner.meta_step([task])
    with pytest.raises(ArgumentError, match=r"task_id: no task with an id was trained on, so 'a' names no head"):
        learner.adapt(task.support_x, task.support_y, task_id="a")
