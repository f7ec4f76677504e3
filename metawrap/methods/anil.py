"""ANIL: embeddings, once -> gradient steps on the head alone -> target loss -> gradient to body and head."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from metawrap.checks.first_look import warn_many_outputs
from metawrap.checks.second_derivative import missing_second_derivative
from metawrap.engines.calling import differentiable_twice
from metawrap.engines.functional import FunctionalEngine
from metawrap.errors import UnsupportedModuleError
from metawrap.inner_loop.inner_loop import FastWeights, InnerLoop, Point
from metawrap.inner_loop.update_rules import LearningRates, inner_optimizer
from metawrap.layers.step_clock import Moments
from metawrap.learner.embedding_learner import EmbeddingKeywords
from metawrap.learner.head_learner import HeadLearner, plain_module, refuse_late_parts, refuse_mask
from metawrap.results import TaskOutcome, outcome_of
from metawrap.settings.groups import InnerOptions
from metawrap.settings.keywords import checked
from metawrap.settings.validated import Count, Number, Switch
from metawrap.tasks import Task


class ANIL(HeadLearner):
    """Almost No Inner Loop: MAML whose inner loop adapts the head only; the body is shared by all tasks.

    With f the body, h the head with weights w, alpha the rate and K the number of steps:
    w_0 = w;  w_k = w_(k-1) - alpha * grad_w L(h(f(support); w_(k-1)), support_y);  meta-loss = L(h(f(target); w_K),
    target_y). Its gradient flows through every step to w and, through the embeddings of support and target, to f.

    As in the paper: second order, and MAML's norm policy, because the paper compares the two: here "support" by
    default, there "batch" (transductive). Differs: the network runs once per task, not once per step, which gives the
    same gradient; rates can be learned. Any label that `loss_fn` takes, regression too.

    Args:
        inner_steps: gradient steps on the head.
        inner_lr: their rate; the first one, where rates are learned.
        learn_inner_lr: learn one rate for each of the head's parameter tensors and each step.
        first_order: leave second derivatives out; the body then learns from the target embeddings alone.
        keywords: see `EmbeddingKeywords` and `OuterKeywords`.

    >>> learner = ANIL(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), inner_steps=3)
    >>> adapted = learner.adapt(torch.randn(6, 4), torch.arange(6) % 3)

    Source: Raghu, Raghu, Bengio, Vinyals 2020, arXiv:1909.09157, section 4; the equations are those of Finn et al.
    2017, arXiv:1703.03400, with the body's inner rates at zero.
    """

    defaults: ClassVar[Mapping[str, Any]] = {"norm": "support"}
    learning_rates: LearningRates

    @checked
    def __init__(
        self,
        model: nn.Module,
        *,
        inner_steps: Count = 5,
        inner_lr: Number = 0.1,
        learn_inner_lr: Switch = False,
        first_order: Switch = False,
        **keywords: Unpack[EmbeddingKeywords],
    ) -> None:
        self.inner_lr, self.learn_inner_lr, self.first_order = inner_lr, learn_inner_lr, first_order
        rates = {"learning_rates": LearningRates([], inner_steps, inner_lr, learn_inner_lr)}
        super().__init__(model, keywords, parts=rates)

    def _solve(
        self, task: Task, *, training: bool, norm: str, steps: int | None = None, mask: bool | None = None, **_: Any
    ) -> TaskOutcome:
        refuse_mask(self, mask)
        steps = self.settings.inner_steps if steps is None else steps
        moments: list[Moments] | None = [] if training else None
        support, target = self.own_head.of_task(task, training, norm, moments)
        fast = self._fast_weights(support, task.support_y, steps)
        prediction = FunctionalEngine(self.own_head.module).call(fast, target)
        loss = self.own_head.loss(self.loss_fn, prediction, task.target_y, "target")
        step_losses = [None] * (steps - 1) + [loss] if steps else []
        shown = self.own_head.in_form(prediction)
        return outcome_of(task, loss, shown, loss_fn=self.loss_fn, step_losses=step_losses, moments=moments)

    def _module(self, task: Task, norm: str, steps: int) -> nn.Module:
        support = self.own_head.of(task.support_x, "running" if norm == "running" else "batch")
        fast, full = self._fast_weights(support, task.support_y, steps), self.own_head.names(frozen=True)
        return plain_module(self, {full[name]: weight for name, weight in fast.items()}, task.support_x, norm)

    def _fast_weights(self, support: Tensor, labels: Any, steps: int) -> FastWeights:
        """The head's weights after so many steps, by name in the head; with their graph where gradients are enabled."""
        head, full, rates = self.own_head.module, self.own_head.names(frozen=True), self.learning_rates.per_step()
        # A parameter that was frozen after wrapping has rates, and is still adapted.
        adapted = {name: p for name, p in head.named_parameters() if full[name] in self.learning_rates}
        graph = torch.is_grad_enabled()
        second_order = graph and not self.first_order
        embedded = support if second_order else support.detach()
        loop = InnerLoop(
            Task(embedded, labels, embedded, labels),
            FunctionalEngine(head),
            inner_optimizer("functional", InnerOptions()),
            {name: rates[full[name]] for name in adapted},
            partial(self.own_head.loss, self.loss_fn),
            differentiable=graph,
            second_order=second_order,
        )
        # Clones keep in-place edits of fast weights away from the parameters, whose hooks do not see them either.
        copies = {name: weight.clone() for name, weight in adapted.items()}
        start = {n: w if graph and w.requires_grad else w.detach().requires_grad_() for n, w in copies.items()}
        with differentiable_twice(head, plain=True) if second_order else nullcontext():
            return loop.adapted(Point(start, {}), steps).fast

    def _tuned_names(self) -> Iterable[str]:
        return self.learning_rates

    def _check_head(self, task: Task) -> None:
        head = self.own_head.module
        engine, support = FunctionalEngine(head), self.own_head.of(task.support_x, "batch").detach()
        fast = {name: p.detach().clone().requires_grad_() for name, p in head.named_parameters()}

        def loss(weights: Mapping[str, Tensor]) -> Tensor:
            return self.own_head.loss(self.loss_fn, engine.call(weights, support), task.support_y, "support")

        if self.model.training:
            warn_many_outputs(engine.call(fast, support), task, self.loss_fn)
        value = loss(fast)
        found = torch.autograd.grad(value, list(fast.values()), allow_unused=True) if value.requires_grad else ()
        if all(gradient is None for gradient in found):
            raise UnsupportedModuleError(
                f"No parameter of the head '{self.head}' gets a gradient from the support loss. It may compute under "
                "no_grad, or detach its output: make it differentiable, or name another module with head=."
            )
        if self.first_order:
            return
        with differentiable_twice(head, plain=True):
            fix = "Use first_order=True, or put something differentiable in its place."
            reason = missing_second_derivative(head, fast, loss, fix=fix)
        if reason:
            raise UnsupportedModuleError(reason)

    def _make_parts(self, task: Task | None) -> None:
        if not len(self.learning_rates):
            if self.learn_inner_lr:
                refuse_late_parts(self)
            parameters = dict(self.model.named_parameters())
            self._set_rates({name: parameters[name] for name in self.own_head.names().values()})

    def _match_parts(self, stored: Mapping[str, Any]) -> None:
        state = stored.get("_extra_state")
        if any(key.startswith("learning_rates.") for key in stored):
            if self.head is not None:
                self._make_parts(None)
        elif state is not None and state.get("head") is None:
            # The state was saved before any task: the head is found, and the rates are made, with the next one.
            self.own_head.head = self.options["head"]
            self.findings.clear()
            self._set_rates({})

    def _set_rates(self, adapted: Mapping[str, nn.Parameter]) -> None:
        steps, learned = self.settings.inner_steps, self.learn_inner_lr
        self.learning_rates = LearningRates(adapted.items(), steps, self.inner_lr, learned)
        self._learn(*self.learning_rates.parameters())
