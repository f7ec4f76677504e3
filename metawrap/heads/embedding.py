"""The embedding: the tensor that enters the head of the user's network. First task -> head, checked -> embeddings.

A learner has one `Embedding`. A learner that replaces the head by a fitted one calls `check` and `check_replaceable`
with its first task; a learner that keeps the user's head has an `OwnHead`, which adds checks of its parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from metawrap.engines.batched import first_line
from metawrap.errors import UnsupportedModuleError
from metawrap.heads.joint_rows import form_of as form_of_inputs
from metawrap.heads.joint_rows import joined, may_hold_places, rows_stand_alone
from metawrap.layers.norm_policies import Statistics, passes_of
from metawrap.layers.per_step_norm import PerStepNorm
from metawrap.layers.step_clock import Moments
from metawrap.outputs import candidates, filled, form_of, in_words, left_out, only_tensor, prediction_in, takes_tensors
from metawrap.results import task_loss
from metawrap.surgery.inspect import find_head
from metawrap.tasks import Inputs, Task, describe_value, map_tensors, tensors_in

EmbeddingSource = Literal["head_input", "output"] | Callable[[Any], Tensor]
Run = Callable[..., Any]
# Of the head: the number of its arguments; its output, or the prediction in it if the head is kept; a copy of that.
_Call = tuple[int, Any, Any]
_HIDDEN = "is called through something other than its place in the network (a list, a closure)"


class Entering(NamedTuple):
    """A call of the head: its argument; the name of this argument, None by position; for an embedding that is read from
    the network's output, whether input and output of the network are bare tensors."""

    value: Any
    keyword: str | None
    bare: bool = False


