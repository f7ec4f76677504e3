"""The five groups of keywords that no paper names: inner update, outer update, execution, outputs, wrapping.

A learner takes each as one of these objects or as a dict of its fields; recipes and `--set` take "group.field".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, SkipValidation

from metawrap.errors import ArgumentError
from metawrap.settings.validated import (
    Betas,
    Count,
    CountOrNone,
    Expected,
    Fraction,
    Options,
    Positive,
    PositiveOrNone,
    Switch,
    Workers,
    validated,
)
from metawrap.surgery.swap import Factory

HeadInit = Literal["learned", "zeros", "random", "stored", "shared", "prototypes"]
Memory = Literal["unrolled", "flat"]
WorkersIn = Literal["threads", "processes"]
Tune = Annotated[bool | Literal["auto"], Expected('True, False or "auto"')]
InnerOptimizerName = Literal["sgd", "adam"]


@validated
class InnerOptions(Options):
    """`inner_update`: how a gradient of the support loss becomes the next fast weights, besides the learning rate.

    >>> InnerOptions(rule="adam", eps=1e-3).betas
    (0.9, 0.999)
    """

    keyword: ClassVar[str] = "inner_update"
    rule: InnerOptimizerName = Field(
        default="sgd", description='"sgd" or "adam"; both use the learned rates and are differentiated through.'
    )
    momentum: Fraction = Field(default=0.0, description='of "sgd", as in torch.')
    betas: Betas = Field(default=(0.9, 0.999), description='of "adam".')
    eps: Positive = Field(
        default=1e-8,
        description=(
            'of "adam". With 1e-8 its meta-gradient in float32 is exact to a few percent only; 1e-3 is steadier.'
        ),
    )
    max_grad_norm: PositiveOrNone = Field(
        default=None, description="limit of the inner gradient's norm over all adapted tensors; differentiated through."
    )
    max_grad_value: PositiveOrNone = Field(
        default=None, description="limit of each entry of the inner gradient; differentiated through."
    )

    def check_together(self) -> None:
        """Raises ArgumentError where a constant belongs to the other rule."""
        for name, rule in {"momentum": "sgd", "betas": "adam", "eps": "adam"}.items():
            if name in self.given and getattr(self, name) and self.rule != rule:
                raise ArgumentError(
                    f'{self.named(name)}: has no effect with rule="{self.rule}". Leave it out, or pass rule="{rule}".'
                )


@validated
class OuterOptions(Options):
    """`outer_update`: how a meta-gradient becomes the next weights, besides the learning rate.

    >>> OuterOptions(max_grad_norm=10.0).max_skipped_steps
    20
    """

    keyword: ClassVar[str] = "outer_update"
    betas: Betas = Field(default=(0.9, 0.999), description='of the built-in Adam; 0.9 and 0.99 with preset="paper".')
    max_grad_norm: PositiveOrNone = Field(default=None, description="limit of the meta-gradient's norm.")
    max_grad_value: PositiveOrNone = Field(default=None, description="limit of each entry of the meta-gradient.")
    max_skipped_steps: Count = Field(
        default=20,
        description=(
            "training stops when at least this many meta-steps in a row have a gradient that is not finite; looked "
            "up once in as many steps."
        ),
    )
    detect_anomaly: Switch = Field(
        default=False,
        description=(
            "runs torch's anomaly detection, which is slow. The first operation whose backward pass "
            "gives NaN ends the meta-step with an error that names it."
        ),
    )


@validated
class ExecutionOptions(Options):
    """`execution`: how the tasks of a batch are run. Gradients never depend on it, but for rounding.

    >>> ExecutionOptions(workers=2, channels_last=True).memory
    'unrolled'
    """

    keyword: ClassVar[str] = "execution"
    memory: Memory = Field(
        default="unrolled",
        description=(
            '"unrolled" keeps the graph of all inner steps, "flat" that of one step at a time: each '
            "support pass runs a second time, and a step leaves only its weights and the state of its"
            " update rule. If it is not given, memory that runs out turns it on."
        ),
    )
    tasks_per_backward: CountOrNone = Field(
        default=None,
        description=(
            "tasks that are unrolled before a backward pass, memory against speed. None: 1, and with "
            'engine="batched" all of the batch.'
        ),
    )
    workers: Workers = Field(
        default=1,
        description=(
            'tasks that `meta_step` solves at the same time, on a CPU; "auto": one per core. Workers '
            "share the cores, and each holds the graph of `tasks_per_backward` tasks. A model or loss"
            " that draws random numbers, changes an object that it holds, or has hooks is solved one "
            "task after another; `describe()` says so."
        ),
    )
    workers_in: WorkersIn = Field(
        default="threads",
        description=(
            '"threads", or "processes", which are forked (Linux), and forked anew after a change of the model that '
            "is not one of weights or buffers. Processes are mostly faster, because threads wait for each "
            "other while Python runs."
        ),
    )
    channels_last: Switch = Field(
        default=False,
        description=(
            "hands 4- and 5-dimensional inputs to the model with the channels of a pixel side by "
            "side; convolutions and pooling often run faster on this layout."
        ),
    )
    tune: Tune = Field(
        default="auto",
        description=(
            "times workers, workers_in and channels_last and keeps the fastest: True, in the first "
            'meta-step; "auto", in the second, on a CPU, where a meta-step is large (5e8 multiplications and '
            "additions forward) and none of the three is given. `describe()` shows the choice, "
            "and a checkpoint holds it."
        ),
    )
    allocator: Switch = Field(
        default=True,
        description="on Linux, lets the process keep the memory that it frees, from the first meta-step on.",
    )
    cuda_graphs: Switch = Field(
        default=False,
        description=(
            "on a GPU, records the kernels of a meta-gradient and replays them, for batches of one "
            "shape. A model that cannot be recorded is refused by name; models that draw random "
            "numbers cannot."
        ),
    )

    @cached_property
    def measures(self) -> bool:
        """Whether tuning may choose how tasks are run."""
        return bool(self.tune) and not self._chosen and not self.cuda_graphs

    @cached_property
    def in_threads(self) -> bool:
        """Whether tasks are solved in several threads, as far as that was asked for."""
        return self.workers != 1 and self.workers_in == "threads"

    @property
    def _chosen(self) -> frozenset[str]:
        """Fields that tuning would choose, but that the user has set."""
        usual = {"workers": 1, "channels_last": False}
        return self.given & {"workers_in"} | {name for name, value in usual.items() if getattr(self, name) != value}

    def check_together(self) -> None:
        """Raises ArgumentError where a field has no effect beside another."""
        if self.tune is True and self._chosen:
            raise ArgumentError(
                f"{self.named(min(self._chosen))}: is chosen by measurement with tune=True. Leave it out, or tune=True."
            )
        if "workers_in" in self.given and self.workers == 1:
            raise ArgumentError(
                f'{self.named("workers_in")}: has no effect with workers=1. Leave it out, or pass workers=2 or "auto".'
            )
        if self.cuda_graphs and self.memory == "flat":
            raise ArgumentError(
                f'{self.named("memory")}: expected "unrolled" with cuda_graphs=True, but got "flat", which reads the '
                "state of the random generators at every inner step: that cannot be recorded. Leave one of them out."
            )


@validated
class OutputOptions(Options):
    """`outputs`: where the head starts in each task, and which of its outputs count.

    >>> OutputOptions(head_init="zeros").mask_unused_outputs
    False
    """

    keyword: ClassVar[str] = "outputs"
    head_init: HeadInit = Field(
        default="learned",
        description=(
            'where the head starts in each task: "learned"; "zeros"; "random", drawn by its '
            'reset_parameters(); "stored", as the task with the same `Task.id` left it when it was'
            ' last trained on; "shared", the mean of its learned rows for each class (UNICORN-MAML); or'
            ' "prototypes", by the mean embedding of each class (ProtoMAML). With "zeros", "shared" and'
            ' "prototypes" the order of the labels does not matter.'
        ),
    )
    mask_unused_outputs: Switch = Field(
        default=False,
        description=(
            "gives outputs of classes that the support set lacks a logit of minus infinity, for tasks"
            " with fewer ways than the model has outputs."
        ),
    )
    losses_in_training_mode: Switch = Field(
        default=False,
        description=(
            "for a network that returns its losses in training mode alone, as detectors do: `adapt` and `evaluate` take"
            " every loss in training mode, too, and predictions in eval mode."
        ),
    )


@validated
class WrappingOptions(Options):
    """`wrapping`: what becomes of the network's norms when it is copied and wrapped.

    >>> WrappingOptions(keep_norm="stem.*").swap is None
    True
    """

    keyword: ClassVar[str] = "wrapping"
    # `wrap` checks both of them, against the network.
    swap: Annotated[Mapping[type[Any], Factory] | None, SkipValidation] = Field(
        default=None, description="module class to factory(module), for norms that cannot become per-step as they are."
    )
    keep_norm: Annotated[str | Iterable[str], SkipValidation] = Field(
        default=(), description="names or wildcards of batch norms to leave alone, on their stored statistics."
    )


GROUPS: dict[str, type[Options]] = {
    group.keyword: group for group in (InnerOptions, OuterOptions, ExecutionOptions, OutputOptions, WrappingOptions)
}
