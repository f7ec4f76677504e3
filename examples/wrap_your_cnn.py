"""Your own CNN becomes a meta-learner in two lines; the training loop stays yours.

    python examples/wrap_your_cnn.py

A minute on two CPU cores: meta-trains on generated characters, adapts to characters never seen, and saves a plain
module.
"""

from __future__ import annotations

import torch
from torch import nn

from metawrap import MAMLPlusPlus
from metawrap.data import EpisodeSampler, load_data


class YourCNN(nn.Module):
    """Any network will do: nothing in here knows of meta-learning."""

    def __init__(self, ways: int = 5) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, stride=2, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, stride=2, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, stride=2, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
        )
        self.classifier = nn.Linear(32 * 4 * 4, ways)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits of a batch of 28x28 images."""
        return self.classifier(self.features(images).flatten(1))


def main(meta_steps: int = 300, tasks_to_test: int = 200) -> float:
    """Trains, tests, and returns the accuracy after adaptation."""
    torch.manual_seed(0)
    data = load_data("glyphs")
    train = EpisodeSampler(data.train, ways=5, shots=1, targets=3, tasks_per_batch=4, seed=0)
    unseen = EpisodeSampler(data.test, ways=5, shots=1, targets=3, tasks_per_batch=tasks_to_test, seed=1)

    # The two lines: wrap, and step.
    learner = MAMLPlusPlus(YourCNN(), inner_steps=3, inner_lr=0.1, epochs=10, iterations_per_epoch=meta_steps // 10)
    for step, task_batch in enumerate(train.batches(meta_steps)):
        metrics = learner.meta_step(task_batch)
        if step % 50 == 0:
            print(f"meta-step {step:3d}  loss {metrics.loss:.3f}  accuracy {metrics.accuracy:.3f}")

    print("before adapting:", learner.evaluate(unseen.batches(1), steps=0))
    result = learner.evaluate(unseen.batches(1))
    print("after adapting: ", result)

    # A plain module of your own class, fitted to five images; pickle it, export it, deploy it.
    task = unseen.batch(1)[0]
    adapted = learner.adapt(task.support_x, task.support_y)
    right = (adapted(task.target_x).argmax(1) == task.target_y).sum()
    print(f"{type(adapted).__name__} adapted to one task: {int(right)} of {len(task.target_y)} targets right")
    return result.mean


if __name__ == "__main__":
    main()
