"""R2-D2: support embeddings -> ridge regression onto the classes, in closed form -> scale and shift -> logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from metawrap.heads.fitted import FittedHead, LinearHead, one_hot, ridge_weights
from metawrap.learner.embedding_learner import Embedded, EmbeddedKeywords
from metawrap.settings.settings import check_positive


class R2D2(Embedded):
    """R2-D2: the head is the ridge regression of the support's one-hot labels on its embeddings, solved exactly.

    W = (X^T X + n lambda I)^-1 X^T Y, or by Woodbury's identity X^T (X X^T + n lambda I)^-1 Y where the n support
    examples are fewer than the numbers in an embedding, which X holds with a column of ones behind them. Logits are
    scale * x W + bias. lambda (through its logarithm, so that it stays positive), scale and bias are learned.

    As in the paper, but for two things that are from the authors' code: lambda is per example (they divide X and Y by
    sqrt(n)), so that one lambda suits every number of shots; and the ones make the regression's own bias, which is
    regularised too. The code holds lambda fixed by default; here it is learned, as the paper has it.

    Args:
        model: any `torch.nn.Module`; it is copied, never changed. What enters its head is the embedding.
        regularizer: where lambda starts; the authors' is 50, for embeddings of thousands of numbers.
        scale: where the scale starts; the authors' value for Omniglot is the default. The bias starts at 0.
        keywords: see `EmbeddedKeywords` and `OuterKeywords`.
    Raises:
        ArgumentError: an argument has the wrong type, range or combination.
        UnsupportedModuleError: the model has something that cannot be carried.

    Source: Bertinetto, Henriques, Torr, Vedaldi 2019, arXiv:1805.08136, Eq. 4 to 6.
    """

    log_regularizer: nn.Parameter
    scale: nn.Parameter
    bias: nn.Parameter

    def __init__(
        self, model: nn.Module, *, regularizer: float = 1.0, scale: float = 10.0, **keywords: Unpack[EmbeddedKeywords]
    ) -> None:
        check_positive("regularizer", regularizer)
        check_positive("scale", scale)
        starts = {"log_regularizer": math.log(regularizer), "scale": scale, "bias": 0}
        parts = {name: nn.Parameter(torch.tensor(value, dtype=torch.float64)) for name, value in starts.items()}
        super().__init__(model, keywords, options={"regularizer": regularizer, "scale": scale}, parts=parts)

    def _fitted(self, support: Tensor, labels: Tensor, ways: int) -> FittedHead:
        # LAPACK knows no half precision.
        exact = support.to(torch.promote_types(support.dtype, torch.float32))
        inputs = torch.cat([exact, torch.ones_like(exact[:, :1])], 1)
        strength = len(inputs) * self.log_regularizer.to(exact.dtype).exp()
        solution = ridge_weights(inputs, one_hot(labels, ways, exact), strength)
        weights = self.scale * solution.T.to(support.dtype)
        return LinearHead(weights[:, :-1], weights[:, -1] + self.bias)
