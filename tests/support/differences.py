"""Finite differences of a meta-loss along a random direction: no derivative of torch's beyond the first takes part."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Values = dict[str, Tensor]
AT_MOST = 1e-6
# Longer ones leave the straight piece between the kinks of ReLU and max-pooling; shorter ones drown in rounding.
EXPONENTS = (-5, -6, -4, -7, -3, -8, -5.5, -6.5, -4.5, -7.5)


def difference_error(loss: Callable[[Values], float], values: Values, gradients: Mapping[str, Tensor | None]) -> float:
    """The relative error of the gradients' slope along a random direction, from the best of several step lengths.

    A second direction is tried where the kinks of ReLU and max-pooling lie close along the first: a wrong gradient is
    wrong along both.
    """
    error = _error_along(1, loss, values, gradients)
    return error if error <= AT_MOST else min(error, _error_along(2, loss, values, gradients))


def _error_along(
    seed: int, loss: Callable[[Values], float], values: Values, gradients: Mapping[str, Tensor | None]
) -> float:
    """The error along the direction that a seed draws.

    Every tensor has a like part in the slope, all of one sign, so that no error hides behind larger gradients. The step
    grows shorter or longer until the error is at most `AT_MOST`. Central differences of two lengths, a factor of ten
    apart, are also extrapolated (Richardson).
    """
    present = {name: g for name, g in gradients.items() if g is not None and g.numel()}
    norms = {name: float(torch.linalg.vector_norm(g)) for name, g in present.items()}
    floor = 1e-2 * max(norms.values())
    generator = torch.Generator().manual_seed(seed)
    direction = {}
    for name, g in present.items():
        unit = torch.randn(g.shape, generator=generator, dtype=g.dtype)
        direction[name] = unit * (-1 if _product(g, unit) < 0 else 1) / max(norms[name], floor)
    # Of unit length as a whole: a larger network has more kinks, and moves less in each of its entries.
    whole = sum(float(torch.linalg.vector_norm(d)) ** 2 for d in direction.values()) ** 0.5
    direction = {name: d / whole for name, d in direction.items()}
    slope = sum(_product(g, direction[name]) for name, g in present.items())

    def moved(length: float) -> float:
        return loss({n: v + length * direction[n] if n in direction else v for n, v in values.items()})

    found: dict[float, float] = {}
    tried: list[float] = []
    for exponent in EXPONENTS:
        length = 10.0**exponent
        found[exponent] = (moved(length) - moved(-length)) / (2 * length)
        tried.append(found[exponent])
        pairs = [(exponent, exponent + 1), (exponent - 1, exponent)]
        tried += [(100 * found[a] - found[b]) / 99 for a, b in pairs if a in found and b in found]
        if min(abs(one - slope) for one in tried) <= AT_MOST * abs(slope):
            break
    return min(abs(one - slope) for one in tried) / abs(slope)


def _product(a: Tensor, b: Tensor) -> float:
    # torch's gradient of a complex entry is that of its real part plus i times that of its imaginary part.
    return float((a.conj() * b).real.sum())


def assert_every_entry_is_a_difference(learner: Any, batch: Any) -> None:
    """The meta-gradient of each entry of each learned tensor is the central difference of the meta-loss."""
    learner(batch).loss.backward()
    for name, parameter in ((n, p) for n, p in learner.named_parameters() if p.requires_grad):
        for place in range(parameter.numel()):
            losses = []
            for change in (1e-5, -2e-5):
                parameter.data.view(-1)[place] += change
                losses.append(learner(batch).loss.item())
            parameter.data.view(-1)[place] += 1e-5
            found = 0.0 if parameter.grad is None else float(parameter.grad.view(-1)[place])
            expected = (losses[0] - losses[1]) / 2e-5
            assert abs(found - expected) <= max(1e-9, 1e-6 * abs(expected)), (name, place, found, expected)
