"""Checkpoints from strangers: whatever a file holds, loading it runs nothing, and costs little memory."""

from __future__ import annotations

import functools
import io
import os
import pickle
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from metawrap.data.image_files import ZipFiles as ZipSource
from metawrap.errors import CheckpointError, MetaWrapError
from metawrap.training.checkpoints import Checkpoint, CheckpointFolder, load_checkpoint

PARTS = ("settings", "learner", "optimizer", "scheduler", "rng", "history")


class RunsCode:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


class RunsLater:
    """Python's unpickler would call its class's own __setstate__."""

    def __setstate__(self, state: dict[str, str]) -> None:
        Path(state["path"]).mkdir()


def good() -> dict[str, Any]:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    content = {"settings": {"ways": 5}, "learner": dict(model.state_dict()), "optimizer": optimizer.state_dict()}
    content |= {"scheduler": None, "rng": {"cpu": torch.get_rng_state(), "cuda": []}, "seconds": 1.0}
    return {"format": "metawrap-checkpoint", "version": 1, "history": [{"validation_accuracy": 1.0}], **content}


def saved(path: Path, content: Any, **options: Any) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.save(content, path, **options)
    return path


def with_pickle(path: Path, opcodes: bytes, compression: int = zipfile.ZIP_STORED, **more: bytes) -> Path:
    """An archive as torch.save writes it, with this pickle in it."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", opcodes)
        archive.writestr("archive/byteorder", b"little")
        archive.writestr("archive/version", b"3\n")
        for name, content in more.items():
            archive.writestr(f"archive/data/{name}", content)
    return path


def test_a_checkpoint_of_a_run_passes_every_check(tmp_path):
    content = good()
    fields = {name: content[name] for name in Checkpoint.__dataclass_fields__}
    path = CheckpointFolder(tmp_path, 1, 1).save(Checkpoint(**fields))
    found = load_checkpoint(path)
    for name, value in content["learner"].items():
        assert torch.equal(found.learner[name], value)
    assert found.optimizer["state"][0]["exp_avg"].equal(content["optimizer"]["state"][0]["exp_avg"])


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("trap", [RunsCode, RunsLater])
@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_any_part_is_refused_and_not_run(tmp_path, part, trap, zipped):
    proof = tmp_path / "it-ran"
    code = RunsCode(proof) if trap is RunsCode else RunsLater()
    if trap is RunsLater:
        code.__dict__["path"] = str(proof)
    content = good()
    nested = {"state": {0: {"exp_avg": code}}, "param_groups": [{"lr": code}]}
    path = saved(tmp_path / "epoch-0001.pt", content | {part: nested}, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"epoch-0001\.pt" + (".*not loaded.*code" if zipped else "")):
        load_checkpoint(path)
    assert not proof.exists()


@pytest.mark.parametrize(
    "module", ["os system", "builtins eval", "builtins exec", "subprocess Popen", "torch.hub load"]
)
@pytest.mark.parametrize("form", ["GLOBAL", "STACK_GLOBAL", "INST", "bare pickle"])
def test_a_name_that_is_not_of_tensors_is_refused_in_every_form(tmp_path, module, form):
    package, name = module.split()
    argument = b"X\x04\x00\x00\x00true"
    if form == "STACK_GLOBAL":
        loads = b"".join(b"\x8c" + bytes([len(part)]) + part.encode() for part in (package, name))
        opcodes = b"\x80\x04" + loads + b"\x93" + argument + b"\x85R."
    elif form == "INST":
        opcodes = b"\x80\x02(" + argument + f"i{package}\n{name}\n".encode() + b"."
    else:
        opcodes = f"\x80\x02c{package}\n{name}\n".encode("latin-1") + argument + b"\x85R."
    path = tmp_path / "epoch-0001.pt"
    if form == "bare pickle":
        path.write_bytes(opcodes)
    else:
        with_pickle(path, opcodes)
    with pytest.raises(CheckpointError, match=r"epoch-0001\.pt"):
        load_checkpoint(path)


def packed_tensor(path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"format": "metawrap-checkpoint", "w": torch.zeros(2**22)}, buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry in source.namelist():
            archive.writestr(entry, source.read(entry))


def old_format(path: Path) -> None:
    saved(path, {"w": torch.zeros(7)}, _use_new_zipfile_serialization=False)
    # The number of elements stands in the pickled id of the storage: one byte behind BININT1.
    path.write_bytes(path.read_bytes().replace(b"K\x07Nt", b"\x8a\x05\x00\x00\x00\x00\x04Nt"))


WIDE = torch.zeros(1).expand(10**12)
# Each writes a file of less than 2 MB that would take gigabytes.
BOMBS = {
    "a bytearray": lambda path: with_pickle(path, b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x00\x02\x85R."),
    "a tensor of a type": lambda path: with_pickle(path, b"\x80\x02ctorch\nFloatTensor\n\x8a\x05\0\0\0\0\x02\x85R."),
    "a text that is longer than the file": lambda path: with_pickle(path, b"\x80\x04\x8d\0\0\0\0\x10\0\0\0ab."),
    "depth": lambda path: with_pickle(path, b"\x80\x02" + b"]" * 300_000 + b"a" * 299_999 + b"."),
    "depth of a stack": lambda path: saved(
        path, good() | {"history": functools.reduce(lambda x, _: [x], range(300), [])}
    ),
    "a zip bomb in a tensor": packed_tensor,
    "a zip bomb of a pickle": lambda path: with_pickle(path, b"\x80\x02" + b"N0" * 2**24 + b"N.", zipfile.ZIP_DEFLATED),
    "a tensor of one number, a trillion times": lambda path: saved(path, good() | {"learner": {"w": WIDE}}),
    "the same in the optimizer": lambda path: saved(
        path, good() | {"optimizer": {"state": {0: {"exp_avg": WIDE}}, "param_groups": []}}
    ),
    "the old format, with a storage of 2**34 numbers": old_format,
}

LOADER = """
import resource, sys
from pathlib import Path
from metawrap.errors import CheckpointError
from metawrap.training.checkpoints import load_checkpoint
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    try:
        load_checkpoint(Path(path))
    except CheckpointError as error:
        print("refused", path, str(error)[:90])
    else:
        print("LOADED", path)
