"""Gradient steps of a torch optimizer that fit a head, or a whole network, to one support set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from metawrap.engines import call_model
from metawrap.inner_loop.outcome import autograd, dense
from metawrap.settings.settings import InnerOptimizerName, check_choice, check_positive

_OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}


@dataclass(frozen=True)
class HeadTuning:
    """Steps of SGD or Adam at the rate `inner_lr`, each on the whole support set.

    >>> layer, x = nn.Linear(2, 1), torch.ones(3, 2)
    >>> HeadTuning(inner_lr=0.1).fit(layer, x, x.sum(1, keepdim=True), steps=200, loss=nn.functional.mse_loss)
    >>> bool((layer(x) - 2).abs().max() < 1e-3)
    True
    """

    inner_lr: float
    inner_optimizer: InnerOptimizerName = "sgd"

    def __post_init__(self) -> None:
        check_positive("inner_lr", self.inner_lr)
        check_choice("inner_optimizer", self.inner_optimizer)

    def fit(self, module: nn.Module, inputs: Any, labels: Any, *, steps: int, loss: Callable[..., Tensor]) -> None:
        """Moves the module's parameters, except frozen ones, in place.

        Args:
            inputs: of the module, (examples, ...). loss: `loss(prediction, labels)`, a scalar.
        """
        learned = [parameter for parameter in module.parameters() if parameter.requires_grad]
        optimizer = _OPTIMIZERS[self.inner_optimizer](learned, lr=self.inner_lr)  # type: ignore[call-arg]
        with autograd(True):
            for _ in range(steps):
                value = loss(call_model(module, inputs), labels)
                gradients = torch.autograd.grad(value, learned, allow_unused=True)
                for parameter, gradient in zip(learned, gradients, strict=True):
                    parameter.grad = None if gradient is None else dense(gradient)
                optimizer.step()
        for parameter in learned:
            parameter.grad = None
