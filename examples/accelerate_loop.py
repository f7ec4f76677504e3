"""A learner in a loop of one's own under Accelerate: `prepare`, `backward`, and several processes or devices.

    python examples/accelerate_loop.py
    accelerate launch --num_processes 2 --cpu examples/accelerate_loop.py

Seconds on one CPU core. Needs Accelerate: pip install "metawrap[accelerate]".

Each process draws its own tasks. In several processes Accelerate wraps the learner in DistributedDataParallel, under
which the gradients are those of the mean over the tasks of all.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs

from metawrap import MAMLPlusPlus, TaskBatch
from metawrap.backbones import Conv4
from metawrap.data import EpisodeSampler, load_data


def make_accelerator(**options: Any) -> Accelerator:
    """Running statistics are the same in all processes already: DDP need not broadcast them."""
    return Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)], **options)


def train_epoch(
    accelerator: Accelerator, learner: Any, optimizer: Any, epoch: int, task_batches: Iterable[TaskBatch]
) -> float:
    """One epoch of meta-steps; returns the mean meta-loss. learner, optimizer: what `accelerator.prepare` returned."""
    # In a loop of one's own the learner does not count meta-steps: its schedules stand still unless they are told.
    accelerator.unwrap_model(learner).epoch = epoch
    learner.train()
    losses = []
    for task_batch in task_batches:
        optimizer.zero_grad()
        loss = learner(task_batch.to(accelerator.device)).loss
        accelerator.backward(loss)
        optimizer.step()
        losses.append(loss.detach())
    return float(torch.stack(losses).mean())


def main(epochs: int, iterations: int, filters: int = 16, tasks_to_test: int = 50) -> Any:
    """Meta-trains on generated characters and tests on unseen ones; returns the learner."""
    accelerator = make_accelerator()
    # One seed for the weights, which must be equal everywhere; another one for the tasks of each process.
    torch.manual_seed(0)
    data = load_data("glyphs")
    tasks = EpisodeSampler(data.train, tasks_per_batch=4, targets=3, seed=accelerator.process_index)
    learner = MAMLPlusPlus(
        Conv4(filters=filters), inner_steps=3, norm="support", epochs=epochs, iterations_per_epoch=iterations
    )
    prepared, optimizer = accelerator.prepare(learner, learner.optimizer)
    for epoch in range(epochs):
        batches = tasks.batches(iterations, start=epoch * iterations)
        loss = train_epoch(accelerator, prepared, optimizer, epoch, batches)
        accelerator.print(f"epoch {epoch}: meta-loss {loss:.3f}")
    learner = accelerator.unwrap_model(prepared)
    unseen = EpisodeSampler(data.test, tasks_per_batch=tasks_to_test, seed=1).batch(0).to(accelerator.device)
    accelerator.print("before adapting:", learner.evaluate(unseen, steps=0))
    accelerator.print("after adapting: ", learner.evaluate(unseen))
    accelerator.end_training()
    return learner


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--iterations", type=int, default=25)
    arguments = parser.parse_args()
    main(arguments.epochs, arguments.iterations)