print("grown", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_files_that_claim_to_be_huge_are_refused_and_cost_no_memory(tmp_path):
    paths = [tmp_path / f"{place}.pt" for place in range(len(BOMBS))]
    for path, write in zip(paths, BOMBS.values(), strict=True):
        write(path)
    assert all(path.stat().st_size < 2 * 2**20 for path in paths)
    # In a process of its own, whose greatest memory is known.
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LOADER), *map(str, paths)], capture_output=True, text=True, timeout=100
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("refused") == len(BOMBS), ran.stdout
    assert int(ran.stdout.split("grown")[1]) < 64 * 1024, ran.stdout  # KiB


def test_an_entry_outside_of_the_archive_is_never_written(tmp_path):
    path = with_pickle(tmp_path / "epoch-0001.pt", pickle.dumps(5, 2))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("../../escaped", b"x")
    with pytest.raises(MetaWrapError):
        load_checkpoint(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["epoch-0001.pt"]


def test_any_byte_that_is_flipped_ends_in_a_checkpoint_or_in_one_of_our_errors(tmp_path):
    whole = bytearray(saved(tmp_path / "good.pt", good()).read_bytes())
    path = tmp_path / "epoch-0001.pt"
    generator = torch.Generator().manual_seed(0)
    for place in torch.randint(len(whole), (150,), generator=generator).tolist():
        torn = bytearray(whole)
        torn[place] ^= 1 << (place % 8)
        path.write_bytes(torn)
        try:
            found = load_checkpoint(path)
        except CheckpointError:
            continue
        assert isinstance(found, Checkpoint)


def test_an_archive_of_images_with_an_entry_without_a_name_is_read_without_it(tmp_path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("x", b"1")
        archive.writestr("named", b"2")
        archive.infolist()[0].filename = ""  # as the fuzzer found it
    assert ZipSource(tmp_path / "images.zip", 100).names() == ["named"]
