"""THE DATA PATH of gradient-based meta-learning: MAML, first-order MAML, MAML++.

task -> fast weights -> inner step (support loss, gradient, rate of this layer and step) -> target loss after each step
     -> weighted sum over steps.   `Method.meta_step` takes it from there: mean over tasks -> backward -> outer update.

Read from top to bottom. What asks for solved tasks comes first: `_solve_all` for those of a training batch, which hands
them to `_solve`, for one task (as evaluation does), or with engine="batched" to `_solve_together`, for a stack of tasks
of one shape. These two say what goes in (`_unroll`) and what is kept of what comes out. The path itself is `_unrolled`,
and each method below that is one arrow of it. In a stack fast weights, inputs, predictions and losses have a leading
task axis; nothing else differs.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from metawrap.engines import Engine
from metawrap.errors import ArgumentError, MetaWrapWarning
from metawrap.inner_loop.flat_memory import Judge, Point, Tape, pulled_through
from metawrap.inner_loop.masking import check_masked_loss, ignored_label, mask_unused, used_labels
from metawrap.inner_loop.outcome import Solved, added, attached, autograd, dense, solved_from
from metawrap.inner_loop.stacking import alike, apart, stacked, start_of
from metawrap.inner_loop.update_rules import InnerOptimizer, State, clipped, inner_optimizer
from metawrap.layers.learning_rates import LearningRates
from metawrap.layers.step_clock import Moments, Statistics
from metawrap.learner.describing import first_order_warning
from metawrap.learner.gradient_based import GradientBased
from metawrap.learner.keywords import MAMLKeywords
from metawrap.learner.pace import DisturbedError
from metawrap.settings.keywords import flattened, keyword_types, refuse_unknown, shows
from metawrap.settings.schedules import is_second_order, step_loss_weights
from metawrap.settings.settings import PRESETS, Settings, check_choice, check_preset, resolve
from metawrap.snapshot.module_state import restored_buffers
from metawrap.surgery.swap import plain_copy
from metawrap.surgery.wrap import wrap
from metawrap.tasks import Inputs, Task, TaskId, map_tensors, tensors_in

FastWeights = dict[str, Tensor]
Rates = Mapping[str, tuple[Tensor, ...]]
Start = Mapping[str, Tensor]
NO_STATE: State = {}


@dataclass
class Unroll:
    """What stays the same while one task, or a stack of them, is unrolled, and what its norms saw.

    engine: one that takes a task axis if the task has one. ids: of each task; None where there is one task, and no
    axis. starts: where each task's head starts; None for one that is asked for when the task begins. training: as
    opposed to evaluation. statistics: by which norms normalise. differentiable: whether the fast weights carry a graph.
    second_order: whether their gradients do. judge: what takes the target losses' gradients as values; None where they
    are part of the graph. used: the classes whose outputs are not masked; None for all. moments: None where nothing is
    recorded. examples: what an inner step's are called in an error.
    """

    task: Task
    engine: Engine
    ids: Sequence[TaskId | None] | None
    starts: Sequence[Start] | None
    training: bool
    norm: str
    statistics: Statistics
    differentiable: bool
    second_order: bool
    optimizer: InnerOptimizer
    judge: Judge | None = None
    used: Tensor | None = None
    moments: list[Moments] | None = None
    examples: str = "support"

    @property
    def stacked(self) -> bool:
        """Whether there is a task axis."""
        return self.ids is not None


@dataclass
class Unrolled:
    """What comes of a task, or of a stack of them.

    loss: scalar, with its graph, the sum over tasks. losses: of each task; a scalar where there is no task axis.
    step_losses: the same for each inner step, None where not computed. fast: the last fast weights.
    """

    loss: Tensor
    losses: Tensor
    step_losses: list[Tensor | None]
    prediction: Any
    fast: FastWeights


class MAML(GradientBased):
    """Model-Agnostic Meta-Learning: an initialisation from which a few gradient steps fit a new task.

    All keywords are those of `MAMLPlusPlus`, whose six parts are off here. Source: Finn et al. 2017, arXiv:1703.03400.
    """

    default_preset = "maml"
    # Settings that make the method what it is, whatever the preset.
    fixed: ClassVar[Mapping[str, Any]] = {}
    settings_class: type[Settings] = Settings

    @shows(MAMLKeywords)
    def __init__(self, model: nn.Module, **keywords: Unpack[MAMLKeywords]) -> None:
        self._build(model, keywords, MAMLKeywords)

    def _build(self, model: nn.Module, keywords: Mapping[str, Any], known: type) -> None:
        """Checks what a constructor was given, then makes the learner. `known` is the TypedDict of its keywords."""
        method = type(self).__name__
        refuse_unknown(method, flattened(keywords), keyword_types(known))
        for name, value in self.fixed.items():
            if keywords.get(name) not in (None, value):
                raise ArgumentError(
                    f"{name}: cannot be {keywords[name]!r} in {method}, where it is {value!r}. Leave it out, or use "
                    "MAML."
                )
        preset = check_preset(keywords.get("preset"), self.default_preset, method)
        own_outer = [name for name in ("optimizer", "scheduler") if keywords.get(name) is not None]
        settings = resolve(self.settings_class, keywords, {**PRESETS[preset], **self.fixed}, own_outer)
        given = flattened({"wrapping": keywords.get("wrapping")})
        wrapped = wrap(
            model,
            steps=settings.inner_steps,
            affine=settings.per_step_norm_affine,
            statistics=settings.per_step_norm_statistics,
            adapt=keywords.get("adapt"),
            adapt_norm=settings.adapt_norm,
            swap=given.get("wrapping.swap"),
            keep_norm=given.get("wrapping.keep_norm", ()),
            head=keywords.get("head"),
        )
        loss_fn, engine = keywords.get("loss_fn", F.cross_entropy), keywords.get("engine", "auto")
        super().__init__(wrapped, settings, loss_fn, preset, engine, keywords.get("head"))
        # Used outside of an inner loop, too, the norms follow the policy.
        wrapped.clock.statistics = "batch" if settings.norm == "batch" else None
        self._make_inner()
        self._make_outer(keywords.get("optimizer"), keywords.get("scheduler"))
        # How long the user's own schedule trains is not known.
        last = math.inf if own_outer else settings.epochs
        if wrapped.swapped and settings.per_step_norm_affine and settings.first_order_epochs >= last:
            warnings.warn(f"first_order_epochs: {first_order_warning(settings)}", MetaWrapWarning, stacklevel=3)

    def _make_inner(self) -> None:
        """Makes what the inner update learns, and holds: the rates."""
        s = self.settings
        self.learning_rates = LearningRates(
            self.wrapped.adapted_parameters(), s.inner_steps, s.inner_lr, s.learn_inner_lr
        )

    def _inner_optimizer(self, engine: Engine) -> InnerOptimizer:
        return inner_optimizer(engine.name, self.settings.update_rule)

    def _has_graph(self, unroll: Unroll) -> bool:
        """Whether inner steps have a graph that is worth taking apart."""
        return unroll.second_order

    def _of_inner_update(self) -> list[nn.Parameter]:
        """What the inner update alone depends on."""
        return [rate for _, rate in self.learning_rates.items()]

    def _solve_all(
        self, tasks: Sequence[Task], *, training: bool, norm: str, whole_graph: bool = True
    ) -> tuple[Tensor, list[Solved]]:
        if self._batched is None or not training:
            return super()._solve_all(tasks, training=training, norm=norm, whole_graph=whole_graph)
        total: list[Tensor] = []
        solved: dict[int, Solved] = {}
        # In the order of the tasks, as they would be drawn one task after another.
        starts = [self.head_start.values(self.model, task.id) for task in tasks]
        # An edit of a buffer is found, and refused, when it has been made.
        with restored_buffers(self.model):
            for places in alike(tasks):
                group, own = [tasks[place] for place in places], [starts[place] for place in places]
                if len(group) > 1:
                    loss, outcomes = self._solve_together(group, own, training, norm, whole_graph)
                else:
                    alone = self._solve(group[0], training=training, norm=norm, whole_graph=whole_graph, start=own[0])
                    loss, outcomes = alone.loss, [alone.detached()]
                total.append(loss)
                solved |= zip(places, outcomes, strict=True)
        return torch.stack(total).sum(), [solved[place] for place in range(len(tasks))]

    def _solve(
        self,
        task: Task,
        *,
        training: bool,
        norm: str,
        steps: int | None = None,
        mask: bool | None = None,
        whole_graph: bool = True,
        start: Start | None = None,
    ) -> Solved:
        if steps is None:
            steps = self.settings.inner_steps if training else self.settings.default_steps
        unroll = self._unroll(task, training, norm, mask, starts=None if start is None else [start])
        found = self._unrolled(unroll, self._step_weights(steps, training), whole_graph)
        head, ignored = self.head_start.adapted(found.fast), ignored_label(self.loss_fn)
        moments = unroll.moments or []
        return solved_from(found.loss, found.step_losses, found.prediction, task, moments, head, ignored)

    def _solve_together(
        self, tasks: Sequence[Task], starts: Sequence[Start], training: bool, norm: str, whole_graph: bool
    ) -> tuple[Tensor, list[Solved]]:
        unroll = self._unroll(stacked(tasks), training, norm, ids=[task.id for task in tasks], starts=starts)
        weights = self._step_weights(self.settings.inner_steps, training)
        found = self._unrolled(unroll, weights, whole_graph)
        head, ignored, moments = self.head_start.adapted(found.fast), ignored_label(self.loss_fn), unroll.moments or []
        return found.loss, apart(tasks, found.losses, found.step_losses, found.prediction, moments, head, ignored)

    def _unrolled(self, unroll: Unroll, weights: list[float], whole_graph: bool) -> Unrolled:
        with self._twice() if unroll.second_order else nullcontext():
            if weights and unroll.differentiable and self._has_graph(unroll) and self.settings.memory == "flat":
                return self._unrolled_flat(unroll, weights, whole_graph)
            if unroll.differentiable and not whole_graph:
                unroll.judge = Judge(self._learned_only())
            losses: list[Tensor | None] = [None] * len(weights)
            rates = self.learning_rates.per_step()
            fast, state = self._initial_weights(unroll), NO_STATE
            for step, weight in enumerate(weights):
                fast, state = self._inner_step(fast, state, rates, step, unroll)
                if weight:
                    prediction, losses[step] = self._target_loss(fast, step, weight, unroll)
            if weights:
                each = _weighted(losses, weights)
            else:
                prediction, each = self._target_loss(fast, 0, 1.0, unroll)
            total = each.sum()
            if unroll.judge:
                total = attached(total, unroll.judge.pairs())
        return Unrolled(total, each, losses, prediction, fast)

    def _unrolled_flat(self, unroll: Unroll, weights: list[float], whole_graph: bool) -> Unrolled:
        """The same with one inner step's graph at a time: forward without graphs, then backward, step by step."""
        unroll.judge = judge = Judge(self._learned_only(), by_step=True)
        tape, last = Tape(self._stateful(), self._device, len(weights)), len(weights) - 1
        in_order = whole_graph or not self._in_any_order()
        losses: list[Tensor | None] = [None] * len(weights)
        # The target losses that wait until their gradient is used, and where among the moments theirs belong.
        late: dict[int, int] = {}
        rates = self.learning_rates.per_step()
        start = self._initial_weights(unroll)
        sweep, replay = replace(unroll, differentiable=False, second_order=False), replace(unroll, moments=None)
        after: Point = start, NO_STATE
        for step, weight in enumerate(weights):
            after = self._inner_step(*tape.begin(*after), rates, step, sweep)
            if weight and (in_order or step == last):
                prediction, losses[step] = self._target_loss(after[0], step, weight, unroll)
            elif weight:
                late[step] = len(unroll.moments or ())
        fast = after[0]

        inner = [parameter for parameter in self._of_inner_update() if parameter.requires_grad]
        others = [*inner, *judge.others]
        direct: list[Tensor | None] = [None] * len(others)
        behind: dict[Any, Tensor | None] = {}
        for step in reversed(range(len(weights))):
            if step in late:
                seen: list[Moments] = []
                own = replace(unroll, moments=None if unroll.moments is None else seen)
                _, losses[step] = self._target_loss(tape.weights_after(step), step, weights[step], own)
                if unroll.moments is not None:
                    unroll.moments[late[step] : late[step]] = seen
            for name, gradient in judge.of_step(step).items():
                behind[name] = added(behind.get(name), gradient)
            with tape.replayed(step) as before:
                after = self._inner_step(*before, self.learning_rates.per_step(), step, replay)
            behind, more = pulled_through(before, after, behind, others)
            direct = [added(old, new) for old, new in zip(direct, more, strict=True)]
            # Its graph goes: the next step's must not stand beside it.
            del before, after
        if late and (disturbed := tape.taken_back()):
            raise DisturbedError(disturbed)
        each = _weighted(losses, weights)
        found = [(start[name], behind[name]) for name in start] + list(zip(others, direct, strict=True))
        return Unrolled(attached(each.sum(), [*found, *judge.pairs()]), each, losses, prediction, fast)

    def _unroll(
        self,
        task: Task,
        training: bool,
        norm: str,
        mask: bool | None = None,
        ids: Sequence[TaskId | None] | None = None,
        starts: Sequence[Start] | None = None,
    ) -> Unroll:
        engine = self._engine if ids is None else self._batched
        assert engine is not None
        task = self._laid_out(task)
        differentiable = torch.is_grad_enabled()
        masked = self.settings.mask_unused_outputs if mask is None else mask
        return Unroll(
            task,
            engine,
            ids,
            starts,
            training,
            norm,
            statistics="running" if norm == "running" and not training else "batch",
            differentiable=differentiable,
            second_order=differentiable and is_second_order(self.epoch, self.settings.first_order_epochs),
            optimizer=self._inner_optimizer(engine),
            used=used_labels(task, ignored_label(self.loss_fn)) if masked else None,
            moments=[] if training else None,
        )

    def _learned_only(self) -> list[nn.Parameter]:
        """What a target loss depends on besides the fast weights."""
        adapted = {id(parameter) for _, parameter in self.wrapped.adapted_parameters()}
        inner = {id(parameter) for parameter in self._of_inner_update()}
        return [p for p in self.parameters() if p.requires_grad and id(p) not in adapted | inner]

    def _step_weights(self, steps: int, training: bool) -> list[float]:
        return step_loss_weights(steps, self.epoch, self.settings.step_loss_epochs if training else 0) if steps else []

    def _initial_weights(self, unroll: Unroll) -> FastWeights:
        starts = unroll.starts
        if starts is None:
            starts = [self.head_start.values(self.model, id) for id in unroll.ids or [unroll.task.id]]
        # Clones: in-place edits of a fast weight, and hooks on the user's parameters, must not meet each other.
        copies = {
            name: start_of([start.get(name, p) for start in starts], unroll.stacked)
            for name, p in self.wrapped.adapted_parameters()
        }
        # One that was frozen after wrapping is still adapted, from where it is.
        return {
            name: w if unroll.differentiable and w.requires_grad else w.detach().requires_grad_()
            for name, w in copies.items()
        }

    def _inner_step(
        self, fast: FastWeights, state: State, rates: Rates, step: int, unroll: Unroll
    ) -> tuple[FastWeights, State]:
        with autograd(True):
            prediction = self._predict(
                fast, unroll.task.support_x, step, unroll.statistics, unroll, unroll.second_order
            )
            _, loss = self._judged(prediction, unroll.task.support_y, unroll.examples, unroll)
            # Only of the fast weights: every other parameter would lead back through all earlier steps.
            # Of the sum, where there are several tasks: each loss depends on its own fast weights alone.
            gradients = torch.autograd.grad(
                loss.sum(), tuple(fast.values()), create_graph=unroll.second_order, allow_unused=True
            )
        own = {name: rows[min(step, len(rows) - 1)] for name, rows in rates.items()}
        if unroll.differentiable:
            return self._updated(fast, gradients, own, loss, state, unroll)
        with autograd(False):
            updated, state = self._updated(fast, gradients, own, loss, state, unroll)
        return {name: weight.detach().requires_grad_() for name, weight in updated.items()}, state

    def _updated(
        self,
        fast: FastWeights,
        gradients: Sequence[Tensor | None],
        rates: FastWeights,
        losses: Tensor,
        state: State,
        unroll: Unroll,
    ) -> tuple[FastWeights, State]:
        s = self.settings
        named = {name: None if g is None else dense(g) for name, g in zip(fast, gradients, strict=True)}
        # A complex entry is two numbers to an update rule, as it is to torch's own optimizers.
        pairs = {name for name, weight in fast.items() if weight.is_complex()}
        real = {name: torch.view_as_real(w) if name in pairs else w for name, w in fast.items()}
        named |= {name: torch.view_as_real(g) for name in pairs if (g := named[name]) is not None}
        named = clipped(named, s.inner_max_grad_norm, s.inner_max_grad_value, unroll.stacked)
        updated, state = unroll.optimizer.step(real, named, rates, losses, state)
        return {name: torch.view_as_complex(w) if name in pairs else w for name, w in updated.items()}, state

    def _target_loss(self, fast: FastWeights, step: int, weight: float, unroll: Unroll) -> tuple[Any, Tensor]:
        if unroll.judge is None:
            return self._judged(self._predict_target(fast, step, unroll), unroll.task.target_y, "target", unroll)
        leaves = unroll.judge.apart(fast)
        with autograd(True):
            prediction = self._predict_target(leaves, step, unroll)
            prediction, loss = self._judged(prediction, unroll.task.target_y, "target", unroll)
            unroll.judge.take((weight * loss).sum(), fast, leaves, step)
        return prediction, loss.detach()

    def _predict_target(self, fast: FastWeights, step: int, unroll: Unroll) -> Any:
        if unroll.norm == "support":
            # This pass is recorded in the target's place: the target normalises by no statistics of its own.
            self._predict(fast, unroll.task.support_x, step, "capture", unroll)
            return self._predict(fast, unroll.task.target_x, step, "captured", unroll)
        return self._predict(fast, unroll.task.target_x, step, unroll.statistics, unroll)

    def _predict(
        self,
        fast: FastWeights,
        inputs: Inputs,
        step: int,
        statistics: Statistics,
        unroll: Unroll,
        twice: bool = False,
    ) -> Any:
        if self._edits_inputs:
            inputs = map_tensors(inputs, Tensor.clone)
        with self.wrapped.clock.at(step, statistics, unroll.moments, twice):
            return unroll.engine.call(fast, inputs, twice)

    def _judged(self, prediction: Any, y: Any, part: str, unroll: Unroll) -> tuple[Any, Tensor]:
        """The prediction, masked where that is asked for, and its loss."""
        if unroll.used is None:
            return prediction, unroll.engine.each(partial(self._loss, part=part), prediction, y)
        masked = mask_unused(prediction, y, unroll.used)
        loss = self._loss(masked, y, part)
        check_masked_loss(loss, masked, unroll.used)
        return masked, loss

    def adapt(
        self,
        support_x: Inputs,
        support_y: Any,
        steps: int | None = None,
        *,
        mask_unused_outputs: bool | None = None,
        task_id: TaskId | None = None,
    ) -> nn.Module:
        """A plain module of the user's own class, in eval mode, fitted to one support set; changes nothing here.

        Its norms are ordinary ones, at row max(0, min(steps, inner_steps) - 1): under norm="batch" without running
        statistics (they use each batch's own), under "running" with that row's, under "support" with the support set's.
        So under "batch" its state_dict fits a model whose batch norms were built with track_running_stats=False.
        Loading it into others fails; with strict=False it would leave them to normalise by mean 0 and variance 1.

        Args:
            support_x, support_y: one task's support set, (examples, ...).
            steps: inner steps; as in training if None; 0 gives the initialisation.
            mask_unused_outputs: as in the constructor, which decides if None. It rules the inner loop; the module that
                is returned has all its outputs.
            task_id: under head_init="stored", whose head to start from; the learned one if None or not stored yet.
        """
        steps = self.settings.default_steps if steps is None else self._checked_steps(steps)
        if mask_unused_outputs is not None:
            check_choice("mask_unused_outputs", mask_unused_outputs)
        with self._adapting(Task(support_x, support_y, support_x, support_y, id=task_id)) as task:
            unroll = self._unroll(task, False, self.settings.norm, mask_unused_outputs)
            rates, fast, state = self.learning_rates.per_step(), self._initial_weights(unroll), NO_STATE
            for step in range(steps):
                fast, state = self._inner_step(fast, state, rates, step, unroll)
            row = max(0, min(steps, self.settings.inner_steps) - 1)
            statistics = self._support_statistics(fast, row, unroll) if unroll.norm == "support" else None
            adapted = plain_copy(self.model, fast, row, statistics, keep_statistics=unroll.norm != "batch")
            return self._finished(adapted, task)

    def unwrap(self) -> nn.Module:
        """The meta-trained initialisation as a plain module of the user's own class, its norms at row 0.

        Under head_init="zeros" its head is zero, as it is when a task begins.
        """
        start = self.head_start.of_unwrapped(self.model)
        return plain_copy(self.model, start, 0, None, keep_statistics=self.settings.norm != "batch")

    def _support_prediction(self, fast: Mapping[str, Tensor], task: Task) -> Any:
        unroll = self._unroll(task, False, "batch", mask=False)
        return self._predict(dict(fast), unroll.task.support_x, 0, "batch", unroll)

    def _batched_calls(self, stack: Task) -> Iterator[Callable[[], Any]]:
        unroll = self._unroll(stack, False, "batch", mask=False, ids=[None] * len(tensors_in(stack.support_x)[0]))
        weights = {
            n: start_of([p.detach()] * len(unroll.ids or ()), True) for n, p in self.wrapped.adapted_parameters()
        }
        for inputs in (stack.support_x, stack.target_x):
            yield partial(self._predict, weights, inputs, 0, "batch", unroll)

    def _support_loss(self, fast: Mapping[str, Tensor], task: Task) -> Tensor:
        prediction = self._support_prediction(fast, task)
        return self._judged(prediction, task.support_y, "support", self._unroll(task, False, "batch"))[1]

    def _support_statistics(self, fast: FastWeights, row: int, unroll: Unroll) -> dict[str, tuple[Tensor, Tensor]]:
        self._predict(fast, unroll.task.support_x, row, "capture", unroll)
        return self.wrapped.clock.taken()


