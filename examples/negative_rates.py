"""Learned inner rates may become negative. Here they must: every support label has the wrong sign.

    python examples/negative_rates.py

Seconds on one CPU core. A task is a line through the origin. Its support labels come from a sensor that is mounted
upside down, its target labels from one that is not: descending on the support loss leads away from the target, climbing
it leads there. The rates start positive, and the outer loop turns their sign.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metawrap import MAMLPlusPlus


def lines(tasks: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A stacked batch of `tasks` lines y = slope * x: 10 support examples, upside down, and 10 targets, upright."""
    slope = torch.empty(tasks, 1, 1).uniform_(-2, 2, generator=generator)
    support_x, target_x = torch.empty(2, tasks, 10, 1).uniform_(-1, 1, generator=generator)
    return support_x, -slope * support_x, target_x, slope * target_x


def make_learner() -> MAMLPlusPlus:
    """One weight and one bias, with a rate each for either of two inner steps."""
    model = nn.Linear(1, 1)
    return MAMLPlusPlus(model, inner_steps=2, inner_lr=0.1, loss_fn=F.mse_loss, meta_lr=0.02, cosine_annealing=False)


def report(learner: MAMLPlusPlus, moment: str, test: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    """Prints the loss on unseen tasks, and the rates."""
    print(f"{moment}: target loss {learner.evaluate(test).mean:.4f}")
    for name, rates in learner.learning_rates.items():
        print(f"  rate of {name:<8}" + "".join(f"  step {i}: {rate:+.3f}" for i, rate in enumerate(rates.tolist(), 1)))


def main(meta_steps: int) -> MAMLPlusPlus:
    """Trains, prints loss and rates before and after, and returns the learner."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    test = lines(200, generator)
    learner = make_learner()
    report(learner, "before training", test)
    for _ in range(meta_steps):
        learner.meta_step(lines(8, generator))
    report(learner, f"after {meta_steps} meta-steps", test)
    return learner


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--meta-steps", type=int, default=400)
    main(parser.parse_args().meta_steps)
