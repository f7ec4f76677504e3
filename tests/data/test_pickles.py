"""Pickles are read like data: what Python's own pickle and NumPy write comes back, and nothing else is done."""

from __future__ import annotations

import os
import pickle
import pickletools
import struct
import tracemalloc
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refuses

from metawrap.data.pickles import read_pickle
from metawrap.data.stored_arrays import FileSpan, StoredArray
from metawrap.errors import DataError

IMAGES = np.random.RandomState(0).randint(0, 256, (5, 8, 8, 3), dtype=np.uint8)


def as_numpy_1(pickled: bytes) -> bytes:
    """What NumPy 1 writes: the same, under its own module name (protocols below 4, which have no lengths to keep)."""
    return pickled.replace(b"numpy._core.", b"numpy.core.")


def real(value: Any) -> Any:
    if isinstance(value, StoredArray):
        return value.read()
    if isinstance(value, dict):
        return {key: real(part) for key, part in value.items()}
    return [real(part) for part in value] if isinstance(value, list) else value


@pytest.mark.parametrize("protocol", range(6))
def test_what_pickle_writes_comes_back(protocol: int) -> None:
    value = {
        "image_data": IMAGES,
        "fortran": np.asfortranarray(IMAGES[0, :, :, 0]),
        "floats": np.linspace(0, 1, 300),
        "big_endian": np.arange(4, dtype=">i4"),
        "names": np.array(["robin", "wren"]),
        "class_dict": {"n01532829": [0, 1, -70_000], "n01558993": [2**40, True, None, 1.5]},
        "text": "grün",
        "bytes": b"\x00\xff",
        "tuples": [(1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), ()],
        "number": np.int64(7),
    }
    back = real(read_pickle(pickle.dumps(value, protocol)))
    assert list(back) == list(value)
    for name, expected in value.items():
        if isinstance(expected, np.ndarray):
            np.testing.assert_array_equal(back[name], expected)
            assert back[name].dtype == expected.dtype
        else:
            assert back[name] == expected


@pytest.mark.parametrize("protocol", [0, 1, 2, 3])
def test_the_names_of_numpy_1_are_read(protocol: int) -> None:
    pickled = as_numpy_1(pickle.dumps([IMAGES, np.float32(0.5)], protocol))
    assert b"numpy.core.multiarray" in pickled
    array, number = read_pickle(pickled)
    np.testing.assert_array_equal(array.read(), IMAGES)
    assert number == 0.5


def python_2_array(array: np.ndarray, protocol: int) -> bytes:
    """As Python 2 and NumPy 1 pickled it: by hand, because no such Python is at hand."""
    raw, shape = array.tobytes(), array.shape
    if protocol == 0:
        sides = "".join(f"I{side}\n" for side in shape)
        escaped = raw.decode("latin-1").encode("unicode_escape").replace(b"'", b"\\'")
        head = "cnumpy.core.multiarray\n_reconstruct\np1\n(cnumpy\nndarray\np2\n(I0\ntS'b'\ntR(I1\n"
        kind = "cnumpy\ndtype\n(S'u1'\nI0\nI1\ntR(I3\nS'|'\nNNNI-1\nI-1\nI0\ntbI00\n"
        return f"{head}({sides}t{kind}S'".encode() + escaped + b"'\ntb."
    sides = b"".join(b"K" + bytes([side]) for side in shape)
    head = b"\x80\x02cnumpy.core.multiarray\n_reconstruct\nq\x01cnumpy\nndarray\nq\x02K\x00\x85U\x01b\x87R(K\x01"
    kind = b"cnumpy\ndtype\nq\x03U\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
    return head + b"(" + sides + b"t" + kind + b"T" + struct.pack("<i", len(raw)) + raw + b"tb."


@pytest.mark.parametrize("protocol", [0, 2])
@pytest.mark.parametrize("count", [1, 5])
def test_python_2_files_are_read_as_latin_1(protocol: int, count: int) -> None:
    pickled = python_2_array(IMAGES[:count], protocol)
    # The standard library agrees about what the file says.
    np.testing.assert_array_equal(pickle.loads(pickled, encoding="latin1"), IMAGES[:count])
    np.testing.assert_array_equal(read_pickle(pickled).read(), IMAGES[:count])


