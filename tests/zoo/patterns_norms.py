"""Norms of every kind, and every habit around batch norm."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from entry import Entry
from models import BatchNormAct2d, NormedMlp
from pieces import IMAGES, VECTORS, Around, AroundImage, Whole, noise
from torch import Tensor, nn


def normed_sequence(norm: nn.Module) -> nn.Module:
    run = lambda m, x: m.last(torch.tanh(m.norm(m.first(x))).mean(2))
    return Whole(run, first=nn.Conv1d(3, 4, 2), norm=norm, last=nn.Linear(4, 3))


def normed_volume() -> nn.Module:
    run = lambda m, x: m.last(torch.tanh(m.norm(m.first(x))).mean((2, 3, 4)))
    return Whole(run, first=nn.Conv3d(1, 3, 2), norm=nn.BatchNorm3d(3), last=nn.Linear(3, 3))


class Twice(nn.Module):
    """One norm that runs twice in a pass, and another that shares its scale."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.sharing = nn.BatchNorm1d(6)
        self.sharing.weight = self.norm.weight
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.first(x)))
        return self.last(torch.tanh(self.sharing(torch.tanh(self.norm(x + x.square())))))


class AlsoActs(nn.BatchNorm1d):
    """Runs an activation, takes an argument more, and calls its parent."""

    def forward(self, x: Tensor, slope: float = 0.2) -> Tensor:
        return F.leaky_relu(super().forward(x), slope)


class ReadsItself(nn.BatchNorm1d):
    """Normalises by hand: reads its flags, and folds its statistics without torch's batch_norm."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            mean, variance = x.mean(0), x.var(0, unbiased=False)
            with torch.no_grad():
                self.running_mean = (1 - self.momentum) * self.running_mean + self.momentum * mean
                unbiased = variance * len(x) / (len(x) - 1)
                self.running_var = (1 - self.momentum) * self.running_var + self.momentum * unbiased
        else:
            mean, variance = self.running_mean, self.running_var
        return self.weight * (x - mean) / torch.sqrt(variance + self.eps) + self.bias


class OwnNorm(nn.Module):
    """A batch norm of one's own that is no subclass of torch's, on torch's function."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("variance", torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.variance, self.scale, None, self.training, 0.1)


class StaysInEval(NormedMlp):
    """Keeps its norms in eval mode whatever it is told, as fine-tuned detectors do."""

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        self.norm.eval()
        return self


