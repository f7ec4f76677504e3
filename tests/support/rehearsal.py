"""A CUDA device that is not there: tensors say device="cuda:0", and hold values.

The CPU runs each operation on the values, so that checks which look at values, evaluation and adaptation go on.
`FakeTensorMode` judges each operation that meets another device, and refuses it where CUDA does. Tensors of the CPU
stay ordinary ones. Where the host would wait for the device, the operation is noted.

torch's C++ code is told "meta" where Python is told "cuda:0": without a driver its autograd has no CUDA streams. So
kernels that CUDA alone has, of cuDNN for example, do not run.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch._dynamo  # It looks at functions of torch when it is first imported: before they are replaced.
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.nn.parameter import UninitializedTensorMixin, is_lazy

import metawrap

CUDA = torch.device("cuda:0")
_CPU, _META = torch.device("cpu"), torch.device("meta")
_PACKAGE = Path(metawrap.__file__).parent
# On CUDA they read a value, or make a tensor whose shape depends on values.
_READS = {"_local_scalar_dense", "equal", "_linalg_check_errors", "is_nonzero", "allclose"}
_SHAPED_BY_VALUES = {
    *("nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount", "repeat_interleave")
}
_INDEXED, _MASKS = {"index", "index_put", "index_put_", "_unsafe_index"}, (torch.bool, torch.uint8)
_OF_SHAPE = {"squeeze_", "unsqueeze_", "transpose_", "t_", "resize_", "set_", "as_strided_"}


class CudaRehearsal(FakeTensorMode):
    """Inside of it, tensors can be made with device="cuda:0".

    waits: the operations for which the host waits for the device, as "operation at file of metawrap".
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.waits: list[str] = []
        self._judging = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called for every operation."""
        if func is torch.ops.prim.device.default:
            return _META
        leaves: list[Any] = []
        args, kwargs = _mapped((args, kwargs or {}), lambda leaf: leaves.append(_named(leaf)) or leaves[-1])
        if self._judging:  # A part of the operation that is judged.
            return super().__torch_dispatch__(func, types, args, kwargs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        fakes, devices = [t for t in tensors if isinstance(t, FakeTensor)], [d for d in leaves if _is_device(d)]
        if not fakes and CUDA not in devices:
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        values, options = _mapped((args, kwargs), _on_cpu)
        given = {id(_on_cpu(fake)): fake for fake in fakes}
        masked = name in _INDEXED and any(one is not None and one.dtype in _MASKS for one in args[1])
        if name in _READS | _SHAPED_BY_VALUES or masked:
            self._note(name)
        device = CUDA
        if (devices or len(fakes) < len(tensors) or name in _OF_SHAPE) and name not in _READS | _SHAPED_BY_VALUES:
            device = self._judged(func, types, args, kwargs)
            seen = {t.device.type for t in tensors if t.ndim or name == "copy_"} | {device.type}
            if tensors and len(seen) > 1 and not kwargs.get("non_blocking"):
                self._note(name)
        return _mapped(func(*values, **options), lambda value: self._on(device, value, given))

    def _judged(self, func: Any, types: Any, args: Any, kwargs: Any) -> torch.device:
        """The device of the output, by torch's own rules; they also carry out changes of shape in place."""
        # A tensor of the CPU is looked at as a leaf.
        args, kwargs = _mapped((args, kwargs), lambda leaf: leaf.detach() if type(leaf) is Tensor else leaf)
        self._judging = True
        try:
            output = super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self._judging = False
        found: list[Tensor] = []
        _mapped(output, lambda leaf: found.append(leaf) if isinstance(leaf, Tensor) else None)
        return found[0].device if found else CUDA

    def _on(self, device: torch.device, value: Any, given: dict[int, FakeTensor]) -> Any:
        """A new tensor of the device with these values; the given one if it was changed in place."""
        if not isinstance(value, Tensor) or device != CUDA:
            return value
        if id(value) in given:
            return given[id(value)]
        if value._is_zerotensor():  # It has no memory; torch knows it by a mark that the new tensor lacks.
            value = torch.zeros(value.shape, dtype=value.dtype)
        like = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=_META)
        fake = FakeTensor(self, like, CUDA)
        fake.values_on_cpu = value
        return fake

    def _note(self, name: str) -> None:
        places = [frame for frame in traceback.extract_stack() if _PACKAGE in Path(frame.filename).parents]
        last = Path(places[-1].filename).relative_to(_PACKAGE).as_posix() if places else "no file"
        self.waits.append(f"{name} at {last}")

    def __deepcopy__(self, memo: dict[int, Any]) -> CudaRehearsal:
        return self


