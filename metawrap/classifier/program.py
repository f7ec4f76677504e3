"""A network as a program that only needs torch (or onnxruntime); a stranger's is checked before it is loaded.

`torch.export.load` unpickles parts of a file, evaluates expressions of sizes as Python, and takes any function of torch
for an operation. So `load_program` reads the archive first, and refuses whatever `exported` does not write.
"""

from __future__ import annotations

import io
import json
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from metawrap.data.normalisation import normalised
from metawrap.data.preprocessing import Preprocessing
from metawrap.data.text_preprocessing import TextPreprocessing
from metawrap.engines import first_line
from metawrap.errors import DataError, MetaWrapError, UnsupportedModuleError
from metawrap.outputs import prediction_in

Run = Callable[[Tensor], Tensor]
Way = Preprocessing | TextPreprocessing

_MAX_EXAMPLES = 2**16  # at once
_MAX_BYTES = 4 * 2**30
_MEMBERS = re.compile(
    r"[^/]+/(models/model\.json|archive_format|archive_version|byteorder|\.data/\w+|data/weights/weight_\d+"
    r"|data/weights/model_weights_config\.json|data/constants/tensor_\d+|data/constants/model_constants_config\.json"
    r"|data/sample_inputs/model\.pt)"
)
_OPERATIONS = re.compile(
    r"torch\.ops\.aten\.(?!from_file)\w+\.\w+|_operator\.(getitem|add|sub|mul|floordiv|truediv|mod|neg|pow|[lg][te]|eq|ne)"
    r"|torch\.sym_\w+|math\.(ceil|floor|trunc)"
)
_SYMBOL = re.compile(r"Symbol\('[a-z]+\d+'(, \w+=True)*\)|\b[su]\d+\b")
_SIZE = re.compile(r"(\d+|Integer|Add|Mul|Pow|Max|Min|Mod|PythonMod|FloorDiv|CeilDiv|CleanDiv|[-+*(), ])*")
_KIND = re.compile(r"builtins\.(tuple|list|dict)")
# Names of tensors, parameters and enumerations; and the specification of the arguments, which is JSON.
_PLAIN = re.compile(r"[\w.+\- ]*")


class Deployed(nn.Module):
    """What `preprocessing.stack` gives to probabilities, (examples, classes).

    RGB pictures are uint8 of shape (photos, channels, height, width); token ids and masks int64 (texts, 2, tokens).

    Args:
        network: takes examples as `preprocessing.inputs` makes them; its output is, or holds, the logits.
        temperature: what the logits are divided by.
    """

    def __init__(self, network: nn.Module, preprocessing: Way, temperature: float = 1.0) -> None:
        super().__init__()
        self.network, self.temperature = network, temperature
        self.inputs = _Normalised(preprocessing) if isinstance(preprocessing, Preprocessing) else nn.Identity()

    def forward(self, given: Tensor) -> Tensor:
        """The probabilities."""
        logits: Any = prediction_in(self.network(self.inputs(given)))
        return torch.softmax(logits / self.temperature, 1)


class _Normalised(nn.Module):
    mean: Tensor
    deviation: Tensor

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.turned = preprocessing.order == "BGR"
        for name in ("mean", "deviation"):
            self.register_buffer(name, torch.tensor(getattr(preprocessing, name), dtype=torch.float32).view(-1, 1, 1))

    def forward(self, pictures: Tensor) -> Tensor:
        return normalised(pictures, (self.mean, self.deviation), self.turned)


def exported(network: nn.Module, examples: Tensor, max_tokens: int | None = None) -> tuple[ExportedProgram, int | None]:
    """The program of a network, and how many examples it takes at once: None for any number.

    Args:
        examples: two or more. max_tokens: of texts, which may have any number of tokens up to this one.
    Raises:
        UnsupportedModuleError: the network cannot be exported.
    """
    lengths = {} if max_tokens is None else {2: Dim("tokens", min=1, max=max_tokens)}
    several = lengths | {0: Dim("examples", min=1, max=_MAX_EXAMPLES)}
    tries = [(examples, several, None), (examples[:1], lengths, 1)]
    failed: list[Exception] = []
    for example, shapes, at_once in tries:
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                program = torch.export.export(network, (example,), dynamic_shapes=(shapes,))
        except Exception as error:  # torch raises errors of many kinds for what it cannot trace.
            failed.append(error)
            continue
        for graph in (module for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)):
            for node in graph.graph.nodes:
                # Source files and line numbers of the machine that exported.
                for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node", "custom"):
                    node.meta.pop(key, None)
        return program, at_once
    raise UnsupportedModuleError(
        f"torch.export cannot export the network ({first_line(failed[-1])}), so there is no program to deploy. Keep "
        "the adapted module, of learner.adapt, in Python; or change the line of its forward that torch.export names."
    ) from failed[-1]