class Residual(nn.Module):
    """Batch norm after an in-place ReLU, and a skip connection: what a ResNet's block does."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.block = nn.Sequential(
            nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        )
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = self.block(x).add_(x)
        return self.last(F.relu_(x).mean((2, 3)))


def instance_statistics(track: bool) -> nn.Module:
    run = lambda m, x: m.last(m.inorm(m.conv(x)).relu().mean((2, 3)))
    inorm = nn.InstanceNorm2d(3, track_running_stats=track)
    return Whole(run, conv=nn.Conv2d(1, 3, 3), inorm=inorm, last=nn.Linear(3, 3))


def _without_statistics(norm: nn.Module) -> nn.Module:
    return nn.InstanceNorm2d(norm.num_features, norm.eps, affine=norm.affine)


def with_norm(norm: Any, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = NormedMlp()
        model.norm = norm(6, **options)
        return model

    return make


def frozen() -> nn.Module:
    model = NormedMlp()
    model.norm.eval().requires_grad_(False)
    return model


def synchronised() -> nn.Module:
    return nn.SyncBatchNorm.convert_sync_batchnorm(NormedMlp())


_entry = partial(Entry, family="norms", tasks=VECTORS, quick=True)
_policies = ("batch", "support", "running")

_once = {"per_step_norm_affine": False}
# What follows "BatchNorm1d" in the name, network, options of the learner, fields of the entry.
VARIANTS: list[tuple[str, Callable[[], nn.Module], dict[str, Any], dict[str, Any]]] = [
    ("", NormedMlp, {}, {}),
    (" that acts", with_norm(AlsoActs), {}, {"after_norm": {AlsoActs: partial(F.leaky_relu, negative_slope=0.2)}}),
    (" without affine", with_norm(nn.BatchNorm1d, affine=False), {}, {}),
    (" without statistics", with_norm(nn.BatchNorm1d, track_running_stats=False), {}, {}),
    (", cumulative average", with_norm(nn.BatchNorm1d, momentum=None), {}, {}),
    (", adapted", NormedMlp, {"adapt_norm": True} | _once, {}),
    (", one row of scales", NormedMlp, _once, {}),
    (", one row of statistics", NormedMlp, {"per_step_norm_statistics": False}, {}),
    (", kept, frozen", frozen, {"keep_norm": "norm"}, {}),
    (", kept, learned", NormedMlp, {"keep_norm": "norm"}, {}),
    (", kept, adapted", NormedMlp, {"keep_norm": "norm", "adapt_norm": True} | _once, {}),
]

PATTERNS = [
    *(
        _entry(f"BatchNorm1d{name}, norm={p}", make=make, options={"norm": p} | options, **more)
        for name, make, options, more in VARIANTS
        for p in _policies
    ),
    *(
        _entry(f"BatchNorm1d twice in a pass, norm={p}", make=Twice, options={"norm": p}, adapted_alone=p == "batch")
        for p in _policies
    ),
    # Without stored statistics, as norm="batch" leaves it, a norm that reads them cannot run.
    *(
        _entry(
            f"BatchNorm1d written by hand, norm={p}",
            make=with_norm(ReadsItself),
            options={"norm": p},
            adapted_alone=p != "batch",
        )
        for p in _policies
    ),
    _entry(
        "BatchNorm1d, cumulative average, one row",
        make=with_norm(nn.BatchNorm1d, momentum=None),
        options={"per_step_norm_statistics": False},
    ),
    _entry("BatchNorm1d, momentum 1", make=with_norm(nn.BatchNorm1d, momentum=1.0)),
    _entry("BatchNorm1d, momentum 0", make=with_norm(nn.BatchNorm1d, momentum=0.0)),
    _entry("batch norm of one's own", make=lambda: Around(OwnNorm())),
    _entry("train() that leaves norms in eval mode", make=StaysInEval, options={"keep_norm": "norm"}),
    _entry("train() that leaves norms in eval mode, not kept", make=StaysInEval),
    _entry("BatchNorm1d in eval mode but not kept", make=frozen),
    _entry("BatchNorm1d over sequences", make=lambda: normed_sequence(nn.BatchNorm1d(4)), tasks=noise(3, 5)),
    _entry("BatchNorm3d", make=normed_volume, tasks=noise(1, 3, 3, 3)),
    _entry("BatchNorm2d in a residual block", make=Residual, tasks=IMAGES),
    _entry(
        "BatchNorm2d, timm's norm with activation",
        make=lambda: AroundImage(BatchNormAct2d(4)),
        tasks=IMAGES,
        after_norm={BatchNormAct2d: torch.relu},
    ),
    _entry("SyncBatchNorm", make=synchronised),
    _entry("GroupNorm", make=lambda: AroundImage(nn.GroupNorm(2, 4)), tasks=IMAGES),
    _entry("LayerNorm", make=lambda: Around(nn.LayerNorm(6))),
    _entry("LayerNorm without affine", make=lambda: Around(nn.LayerNorm(6, elementwise_affine=False))),
    _entry("RMSNorm", make=lambda: Around(nn.RMSNorm(6))),
    _entry("LocalResponseNorm", make=lambda: AroundImage(nn.LocalResponseNorm(3, alpha=0.5)), tasks=IMAGES),
    _entry("InstanceNorm2d", make=lambda: AroundImage(nn.InstanceNorm2d(4)), tasks=IMAGES),
    _entry("InstanceNorm2d with affine", make=lambda: AroundImage(nn.InstanceNorm2d(4, affine=True)), tasks=IMAGES),
    _entry(
        "InstanceNorm1d with affine", make=lambda: normed_sequence(nn.InstanceNorm1d(4, affine=True)), tasks=noise(3, 5)
    ),
    _entry(
        "InstanceNorm2d with statistics",
        make=partial(instance_statistics, True),
        tasks=IMAGES,
        refused=r"'inorm' \(InstanceNorm2d\).*track_running_stats=False.*'swap':",
    ),
    _entry(
        "InstanceNorm2d with statistics, swapped",
        make=partial(instance_statistics, True),
        plain=partial(instance_statistics, False),
        tasks=IMAGES,
        options={"swap": {nn.InstanceNorm2d: _without_statistics}},
    ),
]
