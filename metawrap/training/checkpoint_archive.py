"""What a checkpoint file claims, looked at before torch reads it: a small file must not cost much memory.

`torch.load(weights_only=True)` runs no code, but it believes a file: it makes a bytearray of any length, unpacks a zip
bomb, and its old format makes room for as many numbers as the file says. What `torch.save` writes for a run is a zip of
entries that are stored as they are, and a pickle that names a handful of things.

Source of the names: `torch._weights_only_unpickler`, without what makes a large thing of a small one.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metawrap.errors import CheckpointError

MAX_DEPTH = 64  # levels; that of a run has less than 10
MAX_PICKLE = 2**26  # bytes; that of a run of 1000 epochs has less than one MiB
_KNOWN = {
    "collections OrderedDict",
    "collections Counter",
    "collections defaultdict",
    "torch Size",
    "torch device",
    "torch.nn.parameter Parameter",
    "torch.serialization _get_layout",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_sparse_tensor",
    "_codecs encode",
    "builtins set",
    "builtins complex",
    "__builtin__ set",
    "__builtin__ complex",
}


def check_archive(path: Path) -> None:
    """Checks what a file claims; reads its list of entries and its pickle, and makes nothing of either.

    Raises:
        CheckpointError: it is no archive of torch.save, or holds code, packed entries, or claims that it cannot keep.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            _check_entries(path, entries)
            pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
            if len(pickles) != 1 or pickles[0].file_size > MAX_PICKLE:
                raise CheckpointError(f"'{path}' is not what torch.save writes: expected one data.pkl. {_REMEDY}")
            content = archive.read(pickles[0])
    except CheckpointError:
        raise
    except Exception as error:  # zipfile documents no list of what a torn file can raise
        raise CheckpointError(f"'{path}' cannot be read ({type(error).__name__}: {error}). {_REMEDY}") from error
    _check_names(path, content)


def check_tensors(path: Path, content: Any) -> None:
    """Checks that no tensor shows more numbers than it holds, as a copy of it would need them all, and how deep it is.

    Raises:
        CheckpointError: one does, or its numbers are not in the file, or plain values are nested too deep to be read.
    """
    seen: set[int] = set()
    level = [content]
    for _ in range(MAX_DEPTH):
        within: list[Any] = []
        for value in level:
            if id(value) in seen:  # A list may hold one list twice, that another one twice, and so on.
                continue
            seen.add(id(value))
            if isinstance(value, Tensor):
                _check_held(path, value)
            elif isinstance(value, dict):
                within += value.values()
            elif isinstance(value, list | tuple | set):
                within += value
        if not within:
            return
        level = within
    raise CheckpointError(f"'{path}' nests its values more than {MAX_DEPTH} deep, so it was not loaded. {_REMEDY}")


def _check_held(path: Path, tensor: Tensor) -> None:
    parts = [tensor] if tensor.layout != torch.sparse_coo else [tensor._indices(), tensor._values()]
    for part in parts:
        if part.layout != torch.strided or part.device.type != "cpu":
            raise CheckpointError(f"'{path}' holds a {part.layout} tensor on '{part.device}'. {_REMEDY}")
        claimed, held = part.numel() * part.element_size(), part.untyped_storage().nbytes()
        if claimed > held:
            raise CheckpointError(
                f"'{path}' claims a tensor of shape {tuple(part.shape)}, {claimed} bytes, where it holds {held}, so it "
                f"was not loaded. {_REMEDY}"
            )


def _check_entries(path: Path, entries: list[zipfile.ZipInfo]) -> None:
    size = path.stat().st_size
    packed = [e.filename for e in entries if e.compress_type != zipfile.ZIP_STORED or e.file_size != e.compress_size]
    claimed = sum(entry.file_size for entry in entries)
    if packed or claimed > size or len({entry.filename for entry in entries}) != len(entries):
        what = (
            f"the packed entry '{packed[0][:80]}'" if packed else f"entries of {claimed} bytes in {size}, or one twice"
        )
        raise CheckpointError(f"'{path}' has {what}, which torch.save never writes, so it was not loaded. {_REMEDY}")


def _check_names(path: Path, content: bytes) -> None:
    texts: list[str] = []
    try:
        for opcode, argument, _ in pickletools.genops(io.BytesIO(content)):
            name = str(argument) if opcode.name in ("GLOBAL", "INST") else None
            if opcode.name == "STACK_GLOBAL":
                name = " ".join(texts[-2:])
            elif isinstance(argument, str):
                texts = [*texts[-1:], argument]
            if name is not None and not _is_known(name):
                raise CheckpointError(
                    f"'{path}' asks for '{name[:80]}', so it was not loaded: objects in a file can run code. A "
                    f"checkpoint holds tensors and plain values alone. {_REMEDY}"
                )
    except CheckpointError:
        raise
    except Exception as error:  # nor does pickletools
        raise CheckpointError(f"'{path}' has a damaged pickle ({type(error).__name__}). {_REMEDY}") from error


def _is_known(name: str) -> bool:
    module, _, local = name.partition(" ")
    # torch.float32 and torch.FloatStorage, which torch itself looks up in a list of its own.
    return name in _KNOWN or (module == "torch" and (local.endswith("Storage") or local in _DTYPES))


_DTYPES = frozenset(
    str(dtype).removeprefix("torch.") for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)
)
_REMEDY = "Delete it to resume from the one before, or write it again with `metawrap train`."
