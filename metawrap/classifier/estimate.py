"""How well a learner does on examples that it was not shown: each example is predicted by what the others taught."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metawrap.learner.embedding_learner import EmbeddingLearner
from metawrap.outputs import prediction_in
from metawrap.tasks import Task

# More rounds give each of them nearly all examples; their time grows with examples and rounds.
_ROUNDS = 10
_Z = 1.96
# The temperatures that are tried, nearest to 1 first: of equally good ones the first is taken. So the temperature stays
# 1 where all logits are equal, and every temperature is as good as another.
_TEMPERATURES = sorted((10 ** (step / 100) for step in range(-400, 401)), key=lambda t: abs(math.log(t)))


@dataclass(frozen=True)
class Estimate:
    """The result of `left_out`.

    right, examples: of the examples that were left out. rounds: how many times a part of them was left out; each was
    left out once, except the only ones of their class. confused: (true class, predicted class, times), the most
    frequent first. temperature: what logits are divided by, so that of the examples that are given a probability of
    80 %, about 80 % are right; see `temperature_of`.
    """

    right: int
    examples: int
    rounds: int
    confused: tuple[tuple[str, str, int], ...]
    temperature: float = 1.0

    @property
    def accuracy(self) -> float:
        """The share that was predicted right, in 0..1."""
        return self.right / self.examples

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the accuracy (Wilson 1927), which is sensible for few examples and for 100 %, too.

        >>> Estimate(right=10, examples=10, rounds=5, confused=()).interval
        (0.7224598..., 1.0)
        """
        share, count, z = self.accuracy, self.examples, _Z
        centre = (share + z * z / (2 * count)) / (1 + z * z / count)
        half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
        return max(0.0, centre - half), min(1.0, centre + half)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        low, high = self.interval
        found = {"right": self.right, "examples": self.examples, "rounds": self.rounds}
        return found | {
            "accuracy": self.accuracy,
            "interval": [low, high],
            "confused": [list(c) for c in self.confused],
            "temperature": self.temperature,
        }

    def __str__(self) -> str:
        low, high = (100 * bound for bound in self.interval)
        share = f"{100 * self.accuracy:.1f} % (95 % interval {low:.1f} to {high:.1f} %)"
        return f"{self.right} of {self.examples} right, {share}"


def embedded(learner: Any, inputs: Tensor, labels: Tensor, norm: str | None = None) -> Tensor | None:
    """The embeddings of all inputs; None for a method without them, or where an example's depends on the others."""
    if not isinstance(learner, EmbeddingLearner):
        return None
    few = [int((labels == label).nonzero()[0]) for label in range(2)]
    small = Task(inputs[few], labels[few], inputs[few], labels[few])
    return learner.embedded(small, inputs, norm)


def left_out(
    learner: Any,
    inputs: Tensor,
    labels: Tensor,
    names: Sequence[str],
    norm: str | None = None,
    embeddings: Tensor | None = None,
) -> Estimate | None:
    """Predicts each example from the others: in each round, at most a tenth of each class's examples is left out.

    Args:
        inputs: (examples, ...). labels: (examples,), places among `names`. norm: as in `learner.evaluate`.
        embeddings: of all inputs, from `embedded`; the network runs once for each example then, not in each round.
    Returns:
        None if each class has one example: nothing can be left out.
    """
    found: list[Tensor] = []
    true: list[int] = []
    rounds = list(_rounds(labels))
    for out in rounds:
        known = inputs if embeddings is None else embeddings
        task = Task(known[~out], labels[~out], known[out], labels[out])
        if embeddings is None:
            result = learner.evaluate([task], norm=norm, keep_predictions=True)
            logits: Any = prediction_in(result.predictions[0])
        else:
            logits = learner.predicted(task)
        found.append(logits[:, : len(names)].detach().double().cpu())
        true += labels[out].tolist()
    if not true:
        return None
    every = torch.cat(found)
    predicted = every.argmax(1).tolist()
    pairs = Counter((names[one], names[two]) for one, two in zip(true, predicted, strict=True) if one != two)
    confused = tuple((one, two, times) for (one, two), times in pairs.most_common())
    right = sum(map(int.__eq__, true, predicted))
    return Estimate(right, len(true), len(rounds), confused, temperature_of(every, torch.tensor(true)))


def temperature_of(logits: Tensor, labels: Tensor) -> float:
    """The temperature that makes the probabilities of examples that were not shown as sure as they are right.

    It has the smallest cross-entropy (Guo et al. 2017, section 4.2) with Platt's targets (1999): n examples, all right,
    are no proof of certainty, so the right class counts (n + 1) / (n + 2). Of n logits that are far apart and all
    right, the probability is then that, too.

    Args:
        logits: (examples, classes), two or more classes; a row with a number that is not finite does not count.
        labels: (examples,).
    """
    known = logits.isfinite().all(1)
    logits, labels = logits[known], labels[known]
    count, classes = logits.shape
    if not count:
        return 1.0
    sure = (count + 1) / (count + 2)
    targets = torch.full_like(logits, (1 - sure) / (classes - 1)).scatter_(1, labels[:, None], sure)
    losses = [float(-(targets * (logits / t).log_softmax(1)).sum(1).mean()) for t in _TEMPERATURES]
    return _TEMPERATURES[min(range(len(losses)), key=losses.__getitem__)]


def _rounds(labels: Tensor) -> Iterator[Tensor]:
    """Masks (examples,) of what to leave out. A class's examples are dealt to the rounds; one is always kept."""
    places = [torch.nonzero(labels == label).flatten() for label in sorted(set(labels.tolist()))]
    several = [own for own in places if len(own) > 1]
    for number in range(min(_ROUNDS, max(map(len, several), default=0))):
        out = torch.zeros(len(labels), dtype=torch.bool)
        for own in several:
            # With fewer examples than rounds, each is left out in a round of its own.
            out[own[number::_ROUNDS]] = True
        yield out
