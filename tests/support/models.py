"""Networks that the tests wrap: each is a shape of module that people really bring."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvBlock(nn.Module):
    def __init__(self, inputs: int, filters: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, filters, 3, stride=stride, padding=1)
        self.norm = nn.BatchNorm2d(filters)
        self.pool = nn.Identity() if stride == 2 else nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(F.leaky_relu(self.norm(self.conv(x)), 0.01))


class Conv4(nn.Module):
    """The field's four-block network, with the names of the reference files: conv0.conv, conv0.norm, ..., linear."""

    def __init__(
        self, filters: int = 4, ways: int = 3, channels: int = 1, size: int = 16, strided: bool = False, blocks: int = 4
    ) -> None:
        super().__init__()
        self.blocks, self.strided = blocks, strided
        for index in range(blocks):
            inputs = channels if index == 0 else filters
            self.add_module(f"conv{index}", ConvBlock(inputs, filters, 2 if strided else 1))
        side = 1 if strided else size // 2**blocks
        self.linear = nn.Linear(filters * side * side, ways)

    def forward(self, x: Tensor) -> Tensor:
        for index in range(self.blocks):
            x = getattr(self, f"conv{index}")(x)
        if self.strided:
            x = x.mean(dim=(2, 3))
        return self.linear(x.flatten(1))


class LSTMClassifier(nn.Module):
    """x: (examples, time, features)."""

    def __init__(self, features: int = 3, hidden: int = 5, ways: int = 3, layers: int = 2) -> None:
        super().__init__()
        self.lstm = nn.LSTM(features, hidden, num_layers=layers, batch_first=True)
        self.linear = nn.Linear(hidden, ways)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.lstm(x)[0][:, -1])


class TiedNet(nn.Module):
    """One parameter under two names (into.weight, again.weight) and one module under two names (mix, mix_alias)."""

    def __init__(self, width: int = 6, ways: int = 3) -> None:
        super().__init__()
        self.into = nn.Linear(width, width)
        self.mix = nn.Linear(width, width)
        self.mix_alias = self.mix
        self.again = nn.Linear(width, width)
        self.again.weight = self.into.weight
        self.norm = nn.BatchNorm1d(width)
        self.linear = nn.Linear(width, ways)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.mix(torch.tanh(self.into(x))))
        x = self.norm(torch.tanh(self.again(x)))
        return self.linear(torch.tanh(self.mix_alias(x)))


def _scale_first_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0] * 1.5 + 0.1, *args[1:])


def _squash_output(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return torch.tanh(output) + 0.2 * output


def hooked_conv4(**options: Any) -> Conv4:
    """A Conv4 whose user hooks change values: a pre-hook on a conv, forward hooks on a norm, a block and the root."""
    model = Conv4(**options)
    model.conv1.conv.register_forward_pre_hook(_scale_first_input)
    model.conv0.norm.register_forward_hook(_squash_output)
    model.conv2.register_forward_hook(_squash_output)
    model.register_forward_hook(_squash_output)
    return model


class BatchNormAct2d(nn.BatchNorm2d):
    """A norm that also runs an activation, as timm's does: replacing it by a plain norm would lose the ReLU."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training or not self.track_running_stats,
            self.momentum,
            self.eps,
        )
        return torch.relu(x)


class ActNormNet(nn.Module):
    def __init__(self, filters: int = 4, ways: int = 3, channels: int = 1) -> None:
        super().__init__()
        self.features = nn.Sequential(
            OrderedDict(
                conv0=nn.Conv2d(channels, filters, 3, padding=1, bias=False),
                norm0=BatchNormAct2d(filters),
                conv1=nn.Conv2d(filters, filters, 3, padding=1, bias=False),
                norm1=BatchNormAct2d(filters),
            )
        )
        self.linear = nn.Linear(filters, ways)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.features(x).mean(dim=(2, 3)))


class Mlp(nn.Module):
    """No norms: plain regression or classification on (examples, features)."""

    def __init__(self, inputs: int = 1, hidden: int = 8, outputs: int = 1) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, hidden)
        self.second = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class NormedMlp(nn.Module):
    """The smallest network with a BatchNorm1d; quick, for tests about policies and counters."""

    def __init__(self, inputs: int = 4, hidden: int = 6, ways: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, hidden)
        self.norm = nn.BatchNorm1d(hidden)
        self.linear = nn.Linear(hidden, ways)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.tanh(self.norm(self.first(x))))


class TwoInputs(nn.Module):
    """`model(*x)` for a tuple and `model(**x)` for a dict with keys `left` and `right`."""

    def __init__(self, ways: int = 3) -> None:
        super().__init__()
        self.left = nn.Linear(2, 5)
        self.right = nn.Linear(3, 5)
        self.linear = nn.Linear(5, ways)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.linear(torch.tanh(self.left(left) + self.right(right)))


def seeded(build: Any, seed: int = 0) -> nn.Module:
    """`build()` under a seed, in float64, with norm scales and shifts that are not the trivial ones and zeros."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build().double()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
                nn.init.uniform_(module.weight, 0.7, 1.3)
                nn.init.uniform_(module.bias, -0.2, 0.2)
    return model


def class_tasks(
    shape: tuple[int, ...], *, tasks: int = 2, ways: int = 3, shots: int = 1, targets: int = 2, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A stacked float64 task batch of noise with a class-dependent offset, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)

    def part(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(ways).repeat_interleave(count).repeat(tasks, 1)
        noise = torch.randn(tasks, ways * count, *shape, generator=generator, dtype=torch.float64)
        return noise + 0.5 * prototypes.repeat_interleave(count, 1), labels

    prototypes = torch.randn(tasks, ways, *shape, generator=generator, dtype=torch.float64)
    return (*part(shots), *part(targets))
