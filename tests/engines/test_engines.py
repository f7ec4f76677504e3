"""Both engines against the oracle, in float64, on every shape of network that people bring."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import pytest
import torch
import torchvision
from face import as_tasks, assert_equals_reference, build, reference_for
from models import ActNormNet, BatchNormAct2d, Conv4, LSTMClassifier, TiedNet, class_tasks, hooked_conv4, seeded
from oracle import Reference, msl_weights
from torch import Tensor, nn

ENGINES = ("functional", "higher")
STEPS, EPOCH, ANNEAL_EPOCHS = 2, 1, 5


def vision_transformer() -> nn.Module:
    model = torchvision.models.VisionTransformer(
        image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=16, num_classes=3
    )
    nn.init.normal_(model.heads.head.weight, std=0.3)  # torchvision starts it at zero, which hides every other gradient
    return model


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


def steady(make: Callable[..., nn.Module], **options: Any) -> nn.Module:
    """A zoo network whose norms have a large eps.

    With the usual one, 6 small images and random weights make it chaotic: rounding grows from 1e-16 to 1e-6, in the
    oracle as in the engines, and hides what the test looks for.
    """
    model = make(num_classes=3, **options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.1
    return model


def zoo(make: Callable[..., nn.Module], **options: Any) -> Case:
    return Case(partial(steady, make, **options), (3, 32, 32), tasks=1, shots=2, targets=2, inner_lr=0.01)


nets = torchvision.models
CASES = {
    "conv4": Case(Conv4, (1, 16, 16)),
    "strided conv4": Case(partial(Conv4, strided=True, channels=3), (3, 16, 16)),
    "resnet18": zoo(nets.resnet18),
    "densenet121": zoo(nets.densenet121),
    "mobilenet_v2": zoo(nets.mobilenet_v2, dropout=0.0),
    "shufflenet_v2": zoo(nets.shufflenet_v2_x0_5),
    "efficientnet_b0": zoo(nets.efficientnet_b0, dropout=0.0, stochastic_depth_prob=0.0),
    "vision transformer": Case(vision_transformer, (3, 16, 16)),
    "lstm": Case(LSTMClassifier, (4, 3)),
    "tied weights": Case(TiedNet, (6,)),
    "user hooks": Case(hooked_conv4, (1, 16, 16)),
    "norm with activation": Case(ActNormNet, (1, 8, 8), after_norm={BatchNormAct2d: torch.relu}),
}


def _learner(case: Case, model: nn.Module, engine: str, **options: Any) -> Any:
    return build(
        model,
        engine=engine,
        inner_steps=STEPS,
        inner_lr=case.inner_lr,
        multi_step_loss=True,
        msl_epochs=ANNEAL_EPOCHS,
        first_order_epochs=0,
        **options,
    )


@cache
def _reference(name: str) -> Reference:
    case = CASES[name]
    model = seeded(case.make)
    weights = msl_weights(STEPS, EPOCH, ANNEAL_EPOCHS)
    return reference_for(model, _learner(case, model, "functional"), case.batch(), weights, after_norm=case.after_norm)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", CASES)
def test_meta_step_equals_the_oracle(name: str, engine: str) -> None:
    case = CASES[name]
    learner = _learner(case, seeded(case.make), engine)
    learner.epoch = EPOCH
    metrics = learner.meta_step(case.batch())
    assert_equals_reference(learner, metrics.loss, _reference(name))


@pytest.mark.parametrize("engine", [*ENGINES, "batched"])
@pytest.mark.parametrize("name", ["conv4", "lstm", "tied weights", "user hooks", "norm with activation"])
def test_forward_and_backward_equal_the_oracle(name: str, engine: str) -> None:
    case = CASES[name]
    learner = _learner(case, seeded(case.make), engine)
    learner.epoch = EPOCH
    output = learner(case.batch())
    output.loss.backward()
    reference = _reference(name)
    assert_equals_reference(learner, output.loss.detach(), reference)
    expected = torch.stack([torch.stack(losses) for losses in reference.step_losses])
    torch.testing.assert_close(output.step_losses, expected, rtol=1e-9, atol=0)
    for found, expected in zip(output.predictions, reference.predictions, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("engine", [*ENGINES, "batched"])
def test_tied_weights_stay_tied_in_the_learner_and_in_what_it_returns(engine: str) -> None:
    learner = _learner(CASES["tied weights"], seeded(TiedNet), engine)
    batch = CASES["tied weights"].batch()
    learner.meta_step(batch)
    support_x, support_y, *_ = as_tasks(batch)[0]
    for model in (learner.model, learner.unwrap(), learner.adapt(support_x, support_y)):
        assert model.into.weight is model.again.weight
        assert model.mix is model.mix_alias
    assert set(learner.learning_rates) == {
        "into.weight", "into.bias", "mix.weight", "mix.bias", "again.bias", "linear.weight", "linear.bias"
    }  # fmt: skip


@pytest.mark.parametrize("engine", [*ENGINES, "batched"])
@pytest.mark.parametrize("name", ["conv4", "lstm", "tied weights", "user hooks", "norm with activation"])
def test_adapted_module_predicts_what_the_oracle_predicts(name: str, engine: str) -> None:
    case = CASES[name]
    model = seeded(case.make)
    learner = _learner(case, model, engine)
    batch = case.batch()
    reference = reference_for(model, learner, batch, [0.0, 1.0], after_norm=case.after_norm, training=False)
    for index, (support_x, support_y, target_x, _) in enumerate(as_tasks(batch)):
        adapted = learner.adapt(support_x, support_y)
        assert type(adapted) is type(model)
        torch.testing.assert_close(adapted(target_x).detach(), reference.predictions[index], rtol=1e-9, atol=1e-11)


def test_auto_takes_higher_for_a_network_that_it_carries() -> None:
    learner = _learner(CASES["conv4"], seeded(Conv4), "auto")
    assert "higher" in str(learner.describe())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["conv4", "strided conv4", "resnet18", "vision transformer", "lstm", "user hooks"])
def test_meta_step_on_cuda_equals_the_oracle_on_the_cpu(name: str, engine: str) -> None:
    case = CASES[name]
    learner = _learner(case, seeded(case.make), engine).to("cuda")
    learner.epoch = EPOCH
    metrics = learner.meta_step(tuple(part.to("cuda") for part in case.batch()))
    assert_equals_reference(learner, metrics.loss, _reference(name), tolerance=1e-8)
