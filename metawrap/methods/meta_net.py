"""Meta networks: loss gradients of the support set -> fast weights of the layers behind the embedding."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from metawrap.heads.class_rows import ClassRows
from metawrap.heads.fitted import FittedHead, cosine_similarities, one_hot
from metawrap.layers.learned_update import preprocessed
from metawrap.learner.embedding_learner import EmbeddingKeywords, EmbeddingLearner
from metawrap.settings.keywords import checked
from metawrap.settings.validated import Count, Several

# How small a gradient may be, exp(-p), before its logarithm says nothing.
_P = 7.0


class MetaNet(EmbeddingLearner):
    """Meta networks: fast weights made from loss gradients, attended to by each target, add to slow ones.

    With e the embedding, a_+ = max(a, 0), Q, O, W slow weights, one row of O and W for each class, and p = 7:

    - representation: u(x) = Q e(x). Its loss on a support example is the cross-entropy of O u(x)_+. The mean gradients
      with respect to Q of up to `representation_steps` parts of the support set, in order, go coordinate by coordinate
      through d, an LSTM that all coordinates share: the last output is the task's fast weights Q*.
    - index memory: R_i = (Q + Q*) e(x_i), that is slow and fast layer side by side.
    - base learner: W e(x). Its cross-entropy on support example i has the gradient G_i with respect to W, and
      m, a perceptron that all coordinates share, makes of it that example's fast weights W*_i.
    - a target has r = (Q + Q*) e(x), a_i = softmax_i(cos(r, R_i)), and the logits W e(x) + (sum_i a_i W*_i) e(x).

    As in the paper: the two kinds of fast weights, their memories, attention and layer augmentation (slow and fast
    outputs are added). As in the authors' code: d and m, sizes included; gradients enter as (log, sign) pairs, as
    constants; cross-entropy is the representation loss for any number of shots; parts of the support set are taken in
    order. Restricted, so that any network works: u and the base learner share the user's embedding, and fast weights
    are made for the layers behind it only. `loss_fn` compares targets and logits.

    Args:
        ways: the most classes that a task may have; None is the number in the first task.
        representation: numbers in u(x).
        representation_steps: gradients that d reads, at most.
        hidden: units of d and m.
        keywords: see `EmbeddingKeywords` and `OuterKeywords`.

    >>> learner = MetaNet(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), ways=3)
    >>> adapted = learner.adapt(torch.randn(6, 4), torch.arange(6) % 3)

    Source: Munkhdalai, Yu 2017, arXiv:1703.00837, Algorithm 1; the authors' code.
    """

    rows: ClassRows
    representation: nn.LazyLinear
    representation_rows: ClassRows
    task_fast: nn.LSTM
    task_fast_out: nn.Linear
    example_fast: nn.Sequential

    @checked
    def __init__(
        self,
        model: nn.Module,
        *,
        ways: Several | None = None,
        representation: Count = 64,
        representation_steps: Count = 5,
        hidden: Count = 20,
        **keywords: Unpack[EmbeddingKeywords],
    ) -> None:
        parts: dict[str, nn.Module] = {
            "representation": nn.LazyLinear(representation, bias=False),
            "representation_rows": ClassRows(ways),
            "task_fast": nn.LSTM(2, hidden),
            "task_fast_out": nn.Linear(hidden, 1),
            "example_fast": nn.Sequential(
                nn.Linear(2, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1)
            ),
            "rows": ClassRows(ways),
        }
        super().__init__(model, keywords, options=self.own, parts=parts)
        self.representation_steps = representation_steps

    def _fit_head(self, support: Tensor, labels: Tensor, ways: int) -> FastWeights:
        self.rows.check_ways(ways, type(self).__name__)
        truth, slow = one_hot(labels, ways, support), self.rows(ways, support.shape[1])
        layer = self._task_weights(support, truth)
        gradients = linear_gradients(support, torch.softmax(support @ slow.T, dim=1) - truth)
        fast = self.example_fast(preprocessed(gradients.detach(), _P)).squeeze(-1)
        return FastWeights(representation=layer, index=support @ layer.T, slow=slow, fast=fast)

    def _task_weights(self, support: Tensor, truth: Tensor) -> Tensor:
        """Q + Q*, from the one-hot labels (examples, ways): (representation, numbers)."""
        output = self.representation(support)
        rows = self.representation_rows(truth.shape[1], output.shape[1])
        wrong = torch.softmax(output.relu() @ rows.T, dim=1) - truth
        gradients = linear_gradients(support, wrong @ rows * (output > 0)).detach()
        parts = gradients.tensor_split(min(len(gradients), self.representation_steps))
        steps = torch.stack([part.mean(0).flatten() for part in parts])
        read, _ = self.task_fast(preprocessed(steps, _P))
        slow: Tensor = self.representation.weight
        fast: Tensor = self.task_fast_out(read[-1]).view_as(slow)
        return slow + fast


def linear_gradients(inputs: Tensor, outputs: Tensor) -> Tensor:
    """Each example's gradient with respect to a linear layer's weight, from that with respect to its output.

    inputs: (examples, numbers). outputs: (examples, units). Returns (examples, units, numbers).
    """
    return outputs[:, :, None] * inputs[:, None]


class FastWeights(FittedHead):
    """Slow weights, and fast ones that each target attends to.

    representation: (units, numbers). index: (examples, units). slow: (ways, numbers). fast: (examples, ways, numbers).
    """

    representation: Tensor
    index: Tensor
    slow: Tensor
    fast: Tensor

    def forward(self, embeddings: Tensor) -> Tensor:
        """(targets, numbers) to (targets, ways)."""
        attention = torch.softmax(cosine_similarities(embeddings @ self.representation.T, self.index), dim=1)
        fast = torch.einsum("ti,iwn,tn->tw", attention, self.fast, embeddings)
        return embeddings @ self.slow.T + fast
