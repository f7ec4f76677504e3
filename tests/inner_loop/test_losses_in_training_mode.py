"""Networks that return their losses in training mode alone, as detectors do, against a loop in plain torch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from face import assert_same_state, snapshot
from torch import Tensor, nn

from metawrap import FOMAML, MAML, ArgumentError, Reptile, Task, TaskError

ON = {"losses_in_training_mode": True}
LR, STEPS = 0.1, 2


class Detector(nn.Module):
    """Images of any size and, in training mode, boxes of each; one box and score for each image in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.box, self.score = nn.Linear(3, 5), nn.Linear(5, 4), nn.Linear(5, 1)

    def forward(self, images: Any, targets: Any = None) -> Any:
        deep = torch.tanh(self.body(torch.stack([image.mean((1, 2)) for image in images])))
        box, score = self.box(deep), self.score(deep)[:, 0]
        if not self.training:
            return [{"boxes": b[None], "scores": s.sigmoid()[None]} for b, s in zip(box, score, strict=True)]
        boxes = [b.expand_as(t["boxes"]) for b, t in zip(box, targets, strict=True)]
        seen = torch.tensor([float(len(t["boxes"]) > 0) for t in targets], dtype=box.dtype)
        return {
            "box": F.smooth_l1_loss(torch.cat(boxes), torch.cat([t["boxes"] for t in targets])),
            "objectness": F.binary_cross_entropy_with_logits(score, seen),
        }


def total(losses: dict[str, Tensor], targets: Any) -> Tensor:
    return sum(losses.values(), torch.zeros((), dtype=torch.float64))


def part(counts: list[int], seed: int, kind: type = list) -> tuple[Any, Any]:
    """Images of unlike sizes, each with so many boxes, as a collate_fn of torchvision gives them."""
    generator = torch.Generator().manual_seed(seed)
    images = kind(torch.rand(3, 4 + n, 5, generator=generator, dtype=torch.float64) for n in range(len(counts)))
    boxes = [torch.rand(n, 4, generator=generator, dtype=torch.float64) for n in counts]
    return images, kind({"boxes": each, "labels": torch.ones(len(each)).long()} for each in boxes)


def task_of(kind: type = list) -> Task:
    support, target = part([1, 0], 0, kind), part([2, 1, 0], 1, kind)
    return Task(support, support[1], target, target[1])


def detector() -> Detector:
    torch.manual_seed(0)
    return Detector().double()


def adapted_by_hand(model: nn.Module, task: Task, steps: int = STEPS) -> nn.Module:
    plain = copy.deepcopy(model).train()
    for _ in range(steps):
        loss = total(plain(*task.support_x), task.support_y)
        with torch.no_grad():
            for parameter, slope in zip(
                plain.parameters(), torch.autograd.grad(loss, list(plain.parameters())), strict=True
            ):
                parameter -= LR * slope
    return plain


def learner_of(method: Any = MAML, **options: Any) -> Any:
    return method(detector(), inner_steps=STEPS, inner_lr=LR, loss_fn=total, engine="functional", **options)


@pytest.mark.parametrize("kind", [list, tuple])
@pytest.mark.parametrize("method", [MAML, FOMAML])
def test_adapt_and_evaluate_equal_a_loop_in_plain_torch(method: Any, kind: type) -> None:
    learner, task = learner_of(method, outputs=ON), task_of(kind)
    learner.meta_step([task])
    before = snapshot(dict(learner.state_dict()))
    plain = adapted_by_hand(learner.unwrap(), task)
    module = learner.adapt(task.support_x, task.support_y)
    result = learner.evaluate([task], keep_predictions=True, metric=lambda found, y: float(len(found) == len(y)))
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(module.get_parameter(name), parameter, rtol=1e-9, atol=1e-12)
    assert not module.training
    assert learner.training
    assert learner.model.training
    assert result.loss == pytest.approx(total(plain(*task.target_x), task.target_y).item(), rel=1e-9)
    torch.testing.assert_close(result.predictions[0], plain.eval()(task.target_x[0]), rtol=1e-9, atol=1e-12)
    assert result.mean == 1
    assert_same_state(dict(learner.state_dict()), before)


