"""Backbones of the few-shot literature, as ordinary modules without any meta-learning."""

from __future__ import annotations

from torch import Tensor, nn

from metawrap.errors import ArgumentError


class ConvBlock(nn.Module):
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

    def forward(self, images: Tensor) -> Tensor:
        """One block; shapes as in the class docstring."""
        return self.pool(self.activation(self.norm(self.conv(images))))  # type: ignore[no-any-return]


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
