"""State is put back as it was: random generators, buffers, attributes and containers of a module."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from metawrap.snapshot.generators import Generators
from metawrap.snapshot.module_state import ForwardState, ModuleState, restored_buffers, unchanged, untouched_buffers
from metawrap.snapshot.reachable_state import difference, state_of

CPU = torch.device("cpu")


class Stateful(nn.Module):
    """Keeps state of every kind; one buffer is registered in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("mean", torch.zeros(2))
        self.inner = nn.Module()
        self.inner.register_buffer("same", self.mean)
        self.count, self.seen, self.sizes = 0, [1], {"a": (2, 3)}
        self.own, self.torchs = random.Random(1), torch.Generator()
        self.numpys, self.numpys_old = np.random.default_rng(0), np.random.RandomState(0)


def _edit_data(model: Any) -> None:
    model.mean.data.add_(1)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "attribute": lambda m: setattr(m, "count", 1),
    "new attribute": lambda m: setattr(m, "cache", torch.ones(1)),
    "list": lambda m: m.seen.append(2),
    "dict": lambda m: m.sizes.update(b=1),
    "hook": lambda m: m.register_forward_hook(lambda *_: None),
    "buffer in place": lambda m: m.mean.add_(1),
    "buffer through .data": _edit_data,
    "buffer replaced": lambda m: setattr(m, "mean", torch.ones(2)),
    "weight": lambda m: m.weight.data.add_(1),
    "python": lambda m: random.random(),
    "numpy": lambda m: np.random.rand(),
    "torch": lambda m: torch.rand(1),
    "own generator": lambda m: m.own.random(),
    "own generator of numpy": lambda m: m.numpys.random(),
    "own RandomState of numpy": lambda m: m.numpys_old.rand(),
    "own generator of torch": lambda m: torch.rand(1, generator=m.torchs),
}


def contents(model: Any) -> list[Any]:
    shared = random.getstate(), np.random.get_state(legacy=False)["state"]["pos"], torch.get_rng_state().tolist()
    own = model.own.getstate(), model.torchs.get_state().tolist(), model.numpys.bit_generator.state
    own = *own, model.numpys_old.get_state()[1].tolist(), model.numpys_old.get_state()[2]
    tensors = [t.tolist() for t in (model.weight, model.mean, model.inner.same)]
    hooks = len(model._forward_hooks)
    return [model.count, hasattr(model, "cache"), list(model.seen), dict(model.sizes), hooks, tensors, shared, own]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_check_of_the_model_leaves_nothing_behind_even_if_it_fails(change: str, fails: bool) -> None:
    model: Any = Stateful()
    before, mean = contents(model), model.mean
    try:
        with unchanged(model, CPU):
            CHANGES[change](model)
            assert contents(model) != before
            assert not fails
    except AssertionError:
        assert fails
    assert contents(model) == before
    assert model.mean is model.inner.same is mean


@pytest.mark.parametrize("change", [c for c in CHANGES if "buffer" in c])
def test_buffers_are_put_back_and_shared_ones_stay_shared(change: str) -> None:
    model: Any = Stateful()
    with untouched_buffers(model):
        CHANGES[change](model)
    assert torch.equal(model.mean, torch.zeros(2))
    assert model.mean is model.inner.same
    try:
        with restored_buffers(model):
            CHANGES[change](model)
            raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert torch.equal(model.mean, torch.zeros(2))
    assert model.mean is model.inner.same


@pytest.mark.parametrize("applied", [True, False])
def test_buffers_of_a_skipped_step_are_restored(applied: bool) -> None:
    model: Any = Stateful()
    with restored_buffers(model) as restore:
        model.mean = torch.ones(2)
        restore(torch.tensor(not applied))
    assert torch.equal(model.mean, torch.full((2,), float(applied)))


def test_restoring_the_buffers_of_a_gpu_does_not_wait_for_it() -> None:
    with FakeTensorMode():
        norm = nn.BatchNorm2d(3, device="cuda")
        with restored_buffers(norm) as restore:
            norm(torch.empty(2, 3, 4, 4, device="cuda"))
            restore(torch.empty((), dtype=torch.bool, device="cuda"))


@pytest.mark.parametrize("change", ["attribute", "new attribute", "list", "dict", "buffer replaced"])
def test_changes_are_named_and_put_back(change: str) -> None:
    model: Any = Stateful()
    before, state = contents(model), ModuleState(model.named_modules(), buffers=True, containers="own")
    assert not list(state.changes())
    CHANGES[change](model)
    names = {"attribute": "'count'", "new attribute": "'cache'", "buffer replaced": "'mean'"}
    assert [found.name for found in state.changes()] == [names.get(change, "a container of 'the model itself'")]
    state.put_back()
    assert not list(state.changes())
    assert contents(model)[:4] == before[:4]


@pytest.mark.parametrize("library", ["python", "numpy", "torch"])
def test_generators_say_which_library_moved(library: str) -> None:
    before = Generators()
    assert before == Generators()
    CHANGES[library](None)
    assert before.moved() == {library}
    assert before != Generators()
    before.put_back()
    assert before == Generators()


@pytest.mark.parametrize("change", [c for c in CHANGES if c not in ("list", "dict", "hook", "weight")])
def test_a_pass_that_changes_what_the_next_one_reads_is_seen(change: str) -> None:
    model: Any = Stateful()
    modules, before = list(model.modules()), state_of([model])
    forward = ForwardState(modules, CPU)
    assert difference(before, state_of([model])) is None
    assert forward.difference(ForwardState(modules, CPU)) is None
    CHANGES[change](model)
    if change != "buffer through .data":  # Only a copy shows it.
        assert difference(before, state_of([model])) is not None
    if not change.startswith("own"):
        assert forward.difference(ForwardState(modules, CPU)) is not None
        forward.restore(copies=False)
        assert forward.difference(ForwardState(modules, CPU)) is None or "in place" in change or "data" in change
