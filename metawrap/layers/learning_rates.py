"""Learned inner-loop rates: one scalar per adapted parameter tensor and inner step (LSLR)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn


class LearningRates(nn.Module):
    """`rates[name]` is the (steps,) vector of the user's parameter `name`; the sign is free.

    A step past the last uses the last entry. Source: Antoniou et al. 2018, arXiv:1810.09502, LSLR; the authors' code
    keeps one rate per parameter tensor (weight and bias apart), as this does.
    """

    def __init__(self, parameters: Iterable[tuple[str, Tensor]], steps: int, initial: float, learned: bool) -> None:
        super().__init__()
        self.names: list[str] = []
        for name, like in parameters:
            dtype = like.real.dtype if like.is_complex() else like.dtype
            rate = torch.full((steps,), initial, dtype=dtype, device=like.device)
            self.names.append(name)
            self.register_parameter(_key(name), nn.Parameter(rate, requires_grad=learned))

    def __getitem__(self, name: str) -> nn.Parameter:
        if name not in self.names:
            raise KeyError(f"'{name}' has no learning rate; adapted parameters: {', '.join(self.names)}")
        return self._parameters[_key(name)]  # type: ignore[return-value]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def items(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Pairs of parameter name and its (steps,) rates."""
        return ((name, self[name]) for name in self.names)

    def per_step(self) -> dict[str, tuple[Tensor, ...]]:
        """Each name's rates as one scalar per step."""
        return {name: rates.unbind() for name, rates in self.items()}


def _key(name: str) -> str:
    # torch refuses dots in a parameter's own name, and names that are already an attribute, such as "items".
    return name.replace(".", "/") if "." in name else f"/{name}"
