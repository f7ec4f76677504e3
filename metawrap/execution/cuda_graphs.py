"""A meta-gradient recorded once and replayed: on a GPU, one launch in place of tens of thousands.

A replay reads parameters, buffers and a batch from where they lay when it was recorded, and runs the same kernels. So a
recording is good for one form of batch and one state of everything else that decides which kernels run: `form_of` names
it. The first replay is compared with the plain run.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from metawrap.checks.first_look import differ
from metawrap.errors import ArgumentError, UnsupportedModuleError
from metawrap.results import TaskOutcome
from metawrap.tasks import Task, TaskBatch, map_tensors, tensors_in

Outcome = tuple[list[TaskOutcome], list[Tensor | None]]
Run = Callable[[TaskBatch], Outcome]
# Recordings hold memory; training comes to few forms at a time: the last batch of an epoch, the weights of its steps.
_KEPT = 4
_WARM_UP = 3


class Recordings:
    """The recordings of one learner, by form; the oldest goes when there are too many."""

    def __init__(self) -> None:
        self._known: OrderedDict[Hashable, _Recording] = OrderedDict()

    def run(self, run: Run, batch: TaskBatch, form: Hashable) -> Outcome:
        """The outcome of `run(batch)`, by a replay.

        Raises:
            UnsupportedModuleError: it cannot be recorded, or its replay gives something else.
        """
        recording = self._known.get(form)
        if recording is None:
            recording = _Recording(run, batch)
            self._known[form] = recording
            if len(self._known) > _KEPT:
                self._known.popitem(last=False)
        return recording.replay(batch)


class _Recording:
    def __init__(self, run: Run, batch: TaskBatch) -> None:
        self._batch = TaskBatch(
            tuple(task.map(lambda t: t.detach().clone().requires_grad_(t.requires_grad)) for task in batch)
        )
        record = RECORDERS[tensors_in(batch[0].support_x)[0].device.type]
        _, expected = _copied(run(batch))
        try:
            self._replay, self._outcome = record(lambda: with_own_casts(run, self._batch))
        except (RuntimeError, torch.AcceleratorError) as error:
            raise UnsupportedModuleError(
                _cannot(f"{type(error).__name__}: {str(error).splitlines()[0][:200]}")
            ) from error
        if differ(self.replay(batch)[1], expected):
            raise UnsupportedModuleError(_cannot("what is replayed is not the gradient of the plain run"))

    def replay(self, batch: TaskBatch) -> Outcome:
        for here, there in zip(self._batch, batch, strict=True):
            for mine, new in zip(_tensors(here), _tensors(there), strict=True):
                with torch.no_grad():
                    mine.copy_(new)
        self._replay()
        solved, gradients = _copied(self._outcome)
        return [replace(s, task_id=task.id) for s, task in zip(solved, batch, strict=True)], gradients


def form_of(batch: TaskBatch, model: nn.Module, parameters: Sequence[Tensor], *more: Hashable) -> Hashable:
    """All that decides which kernels run and where they read, besides the values in memory.

    Args:
        more: what the caller knows besides: settings, weights of the steps.
    """
    tasks = tuple(_shape((task.support_x, task.support_y, task.target_x, task.target_y)) for task in batch)
    state = tuple(
        (path, name, _identity(value))
        for path, module in model.named_modules()
        for name, value in [*module.__dict__.items(), *module._buffers.items(), *module._parameters.items()]
        if name not in ("_parameters", "_buffers", "_modules")
    )
    trained = tuple((id(p), p.data_ptr(), p.requires_grad) for p in [*model.parameters(), *parameters])
    modes = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"), torch.backends.cuda.matmul.allow_tf32
    return tasks, state, trained, modes, torch.backends.cudnn.allow_tf32, more


def _shape(value: Any) -> Hashable:
    if isinstance(value, dict):
        return tuple((key, _shape(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return tuple(map(_shape, value))
    return (value.shape, value.dtype, value.device, value.stride()) if isinstance(value, Tensor) else repr(value)


def _tensors(task: Task) -> Iterator[Tensor]:
    for part in (task.support_x, task.support_y, task.target_x, task.target_y):
        yield from tensors_in(part)


def _identity(value: Any, depth: int = 3) -> Hashable:
    if isinstance(value, dict) and depth:
        return tuple((str(key), _identity(item, depth - 1)) for key, item in value.items())
    if isinstance(value, list | tuple | set | deque) and depth:
        return tuple(_identity(item, depth - 1) for item in value)
    if isinstance(value, Tensor):
        return id(value), value.data_ptr()
    return value if isinstance(value, int | float | str | bool | None) else id(value)


def _copied(outcome: Outcome) -> Outcome:
    """The outcome in memory of its own: the next replay writes where this one wrote."""
    solved, gradients = outcome
    return [_copy_of(each) for each in solved], [None if g is None else g.clone() for g in gradients]


def _copy_of(solved: TaskOutcome) -> TaskOutcome:
    return replace(
        solved,
        loss=solved.loss.clone(),
        step_losses=solved.step_losses.clone(),
        prediction=map_tensors(solved.prediction, Tensor.clone),
        accuracy=None if solved.accuracy is None else solved.accuracy.clone(),
        moments=[m._replace(mean=m.mean.clone(), variance=m.variance.clone()) for m in solved.moments],
        head={name: value.clone() for name, value in solved.head.items()},
    )


def with_own_casts(run: Callable[..., Any], *args: Any) -> Any:
    """A run whose autocasts are its own: a cast that it took over would be read as it was then by every replay."""
    torch.clear_autocast_cache()
    try:
        return run(*args)
    finally:
        torch.clear_autocast_cache()


def _on_cuda(run: Callable[[], Outcome]) -> tuple[Callable[[], Any], Outcome]:
    present, aside = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    aside.wait_stream(present)
    with torch.cuda.stream(aside):
        for _ in range(_WARM_UP):
            run()
    present.wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outcome = run()
    return graph.replay, outcome


RECORDERS: dict[str, Callable[[Callable[[], Outcome]], tuple[Callable[[], Any], Outcome]]] = {"cuda": _on_cuda}


def check_can_record(device: torch.device, traces: str | None) -> None:
    """Checks what is known before anything runs.

    Raises:
        ArgumentError: the learner is not on a device that records.
        UnsupportedModuleError: forward does something that a replay would not do.
    """
    if device.type not in RECORDERS:
        raise ArgumentError(
            f"cuda_graphs: expected the learner on a GPU, but it is on '{device}'. Leave it out, or move the learner "
            'first: learner.to("cuda").'
        )
    if traces:
        raise UnsupportedModuleError(_cannot(traces))


def _cannot(reason: str) -> str:
    return f"execution.cuda_graphs=True cannot carry this model: {reason}. Leave it out."
