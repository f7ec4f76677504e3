"""From a support set to a file that runs without metawrap: `adapt`, then `torch.export`.

    python examples/export_adapted.py --out adapted.pt2

Seconds on one CPU core. The exported program takes any number of images. It holds the statistics of the support set
(norm="support"), so that an image is predicted alike in any company.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from metawrap import MAMLPlusPlus
from metawrap.backbones import Conv4
from metawrap.data import EpisodeSampler, load_data


def export(adapted: nn.Module, example_x: Tensor, path: str) -> None:
    """Writes the module as an exported program for any number of examples; `example_x` holds at least two."""
    batch = torch.export.Dim("batch")
    program = torch.export.export(adapted, (example_x,), dynamic_shapes=({0: batch},))
    torch.export.save(program, path)


def main(meta_steps: int = 100, out: str = "adapted.pt2") -> tuple[nn.Module, Tensor]:
    """Meta-trains, adapts to one unseen task and exports; returns the adapted module and the task's targets."""
    torch.manual_seed(0)
    data = load_data("glyphs")
    train = EpisodeSampler(data.train, tasks_per_batch=4, targets=3, seed=0)
    learner = MAMLPlusPlus(Conv4(filters=16), inner_steps=3, norm="support")
    for task_batch in train.batches(meta_steps):
        learner.meta_step(task_batch)
    task = EpisodeSampler(data.test, targets=5, seed=1).batch(0)[0]
    adapted = learner.adapt(task.support_x, task.support_y)
    export(adapted, task.target_x, out)

    loaded = torch.export.load(out).module()
    right = (loaded(task.target_x).argmax(1) == task.target_y).sum()
    print(f"{out}: {int(right)} of {len(task.target_y)} targets right")
    return adapted, task.target_x


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--meta-steps", type=int, default=100)
    parser.add_argument("--out", default="adapted.pt2")
    arguments = parser.parse_args()
    main(arguments.meta_steps, arguments.out)
