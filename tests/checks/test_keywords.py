"""Keywords of learners and their groups: each is checked, and a mistyped one is told its place."""

from __future__ import annotations

import inspect
import re
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch
from bad_input import INF, NAN
from face import fingerprint
from models import NormedMlp, seeded

import metawrap
from metawrap import FOMAML, MAML, ArgumentError, ExecutionOptions, MAMLPlusPlus, OuterOptions, ProtoNet, Reptile
from metawrap.settings.keywords import keyword_types, nested, plain_keywords
from metawrap.settings.validated import expected
from metawrap.training.run_settings import METHODS


class Strange:
    """No argument is one of these."""


def keywords_of_all_methods() -> list[Any]:
    return [
        pytest.param(name, keyword, hint, id=f"{name}-{keyword}")
        for name in METHODS.values()
        for keyword, hint in plain_keywords(getattr(metawrap, name)).items()
    ]


@pytest.mark.parametrize(("name", "keyword", "hint"), keywords_of_all_methods())
def test_every_keyword_of_every_method_is_checked(name: str, keyword: str, hint: Any) -> None:
    model = seeded(NormedMlp)
    before = fingerprint(model)
    bad: list[Any] = [Strange(), [Strange()]]
    if "number" in (expected(hint) or ""):
        bad += [NAN, "5"]
    options = {"FineTune": {"classes": 6}, "MultiTask": {"classes": 6}}.get(name, {})
    for value in bad:
        with pytest.raises(ArgumentError, match=re.escape(keyword.removeprefix("wrapping."))):
            getattr(metawrap, name)(model, **{**options, **nested({keyword: value})})
    assert fingerprint(model) == before


def test_a_group_says_what_is_wrong_with_it_before_a_learner_is_made() -> None:
    with pytest.raises(ArgumentError, match=r"^execution\.workers: expected a whole number of at least 1"):
        ExecutionOptions(workers=0)
    with pytest.raises(TypeError, match=r"^ExecutionOptions\(\) got an unexpected keyword argument 'worker'. It has"):
        ExecutionOptions(worker=2)  # type: ignore[call-arg]
    with pytest.raises(FrozenInstanceError):
        ExecutionOptions().workers = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("old", "now"),
    [
        ("workers", 'execution={"workers": ...}'),
        ("worker", 'execution={"workers": ...}'),
        ("tune", 'execution={"tune": ...}'),
        ("inner_optimizer", 'inner_update={"rule": ...}'),
        ("inner_betas", 'inner_update={"betas": ...}'),
        ("betas", 'outer_update={"betas": ...}'),
        ("head_init", 'outputs={"head_init": ...}'),
        ("swap", 'wrapping={"swap": ...}'),
        ("inner_step", "'inner_steps'"),
    ],
)
def test_a_keyword_of_0_1_is_told_its_place(old: str, now: str) -> None:
    with pytest.raises(TypeError) as caught:
        MAML(seeded(NormedMlp), **{old: 2})
    assert str(caught.value) == f"MAML() got an unexpected keyword argument '{old}'. Did you mean {now}?"


def test_a_group_is_an_object_or_a_dict_and_leaves_a_preset_what_it_does_not_name() -> None:
    for outer in (OuterOptions(max_grad_norm=1.0), {"max_grad_norm": 1.0}):
        settings = MAMLPlusPlus(seeded(NormedMlp), preset="paper", outer_update=outer).settings
        assert settings.outer_update == OuterOptions(betas=(0.9, 0.99), max_grad_norm=1.0)


@pytest.mark.parametrize("given", [{"execution": {"memory": "flat"}}, {"execution": ExecutionOptions(memory="flat")}])
def test_a_field_that_a_method_does_not_have_is_refused(given: dict[str, Any]) -> None:
    for kind in (Reptile, ProtoNet):
        with pytest.raises(TypeError, match=rf"^{kind.__name__}\(\) got .* 'memory' in execution=\.$"):
            kind(seeded(NormedMlp), **given)


def test_settings_can_be_replaced_field_by_field() -> None:
    options = ExecutionOptions(workers=2, workers_in="processes")
    assert replace(replace(options, workers_in="threads"), workers=1, memory="flat") == ExecutionOptions(memory="flat")


@pytest.mark.filterwarnings("ignore:first_order_epochs.*get no gradient")
@pytest.mark.parametrize("preset", [None, "maml", "inductive", "authors_code", "paper"])
def test_first_order_maml_is_first_order_under_every_preset(preset: str | None) -> None:
    assert FOMAML(seeded(NormedMlp), preset=preset).settings.first_order_epochs == INF


def test_first_order_maml_refuses_second_order_epochs() -> None:
    with pytest.raises(ArgumentError, match=r"first_order_epochs: cannot be 0 in FOMAML, where it is inf.*use MAML"):
        FOMAML(seeded(NormedMlp), first_order_epochs=0)


@pytest.mark.parametrize("kind", [MAMLPlusPlus, Reptile, ProtoNet])
def test_epochs_of_the_built_in_schedule_are_refused_beside_one_of_the_users_own(kind: Any) -> None:
    for own in (
        {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1)},
        {"scheduler": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1)},
    ):
        with pytest.raises(ArgumentError, match=f"epochs: belongs to the built-in .*{next(iter(own))}= was given"):
            kind(seeded(NormedMlp), epochs=3, **own)


def test_constructors_show_their_keywords_and_have_at_most_28() -> None:
    for name in METHODS.values():
        kind = getattr(metawrap, name)
        assert len([each for each in keyword_types(kind) if "." not in each]) <= 27
    shown = inspect.signature(MAML).parameters
    assert {"inner_steps", "execution", "wrapping"} <= set(shown)
    assert "memory" not in shown
    assert set(shown) == {"model", *(name for name in keyword_types(MAML) if "." not in name)}
