"""MAML, first-order MAML and MAML++: an inner loop on every adapted parameter.

The data path is inner_loop/inner_loop.py. This file says which parts a MAML learner has (an inner update with learned
rates, a start of the head, an engine, checks, an executor) and which modules it hands out.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn
from typing_extensions import Unpack

from metawrap.checks.first_task import FirstTaskChecks
from metawrap.engines import ENGINES, BuiltEngines, Engine, choose_engine
from metawrap.errors import ArgumentError, MetaWrapWarning, shown
from metawrap.execution.calls import shared
from metawrap.execution.executor import stateful_modules
from metawrap.execution.measured import executor_for
from metawrap.inner_loop.class_starts import HEAD_STARTS
from metawrap.inner_loop.head_starts import HeadStart
from metawrap.inner_loop.inner_loop import Point
from metawrap.inner_loop.task_solver import InnerUpdate, TaskSolver
from metawrap.inner_loop.update_rules import LearningRates, inner_optimizer
from metawrap.learner.describing import describe_learner, first_order_warning, norm_warnings, unused_warnings
from metawrap.learner.description import Description
from metawrap.learner.evaluation import adapting, check_steps, finished, policy_of
from metawrap.learner.keywords import MAMLKeywords
from metawrap.learner.learner import Learner
from metawrap.learner.task_classes import Classes, TaskClasses
from metawrap.results import ignored_label
from metawrap.settings.keywords import flattened, keyword_types, refuse_unknown, shows
from metawrap.settings.settings import PRESETS, Settings, check_choice, check_preset, resolve
from metawrap.surgery.swap import plain_copy
from metawrap.surgery.wrap import wrap
from metawrap.tasks import Inputs, Task, TaskBatch, TaskId, device_of


class MAML(Learner):
    """Model-Agnostic Meta-Learning: an initialisation from which a few gradient steps fit a new task.

    All keywords are those of `MAMLPlusPlus`, whose six parts are off here. Source: Finn et al. 2017, arXiv:1703.03400.

    >>> learner = MAML(nn.Linear(4, 3), inner_steps=2)
    >>> learner.describe().settings["inner_steps"]
    2
    """

    default_preset = "maml"
    inner_loop = True
    # Settings that make the method what it is, whatever the preset.
    fixed: ClassVar[Mapping[str, Any]] = {}
    settings_class: type[Settings] = Settings
    settings: Settings
    learning_rates: LearningRates

    @shows(MAMLKeywords)
    def __init__(self, model: nn.Module, **keywords: Unpack[MAMLKeywords]) -> None:
        self._build(model, keywords, MAMLKeywords)

    def _build(self, model: nn.Module, keywords: Mapping[str, Any], known: type) -> None:
        """Checks what a constructor was given, then makes the learner. `known` is the TypedDict of its keywords."""
        method = type(self).__name__
        flat = flattened(keywords)
        refuse_unknown(method, flat, keyword_types(known))
        for name, value in self.fixed.items():
            if flat.get(name) not in (None, value):
                raise ArgumentError(
                    f"{name}: cannot be {shown(flat[name])} in {method}, where it is {shown(value)}. Leave it out, "
                    "or use MAML."
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
            norm=settings.norm,
        )
        asked = keywords.get("engine", "auto")
        engine = choose_engine(asked, wrapped.model)
        _check_goes_with(asked, settings)
        parts = self._inner_parts(wrapped.adapted_parameters(), settings)
        super().__init__(
            wrapped,
            settings,
            keywords,
            executor=executor_for(settings.execution, engine.name),
            parts=parts,
            options={"preset": preset},
        )
        self.checks = FirstTaskChecks(wrapped.model, engine)
        self.findings = self.checks.findings
        self.engines = BuiltEngines()
        self.head = keywords.get("head")
        self.head_start: HeadStart = HEAD_STARTS[settings.outputs.head_init]()
        if self.head is not None:
            self.head_start.find(wrapped.model, self.head, wrapped.adapted)
        # How long the user's own schedule trains is not known.
        last = math.inf if own_outer else settings.epochs
        if wrapped.swapped and settings.per_step_norm_affine and settings.first_order_epochs >= last:
            warnings.warn(f"first_order_epochs: {first_order_warning(settings)}", MetaWrapWarning, stacklevel=3)

    def _inner_parts(self, adapted: Sequence[tuple[str, nn.Parameter]], settings: Settings) -> dict[str, nn.Module]:
        """What the inner update learns, by the name that it gets here: the rates."""
        rates = LearningRates(adapted, settings.inner_steps, settings.inner_lr, settings.learn_inner_lr)
        return {"learning_rates": rates}

    def _inner_update(self) -> InnerUpdate:
        options = self.settings.inner_update
        learned = [rate for _, rate in self.learning_rates.items()]
        return InnerUpdate(self.learning_rates, partial(inner_optimizer, options=options), learned)

    def _solver(self, **changes: Any) -> TaskSolver:
        """Solves tasks with the present state. Args: changes: of fields of `TaskSolver`, for a probe."""
        checks = self.checks
        made = {
            "wrapped": self.wrapped,
            "loss_fn": self.loss_fn,
            "settings": self.settings,
            "update": self._inner_update(),
            "head_start": self.head_start,
            "learned": list(self.parameters()),
            "epoch": self.epoch,
            "device": device_of(self),
            "roots": stateful_modules(self),
            "edits": checks.edits,
            "channels_last": self.executor.channels_last,
            "clone_inputs": checks.edits_inputs,
            "plain_forms": checks.plain_forms,
        }
        if "engine" not in changes:
            made["engine"] = self._engine("functional" if checks.engine.name == "batched" else checks.engine.name)
        if "batched" not in changes and checks.batched:
            made |= {"batched": self._engine("batched"), "pads": checks.not_padded is None}
        return TaskSolver(**{**made, **changes})

    def _engine(self, name: str) -> Engine:
        if name not in self.engines:
            self.engines[name] = ENGINES[name](self.model, self.checks.edits)
        return self.engines[name]

    def _prepare(self, task: Task) -> None:
        if self.wrapped.kept:
            self.wrapped.hold_kept_norms()
        if not self._is_prepared():
            self.checks.prepare(self, task)

    def _is_prepared(self) -> bool:
        """Whether the checks have nothing to ask in this mode."""
        training = self.model.training
        known = self.findings.get(training)
        if known is None or (torch.is_grad_enabled() and (not known.differentiable or known.no_second_derivative)):
            return False
        return self.checks.engine.name != "batched" or not training or self.checks.batched

    def _check_trainable(self, batch: TaskBatch) -> None:
        for task in batch if self.settings.outputs.head_init != "learned" else ():
            self.head_start.check(task, ignored_label(self.loss_fn), self.settings.outputs.mask_unused_outputs)

    @shared
    def adapt(
        self,
        support_x: Inputs,
        support_y: Any,
        steps: int | None = None,
        *,
        mask_unused_outputs: bool | None = None,
        task_id: TaskId | None = None,
        classes: Classes | None = None,
        norm: str | None = None,
    ) -> nn.Module:
        """A plain module of the user's own class, in eval mode, fitted to one support set; changes nothing here.

        Its norms are ordinary ones, at row max(0, min(steps, inner_steps) - 1): under norm="batch" without running
        statistics (they use each batch's own), else with the support set's: under "running" moved by that row's shifts,
        under "task" blended with those of each example.
        So under "batch" its state_dict fits a model whose batch norms were built with track_running_stats=False.
        Loading it into others fails; with strict=False it would leave them to normalise by mean 0 and variance 1.

        Args:
            support_x, support_y: one task's support set, (examples, ...).
            steps: inner steps; as in training if None; 0 gives the initialisation.
            mask_unused_outputs: as in the constructor, which decides if None. It rules the inner loop; `classes` rules
                the outputs of the module that is returned.
            task_id: under head_init="stored", the task whose head is the start; the learned head if None or not stored.
            classes: the task's classes, whose outputs alone the module has: labels, or names; see `TaskClasses`.
            norm: batch-norm policy; the learner's own if None; after "batch", "support" suits single images.
        """
        check_steps(steps)
        steps = self.settings.default_steps if steps is None else steps
        if mask_unused_outputs is not None:
            check_choice("mask_unused_outputs", mask_unused_outputs)
        asked = TaskClasses(classes, support_x, support_y, self.loss_fn)
        own, norm = asked.task(id=task_id), policy_of(self, norm)
        if task_id is not None and self.settings.outputs.head_init != "stored":
            raise ArgumentError(
                'task_id: has an effect only with outputs={"head_init": "stored"}, which keeps a head for each task, '
                f"but got {shown(task_id)}. Leave it out."
            )
        with adapting(self, own) as task:
            solver = self._solver()
            loop = solver.loop(task, training=False, norm=norm, mask=mask_unused_outputs)
            start = Point(solver.initial_weights(loop), {})
            point = loop.adapted(start, steps)
            row = max(0, min(steps, self.settings.inner_steps) - 1)
            statistics = None
            if loop.passes.context is not None:
                loop.predict(point.fast, loop.task.support_x, row, loop.passes.context)
                statistics = self.wrapped.held(norm, row)
            module = plain_copy(self.model, point.fast, row, statistics, keep_statistics=norm != "batch")
            return asked.cut(finished(module, task))

    @shared
    def unwrap(self) -> nn.Module:
        """The meta-trained initialisation as a plain module of the user's own class, its norms at row 0.

        Its head is as it is when a task begins under head_init="zeros" and "shared", and under "prototypes", "random"
        and "stored", which decide that by the task, as it was before training, or as learned.
        """
        start = self.head_start.of_unwrapped(self.model)
        return plain_copy(self.model, start, 0, None, keep_statistics=self.settings.norm != "batch")

    def describe(self) -> Description:
        """What wrapping found and did."""
        return describe_learner(
            self,
            settings=self.settings.as_dict(),
            warnings=[*unused_warnings(self.findings), *norm_warnings(self.settings, self.wrapped)],
            title=f'(preset="{self.options["preset"]}")',
            rates=self.learning_rates,
            engine=(self.checks.engine.name, self.checks.engine.why),
            speed=self.executor.in_words(self),
        )


def _check_goes_with(engine: str, settings: Settings) -> None:
    if engine == "batched" and settings.outputs.mask_unused_outputs:
        raise ArgumentError(
            'outputs.mask_unused_outputs: cannot be True with engine="batched", where the tasks of a batch would each '
            'mask others. Use engine="functional", or ask for it in evaluate and adapt, which go task by task.'
        )
    if settings.execution.workers != 1 and engine in ("higher", "batched"):
        raise ArgumentError(
            f'execution.workers: expected 1 with engine="{engine}", which runs in one thread, but got '
            f'{settings.execution.workers!r}. Leave it out, or pass engine="functional".'
        )
    for name in ("tune", "channels_last"):
        if engine == "batched" and getattr(settings.execution, name) is True:
            raise ArgumentError(
                f'execution.{name}: has no effect with engine="batched", which runs all tasks at once in a layout of '
                'its own. Leave it out, or pass engine="functional".'
            )


class MAMLPlusPlus(MAML):
    """MAML++: MAML with six parts, each of which can be switched alone.

    MSL: multi-step loss, `multi_step_loss`, `msl_epochs`. DA: derivative-order annealing, `first_order_epochs`. BNRS
    and BNWB: batch-norm statistics and affine parameters per step, `per_step_norm_statistics`, `per_step_norm_affine`.
    LSLR: a learned rate per parameter tensor and inner step, `learn_inner_lr`. CA: cosine annealing of the outer rate,
    `cosine_annealing`. Source: Antoniou, Edwards, Storkey 2018, arXiv:1810.09502.

    Args:
        model: any `torch.nn.Module`; it is copied, never changed.
        inner_steps: inner updates per task in training; 5.
        inner_lr: initial inner rate of every adapted tensor and step; any sign; 0.1.
        preset: "inductive" (default), "authors_code" (the same under norm="batch", as published figures are) or
            "paper"; an argument that is given wins over it.
        multi_step_loss, msl_epochs: MSL, and the epochs over which its weights move to the last step.
        first_order_epochs: DA: epochs of first-order gradients before second-order ones; 0 turns it off.
        per_step_norm_statistics: BNRS: running statistics per inner step.
        per_step_norm_affine: BNWB: batch-norm scale and shift per inner step, learned by the outer loop.
        learn_inner_lr: LSLR; without it the rates stay at `inner_lr`.
        cosine_annealing, meta_lr, min_meta_lr, epochs: CA, from `meta_lr` to `min_meta_lr` over `epochs` epochs.
        iterations_per_epoch: meta-steps that make an epoch, for every schedule.
        norm: batch-norm policy: "support" (targets use their support set's statistics), "batch" (each batch's own,
            transductive), "running" (as "support", moved by stored shifts), "task" or "task_layer" (TaskNorm-I, -L).
        adapt: which parameters the inner loop adapts: names, wildcards, or a function of the name; all but the
            batch norms' if None. A parameter frozen before wrapping is not adapted; one frozen later still is, from a
            start that is no longer learned.
        adapt_norm: adapts batch-norm scale and shift in the inner loop too, as one (channels,) vector each.
        loss_fn: `loss_fn(prediction, y)` to a scalar; one that is not of torch gets the output as the network gives it.
        optimizer: function from parameters to an optimizer, in place of Adam; brings its own learning rate.
        scheduler: function from an optimizer to a scheduler, stepped at the end of each epoch, in place of CA.
        head: name of the module that makes the prediction; found by watching a forward pass if None.
        engine: "auto", "higher", "functional", or "batched": in `meta_step`, and in `forward` in training mode, all
            tasks of one shape run at once, under `torch.func.vmap`, padded ones of near sizes too where a trial shows
            that this is exact; a task of a shape of its own, `evaluate` and `adapt` run through "functional". What
            vmap cannot carry is refused at the first meta-step; what begins later (a counter, a draw from random or
            numpy, an edited buffer), when it does.
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

    default_preset = "inductive"


class FOMAML(MAML):
    """First-order MAML: the inner gradients count as constants, under every preset.

    Source: Finn et al. 2017, section 5.2.
    """

    default_preset = "fomaml"
    fixed: ClassVar[Mapping[str, Any]] = {"first_order_epochs": math.inf}
