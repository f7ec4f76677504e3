"""Where numbers stop being finite: which task, inner step and layer, and with anomaly detection which operation.

Nothing here runs while training goes well. A step that was skipped left the weights as they were, so that its tasks can
be solved again, this time with a look at every layer.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from metawrap.checks.task_batches import PARTS, is_finite
from metawrap.engines.calling import autograd
from metawrap.errors import DivergedError, MetaWrapError
from metawrap.inner_loop.inner_loop import Point
from metawrap.inner_loop.task_solver import TaskSolver
from metawrap.results import Trouble
from metawrap.snapshot.module_state import unchanged
from metawrap.tasks import Task, TaskBatch, copy_of, device_of, tensors_in, usable

_PACKAGES = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]), "<")
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in \S+\n\s*(.*)')


def find_trouble(learner: Any, batch: TaskBatch) -> list[Trouble]:
    """The tasks that come out not finite, each with the first place where that shows; changes nothing.

    A model that draws random numbers may do well the second time: then its task is not among them.
    """
    found = []
    parameters = {name: p for name, p in learner.named_parameters() if p.requires_grad}
    for index, task in enumerate(batch):
        with autograd(True):
            learner._prepare(usable(task))
        with autograd(True), unchanged(learner.model, device_of(learner)):
            step, place = _first_place(learner, usable(task.map(copy_of)), parameters)
        if place is not None:
            found.append(Trouble(index, task.classes, step, place))
    return found


def _first_place(learner: Any, task: Task, parameters: dict[str, nn.Parameter]) -> tuple[int | None, str | None]:
    for name, part in zip(PARTS, task.parts(), strict=True):
        if not all(map(is_finite, tensors_in(part))):
            return None, f"{name} holds values"
    solver = learner._solver()
    if isinstance(solver, TaskSolver):
        step, place = _in_inner_loop(solver, learner, task)
        if place is not None:
            return step, place
    with _watched(learner.model) as seen:
        loss = solver.solve(task, training=True, norm=learner.settings.norm, whole_graph=False).loss
    if seen:
        return None, f"on the target set, the output of {seen[0]}"
    if not is_finite(loss):
        return None, "the target loss"
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    bad = [name for name, g in zip(parameters, gradients, strict=True) if g is not None and not is_finite(g)]
    return None, f"the meta-gradient of {_listed(bad)}" if bad else None


def _in_inner_loop(solver: TaskSolver, learner: Any, task: Task) -> tuple[int | None, str | None]:
    with autograd(False), _watched(learner.model) as seen:
        loop = solver.loop(task, training=True, norm=learner.settings.norm)
        start = Point(solver.initial_weights(loop), {})
        examples = solver.inner_tasks(loop, learner.settings.inner_steps, training=True)
        for step, point in enumerate(loop.inner_steps(start, examples)):
            if seen:
                return step, f"the output of {seen[0]}"
            if bad := [name for name, weight in point.fast.items() if not is_finite(weight)]:
                return step, f"the update of {_listed(bad)}"
    return None, None


def _listed(names: Sequence[str]) -> str:
    return f"'{names[0]}'" + (f" and {len(names) - 1} more" if len(names) > 1 else "")


@contextmanager
def _watched(model: nn.Module) -> Iterator[list[str]]:
    """Lists the innermost modules whose output is not finite, in the order in which they run."""
    seen: list[str] = []

    def watch(name: str, kind: str) -> Callable[..., None]:
        def look(module: nn.Module, _: Any, output: Any) -> None:
            if not all(map(is_finite, tensors_in(output))):
                seen.append(f"'{name}' ({kind})" if name else "the model")

        return look

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            hooks.enter_context(module.register_forward_hook(watch(name, type(module).__name__)))
        yield seen


def trouble_in_words(learner: Any, batch: TaskBatch) -> str:
    """A sentence about the first of the tasks that come out not finite; nothing where none does."""
    try:
        found = find_trouble(learner, batch)
    except (MetaWrapError, RuntimeError):  # What is being explained comes first.
        return ""
    return f" In the last one, {found[0]}." if found else ""


@contextmanager
def naming_operations(learner: Any, batch: TaskBatch) -> Iterator[None]:
    """torch's anomaly detection for a while.

    Raises:
        DivergedError: an operation's backward gave NaN; names it, the line that called it, the task and the layer.
    """
    # Before anomaly detection: a probe of the first task may fail, which means something else there.
    learner._prepare(usable(batch[0]))
    failure: RuntimeError | None = None
    with warnings.catch_warnings(record=True) as heard, torch.autograd.set_detect_anomaly(True):
        warnings.simplefilter("always")
        try:
            yield
        except RuntimeError as error:
            failure = error
    told = [str(each.message) for each in heard]
    for each, text in zip(heard, told, strict=True):
        if "Error detected in" not in text and "calculation was induced by" not in text:
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
    if failure is None:
        return
    operation = re.search(r"Function '(\w+)' returned nan", str(failure))
    if operation is None:
        raise failure
    raise DivergedError(
        f"The backward of the operation '{operation[1]}'{_called_at(told)} gave NaN.{trouble_in_words(learner, batch)} "
        "Nothing was changed. Keep its input away from where its derivative has no value, or lower inner_lr."
    ) from failure


def _called_at(told: Sequence[str]) -> str:
    frames = [frame for text in told if "Error detected in" in text for frame in _FRAME.findall(text)]
    own = [frame for frame in frames if not frame[0].startswith(_PACKAGES)]
    if not own:
        return ""
    file, line, code = own[-1]
    return f" ({file}, line {line}: {code.strip()})"
