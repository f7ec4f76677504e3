"""All contenders by name. `step()` is one outer update; `gradients()` is the meta-gradient of the last one.

A contender that cannot run here raises Skipped with the reason: a library is not installed, this metawrap does not know
a keyword, or an engine refuses the model. The reason is part of the records.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, distributed

from metawrap import MAMLPlusPlus, TaskBatch
from metawrap.backbones import Conv4
from metawrap.errors import MetaWrapError
from metawrap.tasks import Task
from rivals.cases import Case, TaskTensors, initial_values, make_tasks
from rivals.libraries import Higher, Iteryne, Jax, Learn2Learn, ParallelMetalearn, Skipped, TorchOpt
from rivals.plain import PlainLoop

_UNTUNED = {"tune": False}


class Contender(Protocol):
    """One way to do the meta-step, with tasks of its own."""

    def step(self) -> None:
        """One outer update, its gradient included."""
        ...

    def gradients(self) -> dict[str, Tensor]:
        """The last step's meta-gradient, by the names of `initial_values`."""
        ...


def recorder_for(like: Tensor) -> Callable[[Callable[[], Any]], tuple[Callable[[], Any], Any]]:
    """metawrap's recorder of CUDA graphs; raises Skipped where the tensor's device has none."""
    from metawrap.execution.cuda_graphs import RECORDERS, with_own_casts  # Older versions of metawrap have none.

    if like.device.type not in RECORDERS:
        raise Skipped("CUDA graphs are for a GPU")
    return lambda run: RECORDERS[like.device.type](lambda: with_own_casts(run))


class PlainGraphs(PlainLoop):
    """The plain loop, whose meta-gradient is recorded at the first step, and replayed from then on."""

    def __init__(self, case: Case, values: dict[str, Tensor], tasks: list[TaskTensors]) -> None:
        super().__init__(case, values, tasks)
        self.record, self.replay = recorder_for(next(iter(values.values()))), None

    def step(self) -> None:
        """One outer update."""
        if self.replay is None:
            self.replay, self.recorded = self.record(self._gradients)
        self.replay()
        for value, gradient in zip(self.values.values(), self.recorded, strict=True):
            value.grad = gradient
        self.optimizer.step()

    def _gradients(self) -> list[Tensor]:
        learned = list(self.values.values())
        found = [torch.autograd.grad(self.task_loss(*task) / len(self.tasks), learned) for task in self.tasks]
        return [torch.stack(each).sum(0) for each in zip(*found, strict=True)]


class Metawrap:
    """metawrap, with these keywords of `MAMLPlusPlus`, under the batch statistics of the plain loop.

    In a group of processes it takes this process's share of the tasks.
    """

    def __init__(
        self, case: Case, values: dict[str, Tensor], tasks: list[TaskTensors], first_order: bool = False, **options: Any
    ) -> None:
        known = inspect.signature(MAMLPlusPlus).parameters
        if "execution" not in known:  # metawrap 0.1 takes the fields of this group as keywords.
            options |= options.pop("execution", {})
        if unknown := [name for name in options if name not in known]:
            raise Skipped(f"this metawrap has no {', '.join(f'{name}=' for name in unknown)}")
        if len(tasks) < case.ranks:
            raise Skipped(f"{case.ranks} ranks need a task each, and there are {len(tasks)}")
        like = next(iter(values.values()))
        if options.get("execution", options).get("cuda_graphs"):
            recorder_for(like)
        model = Conv4(case.channels, case.side, case.ways, case.filters).to(like.device, like.dtype)
        epochs = 1_000 if first_order else 0
        # One epoch more than the first-order phase: a run without a second-order epoch gives a warning.
        order = {"first_order_epochs": epochs, "epochs": epochs + 1}
        try:
            self.learner = MAMLPlusPlus(model, inner_steps=case.steps, norm="batch", **order, **options)
        except MetaWrapError as error:
            raise Skipped(f"this metawrap refuses it: {error}") from error
        self.parameters = dict(self.learner.model.named_parameters())
        self.parameters |= {f"lr/{name}": rate for name, rate in self.learner.learning_rates.items()}
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(values[name])
        if case.ranks > 1:
            tasks = tasks[distributed.get_rank() :: case.ranks]
        self.batch = TaskBatch(tuple(Task(*task) for task in tasks))

    def step(self) -> None:
        """One outer update."""
        self.learner.meta_step(self.batch)

    def gradients(self) -> dict[str, Tensor]:
        """The last step's meta-gradient; `meta_step` leaves it in `.grad`."""
        return {name: p.grad for name, p in self.parameters.items() if p.grad is not None}


