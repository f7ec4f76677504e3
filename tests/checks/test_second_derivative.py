"""Models that torch can differentiate only once: refused where second order is due, carried in first order."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from face import assert_step_equals_oracle, build, fingerprint, last_only
from models import class_tasks, seeded
from stateful import Once
from torch import Tensor, nn

from metawrap import FOMAML, MetaWrapWarning, UnsupportedModuleError

ENGINES = ("auto", "higher", "functional")
BATCH = class_tasks((4,))


class Grows(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Once.apply(x)


class Growing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.grow, self.last = nn.Linear(4, 5), Grows(), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.grow(self.first(x))))


class GrowingPlainly(Growing):
    """The same in the forms that torch differentiates twice, for the reference."""

    def __init__(self) -> None:
        super().__init__()
        self.grow = type("Exp", (nn.Module,), {"forward": lambda self, x: x.exp()})()


@pytest.mark.parametrize("engine", ENGINES)
def test_once_differentiable_is_refused_by_module_and_function_and_nothing_has_changed(engine: str) -> None:
    learner = build(seeded(Growing), engine=engine, first_order_epochs=0)
    before = fingerprint(learner)
    with pytest.raises(UnsupportedModuleError, match=r"'grow' \(Grows\).*Once.*FOMAML"):
        learner.meta_step(BATCH)
    with pytest.raises(UnsupportedModuleError, match="Once"):
        learner(BATCH)
    with pytest.raises(UnsupportedModuleError, match="Once"):
        learner.eval()(BATCH)
    assert fingerprint(learner.train()) == before
    learner.evaluate(BATCH)
    learner.adapt(BATCH[0][0], BATCH[1][0])


@pytest.mark.parametrize("engine", ENGINES)
def test_first_order_carries_it_and_equals_the_first_order_oracle(engine: str) -> None:
    for options in ({"method": FOMAML}, {"first_order_epochs": math.inf, "multi_step_loss": False}):
        learner = build(seeded(Growing), engine=engine, **options)
        assert_step_equals_oracle(learner, seeded(GrowingPlainly), BATCH, last_only(2), second_order=False)


def test_second_order_to_come_is_warned_of_and_refused_when_it_comes() -> None:
    learner = build(seeded(Growing), first_order_epochs=3)
    with pytest.warns(MetaWrapWarning, match=r"epoch 3 .*'grow' \(Grows\)"):
        learner.meta_step(BATCH)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learner.meta_step(BATCH)  # once
    learner.epoch = 3
    with pytest.raises(UnsupportedModuleError, match=r"'grow' \(Grows\)"):
        learner.meta_step(BATCH)


def test_a_function_below_what_is_adapted_needs_no_second_derivative() -> None:
    learner = build(seeded(Growing), adapt="last.*", first_order_epochs=0, multi_step_loss=False)
    assert_step_equals_oracle(learner, seeded(GrowingPlainly), BATCH, last_only(2))


def test_a_loss_without_second_derivative_is_named() -> None:
    learner = build(seeded(GrowingPlainly), loss_fn=F.multi_margin_loss, first_order_epochs=0)
    with pytest.raises(UnsupportedModuleError, match=r"(?s)The loss function.*multi_margin_loss.*FOMAML"):
        learner.meta_step(BATCH)
