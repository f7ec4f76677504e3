"""A learned update rule: a two-layer LSTM, the same for every weight, whose cell is the weight."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_FORGET = 5.0  # Its sigmoid is 0.993.
_SMALL = 0.01


class LSTMUpdate(nn.Module):
    """Ravi & Larochelle 2017, section 3: each entry of each tensor goes through the same LSTM, with a state of its own.

    The first layer is an ordinary LSTM on the preprocessed gradient and loss. The second has the weight itself for its
    cell: weight <- forget * weight - input * gradient, where each gate is the sigmoid of a linear function of the first
    layer's output, the weight, and the gate's own value one step before (0 at first). The gradient and the loss count
    as constants, so that a gradient with respect to the initial weights and to these parameters needs no second
    derivative of the user's model.

    forget_weight, input_weight: (hidden_size + 2,). forget_bias, input_bias: scalars.
    """

    def __init__(self, hidden_size: int, rate: float, dtype: torch.dtype, device: torch.device) -> None:
        """Args: rate: where the input gate starts, as the rate of a gradient step, between 0 and 1."""
        super().__init__()
        like: dict[str, Any] = {"dtype": dtype, "device": device}
        self.first = nn.LSTMCell(4, hidden_size, **like)
        self.forget_weight = nn.Parameter(torch.empty(hidden_size + 2, **like).uniform_(-_SMALL, _SMALL))
        self.input_weight = nn.Parameter(torch.empty(hidden_size + 2, **like).uniform_(-_SMALL, _SMALL))
        self.forget_bias = nn.Parameter(torch.tensor(_FORGET, **like))
        self.input_bias = nn.Parameter(torch.tensor(math.log(rate / (1 - rate)), **like))

    def step(
        self,
        fast: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor | None],
        rates: Mapping[str, Tensor],
        losses: Tensor,
        state: Mapping[str, Mapping[str, Any]],
    ) -> tuple[dict[str, Tensor], Mapping[str, Mapping[str, Any]]]:
        """As `InnerOptimizer.step`: the next weights, and each tensor's state; there are no rates."""
        updated, after = dict(fast), dict(state)
        for name, gradient in gradients.items():
            if gradient is not None:
                updated[name], after[name] = self._moved(fast[name], gradient.detach(), losses, state.get(name, {}))
        return updated, after

    def _moved(
        self, weight: Tensor, gradient: Tensor, losses: Tensor, state: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        dtype = self.forget_bias.dtype
        gradient = gradient.to(dtype)
        loss = losses.detach().to(dtype).reshape(losses.shape + (1,) * (gradient.ndim - losses.ndim))
        inputs = torch.cat([preprocessed(gradient), preprocessed(loss).expand(*gradient.shape, 2)], -1).reshape(-1, 4)
        before = (state["hidden"], state["cell"]) if state else None
        hidden, cell = self.first(inputs, before)
        own, zero = weight.to(dtype).flatten(), inputs.new_zeros(len(inputs))
        forget = self._gate(hidden, own, state.get("forget", zero), self.forget_weight, self.forget_bias)
        rate = self._gate(hidden, own, state.get("input", zero), self.input_weight, self.input_bias)
        moved = forget * own - rate * gradient.flatten()
        return moved.view_as(weight).to(weight.dtype), {"hidden": hidden, "cell": cell, "forget": forget, "input": rate}

    @staticmethod
    def _gate(hidden: Tensor, own: Tensor, before: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.sigmoid(hidden @ weight[:-2] + own * weight[-2] + before * weight[-1] + bias)


def preprocessed(values: Tensor, p: float = 10.0) -> Tensor:
    """Two numbers for each, on a last axis of their own: how large, and which sign.

    (log|x| / p, sign(x)) where |x| >= exp(-p), else (-1, exp(p) x). Source: Ravi & Larochelle 2017,
    section 3.2, after Andrychowicz et al. 2016, arXiv:1606.04474, appendix A.
    """
    large = values.abs() >= math.exp(-p)
    size = torch.where(large, values, torch.ones_like(values)).abs().log() / p
    return torch.stack(
        [torch.where(large, size, -torch.ones_like(values)), torch.where(large, values.sign(), math.exp(p) * values)],
        -1,
    )
