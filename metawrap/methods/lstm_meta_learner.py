"""The LSTM meta-learner: MAML's inner loop, whose update rule is an LSTM that is learned with the initialisation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import nn

from metawrap.engines import Engine
from metawrap.errors import ArgumentError
from metawrap.inner_loop.update_rules import InnerOptimizer
from metawrap.layers.learned_update import LSTMUpdate
from metawrap.layers.learning_rates import LearningRates
from metawrap.learner.learner import LossFunction
from metawrap.methods.maml import MAML, Unroll
from metawrap.outer_update.outer_update import OptimizerFactory, SchedulerFactory
from metawrap.settings.settings import HeadInit, Memory, NormPolicy, Settings, WorkersIn
from metawrap.surgery.swap import Factory
from metawrap.surgery.wrap import Selection


@dataclass(frozen=True, kw_only=True)
class LSTMSettings(Settings):
    """Those of MAML, some of which stand at one value, and the LSTM's own."""

    hidden_size: int


class LSTMMetaLearner(MAML):
    """The LSTM meta-learner: a network learns, for each weight and step, how much to keep of it and how far to move it.

    As in the paper: a two-layer LSTM whose parameters all weights share; gradient and loss enter by logarithm and sign;
    the second layer's cell is the weight, its initial value is learned, and its gates start as a gradient step with
    little forgetting; gradients and losses count as constants. Different: each step is on the whole support set; batch
    statistics follow `norm`, where the paper's code keeps running ones for meta-training and each meta-test task; the
    gates' biases start at fixed values, where its code draws them. Source: Ravi & Larochelle 2017, "Optimization as a
    model for few-shot learning".

    Args:
        hidden_size: of the first layer.
        inner_steps: inner updates per task; 5 if None.
        inner_lr: where the input gate, which is the rate of each weight and step, starts: between 0 and 1; 0.01 if
            None.
        memory: "flat" keeps the graph of one inner step at a time: that of the LSTM is many times that of the weights.
        max_grad_norm: of the meta-gradient; the paper's 0.25.
        The others are as in `MAMLPlusPlus`; what that has besides (other update rules and rates, second order) is not
        taken.
    Raises:
        ArgumentError: an argument has the wrong type, range or combination.
        UnsupportedModuleError: the model has something that no engine can adapt correctly.
    """

    default_preset = "lstm"
    settings_class = LSTMSettings
    settings: LSTMSettings

    def __init__(
        self,
        model: nn.Module,
        *,
        hidden_size: int = 20,
        inner_steps: int | None = None,
        inner_lr: float | None = None,
        inner_max_grad_norm: float | None = None,
        inner_max_grad_value: float | None = None,
        multi_step_loss: bool | None = None,
        msl_epochs: int | None = None,
        per_step_norm_statistics: bool | None = None,
        per_step_norm_affine: bool | None = None,
        cosine_annealing: bool | None = None,
        meta_lr: float | None = None,
        min_meta_lr: float | None = None,
        epochs: int | None = None,
        iterations_per_epoch: int | None = None,
        norm: NormPolicy | None = None,
        betas: tuple[float, float] | None = None,
        adapt: Selection = None,
        adapt_norm: bool = False,
        loss_fn: LossFunction = F.cross_entropy,
        optimizer: OptimizerFactory | None = None,
        scheduler: SchedulerFactory | None = None,
        max_grad_norm: float | None = 0.25,
        max_grad_value: float | None = None,
        engine: Literal["auto", "higher", "functional", "batched"] = "auto",
        memory: Memory = "unrolled",
        workers: int | Literal["auto"] = 1,
        workers_in: WorkersIn | None = None,
        channels_last: bool = False,
        tune: bool = False,
        allocator: bool = True,
        cuda_graphs: bool = False,
        tasks_per_backward: int | None = None,
        swap: Mapping[type[nn.Module], Factory] | None = None,
        head: str | None = None,
        head_init: HeadInit = "learned",
        mask_unused_outputs: bool = False,
        keep_norm: str | Iterable[str] = (),
        max_skipped_steps: int = 20,
        detect_anomaly: bool = False,
    ) -> None:
        self._build(dict(locals()))

    def _make_inner(self) -> None:
        s, (_, first) = self.settings, self.wrapped.adapted_parameters()[0]
        if not 0 < s.inner_lr < 1:
            raise ArgumentError(f"inner_lr: expected a number between 0 and 1, for a gate, but got {s.inner_lr}.")
        # None: the input gate takes their part.
        self.learning_rates = LearningRates([], s.inner_steps, s.inner_lr, learned=False)
        self.update = LSTMUpdate(s.hidden_size, s.inner_lr, first.real.dtype, first.device)
        count = sum(parameter.numel() for parameter in self.update.parameters())
        self.wrapped.notes.append(f"the update rule is an LSTM with {count:,} numbers, learned in the outer loop")

    def _inner_optimizer(self, engine: Engine) -> InnerOptimizer:
        return self.update

    def _has_graph(self, unroll: Unroll) -> bool:
        return True

    def _of_inner_update(self) -> list[nn.Parameter]:
        return list(self.update.parameters())