@pytest.mark.parametrize("memory", ["unrolled", "flat"])
def test_the_gradient_of_an_evaluation_loss_is_that_of_the_loop(memory: str) -> None:
    """Central differences of the loop's loss, along one direction."""
    learner, task = learner_of(outputs=ON, execution={"memory": memory}).eval(), task_of()
    learner(task).loss.backward()
    assert not learner.training
    torch.manual_seed(1)
    ways = [torch.randn_like(p) for p in learner.model.parameters()]
    found = sum(float((p.grad * way).sum()) for p, way in zip(learner.model.parameters(), ways, strict=True))
    losses = []
    for sign in (1, -1):
        moved = learner.unwrap()
        with torch.no_grad():
            for parameter, way in zip(moved.parameters(), ways, strict=True):
                parameter += sign * 1e-5 * way
        losses.append(total(adapted_by_hand(moved, task)(*task.target_x), task.target_y).item())
    assert found == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-6)


class Reports(nn.Module):
    """Takes a tensor of images; returns a loss under a name of its own in training mode, and a tensor in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.drop = nn.Dropout(0.5).eval()

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        found = self.drop(self.linear(x))
        return {"loss": F.mse_loss(found, y)} if self.training else found


@pytest.mark.parametrize("method", [MAML, Reptile])
def test_a_network_that_returns_one_loss_in_training_mode(method: Any) -> None:
    torch.manual_seed(0)
    model = Reports().double()
    model.drop.p = 0.0
    x, y = torch.randn(4, 3).double(), torch.randn(4, 2).double()
    learner = method(model, inner_steps=1, inner_lr=LR, loss_fn=lambda out, y: out["loss"], outputs=ON)
    module = learner.adapt((x, y), y, steps=1)
    slope = torch.autograd.grad(F.mse_loss(model.linear(x), y), model.linear.weight)[0]
    torch.testing.assert_close(module.linear.weight, model.linear.weight - LR * slope)
    expected = F.mse_loss(module.linear(x), y).item()
    assert learner.evaluate([Task((x, y), y, (x, y), y)], steps=1).loss == pytest.approx(expected)


def test_predictions_in_eval_mode_are_masked_too() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 4)
    model.bias.data[3] = 50.0  # Of a class that the task lacks.
    x, y = torch.randn(6, 3), torch.arange(6) % 3
    results = []
    for on in (False, True):
        learner = MAML(model, inner_steps=1, outputs={"mask_unused_outputs": True, "losses_in_training_mode": on})
        results.append(learner.evaluate([Task(x, y, x, y)], keep_predictions=True))
    assert results[1].accuracy == results[0].accuracy > 0
    torch.testing.assert_close(results[1].predictions[0], results[0].predictions[0])


def test_dropout_in_losses_of_an_evaluation_leaves_the_generators_alone() -> None:
    learner = MAML(Reports(), inner_steps=2, loss_fn=lambda out, y: out["loss"], outputs=ON)
    x, y = torch.randn(4, 3), torch.randn(4, 2)
    before = torch.get_rng_state()
    first, second = (learner.evaluate([Task((x, y), y, (x, y), y)]).loss for _ in range(2))
    assert first == second
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("call", ["adapt", "evaluate"])
def test_the_switch_is_named_where_it_is_needed(call: str) -> None:
    learner, task = learner_of(), task_of()
    with pytest.raises(ArgumentError, match=r"loss_fn: it gets .* a list with .*losses_in_training_mode") as refused:
        learner.adapt(task.support_x, task.support_y) if call == "adapt" else learner.evaluate([task])
    assert "\n" not in str(refused.value)
    with pytest.raises(ArgumentError, match=r"outputs\.losses_in_training_mode: expected True or False"):
        learner_of(outputs={"losses_in_training_mode": "yes"})


def test_a_dict_for_each_image_counts_as_one_label_whatever_it_holds() -> None:
    images, targets = torch.rand(2, 3, 4, 4), [{"boxes": torch.rand(0, 4)}, {"boxes": torch.rand(3, 4)}]
    Task(images, targets, images, targets)
    with pytest.raises(TaskError, match=r"support_x has 2 examples and support_y has \[1\]"):
        Task(images, targets[:1], images, targets)
