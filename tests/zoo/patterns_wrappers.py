"""Wrappers around modules, and what torch made of them: compiled, scripted, quantised, lazy."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from entry import Entry
from models import NormedMlp
from pieces import VECTORS, Around, Body, Delegates
from torch import nn


# --- wrappers --------------------------------------------------------------------------------------------------------
def distributed() -> nn.Module:
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return nn.parallel.DistributedDataParallel(NormedMlp().double())


def headed(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(make(), nn.Linear(3, 3))


WRAPPERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    name + place: (around(make), around(NormedMlp))
    for place, around in (("", lambda make: make), (", child", headed))
    for name, make in {
        "DataParallel": lambda: nn.DataParallel(NormedMlp()),
        "DistributedDataParallel": distributed,
        "torch.compile": lambda: torch.compile(NormedMlp()),
    }.items()
}


def compiled_in_place() -> nn.Module:
    model = NormedMlp()
    model.compile()
    return model


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)))


def traced() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(nn.Linear(6, 6), torch.zeros(2, 6))


def quantised() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(Around(nn.Linear(6, 6)), {nn.Linear})


def traced_graph() -> nn.Module:
    return torch.fx.symbolic_trace(Body())


_entry = partial(Entry, family="wrappers", tasks=VECTORS, quick=True)

PATTERNS = [
    *(_entry(name, make=make, plain=plain) for name, (make, plain) in WRAPPERS.items()),
    _entry(
        "torch.compile, under a wrapper that delegates",
        make=lambda: Delegates(torch.compile(NormedMlp())),
        plain=lambda: Delegates(NormedMlp()),
    ),
    _entry("torch.compile, in place", make=compiled_in_place, plain=NormedMlp),
    _entry("torch.fx graph", make=traced_graph),
    _entry("TorchScript", make=scripted, refused=r"'the model itself'.*TorchScript.*Wrap the Python module"),
    _entry(
        "TorchScript child",
        make=lambda: nn.Sequential(nn.Linear(4, 6), traced(), nn.Linear(6, 3)),
        refused=r"'1' \(.*TorchScript.*Wrap the Python module",
    ),
    _entry(
        "lazy module, not initialised",
        make=lambda: Around(nn.LazyLinear(6)),
        refused=r"'layer' \(LazyLinear\).*Run the model once",
    ),
    _entry("quantised", make=quantised, refused=r"quanti"),
]
