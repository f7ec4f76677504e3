"""More networks to deploy. Processes that only load a pickle import this module, so it knows nothing of metawrap."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from models import Conv4, NormedMlp
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune


class Encoder(nn.Module):
    """Self-attention over (examples, time, 8); in eval mode torch computes each layer by one fused kernel."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.linear = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.encoder(x).mean(1))


class NormKinds(nn.Module):
    """Batch norms without a scale, without statistics, with a cumulative average, and over sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.bare = nn.BatchNorm1d(6, affine=False)
        self.stateless = nn.BatchNorm1d(6, track_running_stats=False)
        self.conv = nn.Conv1d(1, 3, 3)
        self.cumulative = nn.BatchNorm1d(3, momentum=None)
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stateless(torch.tanh(self.bare(self.first(x)))))
        return self.linear(torch.tanh(self.cumulative(self.conv(x[:, None]))).mean(2))


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(9, 4)
        self.norm = nn.BatchNorm1d(4)
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(self.bag(x)))


class SparseWords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4, sparse=True, padding_idx=0)
        self.norm = nn.BatchNorm1d(4)
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(self.table(x).tanh().mean(1)))


@dataclass
class Output:
    logits: Tensor
    hidden: Tensor


class KeywordNet(nn.Module):
    """`model(**x)` for a dict with keys `left` and `right`."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(2, 6), nn.Linear(3, 6)
        self.norm = nn.BatchNorm1d(6)
        self.linear = nn.Linear(6, 3)

    def forward(self, left: Tensor, right: Tensor) -> Any:
        hidden = torch.tanh(self.norm(self.left(left) + self.right(right)))
        return {"logits": self.linear(hidden), "hidden": hidden}


class KeywordNetWithDataclass(KeywordNet):
    def forward(self, left: Tensor, right: Tensor) -> Any:
        return Output(**super().forward(left, right))


class BoundMethod(NormedMlp):
    def __init__(self) -> None:
        super().__init__()
        self.run = self.first.forward

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.tanh(self.norm(self.run(x))))


class Closure(BoundMethod):
    def __init__(self) -> None:
        super().__init__()
        first = self.first
        self.run = lambda x: first(x)


class ClosuresInContainers(NormedMlp):
    """A closure in a list, one in a dict, one under a partial, and one that encloses a list of modules."""

    def __init__(self) -> None:
        super().__init__()
        first, norm, layers = self.first, self.norm, [self.linear]
        self.stages = [lambda x: first(x)]
        self.by_name = {"norm": {"inner": lambda x: norm(x)}}
        self.last = functools.partial(lambda x, scale: layers[0](x) * scale, scale=1.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.by_name["norm"]["inner"](self.stages[0](x))))


class _Registering(type):
    """A metaclass that keeps a list of its classes, as registries do."""

    made: list[str] = []  # noqa: RUF012

    def __new__(cls, name: str, bases: tuple[type, ...], space: dict[str, Any]) -> Any:
        cls.made.append(name)
        return super().__new__(cls, name, bases, space)


class RegisteredNorm(nn.BatchNorm1d, metaclass=_Registering):
    """A norm of a class with a metaclass of its own."""


class Registered(NormedMlp, metaclass=_Registering):
    def __init__(self) -> None:
        super().__init__()
        self.norm = RegisteredNorm(6)


class ComplexNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.spectrum = nn.Parameter(torch.randn(4, 6, dtype=torch.complex128))
        self.norm = nn.BatchNorm1d(6)
        self.linear = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.tanh(self.norm((x.to(self.spectrum.dtype) @ self.spectrum).abs())))


class Collections(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(4, 6), torch.randn(6, 3)])
        self.biases = nn.ParameterDict({"first": torch.zeros(6), "last": torch.zeros(3)})
        self.norms = nn.ModuleDict({"only": nn.BatchNorm1d(6)})

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norms["only"](x @ self.weights[0] + self.biases["first"]))
        return x @ self.weights[1] + self.biases["last"]


def weight_normed() -> nn.Module:
    model = NormedMlp()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(model.first)
    return model


def parametrized() -> nn.Module:
    model = NormedMlp()
    nn.utils.parametrizations.weight_norm(model.first)
    return model


def pruned() -> nn.Module:
    model = NormedMlp()
    with torch.no_grad():
        prune.custom_from_mask(model.first, "weight", (torch.arange(24).reshape(6, 4) % 3 > 0))
    return model


def synchronised() -> nn.Module:
    return nn.SyncBatchNorm.convert_sync_batchnorm(Conv4(blocks=2, size=8))


def frozen_backbone() -> nn.Module:
    """conv0 and its norm are frozen and pretrained; conv1 and the head are to be adapted."""
    model = Conv4(blocks=2, size=8)
    model.conv0.requires_grad_(False)
    nn.init.uniform_(model.conv0.norm.running_mean, -0.5, 0.5)
    nn.init.uniform_(model.conv0.norm.running_var, 0.5, 1.5)
    return model


def logits(prediction: Any, y: Tensor) -> Tensor:
    """Cross-entropy of whatever holds the logits."""
    if isinstance(prediction, dict):
        prediction = prediction["logits"]
    elif isinstance(prediction, Output):
        prediction = prediction.logits
    return F.cross_entropy(prediction, y)


def parametrized_norm() -> nn.Module:
    """The norm's own scale goes through a parametrization, so that it has no row per step."""
    model = NormedMlp()
    parametrize.register_parametrization(model.norm, "weight", Doubled())
    return model


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class KeepsOutput(NormedMlp):
    """Leaves its last output, with its graph, on itself: in a dataclass, which copy.deepcopy refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.last: list[Output] = []

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.first(x))
        self.last = [Output(self.linear(torch.tanh(hidden)), hidden)]
        return self.last[0].logits
