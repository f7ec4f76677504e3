"""Memory module: support embeddings are written, one by one, to a key-value memory with ages; targets query it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from metawrap.errors import ArgumentError, TaskError
from metawrap.heads.fitted import FittedHead
from metawrap.learner.embedding_learner import EmbeddingKeywords, EmbeddingLearner
from metawrap.results import ignored_label
from metawrap.settings.keywords import checked
from metawrap.settings.validated import Count, NotNegative, Positive, Switch
from metawrap.tasks import Task

_FREE = -1


class MemoryModule(EmbeddingLearner):
    """A memory of normalised keys, their classes and their ages.

    Each support example, in order, queries the memory with its normalised embedding q. If the nearest key n has its
    class, that key becomes (q + K[n]) / |q + K[n]|; else q is written to a free slot, or over the oldest. The slot's
    age becomes 0, all others grow by 1. A target gets the class of its nearest key: the logit of a class is t times the
    cosine with the nearest key of that class among the k nearest keys, and -t where none of them has it.

    The memory loss of a target, with n_p its nearest key of the same class and n_b that of any other class, is
    max(0, q K[n_b] - q K[n_p] + alpha), where 0 stands for a key that is not there. To its mean over targets
    `task_loss * loss_fn(logits, target_y)` is added.

    As in the paper: the update, the ages and the memory loss. As in the authors' code: the memory is empty at the start
    of each episode. Differs: gradients flow into the keys (not with key_gradients=False, as in the paper); `loss_fn` is
    added (not with task_loss=0); free slots are filled before any is written over; positive and negative keys are
    sought in the whole memory; the noise on ages is drawn in training only; keys are the embeddings, without a further
    projection; targets alone are trained on.

    Args:
        slots: of the memory; at least one for each class.
        neighbours: k, how many nearest keys a logit may come from.
        margin: alpha, of the memory loss.
        inverse_temperature: t.
        age_noise: half the range of the uniform noise on ages when the oldest is sought, in presentations.
        task_loss: weight of `loss_fn` on the logits; 0 for the memory loss alone, as in the paper on Omniglot.
        key_gradients: whether gradients flow into the keys, too.
        keywords: see `EmbeddingKeywords` and `OuterKeywords`.

    >>> learner = MemoryModule(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), slots=64)
    >>> adapted = learner.adapt(torch.randn(6, 4), torch.arange(6) % 3)

    Source: Kaiser, Nachum, Roy, Bengio 2017, arXiv:1703.03129, Section 2.
    """

    @checked
    def __init__(
        self,
        model: nn.Module,
        *,
        slots: Count = 8192,
        neighbours: Count = 256,
        margin: NotNegative = 0.1,
        inverse_temperature: Positive = 40.0,
        age_noise: NotNegative = 8.0,
        task_loss: NotNegative = 1.0,
        key_gradients: Switch = True,
        **keywords: Unpack[EmbeddingKeywords],
    ) -> None:
        if task_loss == 0 and "loss_fn" in keywords:
            raise ArgumentError("loss_fn: has no effect with task_loss=0. Leave it out, or give task_loss a weight.")
        super().__init__(model, keywords, options=self.own)
        self.slots, self.neighbours, self.margin = slots, neighbours, margin
        self.inverse_temperature, self.age_noise = inverse_temperature, age_noise
        self.task_loss, self.key_gradients = task_loss, key_gradients

    def _fit_head(self, support: Tensor, labels: Tensor, ways: int) -> KeyMemory:
        if ways > self.slots:
            raise TaskError(f"support_y has {ways} classes, but the memory has {self.slots} slots. Raise slots=.")
        queries = support if self.key_gradients else support.detach()
        # Slots beyond the number of examples would stay free.
        memory = KeyMemory(queries, min(self.slots, len(queries)), ways, self.neighbours, self.inverse_temperature)
        noise = self.age_noise if self.training else 0.0
        for query, label in zip(queries, labels.tolist(), strict=True):
            memory.write(query, label, noise)
        return memory

    def _predict(self, task: Task, support: Tensor, labels: Tensor, ways: int, target: Tensor) -> tuple[Tensor, Tensor]:
        memory = self._fit_head(support, labels, ways)
        prediction = memory(target)
        counted = task.target_y != ignored_label(self.loss_fn)
        loss = memory.loss(target[counted], task.target_y[counted], self.margin)
        if self.task_loss:
            loss = loss + self.task_loss * self._loss(prediction, task.target_y, "target")
        return prediction, loss


class KeyMemory(FittedHead):
    """The memory after a support set.

    keys: (slots, numbers), of length 1, or 0 while free. values: (slots,) classes, -1 while free. ages: (slots,).
    """

    keys: Tensor
    values: Tensor
    ages: Tensor

    def __init__(self, like: Tensor, slots: int, ways: int, neighbours: int, inverse_temperature: float) -> None:
        free, zeros = torch.full((slots,), _FREE, device=like.device), torch.zeros(slots, device=like.device)
        super().__init__(keys=like.new_zeros(slots, like.shape[1]), values=free, ages=zeros)
        self.ways, self.neighbours, self.inverse_temperature = ways, neighbours, inverse_temperature

    def write(self, query: Tensor, value: int, noise: float) -> None:
        """Stores an embedding (numbers,) of a class; `noise` is half the range of the noise on ages."""
        query = nn.functional.normalize(query, dim=0)
        used = int((self.values != _FREE).sum())
        nearest = int((self.keys[:used] @ query).argmax()) if used else None
        key = query
        if nearest is not None and int(self.values[nearest]) == value:
            slot = nearest
            key = nn.functional.normalize(query + self.keys[nearest], dim=0)
        elif used < len(self.values):
            slot = used
        else:
            slot = int((self.ages + (noise * (2 * torch.rand_like(self.ages) - 1) if noise else 0)).argmax())
        here = torch.arange(len(self.values), device=query.device) == slot
        # New tensors: the earlier ones are part of the graph.
        self.keys = torch.where(here[:, None], key, self.keys)
        self.values = torch.where(here, value, self.values)
        self.ages = torch.where(here, 0, self.ages + 1)

    def forward(self, embeddings: Tensor) -> Tensor:
        """(targets, numbers) to (targets, ways)."""
        near = self._cosines(embeddings).topk(min(self.neighbours, len(self.values)), dim=1)
        classes = torch.arange(self.ways, device=self.values.device)
        is_class = self.values.take(near.indices)[:, None] == classes[:, None]
        return self.inverse_temperature * torch.where(is_class, near.values[:, None], -1.0).amax(2)

    def loss(self, embeddings: Tensor, labels: Tensor, margin: float) -> Tensor:
        """The mean memory loss of targets (targets, numbers) of classes (targets,)."""
        cosines = self._cosines(embeddings)
        same = self.values == labels[:, None]
        positive, negative = _greatest(cosines, same), _greatest(cosines, ~same & (self.values != _FREE))
        return torch.relu(negative - positive + margin).sum() / max(len(labels), 1)

    def _cosines(self, embeddings: Tensor) -> Tensor:
        # A free slot has the smallest cosine that there is.
        cosines = nn.functional.normalize(embeddings, dim=1) @ self.keys.T
        return torch.where(self.values == _FREE, -1.0, cosines)


def _greatest(cosines: Tensor, among: Tensor) -> Tensor:
    """The greatest of each row where `among` holds, 0 where it holds nowhere: (targets, slots) to (targets,)."""
    return torch.where(among.any(1), torch.where(among, cosines, -2.0).amax(1), 0.0)