def save_program(program: ExportedProgram, path: Path) -> None:
    """Writes a program, in the form that `load_program` takes."""
    torch.export.save(program, path)


def load_program(path: Path) -> Run:
    """A program of `save_program`.

    Raises:
        DataError: there is no such file, or it holds what a program of `save_program` does not.
    """
    try:
        content = path.read_bytes()
        _check(content, path)
        module: Run = torch.export.load(io.BytesIO(content)).module()
    except DataError:
        raise
    except Exception as error:  # The readers of zip, JSON and torch raise errors of many kinds for broken files.
        raise DataError(f"'{path}' is no readable program: {first_line(error)}. Get a fresh copy of it.") from error
    return module


def save_onnx(program: ExportedProgram, path: Path, name: str = "pictures") -> None:
    """Writes a program as ONNX, with an input of this name and the output "probabilities".

    Raises:
        MetaWrapError: onnx or onnxscript is not installed. UnsupportedModuleError: an operation has no ONNX form.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MetaWrapError('ONNX needs onnx and onnxscript: pip install "metawrap[onnx]".') from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made: Any = torch.onnx.export(
                program, input_names=[name], output_names=["probabilities"], dynamo=True, verbose=False
            )
            made.save(path, external_data=False)
    except Exception as error:  # Of many kinds, by the operation that has no form.
        raise UnsupportedModuleError(
            f"The network cannot be written as ONNX: {first_line(error)}. Deploy the program of torch.export."
        ) from error


def load_onnx(path: Path) -> Run:
    """A program of `save_onnx`, run by onnxruntime on the CPU.

    Raises:
        MetaWrapError: onnxruntime is not installed. DataError: the file is no program that it reads.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MetaWrapError('ONNX programs need onnxruntime: pip install "metawrap[onnx]".') from error
    try:
        # From memory: a model may name other files to read its numbers from.
        session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    except Exception as error:
        raise DataError(
            f"'{path}' is no readable ONNX program: {first_line(error)}. Get a fresh copy of it."
        ) from error

    def run(given: Tensor) -> Tensor:
        [found] = session.run(None, {session.get_inputs()[0].name: given.numpy()})
        return torch.from_numpy(found)

    return run


def in_batches(run: Run, preprocessing: Way, prepared: Sequence[Any], at_once: int) -> Tensor:
    """Probabilities (examples, classes) of what `preprocessing.prepare` gave."""
    parts = [prepared[start : start + at_once] for start in range(0, len(prepared), at_once)]
    with torch.inference_mode():
        return torch.cat([run(preprocessing.stack(part)) for part in parts])


def _check(content: bytes, path: Path) -> None:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = archive.infolist()
        if sum(member.file_size for member in members) > _MAX_BYTES or len({m.filename for m in members}) < len(
            members
        ):
            raise _refused(path, "more than it could use")
        for member in members:
            if not _MEMBERS.fullmatch(member.filename):
                raise _refused(path, f"the member {member.filename[:80]!r}")
        root = members[0].filename.partition("/")[0]
        for part in ("weights/model_weights_config", "constants/model_constants_config"):
            config = json.loads(archive.read(f"{root}/data/{part}.json"))
            if any(each["use_pickle"] for each in config["config"].values()):
                raise _refused(path, "a pickled tensor")
        # torch.export.load would unpickle it without limits where this fails.
        torch.load(io.BytesIO(archive.read(f"{root}/data/sample_inputs/model.pt")), weights_only=True)
        model = json.loads(archive.read(f"{root}/models/model.json"))
    for key, text in _texts(model):
        if not _is_known(key, text):
            raise _refused(path, f"{key}: {text[:80]!r}")


def _is_known(key: str, text: str) -> bool:
    if key == "target":
        return _OPERATIONS.fullmatch(text) is not None
    if key == "expr_str":
        return _SIZE.fullmatch(_SYMBOL.sub("", text)) is not None
    if key in ("in_spec", "out_spec"):
        return all(
            _KIND.fullmatch(inner) is not None if name == "type" else _PLAIN.fullmatch(inner.strip("[]")) is not None
            for name, inner in _texts(json.loads(text))
        )
    return _PLAIN.fullmatch(text) is not None


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text among plain values, names of a dict too, with the name that it stands under."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield "name", name
            yield from _texts(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner, key)


def _refused(path: Path, what: str) -> DataError:
    return DataError(
        f"'{path}' holds {what}, which no program of metawrap has: it is not loaded, because it could run code of its "
        "own. Use a classifier from a source that you trust."
    )
