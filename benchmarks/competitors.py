"""Who takes part, behind one face: `step()` is a whole outer update, `gradients()` what the last one was made from.

A setting that cannot run here (a library that is not installed, a keyword that this metawrap does not know, a model
that an engine refuses) raises Skipped with the reason, so that it is left out by name and never in silence.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partialmethod
from typing import Any, Protocol
from unittest.mock import patch

import torch
from cases import Case, TaskTensors, initial_values, make_tasks
from peers import Higher, Jax, Learn2Learn, Skipped, TorchOpt
from plain import PlainLoop
from torch import Tensor

from metawrap import MAMLPlusPlus, TaskBatch
from metawrap.backbones import Conv4
from metawrap.engines import ENGINES
from metawrap.errors import MetaWrapError
from metawrap.tasks import Task


class Competitor(Protocol):
    """One way to do the same meta-step, on tasks of its own."""

    def step(self) -> None:
        """One outer update, its gradient included."""
        ...

    def gradients(self) -> dict[str, Tensor]:
        """The last step's meta-gradient, by the names of `initial_values`."""
        ...


class Metawrap:
    """metawrap, with these keywords of `MAMLPlusPlus`."""

    def __init__(
        self,
        case: Case,
        values: dict[str, Tensor],
        tasks: list[TaskTensors],
        first_order: bool = False,
        convolution: str | None = None,
        **options: Any,
    ) -> None:
        self.form = _convolution_form(convolution)
        known = inspect.signature(MAMLPlusPlus).parameters
        if "execution" in known:  # In 0.1, which the same benchmark also measures, these keywords were flat.
            groups: dict[str, Any] = {"execution": {n: v for n, v in options.items() if n not in known}}
            groups |= {name: value for name, value in options.items() if name in known}
        elif unknown := [name for name in options if name not in known]:
            raise Skipped(f"this metawrap has no {', '.join(f'{name}=' for name in unknown)}")
        else:
            groups = options
        like = next(iter(values.values()))
        if options.get("cuda_graphs") and not like.is_cuda:
            raise Skipped("CUDA graphs are for a GPU")
        model = Conv4(case.channels, case.side, case.ways, case.filters).to(like.device, like.dtype)
        epochs = 1_000 if first_order else 0
        # Longer than the first-order phase: a run that is nothing else is warned of.
        order = {"first_order_epochs": epochs, "epochs": epochs + 1}
        try:
            self.learner = MAMLPlusPlus(model, inner_steps=case.steps, **order, **groups)
        except TypeError as error:
            raise Skipped(f"this metawrap has no such keyword: {error}") from error
        except MetaWrapError as error:
            raise Skipped(f"this metawrap refuses it: {error}") from error
        self.parameters = dict(self.learner.model.named_parameters())
        self.parameters |= {f"lr/{name}": rate for name, rate in self.learner.learning_rates.items()}
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(values[name])
        self.batch = TaskBatch(tuple(Task(*task) for task in tasks))

    def step(self) -> None:
        """One outer update."""
        with self.form:
            self.learner.meta_step(self.batch)

    def gradients(self) -> dict[str, Tensor]:
        """The last step's meta-gradient; `meta_step` leaves it in `.grad`."""
        return {name: p.grad for name, p in self.parameters.items() if p.grad is not None}


def _convolution_form(form: str | None) -> AbstractContextManager[Any]:
    """While it is entered, the batched engine is made with this form: no keyword of the learner leads there."""
    if form is None:
        return nullcontext()
    engine: Any = ENGINES.get("batched")
    if engine is None or "convolution" not in inspect.signature(engine).parameters:
        raise Skipped("this metawrap has no batched engine with convolution=")
    return patch.object(engine, "__init__", partialmethod(engine.__init__, convolution=form))


@dataclass(frozen=True)
class Setting:
    """A competitor by name.

    family: "plain", "peer" or "metawrap". needs: modules that it imports. settles: meta-steps until it does what it
    will go on doing; all of them are checked, none of them timed. by_name: takes part only where it is asked for.
    apart: is timed in a process of its own, in its turn.
    """

    name: str
    family: str
    make: Callable[..., Competitor]
    options: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    settles: int = 1
    by_name: bool = False
    apart: bool = False

    @property
    def first_order(self) -> bool:
        """Whether it is held against the plain loop's first-order gradient."""
        return bool(self.options.get("first_order"))

    def build(self, case: Case, dtype: torch.dtype, device: str, spread: float = 0.0) -> Competitor:
        """The competitor, at the same initial values and on the same tasks as all others.

        Raises:
            Skipped: it cannot run here.
        """
        values = initial_values(case, dtype, device, spread)
        return self.make(case, values, make_tasks(case, dtype, device), **self.options)


def _metawrap(name: str, settles: int = 1, by_name: bool = False, **options: Any) -> Setting:
    return Setting(f"metawrap {name}", "metawrap", Metawrap, options, settles=settles, by_name=by_name)


REFERENCE = "plain"
SETTINGS = {
    setting.name: setting
    for setting in (
        Setting(REFERENCE, "plain", PlainLoop),
        Setting("plain one-backward", "plain", PlainLoop, {"one_backward": True}),
        Setting("plain first-order", "plain", PlainLoop, {"first_order": True}),
        Setting("higher", "peer", Higher, needs=("higher",)),
        Setting("torchopt", "peer", TorchOpt, needs=("torchopt",)),
        Setting("learn2learn", "peer", Learn2Learn, needs=("learn2learn",)),
        # With its threads in the process, torch's own were measured to take ten times as long.
        Setting("jax", "peer", Jax, needs=("jax",), apart=True),
        _metawrap("higher", engine="higher"),
        _metawrap("functional", engine="functional"),
        _metawrap("flat", engine="functional", memory="flat"),
        _metawrap("workers", engine="functional", workers="auto"),
        _metawrap("workers channels_last", engine="functional", workers="auto", channels_last=True),
        _metawrap("workers flat", engine="functional", workers="auto", memory="flat"),
        _metawrap("processes", engine="functional", workers="auto", workers_in="processes"),
        _metawrap(
            "processes channels_last",
            engine="functional",
            workers="auto",
            workers_in="processes",
            channels_last=True,
        ),
        _metawrap("tune", engine="functional", tune=True),
        _metawrap("batched", engine="batched"),
        _metawrap("batched flat", engine="batched", memory="flat"),
        _metawrap("batched grouped", engine="batched", convolution="grouped", by_name=True),
        _metawrap("batched unfolded", engine="batched", convolution="unfolded", by_name=True),
        _metawrap("batched graphs", engine="batched", cuda_graphs=True, settles=4, by_name=True),
        _metawrap("first-order", engine="functional", first_order=True),
        _metawrap("first-order workers", engine="functional", first_order=True, workers="auto"),
        _metawrap(
            "first-order processes", engine="functional", first_order=True, workers="auto", workers_in="processes"
        ),
        _metawrap("first-order tune", engine="functional", first_order=True, tune=True),
    )
}
GROWING = (REFERENCE, "metawrap functional", "metawrap flat", "metawrap workers", "metawrap workers flat")
