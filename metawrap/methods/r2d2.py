"""R2-D2: support embeddings -> ridge regression onto the classes, in closed form -> scale and shift -> logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from metawrap.heads.fitted import FittedHead, LinearHead, one_hot, ridge_weights
from metawrap.learner.embedding_learner import EmbeddingKeywords, EmbeddingLearner
from metawrap.settings.keywords import checked
from metawrap.settings.validated import Positive


class R2D2(EmbeddingLearner):
    """R2-D2: the head is the ridge regression of the support's one-hot labels on its embeddings, solved exactly.

    W = (X^T X + n lambda I)^-1 X^T Y, or by Woodbury's identity X^T (X X^T + n lambda I)^-1 Y where the n support
    examples are fewer than the numbers in an embedding. X holds the embeddings and a column of ones. Logits are
    scale * x W + bias. lambda (through its logarithm, so that it stays positive), scale and bias are learned.

    As in the paper. Two things are from the authors' code: lambda is per example (they divide X and Y by sqrt(n)), so
    that one lambda suits every number of shots; and the column of ones gives a bias, which is regularised too. The code
    holds lambda fixed by default; here it is learned, as in the paper.

    Args:
        regularizer: where lambda starts; the authors' is 50, for embeddings of thousands of numbers.
        scale: where the scale starts; the authors' value for Omniglot is the default. The bias starts at 0.
        keywords: see `EmbeddingKeywords` and `OuterKeywords`.

    >>> learner = R2D2(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), regularizer=0.1)
    >>> adapted = learner.adapt(torch.randn(6, 4), torch.arange(6) % 3)

    Source: Bertinetto, Henriques, Torr, Vedaldi 2019, arXiv:1805.08136, Eq. 4 to 6.
    """

    log_regularizer: nn.Parameter
    scale: nn.Parameter
    bias: nn.Parameter

    @checked
    def __init__(
        self,
        model: nn.Module,
        *,
        regularizer: Positive = 1.0,
        scale: Positive = 10.0,
        **keywords: Unpack[EmbeddingKeywords],
    ) -> None:
        starts = {"log_regularizer": math.log(regularizer), "scale": scale, "bias": 0}
        parts = {name: nn.Parameter(torch.tensor(value, dtype=torch.float64)) for name, value in starts.items()}
        super().__init__(model, keywords, options=self.own, parts=parts)

    def _fit_head(self, support: Tensor, labels: Tensor, ways: int) -> FittedHead:
        # LAPACK knows no half precision.
        exact = support.to(torch.promote_types(support.dtype, torch.float32))
        inputs = torch.cat([exact, torch.ones_like(exact[:, :1])], 1)
        strength = len(inputs) * self.log_regularizer.to(exact.dtype).exp()
        solution = ridge_weights(inputs, one_hot(labels, ways, exact), strength)
        weights = self.scale * solution.T.to(support.dtype)
        return LinearHead(weight=weights[:, :-1], bias=weights[:, -1] + self.bias)
