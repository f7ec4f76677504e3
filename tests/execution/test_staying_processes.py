"""Processes that stay from one meta-step to the next, and are forked anew where they would not see a change."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import signal
import sys
import time
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from face import assert_same_values, build
from models import NormedMlp, class_tasks, seeded
from torch import Tensor, nn

from metawrap import FOMAML, MetaSGD, Reptile, Task
from metawrap.execution import measured, parallel
from metawrap.execution.tuning import Speed

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux alone")

FACTOR, OPTIONS = 1.0, {"factor": 1.0}
own = types.ModuleType("a_module_of_the_users")
exec("FACTOR = 1.0\ndef scaled(x):\n    return x * FACTOR", vars(own))


class Scaled:
    """An object of the user's own, whose `__getstate__` hides its number."""

    __slots__ = ("factor", "other")

    def __init__(self) -> None:
        self.factor = 1.0

    def __getstate__(self) -> Any:
        return None, {}

    def __deepcopy__(self, memo: Any) -> Scaled:
        made = Scaled()
        made.factor = self.factor
        return made

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.factor


def by_global(x: Tensor) -> Tensor:
    return x * FACTOR * OPTIONS["factor"]


class Reached(nn.Module):
    """Scales its output by everything that a forward can reach, and writes down who runs it."""

    of_the_class = 1.0

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.inside, self.path, self.factor = NormedMlp(), str(path), 1.0
        self.act: nn.Module = nn.Tanh()
        self.settings = SimpleNamespace(deep=[{"factor": 1.0}])
        self.array, self.own, self.function = np.ones(()), Scaled(), lambda x: x
        self.plain = torch.ones((), dtype=torch.float64)
        self.register_buffer("moved", torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        with open(self.path, "a") as file:
            file.write(f"{os.getpid()}\n")
        y = self.act(self.inside(x)) * self.factor * self.of_the_class * self.settings.deep[0]["factor"]
        y = y * float(self.array) * self.plain * self.moved
        return self.function(by_global(own.scaled(self.own(y))))


def told(path: Path) -> set[int]:
    pids = {int(line) for line in path.read_text().split()} - {os.getpid()}
    path.write_text("")
    return pids


WAYS: list[dict[str, Any]] = [{}, {"workers": 2, "workers_in": "processes"}]


def two(tmp_path: Path, **options: Any) -> Any:
    """A learner whose tasks run in order, and one whose tasks run in two processes."""
    models = [seeded(partial(Reached, tmp_path / name)) for name in ("plain", "asked")]
    return [build(model, engine="functional", **way, **options) for model, way in zip(models, WAYS, strict=True)]


def same(plain: Any, asked: Any) -> None:
    gradients = [[p.grad for p in learner.parameters() if p.grad is not None] for learner in (asked, plain)]
    assert_same_values(*gradients, tolerance=1e-12)
    assert_same_values([*asked.parameters(), *asked.buffers()], [*plain.parameters(), *plain.buffers()])


def half(x: Tensor) -> Tensor:
    return x * 0.5


def other_forward(model: Any) -> None:
    forward = model.forward
    model.forward = lambda x: forward(x) * 0.5


def attribute(name: str, value: Any) -> Callable[[Any], None]:
    return lambda model: setattr(model, name, value)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "an attribute": attribute("factor", 0.5),
    "a value deep within": lambda model: model.settings.deep[0].update(factor=0.5),
    "a module without values": attribute("act", nn.Sigmoid()),
    "the class of a module": lambda model: setattr(model.act, "__class__", nn.Sigmoid),
    "an array": lambda model: model.array.fill(0.5),
    "a slot that pickle does not see": lambda model: setattr(model.own, "factor", 0.5),
    "a function": attribute("function", half),
    "a tensor": lambda model: model.plain.fill_(0.5),
    "a tensor's data": lambda model: model.plain.data.fill_(0.5),
    "a buffer": lambda model: model.moved.fill_(0.5),
    "a buffer's data": lambda model: model.moved.data.fill_(0.5),
    "another buffer": attribute("moved", torch.full((), 0.5, dtype=torch.float64)),
    "a weight's data": lambda model: setattr(model.inside.linear.weight, "data", model.inside.linear.weight * 0.5),
    "a hook": lambda model: model.register_forward_hook(lambda module, args, output: output * 0.5),
    "forward": other_forward,
    "evaluation mode": lambda model: model.eval(),
}
ELSEWHERE: dict[str, tuple[Any, str, Any]] = {
    "a global": (sys.modules[__name__], "FACTOR", 0.5),
    "a dict among the globals": (sys.modules[__name__], "OPTIONS", {"factor": 0.5}),
    "a global of the user's own module": (own, "FACTOR", 0.5),
    "a function of the user's own module": (own, "scaled", half),
    "a class attribute": (Reached, "of_the_class", 0.5),
    "a method": (Scaled, "__call__", lambda self, x: x * 0.5),
    "a hook for all modules": (
        nn.modules.module,
        "_global_forward_hooks",
        {0: lambda module, args, output: output * 0.5 if isinstance(module, nn.Tanh) else None},
    ),
}


