"""What is done to a learner after wrapping: compiled, interrupted, made in inference mode."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from face import fingerprint
from models import NormedMlp, class_tasks, seeded
from torch import nn

from metawrap import FOMAML, MAMLPlusPlus, MetaWrapError, ProtoNet, UnsupportedModuleError

BATCH = class_tasks((4,), shots=2)


def stepped(method: Any = MAMLPlusPlus, **options: Any) -> Any:
    learner = method(seeded(NormedMlp), **({} if method is ProtoNet else {"inner_steps": 2}), **options)
    learner.meta_step(BATCH)
    return learner


def in_place(learner: Any) -> None:
    learner.model.compile(backend="eager")


def of_a_part(learner: Any) -> None:
    learner.model.first.compile(backend="eager")


def of_forward(learner: Any) -> None:
    learner.model.forward = torch.compile(learner.model.forward, backend="eager")


@pytest.mark.parametrize("engine", ["functional", "higher", "batched"])
@pytest.mark.parametrize("compiled", [in_place, of_a_part, of_forward])
def test_a_compiled_model_is_refused_where_it_is_differentiated_twice(
    engine: str, compiled: Callable[[Any], None]
) -> None:
    learner = stepped(engine=engine, first_order_epochs=0)
    compiled(learner)
    before = fingerprint(learner)
    with pytest.raises(UnsupportedModuleError, match=r"runs through torch\.compile"):
        learner.meta_step(BATCH)
    assert fingerprint(learner) == before


def test_a_class_with_a_compiled_forward_is_refused_too() -> None:
    class Compiled(NormedMlp):
        forward = torch.compile(NormedMlp.forward, backend="eager")

    learner = MAMLPlusPlus(seeded(Compiled), inner_steps=2, first_order_epochs=0)
    with pytest.raises(UnsupportedModuleError, match=r"the model runs through torch\.compile"):
        learner.meta_step(BATCH)


# Of torch's compiler, which looks at fast weights.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("method", [FOMAML, ProtoNet])
def test_first_order_methods_carry_a_compiled_model(method: Any) -> None:
    plain, compiled = stepped(method), stepped(method)
    compiled.model.compile(backend="eager")
    for learner in (plain, compiled):
        learner.meta_step(BATCH)
    torch.compiler.reset()
    for one, other in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("place", ["", "first"])
@pytest.mark.parametrize("method", [MAMLPlusPlus, ProtoNet])
@pytest.mark.parametrize("call", ["meta_step", "evaluate", "forward"])
def test_a_module_inside_of_torch_compile_is_refused_by_name(method: Any, place: str, call: str) -> None:
    learner = stepped(method)
    owner: nn.Module = learner.model if place else learner
    setattr(owner, place or "model", torch.compile(getattr(owner, place or "model"), backend="eager"))
    with pytest.raises(UnsupportedModuleError, match=r"was replaced by torch\.compile.*_orig_mod"):
        getattr(learner, call)(BATCH)


class Interrupted(torch.optim.SGD):
    """Ctrl-C comes right behind the update."""

    now = False

    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        if self.now:
            signal.raise_signal(signal.SIGINT)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C raises, as in a terminal: a process that a shell started in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_an_interrupt_behind_the_optimizers_step_leaves_a_whole_meta_step() -> None:
    learner, twin = (stepped(optimizer=lambda parameters: Interrupted(parameters, lr=0.1)) for _ in range(2))
    learner.optimizer.now = True
    with pytest.raises(KeyboardInterrupt):
        learner.meta_step(BATCH)
    twin.meta_step(BATCH)
    assert learner.iteration == twin.iteration == 2
    for (name, one), other in zip(learner.state_dict().items(), twin.state_dict().values(), strict=True):
        assert name == "_extra_state" or torch.equal(one, other), name
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("method", [MAMLPlusPlus, ProtoNet])
def test_a_learner_is_not_made_in_inference_mode(method: Any) -> None:
    model = seeded(NormedMlp)
    with torch.inference_mode(), pytest.raises(MetaWrapError, match=r"made under torch\.inference_mode"):
        method(model)
    learner = method(model)
    learner.meta_step(BATCH)
    with torch.inference_mode():
        assert learner.evaluate(BATCH).tasks == len(BATCH[0])
