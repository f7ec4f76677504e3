"""BOIL: the oracle's gradient with the head left out, and MAML's where the body alone is named."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from differences import assert_every_entry_is_a_difference
from engine_cases import ALL_ENGINES
from face import assert_step_equals_oracle, build, gradients_of, last_only
from keywords import grouped
from models import NormedMlp, TiedNet, class_tasks, seeded
from oracle import assert_same_gradients
from torch import Tensor, nn

from metawrap import BOIL, MAML, ArgumentError

BATCH = class_tasks((4,), tasks=2, shots=2)
BODY = ("first.weight", "first.bias")


def boil(**options: Any) -> Any:
    return build(seeded(NormedMlp), method=BOIL, **{"engine": "functional", "learn_inner_lr": True, **options})


@pytest.mark.parametrize("memory", ["unrolled", "flat"])
@pytest.mark.parametrize("engine", ALL_ENGINES)
def test_the_meta_gradient_equals_the_oracle_with_the_head_left_out(engine: str, memory: str) -> None:
    learner = boil(engine=engine, memory=memory)
    learner.evaluate(BATCH)  # Finds the head, whose rates the oracle must not see.
    assert tuple(learner.learning_rates) == BODY
    assert_step_equals_oracle(learner, seeded(NormedMlp), BATCH, last_only(2))
    assert gradients_of(learner)["linear.weight"] is not None, "the outer loop learns the head"


def test_the_meta_gradient_equals_finite_differences() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)))
    learner, batch = BOIL(model, inner_steps=2, inner_lr=0.5), class_tasks((2,), ways=2, shots=2)
    assert_every_entry_is_a_difference(learner, batch)
    assert all(parameter.grad is not None for parameter in learner.model.parameters())


@pytest.mark.parametrize("head", [None, "linear"])
@pytest.mark.parametrize("options", [{"max_grad_norm": 0.1}, {"inner_optimizer": "adam", "inner_eps": 1e-3}])
def test_it_is_maml_on_the_body_in_training_evaluation_and_adapt(head: str | None, options: dict[str, Any]) -> None:
    options = {f"inner_{name}" if name == "max_grad_norm" else name: value for name, value in options.items()}
    learner = BOIL(seeded(NormedMlp), inner_steps=2, head=head, **grouped(**options))
    maml = MAML(seeded(NormedMlp), inner_steps=2, adapt="first.*", **grouped(**options))
    for _ in range(2):
        assert learner.meta_step(BATCH).loss == pytest.approx(maml.meta_step(BATCH).loss, rel=1e-12)
    assert_same_gradients(gradients_of(learner), gradients_of(maml))
    task = [part[0] for part in BATCH]
    found, expected = (each.adapt(*task[:2], steps=3) for each in (learner, maml))
    torch.testing.assert_close(found(task[2]), expected(task[2]))
    assert torch.equal(found.linear.weight, learner.model.linear.weight)
    assert not torch.equal(found.first.weight, learner.model.first.weight)
    assert learner.evaluate(BATCH).loss == pytest.approx(maml.evaluate(BATCH).loss, rel=1e-12)


def test_the_head_is_told_before_and_after_it_is_found() -> None:
    learner = boil()
    assert "the head will not be adapted; it is found with the first task" in learner.describe().notes
    learner.meta_step(BATCH)
    described = learner.describe()
    assert described.head == "linear"
    assert tuple(described.adapted) == BODY
    assert {"linear.weight", "linear.bias"} <= set(described.learned_only)
    assert not [note for note in described.notes if "will not be adapted" in note]


def test_a_state_fits_whether_the_head_was_known_or_not() -> None:
    trained, named = boil(), boil(head="linear")
    trained.meta_step(BATCH)
    for other in (boil(), named, copy.deepcopy(trained)):
        other.load_state_dict(trained.state_dict())
        assert other.evaluate(BATCH).loss == trained.evaluate(BATCH).loss
        assert other.meta_step(BATCH).loss == copy.deepcopy(trained).meta_step(BATCH).loss


class Gated(nn.Module):
    """Its prediction is no module's output."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.gate = nn.Linear(4, 3), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) * torch.sigmoid(self.gate(x))


def test_a_head_that_is_a_guess_must_be_named() -> None:
    learner = BOIL(seeded(Gated))
    for _ in range(2):  # Asking again is no way past it.
        with pytest.raises(ArgumentError, match=r"BOIL: .*not known for sure.*head="):
            learner.meta_step(BATCH)
    learner = BOIL(seeded(Gated), head="head")
    learner.meta_step(BATCH)
    assert set(learner.describe().adapted) == {"gate.weight", "gate.bias"}


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (TiedNet, {"head": "again"}, r"BOIL: the head 'again' shares 'into.weight' with Linear.weight.*MAML"),
        (NormedMlp, {"head": "linear", "adapt": "linear.*"}, r"nothing is adapted besides the head 'linear'.*ANIL"),
        (NormedMlp, {"outputs": {"head_init": "zeros"}}, r"outputs.head_init: cannot be 'zeros' in BOIL.*use MAML"),
    ],
)
def test_what_leaves_nothing_to_adapt_is_refused(make: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        BOIL(seeded(make), **options)
