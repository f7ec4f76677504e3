"""What changes over epochs: weights of the step losses, derivative order, and the outer learning rate."""

from __future__ import annotations

import math
from functools import lru_cache


@lru_cache
def step_loss_weights(steps: int, epoch: int, anneal_epochs: int) -> tuple[float, ...]:
    """Weights of the target loss after each inner step (MSL).

    Starts uniform and shifts to the last step over `anneal_epochs` epochs; from then on only the last step counts.

    Args:
        steps: inner updates per task.
        epoch: meta-training epoch, from 0.
        anneal_epochs: epochs until only the last step counts; 0 turns the multi-step loss off.
    Returns:
        `steps` non-negative numbers that sum to 1.
    Raises:
        ValueError: steps is below 1.
    Source: Antoniou et al. 2018, arXiv:1810.09502, Eq. 4 (v_i); the 0.03 floor is from the authors' code.
    """
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, but got {steps}.")
    if epoch >= anneal_epochs:
        return (0.0,) * (steps - 1) + (1.0,)
    floor = 0.03 / steps
    early = max(1 / steps - epoch / (steps * anneal_epochs), floor)
    last = min(1 / steps + epoch * (steps - 1) / (steps * anneal_epochs), 1 - (steps - 1) * floor)
    return (early,) * (steps - 1) + (last,)


@lru_cache
def is_second_order(epoch: int, first_order_epochs: float) -> bool:
    """Whether an epoch differentiates through the inner gradients (DA): not before `first_order_epochs` have passed."""
    return epoch >= first_order_epochs


@lru_cache
def cosine_meta_lr(epoch: int, epochs: int, highest: float, lowest: float) -> float:
    """The outer learning rate of an epoch (CA): a half cosine from `highest` to `lowest` that then stays there.

    The usual `CosineAnnealingLR` rises again past its end; longer runs than planned must not.
    Source: Loshchilov & Hutter 2017, arXiv:1608.03983, Eq. 5, without restarts.
    """
    progress = min(epoch, epochs) / epochs
    return lowest + (highest - lowest) * (1 + math.cos(math.pi * progress)) / 2


@lru_cache
def linear_meta_lr(epoch: int, epochs: int, highest: float) -> float:
    """The outer learning rate of an epoch: from `highest` in equal parts to 0, where it stays.

    Source: Nichol et al. 2018, arXiv:1803.02999, whose code goes down meta-step by meta-step.
    """
    return highest * (1 - min(epoch, epochs) / epochs)
