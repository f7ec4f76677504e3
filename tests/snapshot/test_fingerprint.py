"""The fingerprint of all that a call can reach: the same while nothing changes, another after any change."""

from __future__ import annotations

import abc
import collections
import contextvars
import enum
import functools
import itertools
import operator
import random
import sys
import threading
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metawrap.snapshot.fingerprint import fingerprint

FACTOR = 2.0
config = types.ModuleType("a_config")
exec("alpha = 1.0\nclass Inner:\n    beta = [1.0]\ninner = Inner()\ndef f(x): return x * alpha", vars(config))


def uses_global(x: Any) -> Any:
    return x * FACTOR


def uses_function(x: Any) -> Any:
    return [uses_global(y) for y in x]


def uses_config(x: Any) -> Any:
    return x * config.alpha


def imports_config(x: Any) -> Any:
    import a_config

    return x * a_config.alpha


def imports_math(x: Any) -> Any:
    import math

    return math.sqrt(x)


def asks_for_names(x: Any) -> Any:
    return x * globals()["FACTOR"]


@functools.lru_cache
def cached(x: Any) -> Any:
    return x * FACTOR


def wrapped(function: Any) -> Any:
    @functools.wraps(function)
    def inner(x: Any) -> Any:
        return function(x) * FACTOR

    return inner


def uses_torch(x: Any) -> Any:
    return F.softplus(x) * torch.FACTOR


def imports_beside(x: Any) -> Any:
    from .math import FACTOR

    return x * FACTOR


def looks_around(x: Any) -> Any:
    return x * sys.modules[__name__].FACTOR


def uses_operators(x: Any) -> Any:
    return torch.ops.aten.relu(x)


def closure() -> tuple[Any, list[float]]:
    held = [1.0]
    return lambda x: x * held[0], held


class Slotted:
    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 1.0

    def __getstate__(self) -> Any:
        return None


class Private:
    __slots__ = ("__value",)

    def __init__(self) -> None:
        self.put(1.0)

    def put(self, value: float) -> None:
        self.__value = value


class Registering(abc.ABC):  # noqa: B024
    pass


Registering.register(int)


def asks_for_subclasses(x: Any) -> Any:
    return x * len(Private.__subclasses__())


class Real(float):
    def __repr__(self) -> str:
        return "a number"


class Secret:
    def __init__(self) -> None:
        self.value = 1.0

    def __reduce__(self) -> Any:
        return Secret, ()


@dataclass
class Data:
    value: float = 1.0
    more: list[float] = field(default_factory=lambda: [1.0])


class Mode(enum.Enum):
    ONE = 1
    TWO = 2


class Table(collections.OrderedDict[str, float]):
    pass


class Numbers(list[float]):
    pass


class Meta(type):
    factor = 1.0


class Made(metaclass=Meta):
    value: float = 1.0

    @property
    def twice(self) -> float:
        return 2 * self.value

    @staticmethod
    def static(x: Any) -> Any:
        return x * FACTOR

    @functools.cached_property
    def slow(self) -> float:
        return self.value


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * FACTOR


def lasting(**values: Any) -> SimpleNamespace:
    return SimpleNamespace(**values)


def put(owner: Any, name: str, value: Any) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda monkeypatch: monkeypatch.setattr(owner, name, value)


