"""Regression: learn to fit a sinusoid of unknown amplitude and phase from ten points (Finn et al. 2017, section 5.1).

    python examples/sinusoid.py --out sinusoid.png

A minute on two CPU cores. Needs matplotlib: pip install "metawrap[plot]".
"""

from __future__ import annotations

import argparse
import math

import torch
import torch.nn.functional as F
from torch import nn

from metawrap import MAMLPlusPlus, Task, TaskBatch

POINTS = 10


def sinusoids(tasks: int, generator: torch.Generator) -> TaskBatch:
    """Tasks of `POINTS` support and `POINTS` target points; x in [-5, 5], amplitude in [0.1, 5], phase in [0, pi]."""
    amplitude = 0.1 + 4.9 * torch.rand(tasks, 1, 1, generator=generator)
    phase = math.pi * torch.rand(tasks, 1, 1, generator=generator)
    x = 10 * torch.rand(tasks, 2 * POINTS, 1, generator=generator) - 5
    y = amplitude * torch.sin(x - phase)
    return TaskBatch.stacked(x[:, :POINTS], y[:, :POINTS], x[:, POINTS:], y[:, POINTS:])


def make_learner(meta_steps: int) -> MAMLPlusPlus:
    """The paper's network, two hidden layers of 40 units; the schedules run over ten epochs."""
    model = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
    epoch = max(1, meta_steps // 10)
    return MAMLPlusPlus(model, inner_lr=0.02, meta_lr=2e-3, loss_fn=F.mse_loss, epochs=10, iterations_per_epoch=epoch)


def plot(learner: MAMLPlusPlus, task: Task, path: str) -> None:
    """Draws one task: its points, the truth, and the network after 0, 1 and 5 inner steps."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise SystemExit('The plot needs matplotlib: pip install "metawrap[plot]"') from error
    x = torch.linspace(-5, 5, 200).unsqueeze(1)
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(task.target_x, task.target_y, "o", ms=5, color="0.6", label="targets, unseen")
    axes.plot(task.support_x, task.support_y, "k^", ms=8, label=f"support, {POINTS} points")
    for steps, style in ((0, ":"), (1, "--"), (5, "-")):
        with torch.no_grad():
            fitted = learner.adapt(task.support_x, task.support_y, steps=steps)(x)
        name = f"after {steps} inner step{'' if steps == 1 else 's'}"
        axes.plot(x, fitted, style, color="tab:red", alpha=0.4 + 0.12 * steps, lw=2, label=name)
    axes.set(xlabel="x", ylabel="y", title="A sinusoid fitted from ten points")
    figure.legend(loc="outside lower center", frameon=False, ncols=3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(meta_steps: int = 3000, out: str = "sinusoid.png") -> float:
    """Trains, prints the error before and after adaptation, plots; returns the error after."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    learner = make_learner(meta_steps)
    for step in range(meta_steps):
        metrics = learner.meta_step(sinusoids(4, generator))
        if step % 500 == 0:
            print(f"meta-step {step:4d}  loss {metrics.loss:.3f}")
    unseen = sinusoids(200, torch.Generator().manual_seed(1))
    print("before adapting:", learner.evaluate(unseen, steps=0))
    result = learner.evaluate(unseen)
    print("after adapting: ", result)
    plot(learner, unseen[0], out)
    print(f"curves: {out}")
    return result.mean


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--meta-steps", type=int, default=3000)
    parser.add_argument("--out", default="sinusoid.png")
    arguments = parser.parse_args()
    main(arguments.meta_steps, arguments.out)
