"""Networks that return more than one tensor, or one in a container."""

from __future__ import annotations

from collections import OrderedDict, UserDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Form = Callable[["Many", Tensor, Tensor], Any]


class Many(nn.Module):
    """A head on deep features and, run after it, an auxiliary head on shallow ones. form: (self, x, deep) to output."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.body, self.deep = nn.Linear(4, 6), nn.Linear(6, 5)
        self.head, self.aux = nn.Linear(5, 3), nn.Linear(6, 3)
        self.form = form

    def forward(self, x: Tensor) -> Any:
        shallow = torch.tanh(self.body(x))
        return self.form(self, shallow, torch.tanh(self.deep(shallow)))


@dataclass
class Found:
    """A plain dataclass."""

    logits: Tensor
    features: Any = None


@dataclass
class ModelOutput(OrderedDict[str, Any]):
    """As in transformers: fields that are items too, with integers as keys of those that are not None."""

    loss: Any = None
    logits: Any = None
    hidden_states: Any = None

    def __post_init__(self) -> None:
        for part in fields(self):
            if getattr(self, part.name) is not None:
                super().__setitem__(part.name, getattr(self, part.name))

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else tuple(self.values())[key]


class Outputs(NamedTuple):
    """As torchvision's GoogLeNet and Inception return in training mode."""

    logits: Tensor
    aux: Any = None


# Outputs in which the prediction is known.
KNOWN: dict[str, Form] = {
    "tensor": lambda net, shallow, deep: net.head(deep),
    "dict": lambda net, shallow, deep: {"logits": net.head(deep)},
    "one of another name": lambda net, shallow, deep: {"out": net.head(deep), "ids": torch.zeros(len(deep)).long()},
    "list of one": lambda net, shallow, deep: [net.head(deep)],
    "dict with features": lambda net, shallow, deep: (
        {"logits": net.head(deep), "features": shallow, "sharp": True, "scale": 2.0}
    ),
    "object": lambda net, shallow, deep: SimpleNamespace(logits=net.head(deep), features=shallow),
    "mapping": lambda net, shallow, deep: UserDict(logits=net.head(deep), aux=net.aux(shallow)),
    "dict with an auxiliary head": lambda net, shallow, deep: {"logits": net.head(deep), "aux": net.aux(shallow)},
    "named tuple": lambda net, shallow, deep: Outputs(net.head(deep), net.aux(shallow) if net.training else None),
    "dataclass": lambda net, shallow, deep: Found(net.head(deep), [shallow]),
    "transformers": lambda net, shallow, deep: ModelOutput(logits=net.head(deep), hidden_states=(shallow, deep)),
}
# Outputs in which it is not, and how Python reads it there.
UNKNOWN: dict[str, tuple[Form, str]] = {
    "two heads": (lambda net, shallow, deep: (net.head(deep), net.aux(shallow)), "output[0]"),
    "prediction second": (lambda net, shallow, deep: [shallow, net.head(deep)], "output[1]"),
    "dict of heads": (
        lambda net, shallow, deep: {"a": {"b": net.head(deep)}, "c": net.aux(shallow)},
        "output['a']['b']",
    ),
}


def logits_of(output: Any) -> Tensor:
    """The prediction in any of `KNOWN`."""
    if isinstance(output, dict) and "out" in output:
        return output["out"]  # type: ignore[no-any-return]
    if isinstance(output, list):
        return output[0]  # type: ignore[no-any-return]
    return output["logits"] if isinstance(output, Mapping) else getattr(output, "logits", output)