HERE = sys.modules[__name__]
FUNCTION, HELD = closure()
DEEP: Any = functools.reduce(lambda inner, _: [inner], range(40), [1.0])
BOTTOM = functools.reduce(lambda outer, _: outer[0], range(40), DEEP)
NET, LSTM = nn.Sequential(nn.Linear(2, 2), nn.Tanh()), nn.LSTM(2, 2)
PRIVATE, SHARED = Private(), [TWO := torch.ones(2), TWO[:]]
SLOTTED, SECRET, DATA, NUMBERS, MADE = Slotted(), Secret(), Data(), Numbers([1.0]), Made()
SPACE, TENSOR, ARRAY, DRAWS = lasting(mode=Mode.ONE), torch.ones(3), np.ones(3), random.Random(0)
STAMPED, GENERATOR, COUNT = torch.ones(1), torch.Generator(), itertools.count()
PARTIAL = lasting(f=functools.partial(operator.mul, 1.0))
DEFAULTS = collections.defaultdict(list)
CASES: dict[str, tuple[Any, Callable[[pytest.MonkeyPatch], Any]]] = {
    "a global": (uses_function, put(HERE, "FACTOR", 3.0)),
    "a function that is named": (uses_function, put(HERE, "uses_global", lambda x: x)),
    "a module that is named": (uses_config, put(config, "alpha", 2.0)),
    "an object in a module that is named": (uses_config, lambda _: config.inner.beta.append(2.0)),
    "a function in a decorator": (wrapped(uses_global), put(HERE, "FACTOR", 3.0)),
    "a variable that is enclosed": (FUNCTION, lambda _: HELD.append(2.0)),
    "the code of a function": (uses_config, put(uses_config, "__code__", uses_global.__code__)),
    "a default": (uses_config, put(uses_config, "__defaults__", (1.0,))),
    "the arguments of a partial": (PARTIAL, put(PARTIAL, "f", functools.partial(operator.mul, 2.0))),
    "a slot": (SLOTTED, put(SLOTTED, "value", 2.0)),
    "state that pickle is not shown": (SECRET, put(SECRET, "value", 2.0)),
    "a field": (DATA, lambda _: DATA.more.append(2.0)),
    "an enumeration": (SPACE, put(SPACE, "mode", Mode.TWO)),
    "a private slot": (PRIVATE, lambda _: PRIVATE.put(2.0)),
    "a function of torch": (uses_torch, put(F, "softplus", F.relu)),
    "a method of torch's": (nn.Tanh(), put(nn.Tanh, "forward", lambda self, x: x)),
    "a method of tensors": (None, put(Tensor, "relu", Tensor.sigmoid)),
    "a name in torch": (uses_torch, lambda monkeypatch: monkeypatch.setattr(torch, "FACTOR", 3.0, raising=False)),
    "a kind of number": (SPACE, lambda _: setattr(SPACE, "mode", Real(3.0))),
    "numpy's settings": (None, lambda _: np.seterr(under="warn")),
    "tensors on one storage": (SHARED, lambda _: setattr(SHARED[1], "data", SHARED[1].clone())),
    "a kind of list": (NUMBERS, lambda _: NUMBERS.append(2.0)),
    "a dictionary with defaults": (DEFAULTS, lambda _: DEFAULTS["a"]),
    "a class attribute": (MADE, put(Made, "value", 2.0)),
    "an annotation": (MADE, lambda _: Made.__annotations__.update(other=int)),
    "a property": (MADE, put(Made, "twice", property(lambda self: 3.0))),
    "an attribute of a metaclass": (MADE, put(Meta, "factor", 2.0)),
    "a cached property of the user's": (MADE, lambda _: MADE.slow),
    "an own derivative": (Double, put(HERE, "FACTOR", 3.0)),
    "the class of an object": (SPACE, lambda _: setattr(SPACE, "mode", Slotted())),
    "a value far down": (DEEP, lambda _: BOTTOM.append(2.0)),
    "a tensor": (TENSOR, lambda _: TENSOR.data.mul_(2)),
    "an attribute of a tensor": (STAMPED, lambda _: setattr(STAMPED, "factor", 2.0)),
    "an array": (ARRAY, lambda _: ARRAY.fill(2.0)),
    "a generator of Python": (DRAWS, lambda _: DRAWS.random()),
    "a generator of torch": (GENERATOR, lambda _: torch.rand(1, generator=GENERATOR)),
    "a weight": (NET, lambda _: nn.init.constant_(NET[0].bias, 3.0)),
    "a module": (NET, lambda _: NET.__setitem__(1, nn.Sigmoid())),
    "a hook": (NET, lambda _: NET.register_forward_hook(lambda *_: None)),
    "the weight behind a weak reference": (LSTM, lambda _: nn.init.constant_(LSTM.weight_hh_l0, 3.0)),
    "the kind of numbers": (None, lambda monkeypatch: torch.set_default_dtype(torch.float64)),
    "a hook of all modules": (None, put(nn.modules.module, "_global_forward_hooks", {0: print})),
    "the environment": (None, lambda monkeypatch: monkeypatch.setenv("A_NAME", "1")),
}


@pytest.mark.parametrize("name", CASES)
def test_it_differs_after_a_change_and_not_before(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    root, change = CASES[name]
    before, again = fingerprint(root), fingerprint(root)
    assert before is not None
    assert again is not None
    assert before.content == again.content
    try:
        change(monkeypatch)
        after = fingerprint(root)
    finally:
        torch.set_default_dtype(torch.float32)
    assert after is not None
    assert after.content != before.content


def test_objects_that_look_alike_are_told_apart_by_what_they_do() -> None:
    kinds = [nn.Tanh(), nn.Sigmoid(), nn.Identity(), Slotted(), Data(), torch.ones(1), torch.ones(1).double()]
    kinds += [functools.partial(F.leaky_relu, negative_slope=s) for s in (0.1, 0.2)] + [lambda x: x, lambda x: -x]
    found = [fingerprint(kind) for kind in kinds]
    assert len({each.content for each in found if each is not None}) == len(kinds)


def test_values_of_free_tensors_do_not_count_and_their_forms_do() -> None:
    net = nn.Linear(2, 2)

    def seen() -> bytes | None:
        found = fingerprint(net, list(net.parameters()))
        return found and found.content

    before = seen()
    nn.init.ones_(net.weight)
    net.bias.data = torch.zeros(2)
    assert seen() == before
    net.weight.requires_grad_(False)
    assert seen() != before
    net.weight.requires_grad_(True)
    assert seen() == before
    net.weight.data = torch.ones(2, 2).double()
    assert seen() != before


@pytest.mark.parametrize(
    "root",
    [
        *(threading.Lock(), imports_config, asks_for_names, (x for x in [1])),
        *(contextvars.ContextVar("a"), torch.zeros(1 << 20), torch.eye(2).to_sparse(), sys.stdout, threading.local()),
        *(nn.Linear(1, 1)(torch.ones(1)), types.SimpleNamespace(f=imports_config)),
        *(Registering(), asks_for_subclasses),
        *(cached, imports_beside, looks_around, uses_operators, Table(a=1.0), np.ones(1 << 20), ["a" * (1 << 24)]),
    ],
    ids=range(20),
)
def test_what_cannot_be_read_has_none(root: Any) -> None:
    assert fingerprint(lasting(held=root)) is None


def test_what_belongs_to_a_library_can_be_read() -> None:
    assert fingerprint([imports_math, torch.relu, F.cross_entropy, np.sqrt, nn.CrossEntropyLoss(), len, torch.float32])
