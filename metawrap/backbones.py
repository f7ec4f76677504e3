"""Backbones of the few-shot literature, as ordinary modules without any meta-learning."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metawrap.errors import ArgumentError


class ConvBlock(nn.Sequential):
    """3x3 convolution with bias, batch norm, leaky ReLU, then 2x2 max-pool; `strided` has stride 2 and no pool.

        >>> import torch
        >>> ConvBlock(1, 64, strided=False, slope=0.0)(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 64, 14, 14])

    Input (batch, in_channels, h, w); output (batch, filters, h // 2, w // 2), or (h + 1) // 2 if strided.
    """

    def __init__(self, in_channels: int, filters: int, strided: bool, slope: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, filters, 3, stride=2 if strided else 1, padding=1)
        self.norm = nn.BatchNorm2d(filters)
        self.activation = nn.LeakyReLU(slope)
        self.pool = nn.Identity() if strided else nn.MaxPool2d(2)


class Conv4(nn.Module):
    """Four conv blocks and a linear head: the backbone of MAML and MAML++.

        >>> import torch
        >>> Conv4(in_channels=3, image_size=84, ways=5)(torch.zeros(2, 3, 84, 84)).shape
        torch.Size([2, 5])

    Input (batch, in_channels, image_size, image_size); output (batch, ways) logits. Weights are
    Xavier-uniform, biases zero.
    Sources: Vinyals et al. 2016, arXiv:1606.04080; strided form and initialisation as in Antoniou et al. 2018.

    Args:
        in_channels: image channels.
        image_size: side of the square images in pixels; at least 16 with pooling.
        ways: classes of a task.
        filters: channels of every block: 64 for Omniglot, 48 for mini-ImageNet.
        strided: stride 2 and global average pooling instead of max-pooling.
        slope: the leaky ReLU's slope for negative inputs; 0 gives the paper's ReLU.
    Raises:
        ArgumentError: the images are too small for four poolings.
    """

    def __init__(
        self,
        in_channels: int = 1,
        image_size: int = 28,
        ways: int = 5,
        filters: int = 64,
        strided: bool = False,
        slope: float = 0.01,
    ) -> None:
        super().__init__()
        side = 1 if strided else image_size // 16
        if side < 1:
            raise ArgumentError(f"image_size: expected at least 16 for four poolings, but got {image_size}.")
        self.conv0 = ConvBlock(in_channels, filters, strided, slope)
        self.conv1 = ConvBlock(filters, filters, strided, slope)
        self.conv2 = ConvBlock(filters, filters, strided, slope)
        self.conv3 = ConvBlock(filters, filters, strided, slope)
        self.average = nn.AdaptiveAvgPool2d(1) if strided else nn.Identity()
        self.linear = nn.Linear(filters * side * side, ways)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> Tensor:
        """Logits of a batch of images."""
        for block in (self.conv0, self.conv1, self.conv2, self.conv3):
            images = block(images)
        return self.linear(self.average(images).flatten(1))  # type: ignore[no-any-return]


class ResNet12(nn.Module):
    """Four residual blocks of three convolutions, global average pooling and a linear head.

        >>> ResNet12(ways=5, filters=8)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 5])

    Input (batch, in_channels, h, w), h and w at least 16; output (batch, ways) logits. With 64 filters the blocks have
    64, 160, 320 and 640 channels, and the network without its head has 12.4 million weights.
    Source: Lee et al. 2019, MetaOptNet, arXiv:1904.03758, and their code, which widens the ResNet-12 of TADAM (Oreshkin
    et al. 2018, arXiv:1805.10123). Their code raises the drop rate over 40,000 steps; here it is constant.

    Args:
        in_channels: image channels.
        ways: classes of a task.
        filters: channels of the first block; the others have 2.5, 5 and 10 times as many.
        drop_rate: the share of features to drop in training, by dropout after the first two blocks and by DropBlock
            (Ghiasi et al. 2018, arXiv:1810.12890) after the last two; 0.1 in MetaOptNet.
        drop_block: side of the squares that DropBlock drops: 5 for 84 pixels, 2 for 32.
    Raises:
        ArgumentError: drop_rate or drop_block is out of range.
    """

    def __init__(
        self, in_channels: int = 3, ways: int = 5, filters: int = 64, drop_rate: float = 0.0, drop_block: int = 5
    ) -> None:
        super().__init__()
        if not 0 <= drop_rate < 1 or drop_block < 1:
            raise ArgumentError(
                f"drop_rate, drop_block: expected a share from 0 to below 1, and at least 1 pixel, but got {drop_rate} "
                f"and {drop_block}. Take 0.1 and 5, as MetaOptNet does."
            )
        widths = [filters, filters * 5 // 2, filters * 5, filters * 10]
        self.blocks = nn.Sequential()
        for place, (channels, width) in enumerate(zip([in_channels, *widths], widths, strict=False)):
            drop = nn.Dropout(drop_rate) if place < 2 else DropBlock(drop_rate, drop_block)
            self.blocks.append(_ResNet12Block(channels, width, drop if drop_rate else nn.Identity()))
        self.linear = nn.Linear(widths[-1], ways)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="leaky_relu")

    def forward(self, images: Tensor) -> Tensor:
        """Logits of a batch of images."""
        return self.linear(self.blocks(images).mean((2, 3)))  # type: ignore[no-any-return]


class _ResNet12Block(nn.Module):
    """Three 3x3 convolutions with norms, beside a 1x1 convolution; pooling halves height and width of the sum."""

    def __init__(self, in_channels: int, filters: int, drop: nn.Module) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels in (in_channels, filters, filters):
            convolution = nn.Conv2d(channels, filters, 3, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(filters), nn.LeakyReLU(0.1)]
        self.residual = nn.Sequential(*layers[:-1])
        self.shortcut = nn.Sequential(nn.Conv2d(in_channels, filters, 1, bias=False), nn.BatchNorm2d(filters))
        self.activation, self.pool, self.drop = nn.LeakyReLU(0.1), nn.MaxPool2d(2), drop

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.pool(self.activation(self.residual(x) + self.shortcut(x))))  # type: ignore[no-any-return]


class DropBlock(nn.Module):
    """Drops squares of features in training, and scales the others up; changes nothing in eval mode.

    rate: the expected share of dropped features. side: of the squares, at most that of the features.
    """

    def __init__(self, rate: float, side: int) -> None:
        super().__init__()
        self.rate, self.side = rate, side

    def forward(self, x: Tensor) -> Tensor:
        """Input and output: (batch, channels, h, w)."""
        if not self.training:
            return x
        height, width = x.shape[2:]
        side = min(self.side, height, width)
        corners = height - side + 1, width - side + 1  # the places where a square fits
        chance = self.rate * height * width / (side**2 * corners[0] * corners[1])
        chosen = (torch.rand(*x.shape[:2], *corners, device=x.device) < chance).to(x.dtype)
        kept = 1 - F.max_pool2d(F.pad(chosen, [side - 1] * 4), side, stride=1)
        return x * kept * (kept.numel() / kept.sum().clamp(min=1))


class WideResNet(nn.Module):
    """A wide residual network, by default WRN-28-10: a convolution, three groups of blocks, a norm and a linear head.

        >>> WideResNet(ways=5, depth=10, width=1)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 5])

    Input (batch, in_channels, h, w); output (batch, ways) logits. The groups have 16, 32 and 64 times `width` channels,
    and work on the whole, half and quarter of h and w. WRN-28-10 has 36.5 million weights.
    Sources: Zagoruyko and Komodakis 2016, arXiv:1605.07146; for few-shot learning Mangla et al. 2020, S2M2,
    arXiv:1907.12087, on 80 pixels.

    Args:
        in_channels: image channels.
        ways: classes of a task.
        depth: the number of layers: 4 and a multiple of 6.
        width: times the channels of the thinnest network.
    Raises:
        ArgumentError: there is no network of this depth.
    """

    def __init__(self, in_channels: int = 3, ways: int = 5, depth: int = 28, width: int = 10) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ArgumentError(f"depth: expected 10, 16, 22, 28, ..., but got {depth}. Take the nearest of these.")
        self.conv = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        blocks, channels = [], 16
        for group in range(3):
            for place in range((depth - 4) // 6):
                filters = 16 * width * 2**group
                blocks.append(_WideBlock(channels, filters, stride=2 if group and not place else 1))
                channels = filters
        self.blocks = nn.Sequential(*blocks)
        self.norm, self.activation = nn.BatchNorm2d(channels), nn.ReLU()
        self.linear = nn.Linear(channels, ways)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.linear.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of a batch of images."""
        features = self.activation(self.norm(self.blocks(self.conv(images))))
        return self.linear(features.mean((2, 3)))  # type: ignore[no-any-return]


class _WideBlock(nn.Module):
    """Norm, ReLU and convolution, twice; added to its input, or to a convolution of it where the shape changes."""

    def __init__(self, in_channels: int, filters: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(in_channels), nn.BatchNorm2d(filters)
        self.conv1 = nn.Conv2d(in_channels, filters, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(filters, filters, 3, padding=1, bias=False)
        self.activation = nn.ReLU()
        same = in_channels == filters and stride == 1
        self.shortcut = None if same else nn.Conv2d(in_channels, filters, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        ready = self.activation(self.norm1(x))
        beside = x if self.shortcut is None else self.shortcut(ready)
        return beside + self.conv2(self.activation(self.norm2(self.conv1(ready))))  # type: ignore[no-any-return]