def test_mappings_become_plain_dicts() -> None:
    lists = defaultdict(list, {"a": [1]})
    for protocol in range(6):
        assert read_pickle(pickle.dumps(OrderedDict(b=1, a=2), protocol)) == {"b": 1, "a": 2}
        assert type(read_pickle(pickle.dumps(lists, protocol))) is dict
        assert read_pickle(pickle.dumps(lists, protocol)) == {"a": [1]}
    assert read_pickle(b"ccollections\nOrderedDict\n((lp0\n(lp1\nS'b'\naI1\naatR.") == {"b": 1}


class _Runs:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_would_run_a_command_is_refused_by_name_and_runs_nothing(tmp_path: Path, protocol: int) -> None:
    proof = tmp_path / "proof"
    pickled = pickle.dumps({"image_data": IMAGES, "labels": _Runs(os.system, f"touch {proof}")}, protocol)
    refuses(DataError, r"asks for '(posix|nt)\.system'.*nothing of it is run", read_pickle, pickled)
    assert not proof.exists()
    pickle.loads(pickled)  # The file is armed: Python's own reader runs it.
    assert proof.exists()


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (_Runs(eval, "1"), "builtins.eval|__builtin__.eval"),
        (_Runs(getattr, "a", "b"), "getattr"),
        (_Runs(np.load, "file"), "numpy.*load"),
        (Path("a"), "pathlib"),
        ({1, 2}, "opcode|set"),
        (_Runs(np.frombuffer, b""), "frombuffer"),
        (_Runs(np.dtype, "O"), "Python objects"),
        (_Runs(np.dtype, "V8"), "V8"),
        (_Runs(np.dtype, "S99999"), "S99999"),
        (_Runs(np.ndarray, (2**40,)), "numpy.ndarray' in a way"),
        (np.array([{"a": 1}, None], dtype=object), "Python objects"),
        (np.zeros(2, dtype=[("a", "u1"), ("b", "i4")]), "array of type|records"),
        (np.zeros(2, dtype="M8[s]"), "M8"),
        ({(1, 2): 3}, "key of type tuple"),
    ],
    ids=lambda value: None if isinstance(value, str) else type(value).__name__,
)
def test_anything_but_arrays_and_plain_values_is_refused(value: Any, what: str) -> None:
    for protocol in (0, 2, 4, 5):
        refuses(DataError, what, read_pickle, pickle.dumps(value, protocol))


def test_a_dotted_name_does_not_reach_through_a_known_module() -> None:
    for module, name in (
        ("numpy", "ndarray.__class__"),
        ("_codecs", "encode.__self__"),
        ("numpy.core.multiarray", "os"),
    ):
        pickled = b"\x80\x04" + b"".join(b"\x8c" + bytes([len(part)]) + part.encode() for part in (module, name))
        refuses(DataError, "asks for", read_pickle, pickled + b"\x93.")


def test_state_is_set_on_arrays_only_and_once() -> None:
    # BUILD on a name would change the function itself in Python's own reader.
    refuses(DataError, "sets the state of a _Name", read_pickle, b"\x80\x02cnumpy\ndtype\n}b.")
    array = pickle.dumps(IMAGES, 2)
    refuses(DataError, "sets the state of a PickledArray", read_pickle, array[:-1] + b"(K\x01tb.")


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_file_cut_short_anywhere_is_an_error(protocol: int) -> None:
    pickled = pickle.dumps({"image_data": IMAGES, "class_dict": {"a": [0, 1]}}, protocol)
    for end in [*range(0, len(pickled) - 1, 7), len(pickled) - 1]:
        refuses(DataError, r"cut short|cannot be read", read_pickle, pickled[:end])


@pytest.mark.parametrize(
    "bomb",
    [
        pytest.param(b"\x80\x04\x96" + struct.pack("<Q", 2**40) + b"x.", id="a bytearray of 1 TiB"),
        pytest.param(b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"x.", id="bytes of 4 EiB"),
        pytest.param(b"\x80\x04\x8d" + struct.pack("<Q", 2**64 - 1) + b"x.", id="text of 16 EiB"),
        pytest.param(b"T" + struct.pack("<i", -5) + b"x.", id="text of negative length"),
        pytest.param(b"Np99999999999\n.", id="a huge memo in text"),
        pytest.param(b"Nr" + struct.pack("<I", 2**32 - 1) + b"0j" + struct.pack("<I", 7) + b".", id="a huge memo"),
        pytest.param(b"\x80\x04" + b"]" * 2**17 + b".", id="too many lists"),
        pytest.param(b"\x80\x04" + b"]" + b"(2" * 2**17, id="too many copies of one list"),
        pytest.param(b"\x8b" + struct.pack("<i", 2**31 - 1) + b".", id="a number of 2 GiB"),
        pytest.param(b"I" + b"9" * 2**20 + b"\n.", id="a number of a million digits"),
    ],
)
def test_a_claim_costs_no_memory(bomb: bytes) -> None:
    tracemalloc.start()
    refuses(DataError, r"cut short|more than|opcode", read_pickle, bomb, max_values=2**16)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 128 * 2**16 + 2**21  # A value takes some 100 bytes.


