"""All tasks of a batch at once: the user's module under `torch.func.vmap`, with its own fast weights for each task.

Only the forward pass runs under vmap. Gradients are those of the sum of the tasks' losses, taken outside of vmap: tasks
share no fast weight, so each gets its own gradient. Statistics of norms leave vmap as values.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metawrap.engines.calling import PLAIN_ATTENTION
from metawrap.engines.functional import FunctionalEngine
from metawrap.engines.task_axis import TaskAxis, is_batched
from metawrap.errors import MetaWrapError, UnsupportedModuleError
from metawrap.layers.per_step_norm import PerStepNorm
from metawrap.layers.step_clock import Moments, StepClock
from metawrap.snapshot.generators import Generators
from metawrap.snapshot.module_state import BufferEdits, ModuleState, slots_of
from metawrap.surgery.copying import held_tensors
from metawrap.tasks import map_tensors, tensors_in

Captured = dict[str, list[tuple[Tensor, Tensor]]]


class Padded(NamedTuple):
    """Inputs or labels of tasks of unequal sizes, each padded to the rows of the largest.

    values: (tasks, rows, ...). rows: (tasks, rows), which of them are the task's own.
    """

    values: Tensor
    rows: Tensor


class BatchedEngine:
    """Weights, inputs and predictions have a leading task axis; the user's module sees one task, without it."""

    name = "batched"

    def __init__(self, model: nn.Module, edits: BufferEdits | None = None) -> None:
        self.model = model
        # Its own: an edit that evaluation makes, task by task, does not count here.
        self._edits = BufferEdits(edits.aliased if edits else {})
        self._functional = FunctionalEngine(model, self._edits)
        # Keys of the changes that were seen to be a cache's.
        self._settled: set[Hashable] = set()
        self._one_by_one = False
        self._axis = TaskAxis()
        self._modules = list(model.named_modules())
        norms = [module for module in model.modules() if isinstance(module, PerStepNorm)]
        self._clock = norms[0].per_step.clock if norms else StepClock()

    def call(self, weights: Mapping[str, Tensor], inputs: Any, twice: bool = False, head: str | None = None) -> Any:
        """See `Engine.call`; every tensor has a leading task axis.

        Args:
            inputs: also `Padded`: norms then leave the padded rows out.
        Raises:
            UnsupportedModuleError: forward has a side effect that would serve all tasks at once, or fails for several
                tasks but not for one. An error that one task raises by itself is raised as it is.
        """
        clock, recorder, captured = self._clock, self._clock.recorder, self._clock.captured
        passes: list[Moments] = []
        inputs, rows = inputs if isinstance(inputs, Padded) else (inputs, None)

        def run(fast: Mapping[str, Tensor], x: Any, statistics: Captured, own: Tensor | None) -> Any:
            passes.clear()
            clock.rows = own
            clock.recorder = None if recorder is None else passes
            clock.captured = {name: list(pairs) for name, pairs in statistics.items()}
            output = self._functional.call(fast, x, head=head)
            left = {name: list(pairs) for name, pairs in clock.captured.items()}
            return output, [(seen.mean, seen.variance) for seen in passes], left

        args = (dict(weights), inputs, captured, rows)
        before = self._state()
        try:
            output, moments, captured = self._mapped(run, *args)
            self._refuse_changes(before, inputs, lambda: self._mapped(run, *args))
        except BaseException as error:
            before.put_back()
            if isinstance(error, Exception) and not isinstance(error, MetaWrapError | torch.OutOfMemoryError):
                self._run_alone(run, args)
                raise UnsupportedModuleError(cannot(f"it fails with {first_line(error)}")) from error
            raise
        finally:
            self._edits.edited.clear()
            clock.recorder, clock.captured, clock.rows = recorder, captured, None
        if recorder is not None:
            pairs = zip(passes, moments, strict=True)
            recorder += [seen._replace(mean=mean, variance=variance) for seen, (mean, variance) in pairs]
        return output

    def each(self, function: Callable[..., Any], *args: Any) -> Any:
        """The result of a function without side effects for each task; every tensor has a task axis, in and out.

        Runs task by task where vmap cannot run the function, where the function draws from random or numpy, or where it
        raises: the error is then that of one task.
        """
        if not self._one_by_one:
            before = Generators()
            try:
                output = self._mapped(function, *args)
                if not before.moved() & _SHARED_DRAWS:
                    return output
                failed = False
            except Exception as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                failed = True
            before.put_back()
        outputs = [function(*own) for own in _each_alone(args)]
        self._one_by_one = self._one_by_one or failed
        return _refilled(outputs[0], [torch.stack(parts) for parts in zip(*map(tensors_in, outputs), strict=True)])

    def _mapped(self, function: Callable[..., Any], *args: Any) -> Any:
        shells: list[Any] = []

        def run(tensors: Sequence[Tensor]) -> list[Tensor]:
            # Fused attention has no rule under vmap.
            with TaskAxis() as self._axis, PLAIN_ATTENTION.made():
                output = function(*_refilled(args, tensors))
            shells.append(output)
            return tensors_in(output)

        try:
            # "different": each task draws its own dropout mask.
            found = torch.func.vmap(run, randomness="different")(tensors_in(args))
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or not any(word in str(error) for word in _OF_VMAP):
                raise
            raise UnsupportedModuleError(cannot(f"torch.func.vmap cannot run it: {first_line(error)}")) from error
        return _refilled(shells[-1], found)

    def _refuse_changes(self, before: ModuleState, inputs: Any, again: Callable[[], Any]) -> None:
        """Refuses side effects of a call, which happen once for all tasks, except a cache: a second call keeps it."""
        changes = list(before.changes())
        for change in changes:
            if any(is_batched(tensor) for tensor in held_tensors(change.value)):
                raise UnsupportedModuleError(
                    cannot(f"its forward keeps values of one task in {change.name}, and several run at once")
                )
        self._refuse_edits()
        form = tuple((tensor.shape, tensor.dtype) for tensor in tensors_in(inputs))
        keys = {None if change.key is None else (change.key, form) for change in changes}
        if keys <= self._settled and not self._draws(before):
            return
        # A second call leaves a cache as it is, and a generator that only another thread draws from.
        between = self._state()
        device = tensors_in(inputs)[0].device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            again()
            if drawn := self._draws(between):
                raise UnsupportedModuleError(cannot(drawn))
        if changed := [change.name for change in between.changes()]:
            raise UnsupportedModuleError(cannot(f"each call of its forward changes {changed[0]}, {ONCE}"))
        self._settled |= keys - {None}

    def _state(self) -> ModuleState:
        return ModuleState(self._modules, buffers=True, containers="own")

    def _draws(self, before: ModuleState) -> str | None:
        """Which random draws since then are refused, or None."""
        moved = before.generators.moved()
        if moved & _SHARED_DRAWS:
            return "its forward draws from random or numpy: one draw would serve all tasks. Draw with torch's dropout"
        return DRAWS if moved and not self._axis.may_drop else None

    def _refuse_edits(self) -> None:
        if self._edits.edited:
            raise UnsupportedModuleError(cannot(f"its forward edits the buffer '{min(self._edits.edited)}', {ONCE}"))

    def _run_alone(self, run: Callable[..., Any], args: Any) -> None:
        """Runs each task alone to raise its own error or to name the buffer that it edits; changes nothing."""
        before, buffers = self._state(), slots_of(self._modules)
        try:
            for own in _each_alone(args):
                run(*own)
            self._refuse_edits()
        finally:
            before.put_back()
            for slot in buffers:
                slot.put_back()


def cannot(reason: str) -> str:
    """The message of an error that refuses a model."""
    return f'engine="batched" cannot carry this model: {reason}. Use engine="functional".'


def _refilled(shell: Any, tensors: Sequence[Tensor]) -> Any:
    """The same nested structure around other tensors."""
    rest = iter(tensors)
    return map_tensors(shell, lambda _: next(rest))


def _each_alone(args: Any) -> Iterator[Any]:
    """The arguments of each task."""
    tensors = tensors_in(args)
    for task in range(len(tensors[0])):
        yield _refilled(args, [tensor[task] for tensor in tensors])


def first_line(error: BaseException) -> str:
    """A short account of an error."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}" if str(error) else type(error).__name__


_SHARED_DRAWS = {"python", "numpy"}
_OF_VMAP = ("vmap", "atching rule", "functorch", "BatchedTensor")
ONCE = "once for all tasks, not for each"
DRAWS = "its forward draws random numbers, not through torch's dropout, so that it cannot be checked"
