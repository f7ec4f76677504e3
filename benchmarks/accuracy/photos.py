"""A pretrained, frozen network on photos of groceries, 5-way, 1 and 5 shots: without and with meta-training.

Each photo is embedded once, so that 600 tasks take seconds. `--split families` tests on the classes of metawrap's own
split, `--split seed` on those of `load_image_folder(seed=0)`. Methods are meta-trained on all other classes, behind the
network's embedding.

    python benchmarks photos --model lite:build --data-root grocery-store-128.zip --out photos.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from metawrap import Task, methods
from metawrap.data import load_data, load_image_folder
from metawrap.pretrained import load_network
from metawrap.training.machine import command_line, describe_machine

METHODS = ("ProtoNet", "SimpleShot", "R2D2", "LogisticRegression")
META_STEPS, TASKS = 100, 4  # of meta-training, and tasks in each


class Embedded(nn.Module):
    """Stands for a network whose photos are embedded already; methods need a parameter to wrap."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """The embeddings, unchanged."""
        return x + self.unused


class Linear(nn.Module):
    """A linear layer that begins as the identity, and a head."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(numbers, numbers), nn.Linear(numbers, 5)
        nn.init.eye_(self.body.weight)
        nn.init.zeros_(self.body.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Embeddings to logits."""
        return self.head(self.body(x))  # type: ignore[no-any-return]


def meta_trained(numbers: int) -> dict[str, Any]:
    """Learners to be meta-trained on embeddings, by name."""
    outer = {"epochs": 1, "iterations_per_epoch": META_STEPS}
    return {
        "SimpleShot, whitening=1": methods.SimpleShot(Embedded(), embedding="output", whitening=1.0, **outer),
        "R2D2 behind a linear layer": methods.R2D2(Linear(numbers), **outer),
        "MAML++ behind a linear layer": methods.MAMLPlusPlus(
            Linear(numbers), outputs={"head_init": "prototypes"}, **outer
        ),
    }


def main() -> None:
    """Embeds, trains, evaluates, measures times, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="as for metawrap adapt")
    parser.add_argument("--weights", default=None)
    parser.add_argument("--data-root", required=True)
    parser.add_argument("--split", choices=("families", "seed"), default="seed")
    parser.add_argument("--tasks", type=int, default=600)
    parser.add_argument("--targets", type=int, default=10)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    network = load_network(args.model, args.weights)
    way = network.preprocessing
    assert way is not None, "the network must say its preprocessing"
    if args.split == "families":
        splits = load_data("grocery", root=args.data_root, image_size=way)
    else:
        splits = load_image_folder(args.data_root, image_size=way, seed=0)
    images = splits.test
    learner = methods.ProtoNet(network.model).eval()
    photos = images.gather(np.arange(len(images)))
    learner.adapt(way.normalised(photos[:2]), torch.arange(2))  # finds the head
    embedded = _embedded(learner, images, way)
    rows: list[dict[str, Any]] = []
    for name in METHODS:
        own = getattr(methods, name)(Embedded(), embedding="output").eval()
        row: dict[str, Any] = {"method": name} | _times(
            getattr(methods, name)(network.model), way.normalised(photos[:25])
        )
        for shots in (1, 5):
            found = own.evaluate(list(_tasks(embedded, images.labels, shots, args.targets, args.tasks)))
            row[f"{shots}-shot"] = [found.mean, found.interval]
        rows.append(row)
        print(row, flush=True)
    begun = time.perf_counter()
    parts = [(_embedded(learner, part, way), part.labels) for part in (splits.train, splits.validation)]
    others = torch.cat([rows for rows, _ in parts])
    labels = torch.cat([parts[0][1], parts[1][1] + parts[0][1].max() + 1])
    embedding_seconds = time.perf_counter() - begun
    for shots in (1, 5):
        torch.manual_seed(0)
        for name, trained in meta_trained(others.shape[1]).items():
            begun = time.perf_counter()
            tasks = _tasks(others, labels, shots, args.targets, META_STEPS * TASKS)
            for _ in range(META_STEPS):
                trained.meta_step([next(tasks) for _ in range(TASKS)])
            seconds = time.perf_counter() - begun
            found = trained.eval().evaluate(list(_tasks(embedded, images.labels, shots, args.targets, args.tasks)))
            rows.append({"method": name, f"{shots}-shot": [found.mean, found.interval], "training_seconds": seconds})
            print(rows[-1], flush=True)
    about = {"command": command_line(), "machine": describe_machine(torch.device("cpu")), "classes": images.class_names}
    about |= {"embedding_seconds": embedding_seconds, "photos_for_training": len(others)}
    Path(args.out).write_text(json.dumps(about | {"rows": rows}, indent=2) + "\n")


def _embedded(learner: Any, images: Any, way: Any) -> Tensor:
    """The embeddings of all photos of a part."""
    rows = []
    with torch.inference_mode():
        for first in range(0, len(images), 64):
            photos = images.gather(np.arange(first, min(first + 64, len(images))))
            rows.append(learner.embedding.of(way.normalised(photos), "running"))
    return torch.cat(rows).clone()


def _times(learner: Any, photos: Tensor) -> dict[str, float]:
    """Median seconds to adapt to 25 photos, and to predict one."""
    labels, adapting, predicting = torch.arange(5).repeat(5), [], []
    for _ in range(5):
        begun = time.perf_counter()
        module = learner.adapt(photos, labels)
        adapting.append(time.perf_counter() - begun)
    with torch.inference_mode():
        for _ in range(20):
            begun = time.perf_counter()
            module(photos[:1])
            predicting.append(time.perf_counter() - begun)
    return {"adapt_seconds": statistics.median(adapting), "predict_seconds": statistics.median(predicting)}


def _tasks(embedded: Tensor, labels: Tensor, shots: int, targets: int, tasks: int) -> Iterator[Task]:
    generator = np.random.default_rng(0)
    places = [torch.nonzero(labels == label).flatten().numpy() for label in labels.unique()]
    own = torch.arange(5)
    for _ in range(tasks):
        drawn = [
            generator.choice(places[c], shots + targets, replace=False) for c in generator.choice(len(places), 5, False)
        ]
        support, target = (np.concatenate([row[part] for row in drawn]) for part in (slice(shots), slice(shots, None)))
        yield Task(embedded[support], own.repeat_interleave(shots), embedded[target], own.repeat_interleave(targets))


if __name__ == "__main__":
    main()
