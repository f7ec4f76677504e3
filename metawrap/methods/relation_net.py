"""Relation networks: sum of a class's support embeddings, beside a target's -> a learned module -> a score in 0..1."""

from __future__ import annotations

import copy
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedParameter
from typing_extensions import Unpack

from metawrap.errors import ArgumentError, UnsupportedModuleError
from metawrap.heads.fitted import FittedHead, class_sums, one_hot
from metawrap.learner.embedding_learner import EmbeddingKeywords, EmbeddingLearner
from metawrap.results import IGNORED
from metawrap.settings.keywords import checked
from metawrap.settings.validated import Count, Expected
from metawrap.tasks import describe_value


def relation_loss(prediction: Tensor, y: Tensor) -> Tensor:
    """The paper's loss: mean squared error of the scores, against 1 for the class and 0 for every other.

    The mean over all pairs, where the paper writes a sum. Targets labelled -100 are left out, as by cross-entropy.

    Args:
        prediction: (targets, ways), the scores before the sigmoid. y: (targets,).
    """
    shown = (y != IGNORED)[:, None]
    wanted = one_hot(y.clamp(min=0), prediction.shape[1], prediction)
    errors = F.mse_loss(torch.where(shown, prediction, 0).sigmoid(), wanted, reduction="none")
    return torch.where(shown, errors, 0).sum() / (shown.sum() * prediction.shape[1])


class RelationNet(EmbeddingLearner):
    """Relation networks: a learned module scores how well a target goes with each class.

    The summed support embeddings of a class and the embedding of a target, channels one after the other, enter the
    relation module, whose sigmoid is the score r in 0..1; trained by mean squared error to r = 1 for the target's class
    and 0 for the others. The prediction is the score before its sigmoid, for a `loss_fn` of your own too.

    As in the paper, the relation module has two blocks (3x3 convolution, ReLU, 2x2 max-pool) and two linear layers, of
    8 units and of 1, and the sum grows with the number of shots: train with as many as you test with. Differs: the
    blocks have no batch norm, which would mix the targets of a task; the first block starts on the difference of the
    two embeddings, because without norms learning was slower otherwise; a side of 1 is neither convolved nor pooled, so
    that for vectors, taken as maps of 1x1, the module is an MLP.

    Args:
        model: its embedding is a map (examples, channels, height, width), or anything else, taken as a vector.
        hidden: channels of the relation module's blocks; 64 if None, as in the paper.
        relation: a module of your own in its place; it is copied. From pairs (targets * ways, 2 * channels, ...) to
            one number each, the score before the sigmoid. No batch norm: use `nn.GroupNorm`.
        keywords: see `EmbeddingKeywords` and `OuterKeywords`; loss_fn defaults to `relation_loss`.

    >>> learner = RelationNet(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), hidden=16)
    >>> adapted = learner.adapt(torch.randn(6, 4), torch.arange(6) % 3)

    Source: Sung et al. 2018, arXiv:1711.06025, Eq. 1 to 3 and Fig. 2.
    """

    flat: ClassVar[bool] = False
    relation: nn.Module

    @checked
    def __init__(
        self,
        model: nn.Module,
        *,
        hidden: Count | None = None,
        relation: Annotated[nn.Module, Expected("a torch.nn.Module")] | None = None,
        **keywords: Unpack[EmbeddingKeywords],
    ) -> None:
        if relation is None:
            hidden = hidden or 64
            part = relation_module(hidden)
            shown = "built-in"
        else:
            if hidden is not None:
                raise ArgumentError("hidden: has no effect with relation=, which is the whole module. Leave it out.")
            _check_relation(relation)
            part, shown = copy.deepcopy(relation), type(relation).__name__
        keywords.setdefault("loss_fn", relation_loss)
        # Not the user's own module: a copy of the learner would copy it.
        self.own = {"relation": shown} | ({"hidden": hidden} if relation is None else {})
        super().__init__(model, keywords, options=self.own, parts={"relation": part})

    def _fit_head(self, support: Tensor, labels: Tensor, ways: int) -> FittedHead:
        return Relations(class_sums(support, labels, ways), self.relation)