@dataclass
class Embedding:
    """Computes embeddings by running a user's network.

    method: name of the learner's class, for errors. run: `run(inputs, statistics, moments)` is one pass of `model`.
    head: name of the module that the embedding enters; None until the first task. source: "output" takes the network's
    own output as the embedding, a function what it reads from that output, and then no module is the head.
    flat: whether embeddings are flattened to vectors. forms: the output in each mode around the head's own output.
    joint: by form of the inputs, whether support and target rows may run as one batch.
    """

    keeps_head: ClassVar[bool] = False

    method: str
    model: nn.Module
    run: Run
    head: str | None
    source: EmbeddingSource = "head_input"
    flat: bool = True
    joint: dict[str, bool] = field(default_factory=dict)
    forms: dict[bool, Any] = field(default_factory=dict)

    @property
    def module(self) -> nn.Module:
        """The head; it must be known."""
        assert self.head is not None
        return self.model.get_submodule(self.head)

    def of(self, inputs: Inputs, statistics: Statistics, moments: list[Moments] | None = None) -> Tensor:
        """The embeddings of inputs: (examples, numbers) if `flat`, else (examples, ...) as the head gets them."""
        found: Tensor = self.entering(inputs, statistics, moments).value
        return found.flatten(1) if self.flat else found

    def entering(self, inputs: Inputs, statistics: Statistics, moments: list[Moments] | None = None) -> Entering:
        """What enters the head, (examples, ...), and how."""
        calls: list[Entering] = []
        if self.source != "head_input":
            output = self.run(inputs, statistics, moments)
            bare = self.source == "output" and isinstance(inputs, Tensor) and isinstance(output, Tensor)
            calls.append(Entering(embedding_in(output, self.source), None, bare))
        else:

            def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                calls.append(Entering(next(iter((*args, *kwargs.values())), None), next(iter(kwargs), None)))

            with self.module.register_forward_pre_hook(note, with_kwargs=True):
                self.run(inputs, statistics, moments)
        self._check_calls(len(calls))
        found = calls[0].value
        if not isinstance(found, Tensor) or found.ndim < 2 or not found.is_floating_point():
            where = "the model's output" if self.source != "head_input" else f"the input of the head '{self.head}'"
            raise UnsupportedModuleError(
                f"Expected {where} to be a floating-point tensor of shape (examples, ...), but it is "
                f"{describe_value(found)}. Name the module that an embedding enters with head={self._or_output('')}."
            )
        return calls[0]

    def of_task(
        self, task: Task, training: bool, norm: str, moments: list[Moments] | None, run: Run | None = None
    ) -> tuple[Tensor, Tensor]:
        """The embeddings of a task's support and target sets, with the statistics of a norm policy.

        Args:
            run: `run(inputs, statistics, moments)` to something else than embeddings, such as predictions.
        """
        run, kind = run or self.of, "embeddings" if run is None else "others"
        passes = passes_of(norm, training=training)
        if passes.context is not None:
            return run(task.support_x, passes.context, moments), run(task.target_x, passes.target, moments)
        if norm == "running" and training and (both := self._joint_inputs(task, run, kind)) is not None:
            # One batch, as in ordinary training: its statistics are stored, and used in evaluation.
            rows = run(both, "batch", moments)
            count = len(tensors_in(task.support_x)[0])
            return rows[:count], rows[count:]
        return run(task.support_x, passes.support, moments), run(task.target_x, passes.target, moments)

    def _joint_inputs(self, task: Task, run: Run, kind: str) -> Inputs | None:
        """Support and target inputs as one batch; None where that is not known to give the same rows.

        Without a batch norm a joint pass has no advantage, so the sets stay apart.
        """
        normed = any(isinstance(module, PerStepNorm) for module in self.model.modules())
        if not normed or may_hold_places(task.support_x):
            return None
        if (both := joined(task.support_x, task.target_x)) is None:
            return None
        form = f"{kind}: {form_of_inputs(task.support_x)}"
        if form not in self.joint:
            stored = partial(run, statistics="running", moments=None)
            self.joint[form] = rows_stand_alone(self.model, stored, task.support_x, task.target_x)
        return both if self.joint[form] else None

    @contextmanager
    def found(self, inputs: Inputs, *, needed: bool = True) -> Iterator[None]:
        """Finds the head, where it is needed and unknown; forgets it again if the block fails."""
        before = self.head
        try:
            if before is None and needed and self.source == "head_input":
                self.head = self._find(inputs)
            yield
        except BaseException:
            self.head = before
            raise

    def check(self, inputs: Inputs) -> None:
        """Raises UnsupportedModuleError unless one call of the head, with one argument, makes the prediction."""
        output, calls = self.note_form(inputs)
        self._check_calls(len(calls))
        [call] = calls
        if call[0] != 1:
            raise UnsupportedModuleError(
                f"The head '{self.head}' is called with {call[0]} arguments, but {self.method} fits it on one, the "
                "embedding. Name a module that takes one tensor with head=."
            )
        if not any(self._is_of(call, tensor) for tensor in tensors_in(output)):
            fix = "Name the last module with head=, move what follows into the loss"
            cause = "does more behind the head '{}': its prediction is not the head's own output, which {} fits"
            if not isinstance(call[1], Tensor):
                fix = "Return that tensor from the head, and build the rest in the network's forward"
                cause = "has a head '{}' that does not return the prediction as a tensor, as {} needs it"
            other = "wrap the network without it, and say what embeds with embedding="
            if self.keeps_head:
                other = f"use MAML(..., adapt='{self.head}.*'), which runs the whole network"
            raise UnsupportedModuleError(f"The network {cause.format(self.head, self.method)}. {fix}, or {other}.")

    def watched(self, inputs: Inputs, *how: Any) -> tuple[Any, list[_Call]]:
        """The network's output, and the calls of the head, if it is known."""
        calls: list[_Call] = []

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            own = prediction_in(output) if self.keeps_head else output
            calls.append((len(args) + len(kwargs), own, map_tensors(output, Tensor.clone)))

        with nullcontext() if self.head is None else self.module.register_forward_hook(note, with_kwargs=True):
            return self.run(inputs, *how), calls

    def note_form(self, inputs: Inputs) -> tuple[Any, list[_Call]]:
        """Notes the form of the network's output around the head's own; returns what `watched` does."""
        output, calls = self.watched(inputs, "batch", None)
        self.forms[self.model.training] = form_of(output, lambda tensor: bool(calls) and self._is_of(calls[-1], tensor))
        return output, calls

    def _is_of(self, call: _Call, tensor: Tensor) -> bool:
        # A fitted head takes the place of the user's, whose output may have another shape in the prediction.
        return tensor is call[1] if self.keeps_head else _same_rows(tensor, call[2])

    def in_form(self, output: Any, other: Any = None) -> Any:
        """The head's prediction in the form of the network's output, with `other` for each other tensor in it."""
        return filled(self.forms.get(self.model.training), prediction_in(output), other)

    def loss(self, loss_fn: Any, prediction: Any, y: Any, part: str) -> Tensor:
        """`task_loss` of a prediction of the head: a loss of the user's own gets the form of the network's output."""
        shown = prediction if takes_tensors(loss_fn) else self.in_form(prediction, left_out())
        return task_loss(loss_fn, shown, y, part)

    def check_replaceable(self, inputs: Inputs) -> None:
        """Raises UnsupportedModuleError when the network would not run another module in the head's place."""
        stand_in, reason = _StandIn(), _HIDDEN
        places = put_in_place(self.model, str(self.head), stand_in)
        try:
            self.run(inputs, "batch", None)
        except Exception as error:  # The layers behind the head may not take the stand-in's output.
            reason = f"is used for more than being called ({type(error).__name__}: {first_line(error)})"
        finally:
            for owner, local, original in places:
                owner._modules[local] = original
        if not stand_in.calls:
            raise UnsupportedModuleError(
                f"The head '{self.head}' {reason}, so no fitted head could take its place. Call it by its attribute in "
                "forward, and read nothing of it there."
            )

    def check_rows(self, embedded: Tensor, examples: int) -> None:
        """Raises UnsupportedModuleError unless each example has a row in the embeddings."""
        if len(embedded) != examples:
            raise UnsupportedModuleError(
                f"The embedding has {len(embedded)} rows for {examples} support examples: expected one for each."
            )

    def _check_calls(self, calls: int) -> None:
        if calls != 1:
            raise UnsupportedModuleError(
                f"The head '{self.head}' ran {calls} times in one forward pass, so the embedding is not known. Name "
                f"another module with head={self._or_output('')}."
            )

    def _find(self, inputs: Inputs) -> str:
        head, exact, ambiguous = find_head(self.model, lambda: self.run(inputs, "batch", None))
        if ambiguous:
            raise UnsupportedModuleError(
                f"The network returns {ambiguous}, so it is not known which tensor is the prediction, and which module "
                f"the head. Name the head with head={self._or_output(' if the network has no head')}."
            )
        if head is None or not exact:
            raise UnsupportedModuleError(
                "No module's output is the prediction itself, so the head, and with it the embedding, is not known for "
                f"sure (the last module that ran is '{head}'). Name the head with "
                f"head={self._or_output(' if the network has no head')}."
            )
        if head == "":
            fix = (
                "Use MAML to adapt all of it." if self.keeps_head else 'Pass embedding="output" to embed by its output.'
            )
            raise UnsupportedModuleError(
                f"The whole network is one {type(self.model).__name__}: nothing is embedded before it. {fix}"
            )
        return head

    def _or_output(self, condition: str) -> str:
        return "" if self.keeps_head else f', or pass embedding="output"{condition}'