@dataclass(frozen=True)
class Setting:
    """A contender by name.

    family: "plain", "peer" or "metawrap". needs: modules that it imports. settles: meta-steps until each further one
    does the same work; their gradients are checked, and their times are not taken. by_name: takes part only if it is
    named. apart: is timed, in its turn, in a process of its own. checkout: the folder of another version of metawrap.
    """

    name: str
    family: str
    make: Callable[..., Contender]
    options: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    settles: int = 1
    by_name: bool = False
    apart: bool = False
    checkout: str | None = None

    @property
    def first_order(self) -> bool:
        """Whether the plain loop's first-order gradient is the right one."""
        return bool(self.options.get("first_order"))

    @property
    def in_every_version(self) -> bool:
        """Whether every version of metawrap has this setting: the defaults, or no other keywords than these two."""
        plain = self.options.get("execution", _UNTUNED) == _UNTUNED and set(self.options) <= {"engine", "execution"}
        return self.family == "metawrap" and not self.by_name and plain

    def ranks(self, case: Case) -> int:
        """How many processes its meta-step needs."""
        return case.ranks if self.family == "metawrap" else 1

    def build(self, case: Case, dtype: torch.dtype, device: str, spread: float = 0.0) -> Contender:
        """The contender, with the same initial values and tasks as all others.

        Raises:
            Skipped: it cannot run here.
        """
        values = initial_values(case, dtype, device, spread)
        return self.make(case, values, make_tasks(case, dtype, device), **self.options)


def setting_of(name: str) -> Setting:
    """A setting by its name; "metawrap functional at FOLDER" is that setting with the metawrap of another checkout."""
    usual, _, checkout = name.partition(" at ")
    setting = SETTINGS[usual]
    return replace(setting, name=name, apart=True, checkout=checkout) if checkout else setting


def _metawrap(
    name: str,
    first_order: bool = False,
    settles: int = 1,
    by_name: bool = False,
    engine: str = "functional",
    **how: Any,
) -> Setting:
    if engine == "functional" and not how.keys() & {"workers", "channels_last", "tune"}:
        how |= _UNTUNED  # A setting does what its name says.
    options: dict[str, Any] = {"engine": engine}
    options |= {"execution": how} if how else {}
    options |= {"first_order": True} if first_order else {}
    return Setting(f"metawrap {name}", "metawrap", Metawrap, options, settles=settles, by_name=by_name)


_PROCESSES = {"workers": "auto", "workers_in": "processes"}
REFERENCE = "plain"
SETTINGS = {
    setting.name: setting
    for setting in (
        Setting(REFERENCE, "plain", PlainLoop),
        Setting("plain one-backward", "plain", PlainLoop, {"one_backward": True}),
        Setting("plain first-order", "plain", PlainLoop, {"first_order": True}),
        Setting("plain graphs", "plain", PlainGraphs, settles=4, by_name=True),
        Setting("higher", "peer", Higher, needs=("higher",)),
        Setting("torchopt", "peer", TorchOpt, needs=("torchopt",)),
        Setting("learn2learn", "peer", Learn2Learn, needs=("learn2learn",)),
        Setting("iteryne", "peer", Iteryne, needs=("iteryne",)),
        Setting("parallel-metalearn", "peer", ParallelMetalearn, needs=("metalearn.algorithms",)),
        # In one process with JAX's threads, torch's own took ten times as long.
        Setting("jax", "peer", Jax, needs=("jax",), apart=True),
        Setting("metawrap default", "metawrap", Metawrap, settles=4),
        _metawrap("higher", engine="higher"),
        _metawrap("functional"),
        _metawrap("functional graphs", cuda_graphs=True, settles=4, by_name=True),
        _metawrap("flat", memory="flat"),
        _metawrap("workers", workers="auto"),
        _metawrap("workers channels_last", workers="auto", channels_last=True),
        _metawrap("workers flat", workers="auto", memory="flat"),
        _metawrap("processes", **_PROCESSES),
        _metawrap("processes channels_last", **_PROCESSES, channels_last=True),
        _metawrap("tune", tune=True),
        _metawrap("batched", engine="batched"),
        _metawrap("batched flat", engine="batched", memory="flat"),
        _metawrap("batched graphs", engine="batched", cuda_graphs=True, settles=4, by_name=True),
        _metawrap("first-order", first_order=True),
        _metawrap("first-order workers", first_order=True, workers="auto"),
        _metawrap("first-order processes", first_order=True, **_PROCESSES),
        _metawrap("first-order tune", first_order=True, tune=True),
    )
}
GROWING = (
    REFERENCE,
    "metawrap default",
    "metawrap functional",
    "metawrap flat",
    "metawrap workers",
    "metawrap workers flat",
)