def _weighted(losses: Sequence[Tensor | None], weights: Sequence[float]) -> Tensor:
    """The sum over steps, where a loss that was not computed has no weight."""
    return torch.stack([w * loss for w, loss in zip(weights, losses, strict=True) if loss is not None]).sum(0)


class MAMLPlusPlus(MAML):
    """MAML++: MAML with six parts, each of which can be switched alone.

    MSL: multi-step loss, `multi_step_loss`, `msl_epochs`. DA: derivative-order annealing, `first_order_epochs`. BNRS
    and BNWB:
    per-step batch-norm statistics and affine parameters, `per_step_norm_statistics`, `per_step_norm_affine`. LSLR: a
    learned rate per parameter tensor and inner step, `learn_inner_lr`. CA: cosine annealing of the outer rate,
    `cosine_annealing`. Source: Antoniou, Edwards, Storkey 2018, arXiv:1810.09502.

    Args:
        model: any `torch.nn.Module`; it is copied, never changed.
        inner_steps: inner updates per task in training; 5.
        inner_lr: initial inner rate of every adapted tensor and step; any sign; 0.1.
        preset: "authors_code" (default) or "paper"; an argument that is given wins over it.
        multi_step_loss, msl_epochs: MSL, and the epochs over which its weights move to the last step.
        first_order_epochs: DA: epochs of first-order gradients before second-order ones; 0 turns it off.
        per_step_norm_statistics: BNRS: running statistics per inner step.
        per_step_norm_affine: BNWB: batch-norm scale and shift per inner step, learned by the outer loop.
        learn_inner_lr: LSLR; without it the rates stay at `inner_lr`.
        cosine_annealing, meta_lr, min_meta_lr, epochs: CA, from `meta_lr` to `min_meta_lr` over `epochs` epochs.
        iterations_per_epoch: meta-steps that make an epoch, for every schedule.
        norm: batch-norm policy: "batch" (each batch's own statistics, transductive), "running" (stored ones
            in evaluation) or "support" (targets use their support set's).
        adapt: which parameters the inner loop adapts: names, wildcards, or a function of the name; all but the
            batch norms' if None. A parameter frozen before wrapping is not adapted; one frozen later still is, from a
            start that is no longer learned.
        adapt_norm: adapts batch-norm scale and shift in the inner loop too, as one (channels,) vector each.
        loss_fn: `loss_fn(prediction, y)` to a scalar.
        optimizer: function from parameters to an optimizer, in place of Adam; brings its own learning rate.
        scheduler: function from an optimizer to a scheduler, stepped at the end of each epoch, in place of CA.
        head: name of the module that makes the prediction; found by watching a forward pass if None.
        engine: "auto", "higher", "functional", or "batched": in `meta_step`, and in `forward` in training mode, all
            tasks of one shape run at once, under `torch.func.vmap`; a task of a shape of its own, `evaluate` and
            `adapt` run through "functional". What vmap cannot carry is refused at the first meta-step; what begins
            later (a counter, a draw from random or numpy, an edited buffer), when it does.
        inner_update: an `InnerOptions`, or a dict of its fields: SGD or Adam, momentum, clipping of the inner gradient.
        outer_update: an `OuterOptions` or dict: Adam's betas, clipping, steps that are not finite.
        execution: an `ExecutionOptions` or dict: memory, workers, layout, replays.
        outputs: an `OutputOptions` or dict: where the head starts, and which outputs count.
        wrapping: a `WrappingOptions` or dict: norms to swap, or to keep as they are.
    Raises:
        ArgumentError: an argument has the wrong type, range or combination.
        TypeError: an unknown keyword; the error names the nearest one.
        UnsupportedModuleError: the model has something that no engine can adapt correctly.

    >>> learner = MAMLPlusPlus(nn.Linear(4, 3), inner_steps=2, execution={"workers": 2})
    >>> learner.settings.execution.workers
    2
    """

    default_preset = "authors_code"


class FOMAML(MAML):
    """First-order MAML: the inner gradients count as constants, under every preset.

    Source: Finn et al. 2017, section 5.2.
    """

    default_preset = "fomaml"
    fixed: ClassVar[Mapping[str, Any]] = {"first_order_epochs": math.inf}