class BehindNetwork(nn.Module):
    """A fitted head behind a network whose output is, or holds, the embedding."""

    def __init__(self, network: nn.Module, source: EmbeddingSource, head: nn.Module) -> None:
        super().__init__()
        self.network, self.source, self.head = network, source, head

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The network's inputs to (targets, ways)."""
        logits: Tensor = self.head(embedding_in(self.network(*args, **kwargs), self.source))
        return logits


def put_in_place(model: nn.Module, name: str, module: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Registers a module wherever the one called `name` is; returns owner, local name and old module of each place."""
    original = model.get_submodule(name)
    places = [
        (owner, local, original) for owner in model.modules() for local, m in owner._modules.items() if m is original
    ]
    for owner, local, _ in places:
        owner._modules[local] = module
    return places


def embedding_in(output: Any, source: EmbeddingSource) -> Any:
    """The embedding that a network's output is, or holds.

    Raises:
        UnsupportedModuleError: the output holds several tensors, and `source` is no function that reads one.
    """
    if callable(source):
        return source(output)
    found = output if isinstance(output, Tensor) else only_tensor(output)
    if found is None and (paths := candidates(output)):
        raise UnsupportedModuleError(
            f'embedding="output": the network returns {in_words(output)}, so it is not known which one is the '
            f"embedding. Pass a function that reads it, such as embedding=lambda output: {list(paths)[-1]}."
        )
    return output if found is None else found


def _same_rows(tensor: Tensor, value: Any) -> bool:
    """Whether two tensors hold the same numbers for each example, in one shape or another."""
    return (
        isinstance(value, Tensor)
        and tensor.shape[:1] == value.shape[:1]
        and torch.equal(tensor.flatten(), value.flatten())
    )


class _StandIn(nn.Module):
    calls = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return next(iter((*args, *kwargs.values())))