def _is_device(leaf: Any) -> bool:
    return isinstance(leaf, torch.device)


def _named(leaf: Any) -> Any:
    return CUDA if _is_device(leaf) and leaf.type in ("meta", "cuda") else leaf


def _on_cpu(leaf: Any) -> Any:
    if isinstance(leaf, FakeTensor):
        values: Tensor = leaf.values_on_cpu
        assert values.shape == leaf.shape, "values were left behind by `tensor.data = other`"
        return values
    return _CPU if _is_device(leaf) else leaf


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, tuple | list):
        return type(value)([_mapped(item, change) for item in value])
    if isinstance(value, dict):
        return {key: _mapped(item, change) for key, item in value.items()}
    return change(value)


_dispatch, _data, _materialize = FakeTensor.__torch_dispatch__, Tensor.data, UninitializedTensorMixin.materialize
_apply = nn.Module._apply


def _with_device_for_cpp(func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    return _META if func is torch.ops.prim.device.default else _dispatch(func, types, args, kwargs or {})


def _set_data(tensor: Any, other: Any) -> None:
    _data.__set__(tensor, other)
    tensor.values_on_cpu = other.values_on_cpu


def _applied(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Leaves lazy parameters lazy, and the same objects, as on a GPU."""
    lazy = {name: parameter for name, parameter in module._parameters.items() if is_lazy(parameter)}
    module._parameters.update(dict.fromkeys(lazy))
    try:
        return _apply(module, fn, recurse)
    finally:
        module._parameters.update(lazy)
        for parameter in lazy.values():
            parameter.data = fn(parameter.data)


def _device_of_lazy(lazy: Tensor) -> torch.device:
    return _CPU if Tensor.device.__get__(lazy).type == "cpu" else CUDA


def _materialized(lazy: Any, shape: Any, device: Any = None, dtype: Any = None) -> None:
    """Makes a lazy parameter of the device what torch makes of one of the CPU; its class is no FakeTensor before."""
    if torch.device(device or lazy.device).type == "cpu":
        return _materialize(lazy, shape, device, dtype)
    made = torch.empty(shape, device=CUDA, dtype=dtype or lazy.dtype)
    torch.utils.swap_tensors(lazy, nn.Parameter(made, lazy.requires_grad))


@contextmanager
def cuda_rehearsal() -> Iterator[CudaRehearsal]:
    """A rehearsal, with the functions of torch that need a device replaced."""
    casts = torch.is_autocast_enabled
    with (
        patch.object(nn.Module, "_apply", _applied),
        patch.object(torch.cuda, "get_rng_state", lambda device=None: torch.get_rng_state()),
        patch.object(torch.cuda, "set_rng_state", lambda state, device=None: torch.set_rng_state(state)),
        # Under vmap, Python gets the device from C++.
        patch.object(torch, "is_autocast_enabled", lambda kind="cuda": casts("cuda" if kind == "meta" else kind)),
        patch.object(torch._C, "_ensureCUDADeviceGuardSet", lambda: None),
        patch.object(FakeTensor, "__torch_dispatch__", staticmethod(_with_device_for_cpp)),
        patch.object(FakeTensor, "data", property(_data.__get__, _set_data), create=True),
        patch.object(UninitializedTensorMixin, "materialize", _materialized),
        patch.object(UninitializedTensorMixin, "device", property(_device_of_lazy), create=True),
        patch.object(FakeTensor, "is_cuda", property(lambda self: self.device.type == "cuda"), create=True),
        CudaRehearsal() as mode,
    ):
        yield mode
