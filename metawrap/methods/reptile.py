"""Reptile: the initialisation moves towards the weights that some steps of SGD on a task end at.

task -> fast weights -> inner steps on mini-batches of all its examples -> initialisation - last fast weights, which is
the outer gradient.   The inner step is that of `MAML`, without derivatives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from metawrap.checks.task_batches import with_graphs
from metawrap.errors import ArgumentError, TaskError
from metawrap.heads.joint_rows import form_of, rows_stand_alone, trial
from metawrap.inner_loop.inner_loop import FastWeights, InnerLoop, Point, Unrolled, with_gradients
from metawrap.inner_loop.task_solver import TaskSolver
from metawrap.learner.keywords import ReptileKeywords
from metawrap.methods.maml import MAML
from metawrap.outer_update.outer_update import PlainOuterUpdate
from metawrap.results import MetaOutput
from metawrap.settings.keywords import shows
from metawrap.settings.settings import Settings
from metawrap.settings.validated import Count, CountOrNone, Switch, validated
from metawrap.tasks import Inputs, Task, TaskBatch, as_task_batch, describe_value, map_tensors, tensors_in


@validated
class ReptileSettings(Settings):
    """Those of MAML, most of which stand at one value, and Reptile's own."""

    inner_batch_size: CountOrNone = None
    evaluation_steps: Count = 50
    linear_annealing: Switch = True

    @property
    def default_steps(self) -> int:
        """Inner steps of evaluation."""
        return self.evaluation_steps


