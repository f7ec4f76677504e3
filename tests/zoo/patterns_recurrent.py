"""Recurrent networks, whole and cell by cell."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from entry import Entry
from keywords import grouped
from pieces import SEQUENCES
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


class Recurrent(nn.Module):
    def __init__(self, kind: Callable[..., nn.Module], outputs: int = 4, **options: Any) -> None:
        super().__init__()
        self.cell = kind(3, 4, batch_first=True, **grouped(**options))
        self.last = nn.Linear(outputs, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.cell(x)[0][:, -1])


class Packed(Recurrent):
    def forward(self, x: Tensor) -> Tensor:
        lengths = torch.tensor([1 + index % 5 for index in range(len(x))])
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.last(pad_packed_sequence(self.cell(packed)[0], batch_first=True)[0].sum(1))


class CellLoop(nn.Module):
    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.cell = kind(3, 4)
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.last(state[0] if isinstance(state, tuple) else state)


class LearnedState(Recurrent):
    """The initial state is a parameter, and the last state, not the output, is read."""

    def __init__(self) -> None:
        super().__init__(nn.GRU)
        self.start = nn.Parameter(torch.randn(1, 1, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.cell(x, self.start.expand(-1, len(x), -1).contiguous())[1][0])


class KeepsState(Recurrent):
    """Carries its state from call to call in an attribute, detached, as language models do."""

    def __init__(self) -> None:
        super().__init__(nn.LSTM)
        self.state: Any = None

    def forward(self, x: Tensor) -> Tensor:
        output, state = self.cell(x, None if self.state is None or self.state[0].shape[1] != len(x) else self.state)
        self.state = tuple(part.detach() for part in state)
        return self.last(output[:, -1])


class Flattened(Recurrent):
    def forward(self, x: Tensor) -> Tensor:
        self.cell.flatten_parameters()
        return super().forward(x)


_entry = partial(Entry, family="recurrent", tasks=SEQUENCES, inner_lr=0.3, quick=True)

PATTERNS = [
    *(
        _entry(kind.__name__ + name, make=partial(Recurrent, kind, **options))
        for kind in (nn.LSTM, nn.GRU, nn.RNN)
        for name, options in {
            "": {},
            ", bidirectional": {"bidirectional": True, "outputs": 8},
            ", 2 layers with dropout": {"num_layers": 2, "dropout": 0.4},
            ", without bias": {"bias": False},
        }.items()
    ),
    _entry("RNN, relu", make=partial(Recurrent, nn.RNN, nonlinearity="relu")),
    _entry("LSTM, projections", make=partial(Recurrent, nn.LSTM, outputs=2, proj_size=2)),
    _entry("LSTM, packed", make=partial(Packed, nn.LSTM)),
    _entry("GRU, packed, bidirectional", make=partial(Packed, nn.GRU, bidirectional=True, outputs=8)),
    *(
        _entry(f"{kind.__name__} in a loop", make=partial(CellLoop, kind))
        for kind in (nn.LSTMCell, nn.GRUCell, nn.RNNCell)
    ),
    _entry("GRU, learned initial state", make=LearnedState),
    _entry("LSTM, keeps its state between calls", make=KeepsState, adapted_alone=False),
    _entry("LSTM, flatten_parameters in forward", make=partial(Flattened, nn.LSTM)),
]
