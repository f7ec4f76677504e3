"""A learner inside a LightningModule: Lightning owns the loop, the checkpoints and the devices, metawrap the meta-loss.

    python examples/lightning_module.py

Seconds on one CPU core. Needs Lightning: pip install "metawrap[lightning]".

Lightning calls backward and steps the optimizer, so the learner is called, `learner(task_batch).loss`, in place of
`meta_step`. Two things are then ours to do: to hand the epoch on, or the learner's schedules stand still, and to draw
other episodes in each epoch. What `meta_step` does besides (chunks of tasks, masked non-finite steps) is not done.
"""

from __future__ import annotations

import argparse
import warnings
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from metawrap import MAMLPlusPlus, TaskBatch
from metawrap.backbones import Conv4
from metawrap.data import EpisodeSampler, load_data


class MetaLearning(lightning.LightningModule):
    """Meta-trains a learner under Lightning's automatic optimisation.

    learner: any method of metawrap. train, validation: where episodes are drawn. iterations: meta-steps per epoch; the
    learner's own `epochs` and the trainer's `max_epochs` should agree, as its schedules run over them.
    """

    def __init__(
        self, learner: Any, train: EpisodeSampler, validation: EpisodeSampler | None = None, iterations: int = 50
    ) -> None:
        super().__init__()
        self.learner = learner
        self.samplers, self.iterations = (train, validation), iterations

    def on_train_epoch_start(self) -> None:
        """Moves the learner's schedules: step weights, derivative order and the built-in optimizer's rate."""
        self.learner.epoch = self.current_epoch

    def training_step(self, task_batch: TaskBatch, index: int) -> Tensor:
        """The differentiable meta-loss."""
        output = self.learner(task_batch)
        self.log("loss", output.loss.detach(), batch_size=len(task_batch), prog_bar=True)
        return output.loss

    def validation_step(self, task_batch: TaskBatch, index: int) -> None:
        """Accuracy after adapting, under the learner's own batch-norm policy; changes nothing."""
        result = self.learner.evaluate(task_batch)
        self.log("validation_accuracy", result.mean, batch_size=len(task_batch), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The learner's own: Adam, or the one that it was built with."""
        return self.learner.optimizer

    def train_dataloader(self) -> DataLoader[TaskBatch]:
        """Other episodes in each epoch: the trainer needs reload_dataloaders_every_n_epochs=1."""
        return self._loader(self.samplers[0], self.iterations, self.current_epoch * self.iterations)

    def val_dataloader(self) -> DataLoader[TaskBatch] | list[Any]:
        """The same episodes in each epoch."""
        return [] if self.samplers[1] is None else self._loader(self.samplers[1], 1, 0)

    def _loader(self, sampler: EpisodeSampler, count: int, start: int) -> DataLoader[TaskBatch]:
        return DataLoader(sampler[start : start + count], batch_size=None)


def trainer(epochs: int, **options: Any) -> lightning.Trainer:
    """A trainer that draws other episodes in each epoch; options are Lightning's."""
    options = {"logger": False, "enable_model_summary": False, "accelerator": "auto", "devices": 1} | options
    return lightning.Trainer(max_epochs=epochs, reload_dataloaders_every_n_epochs=1, log_every_n_steps=1, **options)


def main(epochs: int, iterations: int, filters: int = 16, tasks_to_test: int = 50) -> nn.Module:
    """Meta-trains on generated characters, tests on unseen ones, and returns a module fitted to one task."""
    lightning.seed_everything(0, verbose=False)
    data = load_data("glyphs")
    train = EpisodeSampler(data.train, tasks_per_batch=4, targets=3, seed=0)
    validation = EpisodeSampler(data.validation, tasks_per_batch=tasks_to_test, seed=1)
    learner = MAMLPlusPlus(
        Conv4(filters=filters), inner_steps=3, norm="support", epochs=epochs, iterations_per_epoch=iterations
    )
    module = MetaLearning(learner, train, validation, iterations)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*num_workers.*")  # Episodes are gathered from memory.
        trainer(epochs, enable_checkpointing=False).fit(module)
    unseen = EpisodeSampler(data.test, tasks_per_batch=tasks_to_test, seed=2).batch(0)
    print("before adapting:", learner.evaluate(unseen, steps=0))
    print("after adapting: ", learner.evaluate(unseen))
    return learner.adapt(unseen[0].support_x, unseen[0].support_y)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--iterations", type=int, default=25)
    arguments = parser.parse_args()
    main(arguments.epochs, arguments.iterations)
