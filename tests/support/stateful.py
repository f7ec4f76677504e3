"""Networks that do more than compute: state, randomness and control flow that engines and workers must notice."""

from __future__ import annotations

import random
import threading
import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class Late(nn.Module):
    """A network on (examples, 4) that also does what `now` names, from the start or from when a test sets it."""

    def __init__(self, now: str = "") -> None:
        super().__init__()
        self.first, self.linear = nn.Linear(4, 6), nn.Linear(6, 3)
        self.register_buffer("average", torch.zeros(6))
        self.now, self.calls, self.history, self.kept = now, 0, [], None
        self.table, self.done = {}, []

    def bend(self, hidden: Tensor) -> Tensor:
        return getattr(self, self.now)(hidden) if self.now else hidden

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.bend(torch.tanh(self.first(x))))

    def counts(self, hidden: Tensor) -> Tensor:
        self.calls += 1
        return hidden / (1 + 0.1 * self.calls)

    def counts_in_a_table(self, hidden: Tensor) -> Tensor:
        self.table["calls"] = self.table.get("calls", 0) + 1
        return hidden

    def draws_in_python(self, hidden: Tensor) -> Tensor:
        return hidden * random.random()

    def draws_in_numpy(self, hidden: Tensor) -> Tensor:
        return hidden * np.random.rand()

    def draws_in_torch(self, hidden: Tensor) -> Tensor:
        return hidden + torch.randn_like(hidden)

    def drops(self, hidden: Tensor) -> Tensor:
        return F.dropout(hidden, 0.4)

    def draws_the_same(self, hidden: Tensor) -> Tensor:
        with torch.random.fork_rng():
            return hidden + torch.randn_like(hidden)

    def averages(self, hidden: Tensor) -> Tensor:
        self.average.mul_(0.9).add_(0.1 * hidden.detach().mean(0))
        return hidden - self.average

    def ticks(self, hidden: Tensor) -> Tensor:
        self.average += 1
        return hidden - self.average

    def edits_its_weights(self, hidden: Tensor) -> Tensor:
        with torch.no_grad():
            self.linear.weight.mul_(0.9)
        return hidden

    def edits_its_weights_unseen(self, hidden: Tensor) -> Tensor:
        self.linear.weight.data.mul_(0.9)  # torch does not count an edit of `.data`.
        return hidden

    def keeps(self, hidden: Tensor) -> Tensor:
        self.kept = hidden.detach()
        return hidden

    def lists(self, hidden: Tensor) -> Tensor:
        self.history.append(len(self.history))
        return hidden

    def appends(self, hidden: Tensor) -> Tensor:
        self.done.append(hidden.detach())
        return hidden

    def deletes(self, hidden: Tensor) -> Tensor:
        self.__dict__.pop("history", None)
        self.__dict__["again"] = object()
        return hidden

    def branches(self, hidden: Tensor) -> Tensor:
        return hidden if hidden.sum() > 0 else 2 * hidden

    def reads_numpy(self, hidden: Tensor) -> Tensor:
        return hidden * float(hidden.detach().numpy().max())

    def fails_under_vmap(self, hidden: Tensor) -> Tensor:
        if torch._C._functorch.is_batchedtensor(hidden):
            raise KeyError("only alone")
        return hidden

    def caches(self, hidden: Tensor) -> Tensor:
        if len(hidden) not in self.table:
            self.table[len(hidden)] = torch.arange(len(hidden), dtype=hidden.dtype).unsqueeze(1)
        if self.kept is None or len(self.kept) != len(hidden):
            self.kept, self.calls = self.table[len(hidden)], len(hidden)
        return hidden + 0.1 * self.kept


class OwnGenerator(Late):
    def __init__(self) -> None:
        super().__init__()
        self.rng = np.random.default_rng(0)

    def draws_from_its_own(self, hidden: Tensor) -> Tensor:
        return hidden * self.rng.random()


class Watch:
    """How many threads were in a forward pass of `Watched` at the same time."""

    most, inside, lock = 0, 0, threading.Lock()


def watched(forward: Any) -> Any:
    """A forward that `Watch` counts."""

    def run(self: nn.Module, x: Tensor) -> Tensor:
        with Watch.lock:
            Watch.inside += 1
            Watch.most = max(Watch.most, Watch.inside)
        time.sleep(0.002)
        with Watch.lock:
            Watch.inside -= 1
        found: Tensor = forward(self, x)
        return found

    return run


class Watched(Late):
    forward = watched(Late.forward)


class Noisy(Late):
    """Draws from every generator, counts its calls and averages what it saw."""

    def bend(self, hidden: Tensor) -> Tensor:
        hidden = self.drops(hidden) * (1 + random.random()) + float(np.random.rand())
        return self.counts(self.averages(hidden))


class Once(Function):
    """exp(x), which can be differentiated once: torch would leave its second derivative out in silence."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * ctx.saved_tensors[0].exp()


class EditsInput(nn.Module):
    """(examples, 2, height, width) -> logits; its forward edits its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(2, 4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x -= 0.3
        return self.linear(torch.tanh(self.conv(x * 1.5)).mean((2, 3)))


def seed_all(seed: int = 3) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def state_of_generators(model: Any) -> list[Any]:
    """The states of the global generators and of the model's own `rng`, if any."""
    state = np.random.get_state()
    own = model.rng.bit_generator.state if hasattr(model, "rng") else None
    return [random.getstate(), state[1].tolist(), state[2], own, torch.get_rng_state().tolist()]
