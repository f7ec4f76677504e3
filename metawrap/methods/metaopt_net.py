"""MetaOptNet: support embeddings -> a convex problem (SVM or ridge), solved exactly -> a linear head -> logits."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from metawrap.heads.fitted import FittedHead, LinearHead, one_hot, ridge_weights
from metawrap.heads.multiclass_svm import check_solver, multiclass_svm
from metawrap.learner.embedding_learner import EmbeddingKeywords, EmbeddingLearner
from metawrap.settings.settings import check_positive
from metawrap.settings.validated import check_value

Solver = Literal["svm", "ridge"]
_REGULARIZERS = {"svm": 0.1, "ridge": 50.0}


class MetaOptNet(EmbeddingLearner):
    """MetaOptNet: the head is a linear classifier without bias that solves a convex problem on the support set.

    "svm": the multi-class SVM of Crammer and Singer; with the one-hot labels Y of the n support examples X,
    min over W of |W|^2 / 2 + C sum_i max over classes m of (w_m x_i + 1 - [m = y_i]) - w_{y_i} x_i,
    solved in its dual of n * ways variables, in double precision on the CPU; see `multiclass_svm`.
    "ridge": W = 2 X^T (X X^T + lambda I)^-1 Y, or the same by its smaller system.
    Logits are scale * x W. The scale is learned; C and lambda are not.

    As in the paper and the authors' code, except for the first value of the scale. Later versions of that code add 1 to
    the diagonal of X X^T in the SVM, for their solver; this is another problem than the one above, and left out here.

    Args:
        solver: "svm" or "ridge". "svm" needs the extra `metawrap[metaoptnet]`.
        regularizer: C of the SVM, 0.1 if None, where a smaller one regularises more; lambda of the ridge, 50 if None.
        scale: its first value. The authors start at 1, with SGD at a rate of 0.1; under Adam, 300 steps of 4
            tasks of Omniglot 5-way 1-shot gave 84.6 % from 1, and 91.8 % from 10.
        keywords: see `EmbeddingKeywords` and `OuterKeywords`.
    Raises:
        ArgumentError: the solver's library is missing.

    >>> learner = MetaOptNet(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), solver="ridge")
    >>> adapted = learner.adapt(torch.randn(6, 4), torch.arange(6) % 3)

    Source: Lee, Maji, Ravichandran, Soatto 2019, arXiv:1904.03758, Eq. 5 to 8 and 12.
    """

    scale: nn.Parameter

    def __init__(
        self,
        model: nn.Module,
        *,
        solver: Solver = "svm",
        regularizer: float | None = None,
        scale: float = 10.0,
        **keywords: Unpack[EmbeddingKeywords],
    ) -> None:
        check_value("solver", solver, Solver)
        regularizer = _REGULARIZERS[solver] if regularizer is None else regularizer
        check_positive("regularizer", regularizer)
        check_positive("scale", scale)
        if solver == "svm":
            check_solver()
        super().__init__(
            model,
            keywords,
            options={"solver": solver, "regularizer": regularizer, "scale": scale},
            parts={"scale": nn.Parameter(torch.tensor(scale, dtype=torch.float64))},
        )
        self.solver: Solver = solver
        self.regularizer = float(regularizer)

    def _fit_head(self, support: Tensor, labels: Tensor, ways: int) -> FittedHead:
        if self.solver == "svm":
            weights = multiclass_svm(support, one_hot(labels, ways, support), self.regularizer)
        else:
            # LAPACK knows no half precision.
            exact = support.to(torch.promote_types(support.dtype, torch.float32))
            weights = 2 * ridge_weights(exact, one_hot(labels, ways, exact), self.regularizer).to(support.dtype)
        return LinearHead(weight=self.scale * weights.T, bias=support.new_zeros(ways))
