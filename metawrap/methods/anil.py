"""ANIL: embeddings, once -> gradient steps on the head alone -> target loss -> gradient to body and head."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from metawrap.checks.second_derivative import missing_second_derivative
from metawrap.engines.calling import differentiable_twice
from metawrap.engines.functional import FunctionalEngine
from metawrap.errors import UnsupportedModuleError
from metawrap.inner_loop.masking import ignored_label
from metawrap.inner_loop.outcome import Solved, autograd, dense, solved_from
from metawrap.layers.learning_rates import LearningRates
from metawrap.layers.step_clock import Moments
from metawrap.learner.embedding_learner import EmbeddedKeywords
from metawrap.learner.own_head import OwnHead
from metawrap.settings.settings import check_choice
from metawrap.tasks import Task

FastWeights = dict[str, Tensor]


class ANIL(OwnHead):
    """Almost No Inner Loop: MAML whose inner loop adapts the head only; the body is shared by all tasks.

    With f the body, h the head with weights w, alpha the rate and K the number of steps:
    w_0 = w;  w_k = w_(k-1) - alpha * grad_w L(h(f(support); w_(k-1)), support_y);  meta-loss = L(h(f(target); w_K),
    target_y). Its gradient flows through every step to w and, through the embeddings of support and target, to f.

    As in the paper: second order, and the same norm policy as MAML ("batch": each set by its own statistics, so that
    accuracy is transductive), because the paper compares the two on MAML's code; pass norm="running" for figures that
    are inductive. What differs: the network is run once per task, not once per step, which gives the same gradient;
    rates can be learned. Any label that `loss_fn` takes, regression too.

    Args:
        model: any `torch.nn.Module`; it is copied, never changed.
        inner_steps: gradient steps on the head.
        inner_lr: their rate; the first one, where rates are learned.
        learn_inner_lr: learn one rate for each of the head's parameter tensors and each step.
        first_order: leave second derivatives out; the body then learns from the target embeddings alone.
        keywords: see `EmbeddedKeywords` and `OuterKeywords`; embedding="output" makes no sense here.
    Raises:
        ArgumentError: an argument has the wrong type, range or combination.
        UnsupportedModuleError: the model has something that cannot be carried.

    Source: Raghu, Raghu, Bengio, Vinyals 2020, arXiv:1909.09157, section 4; the equations are those of Finn et al.
    2017, arXiv:1703.03400, with the body's inner rates at zero.
    """

    defaults: ClassVar[Mapping[str, Any]] = {"norm": "batch"}
    learning_rates: LearningRates

    def __init__(
        self,
        model: nn.Module,
        *,
        inner_steps: int = 5,
        inner_lr: float = 0.1,
        learn_inner_lr: bool = False,
        first_order: bool = False,
        **keywords: Unpack[EmbeddedKeywords],
    ) -> None:
        own = {"inner_lr": inner_lr, "learn_inner_lr": learn_inner_lr, "first_order": first_order}
        for name, value in own.items():
            check_choice(name, value)
        self.inner_lr, self.learn_inner_lr, self.first_order = inner_lr, learn_inner_lr, first_order
        rates = {"learning_rates": LearningRates([], inner_steps, inner_lr, learn_inner_lr)}
        super().__init__(model, keywords, inner_steps=inner_steps, options=own, parts=rates)

    def _solve(
        self,
        task: Task,
        *,
        training: bool,
        norm: str,
        steps: int | None = None,
        mask: bool | None = None,
        whole_graph: bool = True,
    ) -> Solved:
        self._refuse_mask(mask)
        steps = self.settings.inner_steps if steps is None else steps
        moments: list[Moments] | None = [] if training else None
        support, target = self._embeddings(task, training, norm, moments)
        engine = FunctionalEngine(self._own_head())
        fast = self._fast(engine, support, task.support_y, steps)
        prediction = engine.call(fast, target)
        loss = self._loss(prediction, task.target_y, "target")
        step_losses = [None] * (steps - 1) + [loss] if steps else []
        return solved_from(loss, step_losses, prediction, task, moments or [], {}, ignored_label(self.loss_fn))

    def _fast(self, engine: FunctionalEngine, support: Tensor, labels: Any, steps: int) -> FastWeights:
        """The head's weights after so many steps, by name; with their graph where gradients are enabled."""
        graph = torch.is_grad_enabled()
        full, rates = self._adapted_names(), self.learning_rates.per_step()
        start = dict(engine.model.named_parameters())
        # Clones: in-place edits of a fast weight, and hooks on the user's parameters, must not meet each other.
        copies = {name: start[name].clone() for name in full}
        # One that was frozen after wrapping is still adapted, from where it is.
        fast = {name: w if graph and w.requires_grad else w.detach().requires_grad_() for name, w in copies.items()}
        for step in range(steps):
            row = min(step, self.settings.inner_steps - 1)
            gradients = self._inner_gradient(engine, fast, support, labels, graph and not self.first_order)
            fast = {
                name: w if g is None else w - rates[full[name]][row] * g
                for (name, w), g in zip(fast.items(), gradients, strict=True)
            }
            if not graph:
                fast = {name: weight.detach().requires_grad_() for name, weight in fast.items()}
        return fast

    def _inner_gradient(
        self, engine: FunctionalEngine, fast: FastWeights, support: Tensor, labels: Any, second_order: bool
    ) -> list[Tensor | None]:
        with autograd(True), self._twice() if second_order else nullcontext():
            weights = fast if second_order else {name: w.detach().requires_grad_() for name, w in fast.items()}
            loss = self._loss(engine.call(weights, support if second_order else support.detach()), labels, "support")
            found = (
                torch.autograd.grad(loss, list(weights.values()), create_graph=second_order, allow_unused=True)
                if loss.requires_grad
                else [None] * len(weights)
            )
        if all(gradient is None for gradient in found):
            raise UnsupportedModuleError(
                f"No parameter of the head '{self._head}' gets a gradient from the support loss. It may compute under "
                "no_grad, or detach its output: make it differentiable, or name another module with head=."
            )
        return [None if gradient is None else dense(gradient) for gradient in found]

    def _twice(self) -> Any:
        return differentiable_twice(self._own_head(), hard=True)

    def _module(self, task: Task, norm: str, steps: int) -> nn.Module:
        support = self._embedded(task.support_x, "running" if norm == "running" else "batch")
        fast = self._fast(FunctionalEngine(self._own_head()), support, task.support_y, steps)
        full = self._adapted_names()
        return self._plain({full[name]: weight for name, weight in fast.items()}, task.support_x, norm)

    def _adapted_names(self) -> dict[str, str]:
        return {local: full for local, full in self._full_names(all=True).items() if full in self.learning_rates}

    def _tuned_names(self) -> Iterable[str]:
        return self.learning_rates

    def _refuse_unfit(self, head: str, task: Task) -> None:
        super()._refuse_unfit(head, task)
        if self.first_order:
            return
        engine, support = FunctionalEngine(self._own_head()), self._embedded(task.support_x, "batch").detach()
        fast = {name: p.detach().clone().requires_grad_() for name, p in engine.model.named_parameters()}
        with self._twice():
            reason = missing_second_derivative(
                engine.model,
                fast,
                lambda weights: self._loss(engine.call(weights, support), task.support_y, "support"),
                fix="Use first_order=True, or put something differentiable in its place.",
            )
        if reason:
            raise UnsupportedModuleError(reason)

    def _make_parts(self, task: Task | None) -> None:
        if not len(self.learning_rates):
            if self.learn_inner_lr:
                self._refuse_late()
            parameters = dict(self.model.named_parameters())
            self.learning_rates = LearningRates(
                [(name, parameters[name]) for name in self._full_names().values()],
                self.settings.inner_steps,
                self.inner_lr,
                self.learn_inner_lr,
            )
            self._learn(*self.learning_rates.parameters())

    def _make_room(self, stored: Mapping[str, Any]) -> None:
        state = stored.get("_extra_state")
        if any(key.startswith("learning_rates.") for key in stored):
            if self._head is not None:
                self._make_parts(None)
        elif state is not None and state.get("head") is None:
            # It was saved before any task: this one begins anew, too, and makes its rates with the next.
            self._head = self.options["head"]
            self._looks.clear()
            self.learning_rates = LearningRates([], self.settings.inner_steps, self.inner_lr, self.learn_inner_lr)
            self._learn()
