"""A file of weights -> its tensors, checked -> the network, wholly or not at all; and the head that fits them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metawrap.errors import ArgumentError
from metawrap.factory import in_one_line

# Where training scripts keep the weights in their files, and the prefixes that DataParallel and torch.compile add.
_INSIDE = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")


def load_file(model: nn.Module, file: str, name: str) -> str:
    """Loads a file into the network; returns what there is to say of its head.

    Raises:
        ArgumentError: the file cannot be read, or has other names or shapes; nothing is loaded then.
    """
    state, own = read_file(Path(file)), model.state_dict()
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    if missing or unexpected:
        raise mismatch(file, name, missing[:1], unexpected[:1])
    other = [key for key in own if key in state and own[key].shape != state[key].shape]
    words = ""
    if other:
        path, head = head_of(model)
        if any(key.rpartition(".")[0] != path for key in other):
            key = other[0]
            raise ArgumentError(
                f"weights: '{file}' has '{key}' with the shape {tuple(state[key].shape)}, but that of {name} has "
                f"{tuple(own[key].shape)}. Name the weights of this network."
            )
        classes = len(state[other[0]])
        put(model, path, with_outputs(head, classes))
        words = f"; its head has {classes} classes, in place of {own[other[0]].shape[0]}"
    model.load_state_dict(state, strict=False)
    return words


def mismatch(file: str, name: str, missing: list[str], unexpected: list[str]) -> ArgumentError:
    """The error for weights of another network, with the first names that differ."""
    parts = [f"'{missing[0]}' is missing"] if missing else []
    parts += [f"'{unexpected[0]}' is unexpected"] if unexpected else []
    return ArgumentError(
        f"weights: those of '{file}' are not those of {name}: {' and '.join(parts)}. Name the weights of this network."
    )


def read_file(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, on the CPU. No code of the file is run."""
    fix = "Name a .safetensors file, or what torch.save(model.state_dict(), path) wrote."
    if not path.is_file():
        raise ArgumentError(f"weights: there is no file '{path}'. Pass DEFAULT for the published weights, or a file.")
    try:
        if path.suffix == ".safetensors":
            content = package("safetensors.torch", str(path)).load_file(str(path))
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except ArgumentError:
        raise
    except Exception as error:  # No reader documents all that a torn or hostile file raises.
        raise ArgumentError(f"weights: '{path}' cannot be read: {in_one_line(error)[:300]}. {fix}") from error
    while isinstance(content, Mapping) and (inner := next((key for key in _INSIDE if key in content), None)):
        content = content[inner]
    if not isinstance(content, Mapping) or not content or not all(isinstance(t, Tensor) for t in content.values()):
        raise ArgumentError(f"weights: '{path}' holds no mapping of names to tensors. {fix}")
    state = dict(content)
    for prefix in _PREFIXES:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    return state


def head_of(model: nn.Module) -> tuple[str, nn.Linear | nn.Conv2d]:
    """The path of the head and the head: timm's classifier, else the last linear layer in the order of definition.

    A convolution of one pixel counts as a linear layer.

    Raises:
        ArgumentError: there is none.
    """
    named = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    told = getattr(model, "get_classifier", lambda: None)()
    if found := [each for each in named if each[1] is told] or named[-1:]:
        path, head = found[0]
        if isinstance(head, nn.Linear) or head.kernel_size == (1, 1):
            return path, head
    raise ArgumentError(f"ways: {type(model).__name__} has no linear layer at its end. Make the head in a factory.")


def with_outputs(head: nn.Linear | nn.Conv2d, outputs: int) -> nn.Module:
    """A new head like this one, with another number of outputs and random weights."""
    if isinstance(head, nn.Linear):
        return nn.Linear(head.in_features, outputs, bias=head.bias is not None)
    return nn.Conv2d(head.in_channels, outputs, 1, bias=head.bias is not None)


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Puts a module in the place of another."""
    parent, _, last = path.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def package(module: str, name: str) -> Any:
    """An optional package; ArgumentError if it is not installed. name: the network or file that needs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = module.partition(".")[0]
        raise ArgumentError(
            f"model: '{name}' needs {missing}, which is not installed: pip install {missing}."
        ) from error
