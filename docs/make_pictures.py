"""Draws docs/images/learned-rates.png: the learned inner rates of a small MAML++ run on generated characters.

    python docs/make_pictures.py

A minute or two on one CPU core. Needs matplotlib: pip install "metawrap[plot]".
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from metawrap import MAMLPlusPlus
from metawrap.backbones import Conv4
from metawrap.data import EpisodeSampler, load_data


def trained(meta_steps: int) -> MAMLPlusPlus:
    """A learner meta-trained on 5-way 1-shot tasks of generated characters."""
    torch.manual_seed(0)
    sampler = EpisodeSampler(load_data("glyphs").train, targets=3, tasks_per_batch=4, seed=0)
    learner = MAMLPlusPlus(
        Conv4(filters=16), norm="support", meta_lr=3e-3, epochs=10, iterations_per_epoch=max(1, meta_steps // 10)
    )
    for step, task_batch in enumerate(sampler.batches(meta_steps)):
        metrics = learner.meta_step(task_batch)
        if step % 100 == 0:
            print(f"meta-step {step}: loss {metrics.loss:.3f}")
    return learner


def draw(learner: MAMLPlusPlus, path: str | Path) -> None:
    """The rate of each parameter tensor, a line for each inner step."""
    rates = {name: rate.detach().tolist() for name, rate in learner.learning_rates.items()}
    names, steps = list(rates), learner.settings.inner_steps
    figure, axes = plt.subplots(figsize=(9, 4.2), layout="constrained")
    axes.axhline(0, color="0.6", lw=0.8)
    axes.axhline(0.1, color="0.6", lw=0.8, ls=":", label="start")
    for step in range(steps):
        colour = plt.get_cmap("viridis")(step / steps)
        axes.plot([rates[name][step] for name in names], "o-", color=colour, ms=4, label=f"inner step {step + 1}")
    axes.set_xticks(range(len(names)), names, rotation=35, ha="right")
    axes.set(ylabel="learned inner rate", title="A learned rate for each layer and inner step")
    axes.legend(frameon=False, ncols=3, fontsize="small")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--meta-steps", type=int, default=160)
    parser.add_argument("--out", default="docs/images/learned-rates.png")
    arguments = parser.parse_args()
    draw(trained(arguments.meta_steps), arguments.out)
