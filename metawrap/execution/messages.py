"""Messages between processes: ordinary tensors travel as they lie in memory, everything else as pickle writes it."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor, nn


def send(pipe: Connection, value: Any) -> None:
    """Sends a value, for `receive` at the other end."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(value)
    pipe.send_bytes(file.getbuffer())
    pipe.send_bytes(len(pickler.tensors).to_bytes(4, "little"))
    for tensor in pickler.tensors:
        pipe.send_bytes(tensor.reshape(-1).view(torch.uint8).numpy().data)


def receive(pipe: Connection) -> Any:
    """Waits for a value. Raises EOFError where the other end is closed."""
    file = io.BytesIO(pipe.recv_bytes())
    count = int.from_bytes(pipe.recv_bytes(), "little")
    blocks = [bytearray(pipe.recv_bytes()) for _ in range(count)]
    return _Unpickler(file, blocks.__getitem__).load()


class _Pickler(pickle.Pickler):
    """Leaves ordinary tensors out, to be sent as they lie in memory."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []

    def persistent_id(self, obj: Any) -> Any:
        if type(obj) not in (Tensor, nn.Parameter) or obj.layout != torch.strided or obj.device.type != "cpu":
            return None
        self.tensors.append(obj.detach().resolve_conj().resolve_neg().contiguous())
        return len(self.tensors) - 1, obj.dtype, tuple(obj.shape)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, blocks: Callable[[int], Any]) -> None:
        super().__init__(file)
        self._blocks = blocks

    def persistent_load(self, pid: Any) -> Tensor:
        index, dtype, shape = pid
        block = self._blocks(index)
        return torch.frombuffer(block, dtype=dtype).view(shape) if block else torch.empty(shape, dtype=dtype)
