"""The LSTM meta-learner: MAML's inner loop, whose update rule is an LSTM that is learned with the initialisation."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from typing_extensions import Unpack

from metawrap.errors import ArgumentError
from metawrap.inner_loop.task_solver import InnerUpdate
from metawrap.inner_loop.update_rules import LearningRates
from metawrap.layers.learned_update import LSTMUpdate
from metawrap.learner.description import Description
from metawrap.learner.keywords import LSTMKeywords
from metawrap.methods.maml import MAML
from metawrap.settings.keywords import shows
from metawrap.settings.settings import Settings
from metawrap.settings.validated import Count, validated


@validated
class LSTMSettings(Settings):
    """Those of MAML, some of which stand at one value, and the LSTM's own."""

    hidden_size: Count = 20


class LSTMMetaLearner(MAML):
    """The LSTM meta-learner: a network learns, for each weight and step, how much to keep of it and how far to move it.

    As in the paper: a two-layer LSTM whose parameters all weights share; gradient and loss enter by logarithm and sign;
    the second layer's cell is the weight, its initial value is learned, and its gates start as a gradient step with
    little forgetting; gradients and losses count as constants. Different: each step is on the whole support set; batch
    statistics follow `norm`, where the paper's code keeps running ones for meta-training and each meta-test task; the
    gates' biases start at fixed values, where its code draws them. Source: Ravi & Larochelle 2017, "Optimization as a
    model for few-shot learning".

    Args:
        hidden_size: of the first layer; 20.
        inner_steps: inner updates per task; 5.
        inner_lr: where the input gate, which is the rate of each weight and step, starts: between 0 and 1; 0.01.
        execution: its memory="flat" keeps the graph of one inner step at a time: that of the LSTM is many times that
            of the weights.
        outer_update: its max_grad_norm is the paper's, 0.25.
        The others are as in `MAMLPlusPlus`. Other update rules and rates, and second order, are not taken: see
            `LSTMKeywords`.
    Raises:
        ArgumentError: an argument has the wrong type, range or combination.
        UnsupportedModuleError: the model has something that no engine can adapt correctly.
    """

    default_preset = "lstm"
    settings_class = LSTMSettings
    settings: LSTMSettings
    update: LSTMUpdate

    @shows(LSTMKeywords)
    def __init__(self, model: nn.Module, **keywords: Unpack[LSTMKeywords]) -> None:
        self._build(model, keywords, LSTMKeywords)

    def _inner_parts(self, adapted: Sequence[tuple[str, nn.Parameter]], settings: Settings) -> dict[str, nn.Module]:
        assert isinstance(settings, LSTMSettings)
        if not 0 < settings.inner_lr < 1:
            raise ArgumentError(
                f"inner_lr: expected a number between 0 and 1, for a gate, but got {settings.inner_lr}."
            )
        _, first = adapted[0]
        # No rates: the input gate takes their part.
        rates = LearningRates([], settings.inner_steps, settings.inner_lr, learned=False)
        update = LSTMUpdate(settings.hidden_size, settings.inner_lr, first.real.dtype, first.device)
        return {"learning_rates": rates, "update": update}

    def _inner_update(self) -> InnerUpdate:
        return InnerUpdate(self.learning_rates, lambda _: self.update, list(self.update.parameters()), keeps_graph=True)

    def describe(self) -> Description:
        """What wrapping found and did."""
        described = super().describe()
        count = sum(parameter.numel() for parameter in self.update.parameters())
        described.notes.insert(0, f"the update rule is an LSTM with {count:,} numbers, learned in the outer loop")
        return described