def test_a_list_of_pairs_is_copied_into_one_dict_only() -> None:
    pairs = pickle.dumps([[str(number), number] for number in range(1000)], 2)[:-1]
    calls = b"ccollections\nOrderedDict\nr\x88\x13\x00\x000(" + b"j\x88\x13\x00\x00h\x00\x85R" * 1000
    tracemalloc.start()
    dicts = read_pickle(pairs + b"0" + calls + b"l.")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [len(each) for each in dicts] == [1000] + [0] * 999
    assert peak < 2**22  # A thousand copies would take 40 MB.


def test_keys_are_checked_before_they_are_hashed() -> None:
    nested = b")" + b"\x85" * 100_000
    for opcodes in (b"}" + nested + b"Ns.", b"}(" + nested + b"Nu.", b"(" + nested + b"Nd."):
        refuses(DataError, "key of type tuple", read_pickle, opcodes)
    refuses(DataError, "not a readable pickle|array of type", read_pickle, b"cnumpy\ndtype\n" + nested + b"\x85R.")


def test_an_array_that_claims_more_than_is_there_is_refused_before_it_is_made() -> None:
    pickled = pickle.dumps(IMAGES, 2).replace(b"K\x05K\x08", b"J\xff\xff\xff\x7fK\x08")
    refuses(DataError, r"claims an array of 412316860224 bytes where there are 1431", read_pickle, pickled)
    refuses(DataError, "shape", read_pickle, pickle.dumps(IMAGES, 2).replace(b"K\x05K\x08", b"J\xff\xff\xff\xffK\x08"))


def test_an_array_with_bytes_left_over_is_refused_when_it_is_read() -> None:
    array = read_pickle(pickle.dumps(IMAGES, 2).replace(b"K\x05K\x08", b"K\x04K\x08"))
    refuses(DataError, r"needs 768 bytes, but 960 are there", array.read)


def test_a_large_array_of_a_file_is_not_read_until_asked_for(tmp_path: Path) -> None:
    large = np.arange(2**24, dtype=np.uint8)
    (tmp_path / "cache.pkl").write_bytes(pickle.dumps({"data": large}, 4))
    tracemalloc.start()
    found = read_pickle(tmp_path / "cache.pkl")["data"]
    assert isinstance(found.raw, FileSpan)
    view = found.read()
    assert view[2**23 + 5] == large[2**23 + 5]
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    np.testing.assert_array_equal(view, large)
    moved = pickle.loads(pickle.dumps(found))  # As a worker process gets it.
    np.testing.assert_array_equal(moved.read(), large)


def test_an_empty_or_missing_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty.pkl").touch()
    for name in ("empty.pkl", "missing.pkl"):
        refuses(DataError, name, read_pickle, tmp_path / name)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60), st.integers(0, 5), st.integers(0, 400), st.integers(0, 255))
def test_no_bytes_make_it_do_anything_but_read_or_refuse(noise: bytes, protocol: int, place: int, byte: int) -> None:
    valid = bytearray(pickle.dumps({"image_data": IMAGES[:1, :2, :2], "class_dict": {"a": [np.int64(0)]}}, protocol))
    valid[place % len(valid)] = byte
    for content in (noise, b"\x80\x04" + noise + b".", bytes(valid)):
        try:
            value = real(read_pickle(content))
        except DataError:
            continue
        assert not callable(value)


def test_the_opcodes_are_those_of_the_standard_library() -> None:
    from metawrap.data.pickles import OPCODES

    names = {ord(opcode.code): opcode.name for opcode in pickletools.opcodes}
    unread = {names[code] for code in names if code not in OPCODES}
    assert unread == {
        *("PERSID", "BINPERSID", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"),
        *("EMPTY_SET", "ADDITEMS", "FROZENSET", "LONG4", "NEXT_BUFFER", "READONLY_BUFFER"),
    }
