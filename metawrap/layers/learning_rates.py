"""Learned inner-loop rates: one for each adapted tensor and inner step (LSLR), or one for each weight (Meta-SGD)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn


class LearningRates(nn.Module):
    """`rates[name]` holds a row for each step of the user's parameter `name`; the sign is free.

    A row is a scalar, or with `per_weight` as large as the parameter: (rows, *shape), and (rows, *shape, 2) for a
    complex one, whose entries are two numbers each. A step past the last row uses the last row, so that one row serves
    all steps. Source: Antoniou et al. 2018, arXiv:1810.09502, LSLR; the authors' code keeps one rate per parameter
    tensor (weight and bias apart), as this does.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, Tensor]],
        rows: int,
        initial: float,
        learned: bool,
        per_weight: bool = False,
    ) -> None:
        super().__init__()
        self.names: list[str] = []
        for name, like in parameters:
            real = torch.view_as_real(like) if like.is_complex() else like
            shape = (rows, *real.shape) if per_weight else (rows,)
            rate = torch.full(shape, initial, dtype=real.dtype, device=like.device)
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
        """Pairs of parameter name and its rates, row by row."""
        return ((name, self[name]) for name in self.names)

    def per_step(self) -> dict[str, tuple[Tensor, ...]]:
        """Each name's rows, one after another."""
        return {name: rates.unbind() for name, rates in self.items()}


def _key(name: str) -> str:
    # torch refuses dots in a parameter's own name, and names that are already an attribute, such as "items".
    return name.replace(".", "/") if "." in name else f"/{name}"
