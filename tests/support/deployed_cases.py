"""Learners of networks to deploy, the modules that they give out, and the prediction of plain PyTorch."""

from __future__ import annotations

import gc
import math
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import deployed_models as deployed
import pytest
import torch
import torch.nn.functional as F
import torchvision
from engine_cases import PLAIN_POLICIES, vision_transformer
from face import assert_same_values, build
from models import ActNormNet, Conv4, LSTMClassifier, NormedMlp, TiedNet, class_tasks, hooked_conv4, seeded
from steady import steady
from torch import Tensor, nn

from metawrap.tasks import map_tensors, tensors_in

STEPS = 2
ASKED = (None, 0, 1, STEPS + 3)
"""`steps=` of adapt: as in training, none, fewer, more."""


@dataclass(frozen=True)
class Case:
    """A network that is wrapped, and the tasks for it.

    make: the network; `wrapper` goes around it before it is handed to metawrap.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...] | str = (4,)
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    wrapper: Callable[[nn.Module], nn.Module] | None = None
    higher: bool = True

    def original(self) -> nn.Module:
        return seeded(self.make).eval()

    def batch(self) -> tuple[Any, Tensor, Any, Tensor]:
        if self.shape == "words":
            generator = torch.Generator().manual_seed(0)
            words = [torch.randint(0, 9, (2, count, 5), generator=generator) for count in (6, 9)]
            return words[0], torch.arange(3).repeat(2, 2), words[1], torch.arange(3).repeat(2, 3)
        if self.shape == "keywords":
            left, y, target_left, target_y = class_tasks((2,), shots=2)
            right, _, target_right, _ = class_tasks((3,), shots=2, seed=1)
            return {"left": left, "right": right}, y, {"left": target_left, "right": target_right}, target_y
        return class_tasks(self.shape, shots=2)  # type: ignore[arg-type]

    def task(self) -> tuple[Any, Tensor, Any, Tensor]:
        """support_x, support_y, target_x, target_y of the first task of the batch."""
        return tuple(map_tensors(part, lambda tensor: tensor[0]) for part in self.batch())  # type: ignore[return-value]

    @property
    def loss(self) -> Callable[[Any, Tensor], Tensor]:
        return self.options.get("loss_fn", F.cross_entropy)


def small_images(make: Callable[..., nn.Module]) -> Callable[[], nn.Module]:
    return lambda: steady(make(num_classes=3))


FIRST_ORDER = {"first_order_epochs": math.inf}  # torch has no second derivative of an embedding bag
CASES: dict[str, Case] = {
    "Conv4": Case(partial(Conv4, blocks=2, size=8), (1, 8, 8)),
    "strided Conv4": Case(partial(Conv4, strided=True), (1, 16, 16)),
    "norm with activation": Case(ActNormNet, (1, 6, 6)),
    "hooks": Case(partial(hooked_conv4, blocks=3, size=8), (1, 8, 8)),
    "tied": Case(TiedNet, (6,)),
    "LSTM": Case(LSTMClassifier, (4, 3)),
    "vision transformer": Case(vision_transformer, (3, 16, 16)),
    "transformer encoder": Case(deployed.Encoder, (5, 8)),
    "legacy weight norm": Case(deployed.weight_normed),
    "parametrized": Case(deployed.parametrized, higher=False),
    "parametrized norm": Case(deployed.parametrized_norm, higher=False),
    "pruned": Case(deployed.pruned),
    "SyncBatchNorm": Case(deployed.synchronised, (1, 8, 8)),
    "frozen backbone": Case(deployed.frozen_backbone, (1, 8, 8), {"keep_norm": "conv0.norm"}),
    "kinds of norm": Case(deployed.NormKinds),
    "embedding bag": Case(deployed.Bag, "words", FIRST_ORDER),
    "sparse embedding": Case(deployed.SparseWords, "words"),
    "dict out": Case(deployed.KeywordNet, "keywords", {"loss_fn": deployed.logits}),
    "dataclass out": Case(deployed.KeywordNetWithDataclass, "keywords", {"loss_fn": deployed.logits}),
    "bound method": Case(deployed.BoundMethod, higher=False),
    "closure": Case(deployed.Closure, higher=False),
    "closures in containers": Case(deployed.ClosuresInContainers, higher=False),
    "metaclass": Case(deployed.Registered, higher=False),
    "complex": Case(deployed.ComplexNet),
    "parameter collections": Case(deployed.Collections),
    "keeps its last output": Case(deployed.KeepsOutput),
    "norm parameters for all steps": Case(NormedMlp, options={"per_step_norm_affine": False, "adapt_norm": True}),
    "one row of statistics": Case(NormedMlp, options={"per_step_norm_statistics": False}),
    "DataParallel": Case(NormedMlp, wrapper=nn.DataParallel),
    "compiled": Case(NormedMlp, wrapper=partial(torch.compile, backend="eager")),
}
LARGE: dict[str, Case] = {
    "resnet18": Case(small_images(torchvision.models.resnet18), (3, 32, 32), {"inner_lr": 0.01}),
    "mobilenet_v3_small": Case(small_images(torchvision.models.mobilenet_v3_small), (3, 32, 32), {"inner_lr": 0.01}),
}
ALL = CASES | LARGE
# A norm policy is nothing to a network without a batch norm.
PLAIN = {"LSTM", "vision transformer", "transformer encoder"}


def policy_cases(names: Iterable[str], policies: Sequence[str] = PLAIN_POLICIES, engines: Sequence[str] = ()) -> Any:
    """Parametrises `name`, `norm` and, if asked, `engine`; `higher` runs by default under norm="support" alone."""
    cases = []
    for name in names:
        for norm in policies[-1:] if name in PLAIN else policies:
            for engine in engines or [""]:
                slow = name in LARGE or (engine == "higher" and norm != "support")
                values = (name, norm, engine) if engines else (name, norm)
                cases.append(pytest.param(*values, marks=pytest.mark.slow if slow else ()))
    return pytest.mark.parametrize(("name", "norm", "engine") if engines else ("name", "norm"), cases)


@cache
def wrapped(name: str, norm: str, engine: str = "functional") -> tuple[nn.Module, Any]:
    """The module that was handed to metawrap, and its learner; no test changes either."""
    case = ALL[name]
    model = seeded(case.make)
    handed = model if case.wrapper is None else case.wrapper(model)
    options = {"inner_steps": STEPS, "norm": norm, "engine": engine, "first_order_epochs": 0} | case.options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # first order throughout leaves norm rows without a gradient; none is trained
        return model, build(handed, **options)


@cache
def returned(name: str, norm: str) -> dict[str, nn.Module]:
    """Every module that a learner gives out."""
    _, learner = wrapped(name, norm)
    support_x, support_y, _, _ = ALL[name].task()
    adapted = {f"adapt({steps})": learner.adapt(support_x, support_y, steps=steps) for steps in ASKED}
    return adapted | {"unwrap": learner.unwrap()}


def call(model: Any, x: Any) -> Any:
    return model(**x) if isinstance(x, dict) else model(x)


def assert_same_output(found: Any, expected: Any, tolerance: float = 1e-9) -> None:
    assert type(found) is type(expected)
    assert_same_values(tensors_in(found), tensors_in(expected), tolerance)


def reachable(module: nn.Module) -> Iterator[Any]:
    """Every object that hangs on a module, closures and hooks included; not what classes and Python modules hold."""
    seen: set[int] = set()
    todo: list[Any] = [module]
    while todo:
        value = todo.pop()
        if id(value) in seen or isinstance(value, type | types.ModuleType | types.CodeType):
            continue
        seen.add(id(value))
        yield value
        if isinstance(value, types.FunctionType):
            todo += [value.__closure__, value.__defaults__, value.__kwdefaults__, value.__dict__]
        else:
            todo += gc.get_referents(value)


def memory_of(module: nn.Module) -> set[int]:
    tensors = [value for value in reachable(module) if isinstance(value, Tensor)]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()}


def outcome(action: Callable[[], Any]) -> str:
    """ "works", or the class and text of what was raised."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "works"
