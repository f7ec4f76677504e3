"""Heads of real networks: outputs of transformers, GoogLeNet's auxiliary heads, a detector's own losses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hugging_face import HUGGING_FACE
from steady import steady
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.rpn import AnchorGenerator

from metawrap import ANIL, FOMAML, MAML, FineTune, MultiTask, ProtoNet, Task, UnsupportedModuleError

pytestmark = [pytest.mark.zoo, pytest.mark.filterwarnings("ignore::metawrap.MetaWrapWarning")]
ENTRIES = {entry.name: entry for entry in HUGGING_FACE}
# The module that each network's own code hands its embedding to.
CLASSIFIERS = {
    **{"BERT": "classifier", "RoBERTa": "classifier.out_proj"},
    **{"ViT": "classifier", "BART": "classification_head.out_proj"},
}


def network_and_task(name: str) -> tuple[nn.Module, Task]:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    model, [task] = ENTRIES[name].make().double(), ENTRIES[name].tasks()
    return model, Task(*task, classes=(0, 1, 2))


def embedded(model: nn.Module, head: str, inputs: Any) -> Tensor:
    entered: list[Tensor] = []
    handle = model.get_submodule(head).register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    model(**inputs)
    handle.remove()
    return entered[0].detach()


@pytest.mark.parametrize("loss", [{}, {"loss_fn": lambda output, y: F.cross_entropy(output.logits, y)}])
@pytest.mark.parametrize("method", [ProtoNet, ANIL, FineTune, MultiTask])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_of_transformers_is_fitted_as_by_hand(name: str, method: Any, loss: dict[str, Any]) -> None:
    model, task = network_and_task(name)
    options = {} if method is ProtoNet else {"inner_steps": 3, "inner_lr": 0.1}
    learner = method(model, **options, **loss)
    learner.meta_step([task])
    plain = learner.unwrap().eval()
    support, target = (embedded(plain, CLASSIFIERS[name], x) for x in (task.support_x, task.target_x))
    if method is ProtoNet:
        means = torch.stack([support[task.support_y == way].mean(0) for way in range(3)])
        # What a linear layer can give: how much nearer each mean is than the mean of all means.
        expected = torch.cdist(target, means.mean(0, keepdim=True)).square() - torch.cdist(target, means).square()
    else:
        head = copy.deepcopy(plain.get_submodule(CLASSIFIERS[name]))
        optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(head(support), task.support_y).backward()
            optimizer.step()
        expected = head(target).detach()
    result = learner.evaluate([task], keep_predictions=True)
    adapted = learner.adapt(task.support_x, task.support_y)(**task.target_x)
    assert learner.head == CLASSIFIERS[name]
    assert result.loss == pytest.approx(F.cross_entropy(expected, task.target_y).item(), rel=1e-8)
    for output in (adapted, result.predictions[0]):
        torch.testing.assert_close(output.logits, expected, rtol=1e-8, atol=1e-10)
        assert output["logits"] is output.logits


def test_a_network_that_computes_behind_its_head_is_refused_and_what_is_named_works() -> None:
    model, task = network_and_task("GPT-2")
    for method, fix in ((ANIL, r"MAML\(\.\.\., adapt='score\.\*'\)"), (ProtoNet, "embedding=")):
        with pytest.raises(UnsupportedModuleError, match=r"last module that ran is 'score'"):
            method(model).meta_step([task])
        with pytest.raises(UnsupportedModuleError, match=r"does more behind the head 'score'.*" + fix):
            method(model, head="score").meta_step([task])
    assert MAML(model, adapt="score.*", inner_steps=1).meta_step([task]).loss > 0
    body: Any = model.transformer
    with pytest.raises(UnsupportedModuleError, match=r"embedding=lambda output: output\."):
        ProtoNet(ENTRIES["BERT"].make().double().bert, embedding="output").meta_step([task])
    learner = ProtoNet(body, embedding=lambda output: output.last_hidden_state.mean(1))
    learner.meta_step([task])
    adapted = learner.adapt(task.support_x, task.support_y)(**task.target_x)
    torch.testing.assert_close(adapted, learner.evaluate([task], keep_predictions=True).predictions[0])


@pytest.mark.parametrize("method", [ANIL, ProtoNet])
def test_auxiliary_heads_in_training_are_no_obstacle(method: Any) -> None:
    torch.manual_seed(0)
    model = steady(torchvision.models.googlenet(num_classes=3, init_weights=False, weights=None)).double()
    task = Task(*(part for _ in range(2) for part in (torch.randn(6, 3, 32, 32).double(), torch.arange(6) % 3)))
    learner = method(model, norm="batch")
    learner.meta_step([task])
    assert learner.head == "fc"
    assert learner.model.fc.weight.grad is not None or method is ProtoNet
    assert learner.model.aux1.fc2.weight.grad is None


def detector() -> nn.Module:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU())
    body.out_channels = 8  # type: ignore[assignment]
    few = {f"rpn_{when}_nms_top_n_{mode}": 20 for when in ("pre", "post") for mode in ("train", "test")}
    return FasterRCNN(
        body,
        num_classes=3,
        min_size=32,
        max_size=32,
        rpn_anchor_generator=AnchorGenerator(((8, 16),), ((1.0,),)),
        box_roi_pool=torchvision.ops.MultiScaleRoIAlign(["0"], 2, 2),
        box_detections_per_img=5,
        **few,
    )


def photos(count: int, seed: int) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.tensor([[4.0, 4, 20, 20], [1, 1, 9, 9]])
    targets = [{"boxes": boxes[: 1 + n % 2], "labels": torch.tensor([1, 2])[: 1 + n % 2]} for n in range(count)]
    return [torch.rand(3, 32, 32, generator=generator) for _ in range(count)], targets


def test_faster_r_cnn_trains_adapts_and_detects() -> None:
    support, target = photos(2, 0), photos(3, 1)
    task = Task(support, support[1], target, target[1])
    learner = FOMAML(
        detector(),
        inner_steps=2,
        inner_lr=0.01,
        loss_fn=lambda losses, targets: sum(losses.values()),
        outputs={"losses_in_training_mode": True},
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0),
    )
    learner.meta_step([task])
    plain = copy.deepcopy(detector())
    torch.manual_seed(2)  # It samples anchors in training mode.
    module = learner.adapt(support, support[1])
    torch.manual_seed(2)
    for _ in range(2):
        loss = sum(plain.train()(*support).values())
        adapted = [p for name, p in plain.named_parameters() if "backbone.1" not in name]
        with torch.no_grad():
            for parameter, slope in zip(adapted, torch.autograd.grad(loss, adapted), strict=True):
                parameter -= 0.01 * slope
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(module.get_parameter(name), parameter, rtol=1e-4, atol=1e-6)
    assert not module.training
    found = module(target[0])
    assert [set(each) for each in found] == [{"boxes", "labels", "scores"}] * 3
    result = learner.evaluate([task], keep_predictions=True, metric=lambda found, y: float(len(found) == len(y)))
    assert result.mean == 1
    assert 0 < result.loss < 10
