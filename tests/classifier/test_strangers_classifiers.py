"""A stranger's classifier runs no code: a program with more than metawrap writes is refused before torch reads it."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import photos as made
import pytest
import torch

from metawrap import DataError
from metawrap.classifier import Classifier
from metawrap.classifier.program import load_program

Members = dict[str, bytes]


class Touch:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> Members:
    folder = tmp_path_factory.mktemp("stranger")
    Classifier.of(made.network(), ("a", "b", "c"), made.WAY).save(folder / "clf")
    with zipfile.ZipFile(folder / "clf" / "network.pt2") as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _written(members: Members, path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def _name(members: Members, end: str) -> str:
    [name] = [each for each in members if each.endswith(end)]
    return name


def _edit(end: str, change: Callable[[Any], Any]) -> Callable[[Members, Path], None]:
    def edit(members: Members, mark: Path) -> None:
        name = _name(members, end)
        content = json.loads(members[name])
        change(content)
        members[name] = json.dumps(content).replace("MARK", str(mark)).encode()

    return edit


def _pickled(name: str) -> Callable[[Members, Path], None]:
    def edit(members: Members, mark: Path) -> None:
        root = next(iter(members)).partition("/")[0]
        members[f"{root}/{name}"] = pickle.dumps(Touch(mark))

    return edit


def _pickled_inputs(members: Members, mark: Path) -> None:
    buffer = io.BytesIO()
    torch.save(((Touch(mark),), {}), buffer)
    members[_name(members, "sample_inputs/model.pt")] = buffer.getvalue()


def _pickled_weight(members: Members, mark: Path) -> None:
    name = _name(members, "model_weights_config.json")
    config = json.loads(members[name])
    first = next(iter(config["config"].values()))
    first["use_pickle"] = True
    members[name] = json.dumps(config).encode()
    buffer = io.BytesIO()
    torch.save(Touch(mark), buffer)
    members[_name(members, f"/{first['path_name']}")] = buffer.getvalue()


def _opaque_constant(members: Members, mark: Path) -> None:
    name = _name(members, "model_constants_config.json")
    entry = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
    members[name] = json.dumps({"config": {"evil": entry}}).encode()
    members[f"{name.partition('/')[0]}/data/constants/opaque_obj_0"] = pickle.dumps(Touch(mark))


def _nodes(model: Any) -> Any:
    return model["graph_module"]["graph"]["nodes"]


SIZE = "Symbol('s7', positive=True, integer=True)"
CODE = "__import__('pathlib').Path('MARK').touch()"


def _size(text: str) -> Callable[[Members, Path], None]:
    def change(model: Any) -> None:
        values = model["graph_module"]["graph"].setdefault("sym_int_values", {})
        values["evil"] = {"as_expr": {"expr_str": text, "hint": {"as_int": 2}}}

    return _edit("model.json", change)


HOSTILE: dict[str, Callable[[Members, Path], None]] = {
    "pickled example inputs": _pickled_inputs,
    "a pickled weight": _pickled_weight,
    "an opaque constant": _opaque_constant,
    "a library": _pickled("data/aotinductor/model/evil.so"),
    "a file of the first format": _pickled("data/weights/model.pt"),
    "a member outside of the archive": _pickled("../../evil.pkl"),
    "code for a size": _size(CODE),
    "a function of Python for a size": _size("eval(chr(49))"),
    "code behind a size": _size(f"{SIZE} + {CODE}"),
    "a guard": _edit("model.json", lambda model: model.update(guards_code=[CODE])),
    "a function of torch": _edit("model.json", lambda model: _nodes(model)[0].update(target="torch.hub.load")),
    "an operation that opens files": _edit(
        "model.json", lambda model: _nodes(model)[0].update(target="torch.ops.aten.from_file.default")
    ),
    "a function of the package": _edit(
        "model.json", lambda model: _nodes(model)[0].update(target="torch.ops.aten.add.__class__")
    ),
    "another library of operations": _edit(
        "model.json", lambda model: _nodes(model)[0].update(target="torch.ops.higher_order.cond")
    ),
    "metadata with code": _edit("model.json", lambda model: _nodes(model)[0]["metadata"].update(stack_trace=CODE)),
    "another kind of arguments": _edit(
        "model.json",
        lambda model: model["graph_module"]["module_call_graph"][0]["signature"].update(
            in_spec='[1, {"type": "os.system", "context": "null", "children_spec": []}]'
        ),
    ),
}


def test_a_program_of_ones_own_is_loaded(members: Members, tmp_path: Path) -> None:
    run = load_program(_written(members, tmp_path / "network.pt2"))
    assert run(torch.zeros(1, 3, made.SIZE, made.SIZE, dtype=torch.uint8)).shape == (1, 3)


@pytest.mark.parametrize("hostile", HOSTILE)
def test_what_metawrap_does_not_write_is_refused(hostile: str, members: Members, tmp_path: Path) -> None:
    mark, changed = tmp_path / "ran", dict(members)
    HOSTILE[hostile](changed, mark)
    assert changed != members
    with pytest.raises(DataError, match=r"network\.pt2"):
        load_program(_written(changed, tmp_path / "network.pt2"))
    assert not mark.exists()


@pytest.mark.parametrize("hostile", ["pickled example inputs", "a pickled weight", "an opaque constant"])
def test_torch_alone_would_run_it(hostile: str, members: Members, tmp_path: Path) -> None:
    mark, changed = tmp_path / "ran", dict(members)
    HOSTILE[hostile](changed, mark)
    with contextlib.suppress(Exception):
        torch.export.load(_written(changed, tmp_path / "network.pt2"))
    assert mark.exists()


@pytest.mark.parametrize("content", [b"", b"PK", b"\x80\x04N.", b"{}"])
def test_no_archive(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "network.pt2").write_bytes(content)
    with pytest.raises(DataError, match="no readable program"):
        load_program(tmp_path / "network.pt2")


def test_a_bomb_is_not_unpacked(members: Members, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metawrap.classifier.program._MAX_BYTES", 10_000)
    with zipfile.ZipFile(tmp_path / "network.pt2", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content + b"\0" * 10_000)
    with pytest.raises(DataError, match="more than"):
        load_program(tmp_path / "network.pt2")
