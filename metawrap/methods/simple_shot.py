"""SimpleShot: embeddings -> minus the mean of the training embeddings, to length 1 -> the nearest class mean."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from metawrap.heads.centre import Centre
from metawrap.heads.fitted import FittedHead, NormalisedLinear, class_means, nearest_mean
from metawrap.learner.embedding_learner import EmbeddingKeywords, EmbeddingLearner
from metawrap.settings.keywords import checked
from metawrap.settings.validated import Positive


class SimpleShot(EmbeddingLearner):
    """SimpleShot: the nearest class mean among embeddings that are centred and of length 1 (CL2N in the paper).

    An embedding x becomes z = (x - centre) / |x - centre|; c_k is the mean of z over the support examples of class k.
    Logits are -scale * |z - c_k|^2, but for a constant of the row; see `ProtoNet`.

    The centre is the mean support embedding of the training tasks, which `meta_step` gathers: of all tasks up to 100,
    from then on with a weight of 1/100 for each new task. A learner that has not been trained, such as a pretrained
    network as it is, has no such mean: the centre is then the mean of the task's own support set. Both are inductive.
    `learner.centre.seen` is the number of tasks in the mean.

    Differs from the paper, which trains by ordinary classification (`FineTune` does) and takes the mean over all
    training images: here the loss of the logits may train the network, as in `ProtoNet`, and then a task is centred by
    its own support set. Without training the scale has an effect on probabilities, and none on accuracy.

    Args:
        scale: where the scale starts; it is learned, through its logarithm.
        keywords: see `EmbeddingKeywords` and `OuterKeywords`.

    >>> learner = SimpleShot(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)))
    >>> adapted = learner.adapt(torch.randn(6, 4), torch.arange(6) % 3)

    Source: Wang, Chao, Weinberger, van der Maaten 2019, arXiv:1911.04623, section 3.
    """

    log_scale: nn.Parameter
    centre: Centre

    @checked
    def __init__(self, model: nn.Module, *, scale: Positive = 10.0, **keywords: Unpack[EmbeddingKeywords]) -> None:
        start = nn.Parameter(torch.tensor(math.log(scale), dtype=torch.float64))
        super().__init__(model, keywords, options=self.own, parts={"log_scale": start, "centre": Centre()})

    def _fit_head(self, support: Tensor, labels: Tensor, ways: int) -> FittedHead:
        centre, scale = self.centre(support), self.log_scale.exp().to(support.dtype)
        weight, bias = nearest_mean(class_means(nn.functional.normalize(support - centre, dim=1), labels, ways))
        return NormalisedLinear(weight=scale * weight, bias=scale * bias, centre=centre)

    def _kept(self, support: Tensor) -> dict[str, Tensor]:
        return {"centre": support.detach().mean(0)}
