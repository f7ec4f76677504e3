"""The keywords of constructors, as type checkers and editors see them; `metawrap.settings` has the defaults."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from typing_extensions import TypedDict

from metawrap.outer_update.outer_update import OptimizerFactory
from metawrap.outer_update.users_scheduler import SchedulerFactory
from metawrap.settings.groups import ExecutionOptions, InnerOptions, OuterOptions, OutputOptions, WrappingOptions
from metawrap.settings.keywords import Takes
from metawrap.settings.settings import NormPolicy
from metawrap.settings.validated import Count, NotNegative, Number, Positive, Switch, Whole, WholeOrInfinite
from metawrap.surgery.wrap import Selection

LossFunction = Callable[[Any, Any], Any]
EngineName = Literal["auto", "higher", "functional", "batched"]
InnerUpdate = InnerOptions | Mapping[str, Any] | None
Outer = OuterOptions | Mapping[str, Any] | None
Execution = ExecutionOptions | Mapping[str, Any] | None
Outputs = OutputOptions | Mapping[str, Any] | None
Wrapping = WrappingOptions | Mapping[str, Any] | None


class CommonKeywords(TypedDict, total=False):
    """The keywords of every method, with the meaning that `MAMLPlusPlus` gives them. None means the default."""

    meta_lr: Positive | None
    epochs: Count | None
    iterations_per_epoch: Count | None
    norm: NormPolicy | None
    loss_fn: LossFunction
    optimizer: OptimizerFactory | None
    scheduler: SchedulerFactory | None
    wrapping: Wrapping


class AdamKeywords(CommonKeywords, total=False):
    """And those of every method whose outer update is Adam."""

    cosine_annealing: Switch | None
    min_meta_lr: NotNegative | None
    outer_update: Outer


class OuterKeywords(AdamKeywords, total=False):
    """The keywords that every method without an inner loop takes, with the meaning that `MAMLPlusPlus` gives them.

    Other defaults than there: norm="running" (a norm is trained on the batch's own statistics and evaluated on stored
    ones, as in any network), and cosine_annealing=True. Methods on an embedding then run support and target as one
    batch in training, where both have the same shapes. Of `execution` they take `tasks_per_backward` and `allocator`.
    """

    execution: Annotated[Execution, Takes(("tasks_per_backward", "allocator"))]


class InnerLoopKeywords(CommonKeywords, total=False):
    """The keywords of every method whose inner loop adapts the network."""

    inner_steps: Count | None
    inner_lr: Number | None
    engine: EngineName
    head: str | None
    outputs: Outputs


class SteppedKeywords(InnerLoopKeywords, AdamKeywords, total=False):
    """And of those that learn from the target loss after inner steps."""

    multi_step_loss: Switch | None
    msl_epochs: Whole | None
    per_step_norm_statistics: Switch | None
    per_step_norm_affine: Switch | None
    adapt: Selection
    adapt_norm: Switch | None
    execution: Execution


class MAMLKeywords(SteppedKeywords, total=False):
    """The keywords of `MAML`, `FOMAML`, `MAMLPlusPlus`, `MetaSGD` and `BOIL`."""

    preset: str | None
    first_order_epochs: WholeOrInfinite | None
    learn_inner_lr: Switch | None
    inner_update: InnerUpdate


class LSTMKeywords(SteppedKeywords, total=False):
    """The keywords of `LSTMMetaLearner`."""

    hidden_size: Count | None
    inner_update: Annotated[InnerUpdate, Takes(("max_grad_norm", "max_grad_value"))]


class ReptileKeywords(InnerLoopKeywords, total=False):
    """The keywords of `Reptile`."""

    inner_batch_size: Count | None
    evaluation_steps: Count | None
    linear_annealing: Switch | None
    inner_update: InnerUpdate
    outer_update: Annotated[Outer, Takes(("max_grad_norm", "max_grad_value", "max_skipped_steps", "detect_anomaly"))]
    execution: Annotated[
        Execution, Takes(("tasks_per_backward", "workers", "workers_in", "channels_last", "tune", "allocator"))
    ]
