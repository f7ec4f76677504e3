"""Methods on an embedding: task -> embeddings of support and target -> a head fitted to the support -> its logits.

Read `_solve` first; each method below it is one arrow of it. The embedding is what enters the head of the user's
network, found by watching the first forward pass. A method says what head it fits: see `_fitted`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from typing_extensions import TypedDict

from metawrap.checks.first_look import FirstLook
from metawrap.engines.batched import first_line
from metawrap.errors import ArgumentError, TaskError, UnsupportedModuleError
from metawrap.heads.fitted import FittedHead, PlacedHead
from metawrap.inner_loop.masking import ignored_label
from metawrap.inner_loop.outcome import Solved, solved_from
from metawrap.layers.step_clock import Moments, Statistics
from metawrap.learner.direct import Direct, Parts
from metawrap.learner.keywords import OuterKeywords
from metawrap.surgery.inspect import find_head
from metawrap.surgery.swap import plain_copy
from metawrap.tasks import Inputs, Task, describe_value, map_tensors, tensors_in

Embedding = Literal["head_input", "output"]


class EmbeddedKeywords(OuterKeywords, total=False):
    """What every method on an embedding takes, besides what all methods do.

    head: name of the module that makes the prediction; found by watching a forward pass if None. embedding: what is
    embedded: "head_input" is what enters that module; "output" is the network's own output, for one without a head.
    """

    head: str | None
    embedding: Embedding


class _Own(TypedDict):
    head: str | None
    embedding: Embedding


class Embedded(Direct):
    """A method that embeds a task and fits a head to its support set.

    flat: whether the method takes embeddings as vectors.
    """

    flat: ClassVar[bool] = True

    def __init__(
        self,
        model: nn.Module,
        keywords: EmbeddedKeywords,
        *,
        options: Mapping[str, Any] | None = None,
        parts: Parts | None = None,
        own_steps: int | None = None,
    ) -> None:
        own: _Own = {"head": keywords.get("head"), "embedding": keywords.get("embedding", "head_input")}
        if own["embedding"] not in ("head_input", "output"):
            raise ArgumentError(f"embedding: expected 'head_input' or 'output', but got {own['embedding']!r}.")
        if own["embedding"] == "output" and own["head"] is not None:
            raise ArgumentError('head: has no effect with embedding="output". Leave one of them out.')
        outer = cast(OuterKeywords, {name: value for name, value in keywords.items() if name not in own})
        shown = {**(options or {}), **own}
        super().__init__(model, outer, head=own["head"], options=shown, parts=parts, own_steps=own_steps)
        self.embedding: Embedding = own["embedding"]

    @abstractmethod
    def _fitted(self, support: Tensor, labels: Tensor, ways: int) -> FittedHead:
        """The head fitted to a support set: embeddings (examples, ...), labels (examples,) in 0..ways - 1.

        Differentiable with respect to the embeddings and the method's own parts wherever gradients are enabled.
        """

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
        self._refuse_inner(steps, mask)
        labels, ways = self._labels(task)
        moments: list[Moments] | None = [] if training else None
        support, target = self._embeddings(task, training, norm, moments)
        prediction, loss = self._judged_on(task, support, labels, ways, target)
        return solved_from(loss, [], prediction, task, moments or [], {}, ignored_label(self.loss_fn))

    def _embeddings(
        self, task: Task, training: bool, norm: str, moments: list[Moments] | None
    ) -> tuple[Tensor, Tensor]:
        return self._of_both(self._embedded, task, training, norm, moments)

    def _of_both(
        self, run: Callable[..., Tensor], task: Task, training: bool, norm: str, moments: list[Moments] | None
    ) -> tuple[Tensor, Tensor]:
        """`run(inputs, statistics, moments)` of support and target, (examples, ...) each."""
        if norm == "support":
            return run(task.support_x, "capture", moments), run(task.target_x, "captured", moments)
        if norm == "running" and training and (both := _together(task)) is not None:
            # One batch, as in ordinary training: its statistics are those that are stored and used in evaluation.
            found = run(both, "batch", moments)
            count = len(tensors_in(task.support_x)[0])
            return found[:count], found[count:]
        statistics: Statistics = "running" if norm == "running" and not training else "batch"
        return run(task.support_x, statistics, moments), run(task.target_x, statistics, moments)

    def _embedded(self, inputs: Inputs, statistics: Statistics, moments: list[Moments] | None = None) -> Tensor:
        """The embeddings of inputs: (examples, numbers), or as the head gets them where the method is not `flat`."""
        if self.embedding == "output":
            entered = [self._run(inputs, statistics, moments)]
        else:
            assert self._head is not None
            with _entering(self.model.get_submodule(self._head)) as entered:
                self._run(inputs, statistics, moments)
        where = "the model's output" if self.embedding == "output" else f"what enters the head '{self._head}'"
        if len(entered) != 1:
            raise UnsupportedModuleError(
                f"The head '{self._head}' ran {len(entered)} times in one forward pass, so it is not known what the "
                'embedding is. Name another module with head=, or pass embedding="output".'
            )
        found = entered[0]
        if not isinstance(found, Tensor) or found.ndim < 2 or not found.is_floating_point():
            raise UnsupportedModuleError(
                f"Expected {where} to be a floating-point tensor of shape (examples, ...), but it is "
                f"{describe_value(found)}. Name the module that an embedding enters with head=, or pass "
                'embedding="output".'
            )
        return found.flatten(1) if self.flat else found

    def _judged_on(
        self, task: Task, support: Tensor, labels: Tensor, ways: int, target: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `_judged`, for a method that needs the inputs, too."""
        return self._judged(support, labels, ways, target, task.target_y)

    def _judged(
        self, support: Tensor, labels: Tensor, ways: int, target: Tensor, target_y: Any
    ) -> tuple[Tensor, Tensor]:
        """The prediction for the targets, and the loss that trains the method."""
        prediction = self._fitted(support, labels, ways)(target)
        return prediction, self._loss(prediction, target_y, "target")

    def _labels(self, task: Task) -> tuple[Tensor, int]:
        """The support labels, and how many classes they are.

        Raises:
            TaskError: they are no classes 0..ways - 1, or a target has a class that the support set has not shown.
        """
        name = type(self).__name__
        for part in ("support_y", "target_y"):
            y = getattr(task, part)
            if not isinstance(y, Tensor) or y.ndim != 1 or y.is_floating_point() or y.is_complex():
                raise TaskError(
                    f"{part}: {name} needs the class of each example, (examples,) whole numbers, but got "
                    f"{describe_value(y)}."
                )
        shown, asked = torch.unique(task.support_y).tolist(), torch.unique(task.target_y).tolist()
        ways = len(shown)
        if shown != list(range(ways)):
            raise TaskError(
                f"support_y: {name} needs each class from 0 to the last, but it holds {shown}. Relabel the episode to "
                f"0..{ways - 1}."
            )
        ignored = ignored_label(self.loss_fn)
        if missing := [y for y in asked if y != ignored and not 0 <= y < ways]:
            raise TaskError(
                f"target_y holds classes {missing}, which the support set has not shown. Leave such targets out, or "
                "show the classes."
            )
        return task.support_y.long(), ways

    def _look(self, task: Task) -> FirstLook:
        head = None if self.embedding == "output" else self._head or self._found_head(task)
        before, self._head = self._head, head
        try:
            if head is not None:
                self._refuse_unlike(head, task)
                self._refuse_hidden(head, task)
            labels, ways = self._labels(task)
            # The statistics that every mode has; a first look is no pass, and records nothing.
            support = self._embedded(task.support_x, "batch")
            if len(support) != len(labels):
                raise UnsupportedModuleError(
                    f"The embedding has {len(support)} rows for {len(labels)} support examples: expected one for each."
                )
            shown = replace(task, target_x=task.support_x, target_y=task.support_y)
            _, loss = self._judged_on(shown, support, labels, ways, support)
            learned = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
            unused: list[str] = []
            if self.model.training and not loss.requires_grad:
                raise UnsupportedModuleError(
                    f"Nothing that {type(self).__name__} would learn has a gradient: all that comes before the head is "
                    "frozen. Unfreeze some of it with requires_grad_(); evaluate and adapt work as it is."
                )
            if loss.requires_grad and learned:
                gradients = torch.autograd.grad(loss, list(learned.values()), allow_unused=True)
                unused = [name for name, g in zip(learned, gradients, strict=True) if g is None]
        except BaseException:
            self._head = before
            raise
        return FirstLook(unused, differentiable=True)

    def _found_head(self, task: Task) -> str:
        head, exact = find_head(self.model, lambda: self._run(task.support_x, "batch", None))
        if head is None or not exact:
            raise UnsupportedModuleError(
                "No module's output is the prediction itself, so the head, and with it the embedding, is not known for "
                f"sure (the last module that ran is '{head}'). Name the head with head=, or pass embedding=\"output\" "
                "if the network's output is the embedding."
            )
        if head == "":
            raise UnsupportedModuleError(
                f"The whole network is one {type(self.model).__name__}: nothing is embedded before it. Pass "
                'embedding="output" if its output is the embedding.'
            )
        return head

    def _refuse_unlike(self, head: str, task: Task) -> None:
        """Raises UnsupportedModuleError when a fitted head in its place would not predict what is judged here."""
        calls: list[tuple[int, Any]] = []

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            calls.append((len(args) + len(kwargs), map_tensors(output, Tensor.clone)))

        handle = self.model.get_submodule(head).register_forward_hook(note, with_kwargs=True)
        try:
            prediction = self._run(task.support_x, "batch", None)
        finally:
            handle.remove()
        if calls and calls[-1][0] != 1:
            raise UnsupportedModuleError(
                f"The head '{head}' is called with {calls[-1][0]} arguments, but what stands in its place is fitted to "
                "one, the embedding. Name a module that takes one tensor with head=."
            )
        if calls and not _holds(prediction, calls[-1][1]):
            raise UnsupportedModuleError(
                f"The network does more behind the head '{head}': its prediction is not the head's own output, which "
                f"is what {type(self).__name__} fits. Name the last module with head=, or move what follows into the "
                "loss."
            )

    def _refuse_hidden(self, head: str, task: Task) -> None:
        """Raises UnsupportedModuleError when another head in its place would not be run."""
        stand_in, reason = (
            _StandIn(),
            "is called through something other than its place in the network (a list, a closure)",
        )
        places = list(_put(self.model, head, stand_in))
        try:
            self._run(task.support_x, "batch", None)
        except Exception as error:  # Once it was called, what it returned may not suit what comes behind it.
            reason = f"is used for more than being called ({type(error).__name__}: {first_line(error)})"
        finally:
            for owner, local, original in places:
                owner._modules[local] = original
        if not stand_in.calls:
            raise UnsupportedModuleError(
                f"The head '{head}' {reason}, so no fitted head could take its place. Call it by its attribute in "
                "forward, and read nothing of it there."
            )

    def adapt(self, support_x: Inputs, support_y: Any, steps: int | None = None) -> nn.Module:
        """A plain module of the user's own class, in eval mode, with a head fitted to one support set in its place.

        Its norms are ordinary ones: under norm="running" with the stored statistics, under "batch" without any (they
        use each batch's own), under "support" with the support set's. With embedding="output" it is a Sequential of the
        user's network and the fitted head. Changes nothing here.

        Args:
            support_x, support_y: one task's support set, (examples, ...), labels 0..ways - 1.
            steps: None; there is no inner loop.
        """
        self._refuse_inner(steps)
        with self._adapting(Task(support_x, support_y, support_x, support_y)) as task:
            labels, ways = self._labels(task)
            norm = self.settings.norm
            statistics: Statistics = {"support": "capture", "running": "running"}.get(norm, "batch")  # type: ignore[assignment]
            fitted = self._fitted(self._embedded(task.support_x, statistics), labels, ways).plain()
            held = self.wrapped.clock.taken() if norm == "support" else None
            module = plain_copy(self.model, {}, 0, held, keep_statistics=norm != "batch")
        module.eval()
        if self.embedding == "output":
            flatten = [("flatten", nn.Flatten())] if self.flat else []
            whole = nn.Sequential(OrderedDict([("network", module), *flatten, ("head", fitted)])).eval()
            return self._finished(whole, task)
        assert self._head is not None
        list(_put(module, self._head, PlacedHead(fitted, self.flat).eval()))
        return self._finished(module, task)

    def get_extra_state(self) -> dict[str, Any]:
        """The counters and the head's name, for state_dict."""
        return super().get_extra_state() | {"head": self._head}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restores the counters, and the head's name where this learner has none yet."""
        super().set_extra_state(state)
        self._head = self._head or state.get("head")


