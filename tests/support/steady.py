"""What random weights and six small images would hide or blow up, made ordinary."""

from __future__ import annotations

from torch import nn


def steady(model: nn.Module, eps: float = 0.1) -> nn.Module:
    """The model with a large batch-norm eps and without parameters that start at (nearly) zero.

    With the usual eps, few small images and random weights make deep networks chaotic: rounding grows from 1e-16 to
    1e-6, in the reference as in the learner. Zero heads and tokens, and layer scales of 1e-6, make every other gradient
    vanish, and layer norms of zero tokens have slopes of a million.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eps = eps
    for parameter in model.parameters():
        if float(parameter.detach().abs().max()) < 1e-4:
            nn.init.normal_(parameter, std=0.3)
    return model
