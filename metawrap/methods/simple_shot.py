"""SimpleShot: embeddings -> minus the mean of the training embeddings, to length 1 -> the nearest class mean."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from metawrap.heads.centre import Centre
from metawrap.heads.fitted import FittedHead, NormalisedLinear, WhitenedLinear, class_means, nearest_mean
from metawrap.learner.embedding_learner import EmbeddingKeywords, EmbeddingLearner
from metawrap.settings.keywords import checked
from metawrap.settings.validated import Positive, PositiveOrNone
from metawrap.tasks import Task


class SimpleShot(EmbeddingLearner):
    """SimpleShot: the nearest class mean among embeddings that are centred and of length 1 (CL2N in the paper).

    An embedding x becomes z = (x - centre) / |x - centre|; c_k is the mean of z over the support examples of class k.
    Logits are -scale * |z - c_k|^2, but for a constant of the row; see `ProtoNet`.

    The centre is the mean support embedding of the training tasks, which `meta_step` gathers: of all tasks up to 100,
    from then on with a weight of 1/100 for each new task. A learner that has not been trained, such as a pretrained
    network as it is, has no such mean: the centre is then the mean of the task's own support set. Both are inductive.
    `learner.centre.seen` is the number of tasks in the mean.

    With `whitening` embeddings are multiplied, between centre and length, by a matrix that makes the variance within
    a class the same in all directions ("within-class covariance normalisation", Hatch, Kajarekar, Stolcke 2006):
    directions in which photos of one thing differ count less. The covariance is that of the training tasks, gathered
    like the centre, of support and target examples. A frozen pretrained network then needs no gradients in training: a
    few hundred tasks of other classes add 5 to 6 points at one shot (docs/photos.md).

    Differs from the paper, which trains by ordinary classification (`FineTune` does) and takes the mean over all
    training images: here the loss of the logits may train the network, as in `ProtoNet`, and then a task is centred by
    its own support set. Without training the scale has an effect on probabilities, and none on accuracy.

    Args:
        scale: where the scale starts; it is learned, through its logarithm.
        whitening: the share of the mean variance that is added to the covariance's diagonal, such as 1.0, so that
            directions that hardly vary do not decide; None for no whitening. No effect before training.
        keywords: see `EmbeddingKeywords` and `OuterKeywords`.

    >>> learner = SimpleShot(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)))
    >>> adapted = learner.adapt(torch.randn(6, 4), torch.arange(6) % 3)

    Source: Wang, Chao, Weinberger, van der Maaten 2019, arXiv:1911.04623, section 3; whitening: Hatch et al.,
    Interspeech 2006.
    """

    log_scale: nn.Parameter
    centre: Centre

    @checked
    def __init__(
        self,
        model: nn.Module,
        *,
        scale: Positive = 10.0,
        whitening: PositiveOrNone = None,
        **keywords: Unpack[EmbeddingKeywords],
    ) -> None:
        start = nn.Parameter(torch.tensor(math.log(scale), dtype=torch.float64))
        parts = {"log_scale": start, "centre": Centre(spread=whitening is not None)}
        super().__init__(model, keywords, options=self.own, parts=parts)
        self.whitening = whitening

    def _fit_head(self, support: Tensor, labels: Tensor, ways: int) -> FittedHead:
        centre, scale = self.centre(support), self.log_scale.exp().to(support.dtype)
        moved = support - centre
        whitening = None if self.whitening is None else self.centre.whitening(self.whitening, support)
        if whitening is not None:
            moved = moved @ whitening.T
        weight, bias = nearest_mean(class_means(nn.functional.normalize(moved, dim=1), labels, ways))
        fitted = {"weight": scale * weight, "bias": scale * bias, "centre": centre}
        return NormalisedLinear(**fitted) if whitening is None else WhitenedLinear(**fitted, whitening=whitening)

    def _kept(self, task: Task, support: Tensor, target: Tensor, ways: int) -> dict[str, Tensor]:
        return self.centre.kept(support, target, torch.cat([task.support_y, task.target_y]), ways)