class Relations(FittedHead):
    """Logits are the scores before their sigmoid. sums: (ways, channels, ...), the support embeddings of each class."""

    traceable = False  # The relation module goes by the shape of its input.
    sums: Tensor

    def __init__(self, sums: Tensor, relation: nn.Module) -> None:
        super().__init__(sums=sums)
        self.relation = relation

    def forward(self, embeddings: Tensor) -> Tensor:
        """(targets, channels, ...) to (targets, ways)."""
        targets, ways = len(embeddings), len(self.sums)
        shown = self.sums[None].expand(targets, *self.sums.shape)
        asked = embeddings[:, None].expand(targets, ways, *embeddings.shape[1:])
        scores = self.relation(torch.cat([shown, asked], 2).flatten(0, 1))
        if not isinstance(scores, Tensor) or scores.numel() != targets * ways:
            raise UnsupportedModuleError(
                f"relation: expected one number for each of the {targets * ways} pairs, but it returned "
                f"{describe_value(scores)}. End it in nn.Linear(..., 1)."
            )
        return scores.reshape(targets, ways)


def relation_module(hidden: int) -> nn.Module:
    """The relation module of the paper for maps, an MLP for vectors; sized by what enters it first."""
    return nn.Sequential(
        RelationBlock(hidden, compares=True),
        RelationBlock(hidden),
        nn.Flatten(),
        nn.LazyLinear(8),
        nn.ReLU(),
        nn.Linear(8, 1),
    )


class RelationBlock(LazyModuleMixin, nn.Module):
    """3x3 convolution with bias, ReLU, 2x2 max-pool; a side of 1 is neither convolved nor pooled.

    (pairs, channels, h, w) to (pairs, hidden, max(h // 2, 1), max(w // 2, 1)); anything else enters as
    (pairs, numbers, 1, 1). weight: (hidden, channels, 3 or 1, 3 or 1), sized by the first input. compares: start with
    the weights of a pair's second half minus those of its first.
    """

    weight: UninitializedParameter

    def __init__(self, hidden: int, compares: bool = False) -> None:
        super().__init__()
        self.hidden, self.compares = hidden, compares
        self.weight = UninitializedParameter()
        self.bias = nn.Parameter(torch.zeros(hidden))

    def initialize_parameters(self, pairs: Tensor) -> None:
        """Gives the weight its size, and draws it for a ReLU behind it."""
        if self.has_uninitialized_params():
            maps = _as_maps(pairs)
            sides = [3 if side > 1 else 1 for side in maps.shape[2:]]
            with torch.no_grad():
                self.weight.materialize((self.hidden, maps.shape[1], *sides))
                nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")
                if self.compares:
                    half = maps.shape[1] // 2
                    self.weight[:, half:] = -self.weight[:, :half]

    def forward(self, pairs: Tensor) -> Tensor:
        """One block; shapes as in the class docstring."""
        maps = _as_maps(pairs)
        padding = [side // 2 for side in self.weight.shape[2:]]
        maps = F.relu(F.conv2d(maps, self.weight, self.bias, padding=padding))
        return F.max_pool2d(maps, [min(side, 2) for side in maps.shape[2:]])


def _as_maps(pairs: Tensor) -> Tensor:
    return pairs if pairs.ndim == 4 else pairs.flatten(1)[..., None, None]


def _check_relation(relation: nn.Module) -> None:
    for name, module in relation.named_modules():
        if isinstance(module, _BatchNorm):
            raise ArgumentError(
                f"relation: '{name}' is a {type(module).__name__}, which would normalise a target by the other "
                f"targets of its task. Use nn.GroupNorm(1, {module.num_features})."
            )
    last = list(relation.modules())[-1]
    if isinstance(last, nn.Sigmoid):
        raise ArgumentError(
            "relation: it ends in a sigmoid, but its output is taken as the score before the sigmoid. Leave that out."
        )
