"""All tasks of a batch at once: the user's module under `torch.func.vmap`, with fast weights of one task each.

Only a forward pass runs under vmap. Gradients are taken outside of it, of the sum of the tasks' losses: tasks share no
fast weight, so this gives each task its own. What forward leaves behind (statistics of norms) leaves vmap as values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from metawrap.engines.calling import BufferEdits
from metawrap.engines.functional import FunctionalEngine
from metawrap.engines.inner_optimizer import InnerOptimizer, OwnInnerOptimizer, UpdateRule
from metawrap.engines.task_axis import Convolution, TaskAxis, is_batched
from metawrap.errors import UnsupportedModuleError
from metawrap.layers.per_step_norm import PerStepNorm
from metawrap.layers.step_clock import Moments, StepClock
from metawrap.surgery.copying import held_tensors
from metawrap.tasks import map_tensors, tensors_in

Captured = dict[str, list[tuple[Tensor, Tensor]]]


class BatchedEngine:
    """Weights, inputs and predictions have a leading task axis; the user's module sees one task, without it.

    changed: plain attributes and buffers that calls have replaced, by name, and whose values vmap has left alone: a
    cache, if they are the same after each call.
    """

    name = "batched"

    def __init__(
        self, model: nn.Module, edits: BufferEdits | None = None, convolution: Convolution = "grouped"
    ) -> None:
        """Args: convolution: with weights of one task each, 2-D ones run as one "grouped" convolution, or "unfolded",
        as one batch of matrix products. The values are the same; which is faster, the device decides."""
        self.model = model
        self.changed: set[str] = set()
        self._functional = FunctionalEngine(model, edits)
        self._edits = edits or BufferEdits()
        self._convolution: Convolution = convolution
        self._one_by_one = False
        self._modules = list(model.named_modules())
        norms = [module for module in model.modules() if isinstance(module, PerStepNorm)]
        self._clock = norms[0].per_step.clock if norms else StepClock()

    def call(self, weights: Mapping[str, Tensor], inputs: Any) -> Any:
        """See `Engine.call`; every tensor has a leading task axis.

        Raises:
            UnsupportedModuleError: forward does what cannot be done for several tasks at once.
        """
        clock, recorder, captured = self._clock, self._clock.recorder, self._clock.captured
        passes: list[Moments] = []

        def run(fast: Mapping[str, Tensor], x: Any, statistics: Captured) -> Any:
            clock.recorder = None if recorder is None else passes
            clock.captured = {name: list(pairs) for name, pairs in statistics.items()}
            output = self._functional.call(fast, x)
            left = {name: list(pairs) for name, pairs in clock.captured.items()}
            return output, [(seen.mean, seen.variance) for seen in passes], left

        before = [(dict(module.__dict__), dict(module._buffers)) for _, module in self._modules]
        try:
            output, moments, captured = self._mapped(run, dict(weights), inputs, captured)
            self._refuse_changes(before)
        except BaseException:
            self._put_back(before)
            raise
        finally:
            clock.recorder, clock.captured = recorder, captured
        if recorder is not None:
            pairs = zip(passes, moments, strict=True)
            recorder += [seen._replace(mean=mean, variance=variance) for seen, (mean, variance) in pairs]
        return output

    def each(self, function: Callable[..., Any], *args: Any) -> Any:
        """What `function`, which keeps nothing, gives for each task: every tensor has a task axis, in and out.

        Task by task where vmap cannot run it, or where it raises: the error is then that of one task.
        """
        if not self._one_by_one:
            try:
                return self._mapped(function, *args)
            except (RuntimeError, IndexError, UnsupportedModuleError) as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
        tasks = range(len(tensors_in(args)[0]))
        outputs = [function(*_refilled(args, [tensor[task] for tensor in tensors_in(args)])) for task in tasks]
        self._one_by_one = True
        return _refilled(outputs[0], [torch.stack(parts) for parts in zip(*map(tensors_in, outputs), strict=True)])

    def _mapped(self, function: Callable[..., Any], *args: Any) -> Any:
        shells: list[Any] = []

        def run(tensors: Sequence[Tensor]) -> list[Tensor]:
            # Fused attention has no rule of its own.
            with TaskAxis(self._convolution), sdpa_kernel(SDPBackend.MATH):
                output = function(*_refilled(args, tensors))
            shells.append(output)
            return tensors_in(output)

        try:
            # Different: each task draws its own dropout mask.
            found = torch.func.vmap(run, randomness="different")(tensors_in(args))
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or not any(word in str(error) for word in _OF_VMAP):
                raise
            raise UnsupportedModuleError(cannot(f"torch.func.vmap cannot run it: {first_line(error)}")) from error
        return _refilled(shells[-1], found)

    def inner_optimizer(self, rule: UpdateRule) -> InnerOptimizer:
        """See `Engine.inner_optimizer`; every rule goes entry by entry, so the task axis is one more axis to it."""
        return OwnInnerOptimizer(rule)

    def _refuse_changes(self, before: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> None:
        for name, value in self._replaced(before):
            if any(is_batched(tensor) for tensor in held_tensors(value)):
                raise UnsupportedModuleError(
                    cannot(f"its forward keeps values of one task in '{name}', and several run at once")
                )
            self.changed.add(name)
        if self._edits.edited:
            raise UnsupportedModuleError(
                cannot(f"its forward edits the buffer '{min(self._edits.edited)}', once for all tasks, not for each")
            )

    def _replaced(self, before: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> Iterator[tuple[str, Any]]:
        for (path, module), tables in zip(self._modules, before, strict=True):
            for now, then in zip((module.__dict__, module._buffers), tables, strict=True):
                for key, value in now.items():
                    old = then.get(key, _NOTHING)
                    # A recurrent module's own cache of its weights, which is made anew after each call.
                    own = isinstance(module, nn.RNNBase) and key.startswith("_flat_weight")
                    if value is not old and not own and not (type(value) in _PLAIN and value == old):
                        yield f"{path}.{key}" if path else key, value

    def _put_back(self, before: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> None:
        for (_, module), (attributes, buffers) in zip(self._modules, before, strict=True):
            for table, values in ((module.__dict__, attributes), (module._buffers, buffers)):
                for key in table.keys() - values.keys():
                    del table[key]
                table.update(values)


def cannot(reason: str) -> str:
    """The message of an error that refuses a model."""
    return f'engine="batched" cannot carry this model: {reason}. Use engine="functional".'


def _refilled(shell: Any, tensors: Sequence[Tensor]) -> Any:
    """The same nested structure around other tensors."""
    rest = iter(tensors)
    return map_tensors(shell, lambda _: next(rest))


def first_line(error: BaseException) -> str:
    """A short account of an error."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}" if str(error) else type(error).__name__


_OF_VMAP = ("vmap", "atching rule", "functorch", "BatchedTensor")
_NOTHING = object()
_PLAIN = (int, float, bool, str, type(None), torch.Size)
