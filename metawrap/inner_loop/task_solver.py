"""From tasks to outcomes: builds an inner loop for each task, or for a stack of tasks, and keeps its results.

A learner makes one `TaskSolver` for each call. A probe is `dataclasses.replace(solver, ...)`, with settings and engines
of its own; the live learner is not touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

from metawrap.engines import BatchedEngine, BufferEdits, Engine, differentiable_twice
from metawrap.engines.batched import Padded
from metawrap.inner_loop.flat_memory import unrolled_flat
from metawrap.inner_loop.head_starts import HeadStart
from metawrap.inner_loop.inner_loop import (
    EagerTargetGradients,
    FastWeights,
    GradientSums,
    InnerLoop,
    Unrolled,
    unrolled,
)
from metawrap.inner_loop.masking import Mask, used_labels
from metawrap.inner_loop.padding import can_be_padded, loss_of_rows, padded
from metawrap.inner_loop.task_layout import alike, apart, layouts_of_weights, stacked, start_of, to_channels_last
from metawrap.inner_loop.update_rules import InnerOptimizer, LearningRates
from metawrap.layers.norm_policies import PASSES
from metawrap.results import OneByOne, TaskOutcome, ignored_label, outcome_of, task_loss
from metawrap.settings.schedules import is_second_order, step_loss_weights
from metawrap.settings.settings import Settings
from metawrap.snapshot.generators import Generators
from metawrap.snapshot.module_state import restored_buffers
from metawrap.surgery.wrap import Wrapped
from metawrap.tasks import Task, map_tensors

Start = Mapping[str, Tensor]


@dataclass(frozen=True)
class InnerUpdate:
    """How an inner step moves the fast weights.

    rates: learning rates. optimizer: makes the update rule for an engine, by the engine's name.
    parameters: what the outer loop learns for the update alone. keeps_graph: the update has a graph in first order too,
    as a learned update rule has.
    """

    rates: LearningRates
    optimizer: Callable[[str], InnerOptimizer]
    parameters: Sequence[nn.Parameter]
    keeps_graph: bool = False


@dataclass(frozen=True)
class TaskSolver:
    """Solves tasks by an inner loop.

    engine: for one task; batched: for a stack of tasks of one shape, None to solve them one by one.
    pads: the stack may hold tasks of unequal sizes, padded.
    learned: every parameter that the outer loop learns. epoch: decides about step weights and derivative order.
    roots: hold every module that a pass runs, the loss function if it is one. edits: buffers that forward edits.
    channels_last: images, and the weights of convolutions, have this layout. clone_inputs: the model edits its inputs.
    plain_forms: forward runs an operation that `PlainForms` replaces.
    any_order: the passes of a task may run in another order.
    examples: the support set of each inner step in training; the task's own at each step if None.
    training_path: runs a loop in training, in place of the weighted target losses.
    """

    wrapped: Wrapped
    loss_fn: Any
    settings: Settings
    update: InnerUpdate
    head_start: HeadStart
    engine: Engine
    learned: Sequence[nn.Parameter]
    epoch: int
    device: torch.device
    roots: Sequence[nn.Module]
    edits: BufferEdits
    batched: BatchedEngine | None = None
    pads: bool = False
    channels_last: bool = False
    clone_inputs: bool = False
    plain_forms: bool = False
    any_order: bool = False
    examples: Callable[[InnerLoop, int], Iterable[Task]] | None = None
    training_path: Callable[[InnerLoop, FastWeights, Sequence[float]], Unrolled] | None = None

    def solve_all(
        self, tasks: Sequence[Task], *, training: bool, norm: str, whole_graph: bool = True
    ) -> tuple[Tensor, list[TaskOutcome]]:
        """The sum of the tasks' losses, with its graph, and the outcome of each task without graph.

        Args:
            whole_graph: False allows a loss that is differentiable once and with respect to `learned` alone, so that
                parts of the graph are freed early.
        """
        if self.batched is None or not training:
            one_by_one = OneByOne(self.solve)
            return one_by_one.solve_all(tasks, training=training, norm=norm, whole_graph=whole_graph)
        total: list[Tensor] = []
        outcomes: dict[int, TaskOutcome] = {}
        # In the order of the tasks: random heads are drawn as they would be task by task.
        starts = [self.head_start.values(self.wrapped.model, task.id) for task in tasks]
        # An edit of a buffer is refused after it was made.
        pads = self.pads and all(can_be_padded(task, self.loss_fn) for task in tasks)
        with restored_buffers(self.wrapped.model):
            for places in alike(tasks, pads):
                group, own = [tasks[place] for place in places], [starts[place] for place in places]
                if len(group) > 1:
                    stack = padded(group, self.loss_fn) if pads else stacked(group)
                    loss, found = self._solve_stack(stack, group, own, training, norm, whole_graph)
                else:
                    alone = self.solve(group[0], training=training, norm=norm, whole_graph=whole_graph, start=own[0])
                    loss, found = alone.loss, [alone.detached()]
                total.append(loss)
                outcomes |= zip(places, found, strict=True)
        return torch.stack(total).sum(), [outcomes[place] for place in range(len(tasks))]

    def solve(
        self,
        task: Task,
        *,
        training: bool,
        norm: str,
        steps: int | None = None,
        mask: bool | None = None,
        whole_graph: bool = True,
        start: Start | None = None,
    ) -> TaskOutcome:
        """Adapts to one task's support set and judges on its target set.

        Args:
            steps: inner steps; the setting's if None. mask: masks unused outputs; the setting's if None.
            start: where the head starts; drawn from `head_start` if None.
        """
        if steps is None:
            steps = self.settings.inner_steps if training else self.settings.default_steps
        loop = self.loop(task, training=training, norm=norm, mask=mask)
        start_weights = self.initial_weights(loop, None if start is None else [start])
        found = self._run(loop, start_weights, self._step_weights(steps, training), training, whole_graph)
        head = self.head_start.adapted(found.fast) if self.head_start.kind != "learned" else {}
        return outcome_of(
            task,
            found.loss,
            found.prediction,
            loss_fn=self.loss_fn,
            step_losses=found.step_losses,
            moments=loop.moments,
            head=head,
        )

    def _solve_stack(
        self, stack: Task, tasks: Sequence[Task], starts: Sequence[Start], training: bool, norm: str, whole_graph: bool
    ) -> tuple[Tensor, list[TaskOutcome]]:
        loop = self.loop(stack, training=training, norm=norm, several=True)
        weights = self._step_weights(self.settings.inner_steps, training)
        found = self._run(loop, self.initial_weights(loop, starts), weights, training, whole_graph)
        head, moments = self.head_start.adapted(found.fast), loop.moments or []
        cut, steps = isinstance(stack.target_x, Padded), found.step_losses
        outcomes = apart(tasks, found.losses, steps, found.prediction, moments, head, self.loss_fn, cut)
        return found.loss, outcomes

    def loop(
        self, task: Task, *, training: bool, norm: str, mask: bool | None = None, several: bool = False
    ) -> InnerLoop:
        """The inner loop of a task, or of a stack of tasks (`several`)."""
        engine = self.batched if several else self.engine
        assert engine is not None
        if self.channels_last:
            images = {part: map_tensors(getattr(task, part), to_channels_last) for part in ("support_x", "target_x")}
            task = replace(task, **images)
        differentiable = torch.is_grad_enabled()
        inner = self.settings.inner_update
        masked = self.settings.outputs.mask_unused_outputs if mask is None else mask
        return InnerLoop(
            task,
            engine,
            self.update.optimizer(engine.name),
            self.update.rates.per_step(),
            partial(loss_of_rows if several else task_loss, self.loss_fn),
            self.wrapped.clock,
            stacked=several,
            # Without a batch norm a context pass would have no use.
            passes=PASSES[norm if self.wrapped.swapped else "batch"],
            differentiable=differentiable,
            second_order=differentiable and is_second_order(self.epoch, self.settings.first_order_epochs),
            max_norm=inner.max_grad_norm,
            max_value=inner.max_grad_value,
            moments=[] if training else None,
            mask=Mask(used_labels(task, ignored_label(self.loss_fn)), self.loss_fn) if masked else None,
            clone_inputs=self.clone_inputs,
            losses_in=self._mode_of_losses,
        )

    @property
    def _mode_of_losses(self) -> Callable[[], AbstractContextManager[None]] | None:
        own = self.settings.outputs.losses_in_training_mode and not self.wrapped.model.training
        return self._in_training_mode if own else None

    @contextmanager
    def _in_training_mode(self) -> Iterator[None]:
        # An evaluation leaves the generators as they are; dropout may draw in this mode.
        generators = Generators(self.device)
        with self.wrapped.in_training_mode():
            yield
        generators.put_back()

    def initial_weights(self, loop: InnerLoop, starts: Sequence[Start] | None = None) -> FastWeights:
        """Where the inner loop starts.

        Args:
            starts: start of the head of each task; drawn for the loop's one task if None.
        """
        if starts is None:
            learned = self.head_start.kind == "learned"
            starts = [{} if learned else self.head_start.values(self.wrapped.model, loop.task.id)]
        parameters = dict(self.wrapped.model.named_parameters())
        layouts = layouts_of_weights(self.wrapped.model) if self.channels_last else {}

        def copied() -> FastWeights:
            # Clones: in-place edits of a fast weight, and hooks on the user's parameters, must not meet each other.
            return {
                name: start_of([start.get(name, parameters[name]) for start in starts])
                if loop.stacked
                else starts[0].get(name, parameters[name]).clone(memory_format=layouts.get(name, torch.preserve_format))
                for name in self.wrapped.adapted
            }

        copies = copied()
        if self.head_start.reads_support:
            # By clones of its own: the graph behind one fast weight must not hold another one, or the inner gradient
            # of that one would be taken through both.
            copies.update(self.head_start.of_support(loop, copied, ignored_label(self.loss_fn)))
        # A parameter that was frozen after wrapping is still adapted, from its present value.
        return {
            name: w if loop.differentiable and w.requires_grad else w.detach().requires_grad_()
            for name, w in copies.items()
        }

    def inner_tasks(self, loop: InnerLoop, steps: int, training: bool) -> Iterable[Task]:
        """The task whose support set each inner step is taken on."""
        return self.examples(loop, steps) if training and self.examples else repeat(loop.task, steps)

    def learned_besides(self) -> list[nn.Parameter]:
        """Parameters that a target loss depends on besides the fast weights."""
        # Adapted ones too: a loss function may read the initial values.
        inner = {id(parameter) for parameter in self.update.parameters}
        return [p for p in self.learned if p.requires_grad and id(p) not in inner]

    def _run(
        self, loop: InnerLoop, start: FastWeights, weights: Sequence[float], training: bool, whole_graph: bool
    ) -> Unrolled:
        if training and self.training_path is not None:
            return self.training_path(loop, start, weights)
        twice = differentiable_twice(self.wrapped.model, self.plain_forms) if loop.second_order else nullcontext()
        with twice:
            keeps_graph = loop.second_order or self.update.keeps_graph
            if weights and loop.differentiable and keeps_graph and self.settings.execution.memory == "flat":
                return unrolled_flat(
                    loop,
                    start,
                    weights,
                    learned_by_update=[p for p in self.update.parameters if p.requires_grad],
                    learned_besides=self.learned_besides(),
                    modules=[module for root in self.roots for module in root.modules()],
                    device=self.device,
                    in_order=whole_graph or not self.any_order,
                    whole_graph=whole_graph,
                )
            if loop.differentiable and not whole_graph:
                loop = replace(loop, eager=EagerTargetGradients(GradientSums(self.learned_besides())))
            return unrolled(loop, start, weights)

    def _step_weights(self, steps: int, training: bool) -> Sequence[float]:
        if not steps:
            return ()
        return step_loss_weights(steps, self.epoch, self.settings.step_loss_epochs if training else 0)