class Reptile(MAML):
    """Reptile: (initialisation - adapted weights), the mean over tasks, in place of a gradient; no derivative of it.

    As in the paper: every weight moves, batch norms' scale and shift too; training takes all of a task's examples,
    support and target together, in mini-batches; a batch of one task is the serial form, of several the batched form;
    the outer update is plain SGD, from rate 1 to 0. As in the authors' code: more inner steps in evaluation. Different:
    mini-batches come in an order that the meta-step alone decides, so that a run can be repeated and resumed, and the
    outer rate goes down by epochs; in a loop of your own, each `learner(batch)` in training mode draws anew, by a count
    that state_dict holds. With inner_update={"rule": "adam"} (theirs has betas=(0.0, 0.999) and
    inner_lr=0.001) each task begins with a state of its own; theirs goes from task to task. In `evaluate` and
    `adapt` each step is on the whole support set. `loss` and `accuracy` of a meta-step are those of the target part at
    the adapted weights, which have seen it. Source: Nichol, Achiam, Schulman 2018, arXiv:1803.02999.

    Args:
        inner_steps, inner_lr: of training; 5 and 0.1.
        inner_batch_size: examples of one inner step in training, drawn without replacement until all have been seen;
            all at once if None.
        evaluation_steps: inner steps of `evaluate` and `adapt`; 50.
        meta_lr: outer rate of the first epoch; 1, which for one task goes all the way to its weights.
        linear_annealing, epochs: the outer rate goes to zero over so many epochs; False keeps it.
        optimizer: function from parameters to an optimizer, in place of SGD; brings its own learning rate.
        loss_fn: `loss_fn(prediction, y)` to a scalar; a module with parameters is refused, as nothing would learn them.
        The others are as in `MAMLPlusPlus`. Keywords and fields of it that make no difference here are not taken:
            see `ReptileKeywords`.
    Raises:
        ArgumentError: an argument has the wrong type, range or combination.
        UnsupportedModuleError: the model has something that no engine can adapt correctly.
        TaskError: at the first meta-step: rows of a batch act on each other, except through batch norms.
    """

    default_preset = "reptile"
    settings_class = ReptileSettings
    outer_update = PlainOuterUpdate
    settings: ReptileSettings

    @shows(ReptileKeywords)
    def __init__(self, model: nn.Module, **keywords: Unpack[ReptileKeywords]) -> None:
        loss_fn = keywords.get("loss_fn")
        if isinstance(loss_fn, nn.Module) and any(p.requires_grad for p in loss_fn.parameters()):
            raise ArgumentError(
                f"loss_fn: {type(loss_fn).__name__} has parameters, and Reptile has no gradient to learn them by. "
                "Freeze them with requires_grad_(False), or use another method."
            )
        self._build(model, keywords, ReptileKeywords)
        if self.settings.norm == "running":
            raise ArgumentError(
                'norm: cannot be "running" in Reptile, which trains on the targets too, so that it cannot measure how '
                'they differ from a support set. Use "support".'
            )
        if self.settings.outputs.head_init == "prototypes":
            raise ArgumentError(
                'outputs.head_init: cannot be "prototypes" in Reptile, which has no gradient to pass through them. Use '
                '"zeros" or "shared", or MAML.'
            )
        # Training forwards so far, and where the present call's draws stand because of them: 0 in a meta-step.
        self.forwards = self._ahead = 0
        self._known_forms: set[str] = set()

    def forward(self, task_batch: Any) -> MetaOutput:
        """See `Learner.forward`; in training mode the next call draws other mini-batches."""
        if not self.training:
            return super().forward(task_batch)
        if graphs := with_graphs(as_task_batch(task_batch)):
            raise TaskError(
                f"{graphs[0][0]} was computed with a graph, and Reptile, which moves weights without derivatives, has "
                "no gradient for it. Pass it detached (tensor.detach()), or use another method."
            )
        self._ahead = self.forwards
        try:
            output = super().forward(task_batch)
        finally:
            self._ahead = 0
        self.forwards += 1
        return output

    def get_extra_state(self) -> dict[str, Any]:
        """The counters and what was measured, for state_dict."""
        return super().get_extra_state() | {"forwards": self.forwards}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restores these; in states from before forwards were counted there were none."""
        super().set_extra_state(state)
        self.forwards = int(state.get("forwards", 0))

    def _check_trainable(self, batch: TaskBatch) -> None:
        super()._check_trainable(batch)
        for task in batch:
            form = form_of(task.support_x)
            if form not in self._known_forms:
                self._refuse_mixed_rows(task)
                self._known_forms.add(form)

    def _refuse_mixed_rows(self, task: Task) -> None:
        """Raises TaskError where rows act on each other, except through batch norms: no draw of them is right."""
        both, _ = _joined(task, 0)

        def run(inputs: Inputs) -> Any:
            self.wrapped.run(both, "capture")
            found = self.wrapped.run(inputs, "captured")
            return found if tensors_in(found) else vars(found)  # An object of the user's own.

        trial(self.model, run, both)  # An input that the model does not take is to be told as such.
        if not rows_stand_alone(self.model, run, task.support_x, task.target_x):
            raise TaskError(
                "support_x: Reptile draws mini-batches from support and target examples together, but in this model "
                "rows act on each other: through places of other rows (edges, a batch vector), as steps of one "
                "sequence, or by moments of the batch outside of a batch norm. Use FOMAML or MAML, which keep the two "
                "sets whole."
            )

    def _solver(self, **changes: Any) -> TaskSolver:
        draw = partial(mini_batches, size=self.settings.inner_batch_size, seed=self.iteration + self._ahead)
        return super()._solver(**{"examples": draw, "training_path": partial(_moved_away, examples=draw), **changes})


def _moved_away(
    loop: InnerLoop, start: FastWeights, weights: Sequence[float], examples: Callable[[InnerLoop, int], Iterable[Task]]
) -> Unrolled:
    """Inner steps without derivatives; the gradient of the loss is (initialisation - last fast weights)."""
    sweep = replace(loop, differentiable=False, second_order=False, examples="support_y and target")
    for fast, _ in sweep.inner_steps(Point(start, {}), examples(loop, len(weights))):  # noqa: B007
        pass
    with torch.no_grad():
        # Not recorded: training has seen the statistics of this pass.
        prediction, losses = replace(sweep, moments=None).target_loss(fast, len(weights) - 1)
        away = {name: start[name] - fast[name] for name in start}
    loss = with_gradients(losses.sum(), ((start[name], away[name]) for name in start))
    return Unrolled(loss, losses, [*(None for _ in weights[1:]), losses], prediction, fast)


def mini_batches(loop: InnerLoop, steps: int, *, size: int | None, seed: int) -> Iterator[Task]:
    """For each inner step a task, or a stack of tasks, whose support set is that step's examples.

    Args:
        size: examples of one step, drawn without replacement until all have been seen; None takes all at each step.
    Raises:
        TaskError: the task has fewer examples.
    """
    axis = 1 if loop.stacked else 0
    x, y = _joined(loop.task, axis)
    labels = tensors_in(y)[0]
    count = labels.shape[axis]
    if size is None:
        yield from repeat(replace(loop.task, support_x=x, support_y=y), steps)
        return
    if size > count:
        raise TaskError(
            f"inner_batch_size: expected at most the {count} examples of a task, support and target together, but got "
            f"{size}."
        )
    drawn: list[int] = []
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        while len(drawn) < size:
            drawn += torch.randperm(count, generator=generator).tolist()
        places, drawn = torch.tensor(drawn[:size], device=labels.device), drawn[size:]
        yield replace(loop.task, support_x=_at(x, axis, places), support_y=_at(y, axis, places))


def _joined(task: Task, axis: int) -> tuple[Inputs, Any]:
    """All of a task's inputs and all of its labels.

    Raises:
        TaskError: support and target examples differ in shape, or an input tensor has not one entry for each label.
    """
    for part, x, y in (("support", task.support_x, task.support_y), ("target", task.target_x, task.target_y)):
        counts = {tensor.shape[axis] if tensor.ndim > axis else 0 for tensor in [*tensors_in(x), *tensors_in(y)]}
        if len(counts) > 1:
            raise TaskError(
                f"{part}_x: Reptile takes examples one by one out of every tensor, so each must have as many as there "
                f"are labels, but there are {sorted(counts)}."
            )
    return _cat(task.support_x, task.target_x, axis), _cat(task.support_y, task.target_y, axis)


def _cat(support: Any, target: Any, axis: int) -> Any:
    others = iter(tensors_in(target))
    try:
        return map_tensors(support, lambda tensor: torch.cat([tensor, next(others)], axis))
    except (RuntimeError, StopIteration) as error:
        raise TaskError(
            "task: Reptile trains on support and target examples together, so these must have one shape, but got "
            f"{describe_value(support)} and {describe_value(target)}."
        ) from error


def _at(value: Any, axis: int, places: Tensor) -> Any:
    return map_tensors(value, lambda tensor: tensor.index_select(axis, places))
