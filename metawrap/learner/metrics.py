"""Metrics of `evaluate`: functions, and objects with a state, as those of torchmetrics."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn

from metawrap.errors import ArgumentError
from metawrap.outputs import prediction_in, refuse_unread, takes_tensors
from metawrap.tasks import describe_value


@runtime_checkable
class GatheringMetric(Protocol):
    """A metric with a state, as those of torchmetrics."""

    def update(self, prediction: Any, y: Any, /) -> Any:
        """Takes examples in."""

    def compute(self) -> Any:
        """The value over all examples since `reset`."""

    def reset(self) -> Any:
        """Forgets all examples."""


OneMetric: TypeAlias = Callable[[Any, Any], Any] | GatheringMetric
Metric: TypeAlias = OneMetric | Mapping[str, OneMetric]


class Metrics:
    """The metrics of one evaluation, by name. Of a metric with a state, a copy is used, for each task afresh.

    Args:
        metric: one metric, or several by name.
        device: where metrics with a state of their own go.
    Raises:
        ArgumentError: there is none, or something is no metric.
    """

    def __init__(self, metric: Metric, device: torch.device) -> None:
        self._several = isinstance(metric, Mapping)
        table = dict(metric) if isinstance(metric, Mapping) else {_name_of(metric): metric}
        for name, each in table.items():
            known = not isinstance(each, type) and (callable(each) or isinstance(each, GatheringMetric))
            if not isinstance(name, str) or not known:
                raise ArgumentError(
                    "metric: expected a function metric(prediction, target_y) to a number, an object with update, "
                    f"compute and reset, a dict of them by name, or None, but got {name!r}: {describe_value(each)}."
                )
        if not table:
            raise ArgumentError("metric: expected at least one metric by name, but got an empty dict. Leave it out.")
        for name, each in table.items():
            if isinstance(each, GatheringMetric):
                own = copy.deepcopy(each)
                table[name] = own.to(device) if isinstance(own, nn.Module) else own
        self._table = table

    def of(self, prediction: Any, y: Any) -> dict[str, Tensor]:
        """The value of each metric for one task; a metric of several numbers gives several.

        A function of the user's own gets the network's whole output, any other metric the prediction in it.

        Raises:
            ArgumentError: a value is no number, or a metric cannot read the output.
        """
        found: dict[str, Tensor] = {}
        for name, metric in self._table.items():
            try:
                value = _value(metric, prediction, y)
            except (AttributeError, TypeError, LookupError) as error:
                refuse_unread("metric", prediction, error)
                raise
            parts = value if isinstance(value, Mapping) else {"": value}
            for part, number in parts.items():
                label = name if part == "" else f"{name}.{part}" if self._several else str(part)
                if not isinstance(number, Real) and not (isinstance(number, Tensor) and number.numel() == 1):
                    raise ArgumentError(
                        f"metric: expected one number per task from {label}, but got {describe_value(number)}."
                    )
                found[label] = torch.tensor(float(number), dtype=torch.float64)
        return found


def _name_of(metric: Any) -> str:
    function = getattr(metric, "func", metric)  # of a partial
    return str(getattr(function, "__name__", type(function).__name__))


def _value(metric: Any, prediction: Any, y: Any) -> Any:
    gathers = isinstance(metric, GatheringMetric)
    if (gathers or takes_tensors(metric)) and (found := prediction_in(prediction)) is not None:
        prediction = found
    if not gathers:
        return metric(prediction, y)
    metric.reset()
    # A call gives the value of these examples alone; compute() of torchmetrics would wait for other processes.
    if callable(metric):
        value = metric(prediction, y)
    else:
        metric.update(prediction, y)
        value = metric.compute()
    metric.reset()
    return value
