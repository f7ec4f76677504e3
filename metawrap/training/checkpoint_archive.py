"""Checks of a checkpoint file before and after torch reads it, so that a small file cannot cost much memory.

`torch.load(weights_only=True)` runs no code, but it trusts the sizes in a file: it makes a bytearray of any length,
unpacks a zip bomb, and in its old format allocates as many numbers as the file claims. `torch.save` writes a zip
archive of uncompressed entries and a pickle with a handful of names; everything else is refused here.

Source of the names: `torch._weights_only_unpickler`, without those that make a large object from a small one.
"""

from __future__ import annotations

import pickle
import pickletools
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metawrap.errors import CheckpointError

MAX_DEPTH = 64  # Levels of nested values; a run's checkpoint has less than 10.
MAX_PICKLE = 2**26  # Bytes; a run of 1000 epochs has less than one MiB.
_KNOWN_NAMES = {
    "collections OrderedDict", "collections Counter", "collections defaultdict", "torch Size", "torch device",
    "torch.nn.parameter Parameter", "torch.serialization _get_layout", "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter", "torch._utils _rebuild_sparse_tensor", "_codecs encode",
    "builtins set", "builtins complex", "__builtin__ set", "__builtin__ complex",
}  # fmt: skip
_DTYPES = {str(value).removeprefix("torch.") for value in vars(torch).values() if isinstance(value, torch.dtype)}
REMEDY = "Delete it to resume from the one before, or write it again with `metawrap train`."


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raises CheckpointError in place of any exception of a reader: no reader documents all that a torn file raises."""
    try:
        yield
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"'{path}' holds more than tensors and plain values, or is damaged, so it was not loaded: objects in a "
            f"file can run code. {REMEDY}"
        ) from error
    except Exception as error:
        raise CheckpointError(f"'{path}' cannot be read ({type(error).__name__}: {error}). {REMEDY}") from error


def check_archive(path: Path) -> None:
    """Checks the list of entries and the names in the pickle, without building any object. Raises CheckpointError if
    the file is no archive of torch.save, or holds code, compressed entries or false sizes.
    """
    with reading(path), zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        _check_entries(path, entries)
        pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
        if len(pickles) != 1 or pickles[0].file_size > MAX_PICKLE:
            raise CheckpointError(f"'{path}' is not what torch.save writes: expected one data.pkl. {REMEDY}")
        _check_names(path, archive.read(pickles[0]))


def check_tensors(path: Path, content: Any) -> None:
    """Checks that the file holds every number of every tensor, and that plain values are not nested too deep.

    A tensor may show one stored number a trillion times; a copy of the tensor would need memory for all of them. Raises
    CheckpointError if a tensor claims more than the file holds, or values are nested more than MAX_DEPTH deep.
    """
    seen: set[int] = set()
    level = [content]
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for value in level:
            if id(value) in seen:  # Lists that hold one list twice, level after level, would grow without end.
                continue
            seen.add(id(value))
            if isinstance(value, Tensor):
                _check_size(path, value)
            elif isinstance(value, dict):
                inner += value.values()
            elif isinstance(value, list | tuple | set):
                inner += value
        if not inner:
            return
        level = inner
    raise CheckpointError(f"'{path}' nests its values more than {MAX_DEPTH} deep, so it was not loaded. {REMEDY}")


def _check_size(path: Path, tensor: Tensor) -> None:
    parts = [tensor] if tensor.layout != torch.sparse_coo else [tensor._indices(), tensor._values()]
    for part in parts:
        if part.layout != torch.strided or part.device.type != "cpu":
            raise CheckpointError(f"'{path}' holds a {part.layout} tensor on '{part.device}'. {REMEDY}")
        claimed, held = part.numel() * part.element_size(), part.untyped_storage().nbytes()
        if claimed > held:
            raise CheckpointError(
                f"'{path}' claims a tensor of shape {tuple(part.shape)}, {claimed} bytes, where it holds {held}, so it "
                f"was not loaded. {REMEDY}"
            )


def _check_entries(path: Path, entries: list[zipfile.ZipInfo]) -> None:
    size, claimed = path.stat().st_size, sum(entry.file_size for entry in entries)
    packed = [e.filename for e in entries if e.compress_type != zipfile.ZIP_STORED or e.file_size != e.compress_size]
    if packed or claimed > size or len({entry.filename for entry in entries}) != len(entries):
        fault = (
            f"the packed entry '{packed[0][:80]}'" if packed else f"entries of {claimed} bytes in {size}, or doubled"
        )
        raise CheckpointError(f"'{path}' has {fault}, which torch.save never writes, so it was not loaded. {REMEDY}")


def _check_names(path: Path, content: bytes) -> None:
    texts: list[str] = []
    for opcode, argument, _ in pickletools.genops(content):
        name = str(argument) if opcode.name in ("GLOBAL", "INST") else None
        if opcode.name == "STACK_GLOBAL":
            name = " ".join(texts[-2:])
        elif isinstance(argument, str):
            texts = [*texts[-1:], argument]
        if name is not None and not _is_known(name):
            raise CheckpointError(
                f"'{path}' asks for '{name[:80]}', so it was not loaded: objects in a file can run code. A "
                f"checkpoint holds tensors and plain values alone. {REMEDY}"
            )


def _is_known(name: str) -> bool:
    module, _, local = name.partition(" ")
    # Such as torch.float32 and torch.FloatStorage, which torch looks up in a table of its own.
    return name in _KNOWN_NAMES or (module == "torch" and (local.endswith("Storage") or local in _DTYPES))