@pytest.mark.sampled(8)
@pytest.mark.parametrize("change", [*CHANGES, *ELSEWHERE])
def test_processes_stay_until_something_changes(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, asked = two(tmp_path)
    batch = class_tasks((4,), tasks=4)
    seen = []
    for step in range(4):
        if step == 2 and change in CHANGES:
            for learner in (plain, asked):
                CHANGES[change](learner.model)
        elif step == 2:
            monkeypatch.setattr(*ELSEWHERE[change])
        told(tmp_path / "asked") if step else None
        plain.meta_step(batch)
        asked.meta_step(batch)
        same(plain, asked)
        seen.append(told(tmp_path / "asked"))
    assert len(seen[1]) == 2  # Globals could be shared with a replica here, so this process does no share.
    assert seen[2] <= seen[1] if "buffer" in change or "weight" in change else not seen[2] & seen[1]
    assert seen[3] == seen[2]


@pytest.mark.parametrize("method", [FOMAML, MetaSGD, Reptile])
def test_other_methods_and_epochs_and_batches_of_other_sizes(method: Any, tmp_path: Path) -> None:
    options = {} if method is MetaSGD else {"inner_lr": 0.05}
    plain, asked = two(tmp_path, method=method, **options)
    for tasks, targets in ((4, 2), (4, 3), (2, 2), (5, 2)):
        batch = class_tasks((4,), tasks=tasks, targets=targets)
        for _ in range(2):
            plain.meta_step(batch)
            asked.meta_step(batch)
            same(plain, asked)
        for learner in (plain, asked):
            learner.epoch += 1


def test_frozen_weights_and_other_settings_of_torch(tmp_path: Path) -> None:
    plain, asked = two(tmp_path)
    batch = class_tasks((4,), tasks=4)
    for learner in (plain, asked):
        learner.meta_step(batch)
        learner.model.inside.first.weight.requires_grad_(False)
        learner.meta_step(batch)
        with torch.autocast("cpu", torch.bfloat16):
            learner.meta_step(batch)
        learner.meta_step(batch)
    assert_same_values([*asked.parameters(), *asked.buffers()], [*plain.parameters(), *plain.buffers()], 1e-6)


def test_what_cannot_be_sent_or_read_is_forked_for_each_step(tmp_path: Path) -> None:
    batch = [Task(x.mT.contiguous().mT, *rest) for x, *rest in zip(*class_tasks((4,), tasks=4), strict=True)]
    plain, asked = two(tmp_path)
    seen = []
    for _ in range(2):
        plain.meta_step(batch)
        told(tmp_path / "asked") if seen else None
        asked.meta_step(batch)
        same(plain, asked)
        seen.append(told(tmp_path / "asked"))
    assert seen[1]
    assert not seen[0] & seen[1]
    batch = class_tasks((4,), tasks=4)  # type: ignore[assignment]
    for learner in (plain, asked):
        learner.model.function = unreadable
    for _ in range(2):
        plain.meta_step(batch)
        asked.meta_step(batch)
        same(plain, asked)
    assert asked.executor.staying is None


def unreadable(x: Tensor) -> Tensor:
    return x * globals()["FACTOR"]


def alive(pids: set[int]) -> set[int]:
    return {pid for pid in pids if Path(f"/proc/{pid}/status").exists()}


def test_they_end_with_their_learner_and_belong_to_it_alone(tmp_path: Path) -> None:
    _, asked = two(tmp_path)
    batch = class_tasks((4,), tasks=4)
    asked.meta_step(batch)
    told(tmp_path / "asked")
    asked.meta_step(batch)
    pids = told(tmp_path / "asked")
    copied = copy.deepcopy(asked)
    assert copied.executor.staying is None
    assert pickle.loads(pickle.dumps(asked.executor)).staying is None
    copied.meta_step(batch)
    assert not told(tmp_path / "asked") & pids
    assert alive(pids) == pids
    del asked
    gc.collect()
    assert not alive(pids)


def test_one_that_was_killed_is_replaced_without_a_word(tmp_path: Path) -> None:
    plain, asked = two(tmp_path)
    batch = class_tasks((4,), tasks=4)
    for step in range(3):
        plain.meta_step(batch)
        asked.meta_step(batch)
        same(plain, asked)
        pids = told(tmp_path / "asked")
        if step == 1:
            os.kill(max(pids), signal.SIGKILL)
            time.sleep(0.1)
    assert len(pids) == 2


@pytest.mark.timeout(60)
def test_they_end_with_their_parent_however_it_ends(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    parent = os.fork()
    if not parent:
        try:
            _, asked = two(tmp_path)
            for _ in range(2):
                asked.meta_step(class_tasks((4,), tasks=4))
            os.write(writing, b".")
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.close(writing)
    assert os.read(reading, 1) == b"."
    os.waitpid(parent, 0)
    pids = told(tmp_path / "asked") - {parent}
    # No process of theirs holds the pipe, or this would wait for ever.
    assert os.read(reading, 1) == b""
    while alive(pids):
        time.sleep(0.1)


def test_processes_that_never_fit_are_given_up_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "_AGAIN", 8)
    plain, asked = two(tmp_path)
    batch = class_tasks((4,), tasks=4)
    stays = []
    for step in range(11):
        plain.model.factor = asked.model.factor = float(1 + min(step, 5))
        plain.meta_step(batch)
        asked.meta_step(batch)
        same(plain, asked)
        stays.append(asked.executor.staying is not None)
    # Three misfits in a row, then forks for each step, and one more chance in the ninth step.
    assert stays == [True] * 4 + [False] * 4 + [True] * 3
    asked.executor.end_staying()
    assert asked.executor.staying is None


def test_no_process_is_left_where_the_measurement_chose_another_way(tmp_path: Path, monkeypatch: Any) -> None:
    learner = build(seeded(partial(Reached, tmp_path / "asked")), engine="functional", tune=True)
    tried: list[Any] = []

    def choose(run: Any, *_: Any) -> Speed:
        run(Speed(2, processes=True))
        tried.extend(learner.executor.staying._children)
        return Speed()

    monkeypatch.setattr(measured, "fastest", choose)
    learner.meta_step(class_tasks((4,), tasks=4))
    assert tried
    assert not any(child.lives() for child in tried)


class Late(NormedMlp):
    """Fills a cache at its first call in a process, deeper than the state of the model is compared."""

    def __init__(self) -> None:
        super().__init__()
        self.deep: Any = {}
        self.deep["a"] = {"b": {"c": {"d": {"e": {"f": {"g": {"h": [0]}}}}}}}

    def forward(self, x: Tensor) -> Tensor:
        cell = self.deep["a"]["b"]["c"]["d"]["e"]["f"]["g"]["h"]
        y = super().forward(x)
        if os.environ.get("COUNTS"):
            cell[0] += 1
        return y


def test_a_process_in_which_something_changed_serves_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = build(seeded(Late), engine="functional", **WAYS[1])
    batch = class_tasks((4,), tasks=4)
    learner.meta_step(batch)
    learner.meta_step(batch)
    children = learner.executor.staying._children
    assert all(child.lives() for child in children)
    monkeypatch.setenv("COUNTS", "1")
    learner.meta_step(batch)
    assert not any(child.lives() for child in [*children, *learner.executor.staying._children])
