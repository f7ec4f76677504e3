"""Logistic regression: support embeddings of length 1 -> softmax regression, solved exactly -> a linear head."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from metawrap.heads.fitted import FittedHead, NormalisedLinear, one_hot
from metawrap.heads.softmax_regression import softmax_regression
from metawrap.learner.embedding_learner import EmbeddingKeywords, EmbeddingLearner
from metawrap.settings.keywords import checked
from metawrap.settings.validated import Positive


class LogisticRegression(EmbeddingLearner):
    """Logistic regression on embeddings of length 1: the head that best predicts the support labels, regularised.

    With z = x / |x| it is the W and b that minimise  sum over i of CE(W z_i + b, y_i) + lambda |W|^2 / 2,  solved in
    double precision on the CPU. scikit-learn's `LogisticRegression(C=1 / lambda)` solves the same problem; for two
    classes, where it fits one row of weights instead of two, `C=2 / lambda` does.

    As in the paper: the lengths, the loss and lambda = 1. Differs: the paper trains the network by ordinary
    classification (`FineTune` does); here `meta_step` may train it through the solution, whose derivative is that of
    the conditions of optimality.

    Args:
        regularizer: lambda; greater is smoother.
        keywords: see `EmbeddingKeywords` and `OuterKeywords`.

    >>> learner = LogisticRegression(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)))
    >>> adapted = learner.adapt(torch.randn(6, 4), torch.arange(6) % 3)

    Source: Tian, Wang, Krishnan, Tenenbaum, Isola 2020, arXiv:2003.11539, section 3.
    """

    @checked
    def __init__(self, model: nn.Module, *, regularizer: Positive = 1.0, **keywords: Unpack[EmbeddingKeywords]) -> None:
        super().__init__(model, keywords, options=self.own)
        self.regularizer = float(regularizer)

    def _fit_head(self, support: Tensor, labels: Tensor, ways: int) -> FittedHead:
        inputs = nn.functional.normalize(support, dim=1)
        solution = softmax_regression(inputs, one_hot(labels, ways, inputs), self.regularizer)
        return NormalisedLinear(weight=solution[:, :-1], bias=solution[:, -1], centre=torch.zeros_like(support[0, 0]))
