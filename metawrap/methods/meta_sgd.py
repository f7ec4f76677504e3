"""Meta-SGD: MAML whose inner loop learns a rate for each weight, and with it the direction of the update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import nn

from metawrap.inner_loop.update_rules import LearningRates
from metawrap.methods.maml import MAML
from metawrap.settings.settings import Settings


class MetaSGD(MAML):
    """Meta-SGD: an initialisation, and a learned rate of free sign for each weight; one inner step by default.

    All keywords are those of `MAMLPlusPlus`. As in the paper: the rates are as many as the weights, the same at each
    inner step, and learned by the outer loop together with the initialisation, by second-order gradients. Different:
    they all start at `inner_lr`; the paper draws each from 0.005 to 0.1. Source: Li et al. 2017, arXiv:1707.09835.

    Raises:
        ArgumentError, UnsupportedModuleError: as `MAMLPlusPlus` does; learn_inner_lr=False is refused.
    """

    default_preset = "meta_sgd"
    fixed: ClassVar[Mapping[str, Any]] = {"learn_inner_lr": True}

    def _inner_parts(self, adapted: Sequence[tuple[str, nn.Parameter]], settings: Settings) -> dict[str, nn.Module]:
        return {"learning_rates": LearningRates(adapted, 1, settings.inner_lr, learned=True, per_weight=True)}
