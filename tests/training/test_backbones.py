"""The literature's backbones: published numbers of weights, shapes, and a meta-step of each."""

from __future__ import annotations

import pytest
import torch
from models import class_tasks, seeded

from metawrap import MAMLPlusPlus
from metawrap.backbones import DropBlock, ResNet12, WideResNet
from metawrap.errors import ArgumentError
from metawrap.training.experiment import backbone_of
from metawrap.training.run_settings import RunSettings


def weights(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_the_backbones_of_a_run_have_the_published_numbers_of_weights_and_features() -> None:
    with torch.device("meta"):
        resnet, wide = (backbone_of(RunSettings(backbone=name), (3, 84, 84)) for name in ("resnet12", "wrn28-10"))
        # Tian et al. 2020 (arXiv:2003.11539), the width of MetaOptNet: 12.4 M without the head, 640 features.
        assert weights(resnet) - weights(resnet.linear) == 12_424_320
        assert resnet.blocks(torch.zeros(2, 3, 84, 84)).shape == (2, 640, 5, 5)
        # Zagoruyko and Komodakis 2016, table 4: 36.5 M, on CIFAR-10, so with a head of ten classes.
        assert weights(WideResNet(ways=10)) == 36_479_194 == weights(wide) + 5 * 641
        assert wide.blocks(wide.conv(torch.zeros(2, 3, 80, 80))).shape == (2, 640, 20, 20)
        assert len([module for module in wide.modules() if isinstance(module, torch.nn.Conv2d)]) == 28


@pytest.mark.parametrize("make", [lambda: ResNet12(filters=2, drop_rate=0.1), lambda: WideResNet(depth=10, width=1)])
def test_a_meta_step_moves_every_weight(make) -> None:
    learner = MAMLPlusPlus(seeded(make), inner_steps=1, engine="functional")
    before = {name: value.clone() for name, value in learner.model.named_parameters()}
    tasks = class_tasks((3, 16, 16), tasks=1, ways=5)
    learner.meta_step(tasks)
    still = [name for name, value in learner.model.named_parameters() if torch.equal(value, before[name])]
    assert still == []
    assert type(learner.adapt(tasks[0][0], tasks[1][0])) is type(seeded(make))


def test_drop_block_drops_squares_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    drop, x = DropBlock(0.2, 3), torch.ones(40, 50, 8, 8)
    assert torch.equal(drop.eval()(x), x)
    found = drop.train()(x)
    assert found.mean().item() == pytest.approx(1, abs=1e-4)
    gone = found == 0
    assert gone.double().mean().item() == pytest.approx(0.2, abs=0.04)  # squares that overlap drop a little less
    squares = gone.unfold(2, 3, 1).unfold(3, 3, 1).all(-1).all(-1)  # where all of a 3x3 square is dropped
    covered = torch.zeros_like(gone)
    for down in range(3):
        for right in range(3):
            covered[:, :, down : down + 6, right : right + 6] |= squares
    assert torch.equal(covered, gone)


def test_what_the_backbones_cannot_be_is_refused() -> None:
    for refused in ({"depth": 27}, {"depth": 4}):
        with pytest.raises(ArgumentError, match=r"depth: expected 10, 16, 22, 28"):
            WideResNet(**refused)
    with pytest.raises(ArgumentError, match=r"drop_rate, drop_block: .*got 1 and 5"):
        ResNet12(drop_rate=1)
    with pytest.raises(ArgumentError, match=r"filters: wrn28-10 has 160, 320 and 640 channels, but got 32\. Leave"):
        RunSettings(backbone="wrn28-10", filters=32)
