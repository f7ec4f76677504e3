"""What every method without an inner loop over the user's module shares: it runs the module as it is."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from metawrap.checks.first_look import FirstLook
from metawrap.engines import call_model
from metawrap.errors import ArgumentError
from metawrap.inner_loop.outcome import autograd
from metawrap.layers.step_clock import Moments, Statistics
from metawrap.learner.describing import describe_learner
from metawrap.learner.description import Description
from metawrap.learner.keywords import OuterKeywords
from metawrap.learner.learner import Method
from metawrap.settings.keywords import flattened, keyword_types, refuse_unknown
from metawrap.settings.settings import PLAIN_TRAINING, OuterSettings, TunedSettings, resolve
from metawrap.snapshot.module_state import unchanged
from metawrap.surgery.swap import plain_copy
from metawrap.surgery.wrap import wrap
from metawrap.tasks import Inputs, Task

Parts = Mapping[str, nn.Module | nn.Parameter]


class Direct(Method):
    """A method that runs the user's module as it is.

    options: the method's own keywords, as `describe` shows them. parts: what it learns besides the module, by the name
    that it gets here; on the module's device and in its precision. own_steps: of a method that has an inner loop on a
    part of the network.
    """

    defaults: ClassVar[Mapping[str, Any]] = {}

    def __init__(
        self,
        model: nn.Module,
        outer: OuterKeywords,
        *,
        head: str | None = None,
        options: Mapping[str, Any] | None = None,
        parts: Parts | None = None,
        own_steps: int | None = None,
    ) -> None:
        known = keyword_types(OuterKeywords)
        refuse_unknown(type(self).__name__, flattened(outer), known, keyword_types(type(self)))
        own_outer = [name for name in ("optimizer", "scheduler") if outer.get(name) is not None]
        kind = OuterSettings if own_steps is None else TunedSettings
        settings = resolve(kind, {**outer, "inner_steps": own_steps}, {**PLAIN_TRAINING, **self.defaults}, own_outer)
        given = flattened({"wrapping": outer.get("wrapping")})
        wrapped = wrap(
            model,
            steps=1,
            affine=False,
            statistics=False,
            adapt=False,
            swap=given.get("wrapping.swap"),
            keep_norm=given.get("wrapping.keep_norm", ()),
            head=head,
        )
        super().__init__(wrapped.model, settings, outer.get("loss_fn", F.cross_entropy))
        self.wrapped, self.options = wrapped, dict(options or {})
        self._looks: dict[bool, FirstLook] = {}
        self._head = head
        # Used outside of a task, too, the norms follow the policy.
        wrapped.clock.statistics = "batch" if settings.norm == "batch" else None
        like = next((p for p in wrapped.model.parameters() if p.is_floating_point()), torch.zeros(()))
        for name, part in (parts or {}).items():
            setattr(self, name, _moved(part, like))
        if not list(self.parameters()):
            raise ArgumentError(f"model: {type(model).__name__} has no parameters, so there is nothing to learn.")
        self._make_outer(outer.get("optimizer"), outer.get("scheduler"))
        # What has no size yet has no value: torch.load(weights_only=True) would not take it.
        self._register_state_dict_hook(_without_unsized)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_with_unsized)  # type: ignore[no-untyped-call]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        # A pickled parameter without a size loses its device and precision; still the same object for the optimizer.
        sized = [p for p in self.parameters() if not is_lazy(p)]
        for parameter in self.parameters() if sized else ():
            if is_lazy(parameter):
                parameter.data = parameter.data.to(sized[0])

    @abstractmethod
    def _look(self, task: Task) -> FirstLook:
        """What the first task shows; checks first, and may keep what it found. The model is put back behind it."""

    @property
    def head(self) -> str | None:
        """The name of the module whose output is the prediction; None before the first task."""
        return self._head

    def train(self, mode: bool = True) -> Direct:
        """As in torch; norms named by `keep_norm` stay on their stored statistics."""
        super().train(mode)
        self.wrapped.hold_kept_norms()
        return self

    def unwrap(self) -> nn.Module:
        """The meta-trained network as a plain module of the user's own class."""
        return plain_copy(self.model, {}, 0, None, keep_statistics=self.settings.norm != "batch")

    def describe(self) -> Description:
        """What wrapping found and did."""
        return describe_learner(
            self,
            wrapped=self.wrapped,
            head=self.head,
            looks=self._looks,
            settings=self._shown_settings(),
            warnings=self._warnings(),
        )

    def _shown_settings(self) -> dict[str, Any]:
        """The method's own keywords, and the settings that it takes."""
        taken = {*keyword_types(OuterKeywords), "inner_steps"}
        return self.options | {name: value for name, value in self.settings.as_dict().items() if name in taken}

    def _warnings(self) -> Iterable[str]:
        return []

    def _prepare(self, task: Task) -> None:
        self.wrapped.hold_kept_norms()
        if self.model.training not in self._looks:
            with autograd(True), unchanged(self.model, self._device):
                look = self._look(task.map(Tensor.clone))
            self._looks[self.model.training] = look

    def _run(self, inputs: Inputs, statistics: Statistics, moments: list[Moments] | None) -> Any:
        """One pass of the user's module; what its norms see is added to `moments`."""
        with self.wrapped.clock.at(0, statistics, moments):
            return call_model(self.model, inputs)

    def _refuse_inner(self, steps: int | None, mask: bool | None = None) -> None:
        for name, value in {"steps": steps, "mask_unused_outputs": mask}.items():
            if value is not None:
                raise ArgumentError(
                    f"{name}: has no effect on {type(self).__name__}, which has no inner loop on the network's own "
                    f"outputs, but got {value!r}. Leave it out."
                )


def _without_unsized(learner: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for name, parameter in learner.named_parameters():
        if is_lazy(parameter):
            state.pop(prefix + name, None)


def _with_unsized(learner: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, parameter in learner.named_parameters():
        if is_lazy(parameter):
            state.setdefault(prefix + name, parameter)


def _moved(part: nn.Module | nn.Parameter, like: Tensor) -> nn.Module | nn.Parameter:
    if isinstance(part, nn.Parameter):
        return nn.Parameter(part.detach().to(like), requires_grad=part.requires_grad)
    return part.to(like.device, like.dtype)