def _holds(prediction: Any, output: Any) -> bool:
    """Whether a head's output is in a prediction, as it is or in another shape."""
    if not isinstance(output, Tensor):
        return False
    own = output.flatten()
    return any(
        part.shape[:1] == output.shape[:1] and torch.equal(part.flatten(), own) for part in tensors_in(prediction)
    )


class _StandIn(nn.Module):
    calls = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return next(iter((*args, *kwargs.values())))


def _put(model: nn.Module, name: str, module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Puts a module wherever the one of that name is registered; yields each place and what was there."""
    original = model.get_submodule(name)
    for owner in list(model.modules()):
        for local, child in owner._modules.items():
            if child is original:
                owner._modules[local] = module
                yield owner, local, original


@contextmanager
def _entering(module: nn.Module) -> Iterator[list[Any]]:
    """What enters a module while this is open: the first argument of each call."""
    seen: list[Any] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(next(iter((*args, *kwargs.values())), None))

    handle = module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def _together(task: Task) -> Inputs | None:
    """Support and target inputs as one batch; None where their shapes do not allow it."""
    one, other = tensors_in(task.support_x), tensors_in(task.target_x)
    alike = len(one) == len(other) and all(
        a.ndim and b.ndim and a.shape[1:] == b.shape[1:] and a.dtype == b.dtype and len(a) == len(one[0])
        for a, b in zip(one, other, strict=True)
    )
    targets = iter(other)
    return map_tensors(task.support_x, lambda support: torch.cat([support, next(targets)])) if alike else None
