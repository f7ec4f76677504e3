"""Networks that every engine, memory and way to run tasks must carry, with their tasks and the oracle's result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
import torchvision
from face import build, reference_for
from models import ActNormNet, BatchNormAct2d, Conv4, LSTMClassifier, TiedNet, class_tasks, hooked_conv4, seeded
from oracle import Reference, msl_weights
from steady import steady
from torch import Tensor, nn

ENGINES = ("functional", "higher")
ALL_ENGINES = (*ENGINES, "batched")
# Under these `adapt` returns modules of the user's own classes alone.
PLAIN_POLICIES = ("batch", "running", "support")
POLICIES = ("batch", "running", "support", "task", "task_layer")
STEPS, EPOCH, ANNEAL_EPOCHS = 2, 1, 5


def vision_transformer() -> nn.Module:
    return steady(
        torchvision.models.VisionTransformer(
            image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=16, num_classes=3
        )
    )


@dataclass(frozen=True)
class Case:
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    tasks: int = 2
    shots: int = 1
    targets: int = 1
    inner_lr: float = 0.1
    after_norm: dict[type, Callable[[Tensor], Tensor]] = field(default_factory=dict, hash=False)

    def batch(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return class_tasks(self.shape, tasks=self.tasks, shots=self.shots, targets=self.targets)


def classifier(make: Callable[..., nn.Module], *args: Any, **options: Any) -> Case:
    """A narrow network of torchvision's classes on six small images; `make zoo` has the usual widths."""
    return Case(lambda: steady(make(*args, num_classes=3, **options)), (3, 32, 32), 1, 2, 2, inner_lr=0.01)


nets = torchvision.models
_efficient_blocks = [
    nets.efficientnet.MBConvConfig(*sizes, 0.25, 1) for sizes in ((1, 3, 1, 32, 16, 2), (6, 5, 2, 16, 24, 2))
]
CASES = {
    "conv4": Case(Conv4, (1, 16, 16)),
    "strided conv4": Case(partial(Conv4, strided=True, channels=3), (3, 16, 16)),
    "resnet": classifier(nets.ResNet, nets.resnet.BasicBlock, [1, 1, 1, 1]),
    "densenet": classifier(nets.DenseNet, 4, (2, 2, 2, 2), 8),
    "mobilenet_v2": classifier(nets.MobileNetV2, width_mult=0.1, dropout=0.0),
    "shufflenet_v2": classifier(nets.ShuffleNetV2, [2, 2, 2], [8, 16, 32, 64, 64]),
    "efficientnet": classifier(nets.EfficientNet, _efficient_blocks, 0.0, stochastic_depth_prob=0.0),
    "vision transformer": Case(vision_transformer, (3, 16, 16)),
    "lstm": Case(LSTMClassifier, (4, 3)),
    "tied weights": Case(TiedNet, (6,)),
    "user hooks": Case(hooked_conv4, (1, 16, 16)),
    "norm with activation": Case(ActNormNet, (1, 8, 8), after_norm={BatchNormAct2d: torch.relu}),
}


def case_learner(case: Case, engine: str = "functional", **options: Any) -> Any:
    """A new learner of the case's network, at an epoch at which every inner step's target loss counts."""
    learner = build(
        seeded(case.make),
        engine=engine,
        inner_steps=STEPS,
        inner_lr=case.inner_lr,
        multi_step_loss=True,
        msl_epochs=ANNEAL_EPOCHS,
        first_order_epochs=0,
        **options,
    )
    learner.epoch = EPOCH
    return learner


@cache
def case_reference(name: str) -> Reference:
    """The oracle's loss and gradients for `case_learner(CASES[name])`."""
    case = CASES[name]
    weights = msl_weights(STEPS, EPOCH, ANNEAL_EPOCHS)
    return reference_for(seeded(case.make), case_learner(case), case.batch(), weights, after_norm=case.after_norm)
