"""Files from strangers: refused with the reason, nothing written, memory bounded."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import struct
import tarfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from data_helpers import make_image_folder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from published import cifar_archive, cifar_folder, mini_csv
from refusals import refuses

from metawrap.data import load_cifar_fs, load_data, load_image_folder, load_mini_imagenet, tar_members
from metawrap.data.class_split import PARTS
from metawrap.data.tar_members import TarFiles, read_members
from metawrap.data.text_files import read_table
from metawrap.errors import DataError

MIB = 2**20


@pytest.fixture
def untouched(tmp_path: Path) -> Iterator[Path]:
    """A folder inside another; whatever the test reads, nothing may appear in or around it."""
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    yield inside
    assert not [path for path in tmp_path.rglob("*") if "evil" in path.name]


def member(name: str, content: bytes = b"x", kind: bytes = tarfile.REGTYPE, link: str = "") -> tuple:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(content) if kind == tarfile.REGTYPE else 0, kind, link
    return info, content


def tar(path: Path, *members: tuple, mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize(
    ("evil", "what"),
    [
        (member("../evil"), "unsafe name '../evil', which leaves the folder"),
        (member("cifar-100-python/../../evil"), "leaves the folder"),
        (member("/tmp/evil"), "unsafe name '/tmp/evil'"),
        (member("C:\\evil"), "unsafe name"),
        (member("cifar-100-python/meta", kind=tarfile.SYMTYPE, link="/etc/passwd"), "a link"),
        (member("cifar-100-python/meta", kind=tarfile.LNKTYPE, link="../../evil"), "a link"),
        (member("evil", kind=tarfile.FIFOTYPE), "a device or pipe"),
        (member("evil", kind=tarfile.CHRTYPE), "a device or pipe"),
        (member("evil", kind=tarfile.GNUTYPE_SPARSE), "a sparse file"),
    ],
)
def test_tar_members_that_leave_the_folder_are_refused(untouched: Path, mode: str, evil: tuple, what: str) -> None:
    path = tar(untouched / "cifar-100-python.tar.gz", evil, mode=mode)
    for load in (load_cifar_fs, load_data):
        refuses(DataError, what, load, path)


def test_an_ordinary_archive_passes_the_same_checks(untouched: Path) -> None:
    assert load_cifar_fs(cifar_archive(untouched)).train.num_classes == 64


def peak_of(function, *arguments) -> int:
    tracemalloc.start()
    try:
        with pytest.raises(DataError):
            function(*arguments)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_tar_that_decompresses_to_too_much_is_stopped(untouched: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_members, "_LEAST_LIMIT", MIB)
    path = untouched / "bomb.tar.gz"
    header = tarfile.TarInfo("cifar-100-python/file.txt")
    header.size = 400 * MIB
    path.write_bytes(gzip.compress(header.tobuf() + bytes(64 * MIB), 1))
    assert peak_of(read_members, path, ["cifar-100-python/meta"], 8 * MIB) < 24 * MIB
    refuses(DataError, "claims 419430400 bytes", read_members, path, ["cifar-100-python/meta"], 8 * MIB)
    # Many members, each small enough.
    tar(path, *(member(f"file{number}", bytes(7 * MIB)) for number in range(10)))
    refuses(DataError, "decompresses to more than", read_members, path, ["cifar-100-python/meta"], 8 * MIB)
    assert peak_of(read_members, path, ["cifar-100-python/meta"], 8 * MIB) < 24 * MIB
    refuses(DataError, "decompresses to more than", load_data, path)
    assert peak_of(load_data, path) < 24 * MIB


def test_a_member_of_an_image_archive_is_bounded_and_a_name_comes_once(untouched: Path) -> None:
    images = [member(f"{name}/0.png", bytes(65 * MIB if name == "a" else 1)) for name in "abc"]
    path = tar(untouched / "a.tar.gz", *images)
    refuses(
        DataError,
        r"'a/0\.png' holds more than 67108864 bytes",
        load_data,
        path,
        split={part: [name] for part, name in zip(PARTS, "abc", strict=True)},
    )
    refuses(DataError, r"'a/0\.png' twice", load_data, tar(path, images[1], member("a/0.png"), member("./a/0.png")))


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XGLTYPE])
def test_a_tar_header_that_claims_gigabytes_is_not_believed(untouched: Path, kind: bytes) -> None:
    header = tarfile.TarInfo("long")
    header.type, header.size = kind, 2**33 - 1
    path = untouched / "bomb.tar.gz"
    path.write_bytes(gzip.compress(header.tobuf(tarfile.USTAR_FORMAT) + bytes(32 * MIB), 1))
    assert peak_of(read_members, path, ["a"], 64 * MIB) < 16 * MIB
    assert peak_of(load_data, path) < 16 * MIB


def test_ten_thousand_members_are_enough(untouched: Path) -> None:
    path = tar(untouched / "many.tar", *(member(f"file{number}", b"") for number in range(10_001)), mode="w")
    refuses(DataError, "more than 10000 members", read_members, path, ["a"], MIB * 64)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(noise=st.binary(max_size=40), place=st.integers(0, 4000), packed=st.booleans())
def test_a_damaged_tar_is_read_or_refused(tmp_path: Path, noise: bytes, place: int, packed: bool) -> None:
    path = tar(tmp_path / "a.tar", member("meta", b"abc" * 200), member("train", b"d" * 700), mode="w")
    content = bytearray(path.read_bytes())
    place %= len(content)
    content[place : place + len(noise)] = noise
    path.write_bytes(gzip.compress(bytes(content), 1) if packed else bytes(content))
    with contextlib.suppress(DataError), contextlib.closing(TarFiles(path, MIB)) as files:
        assert all(len(files.read(name)) <= MIB for name in files.names())
    with contextlib.suppress(DataError):
        assert set(read_members(path, ["meta", "train"], MIB)) == {"meta", "train"}


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files of Linux")
@pytest.mark.parametrize(("content", "cause"), [(None, "twice"), (b"<html>", "web page")])
def test_a_refused_tar_is_closed(tmp_path: Path, content: bytes | None, cause: str) -> None:
    path = tar(tmp_path / "a.tar", member("meta", b"abc"), member("meta", b"abc"), mode="w")
    path.write_bytes(content or path.read_bytes())
    before = sorted(os.listdir("/proc/self/fd"))
    with pytest.raises(DataError, match=cause) as raised:
        TarFiles(path, MIB)
    assert raised.value is not None  # The exception, and the frames that it holds, are alive.
    assert sorted(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("file", ["meta", "train", "test"])
def test_a_folder_or_tar_with_a_pickle_that_runs_code_is_refused(untouched: Path, file: str) -> None:
    folder = cifar_folder(untouched)
    (folder / file).write_bytes(b"cos\nsystem\n(S'touch evil'\ntR.")
    members = [member(f"cifar-100-python/{each.name}", each.read_bytes()) for each in folder.iterdir()]
    for root in (folder, tar(untouched / "cifar.tar.gz", *members)):
        refuses(DataError, rf"'cifar-100-python/{file}' asks for 'os\.system'", load_cifar_fs, root)


def chunk(kind: bytes, content: bytes) -> bytes:
    """A part of a PNG file."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_header(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(MIB), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [9_000, 12_000, 60_000])
def test_a_picture_that_claims_too_many_pixels_is_refused_cheaply(tmp_path: Path, side: int) -> None:
    root = make_image_folder(tmp_path / "hostile", range(4))
    (root / "class001" / "1.png").write_bytes(png_header(side, side))
    load_image_folder(make_image_folder(tmp_path / "warm", range(3)), image_size=4)  # Pillow's plugins are loaded once.
    assert peak_of(lambda: load_image_folder(root, image_size=8)) < 4 * MIB
    words = rf"'class001/1\.png'.*({side} x {side} pixels|exceeds limit of \d+ pixels)"
    refuses(DataError, words, load_image_folder, root, image_size=8)


def test_a_picture_with_a_text_that_decompresses_to_gigabytes_is_refused_cheaply(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path, range(4))
    plain = (root / "class001" / "1.png").read_bytes()
    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(256 * MIB), 9))
    (root / "class001" / "1.png").write_bytes(plain[:33] + text + plain[33:])
    assert peak_of(lambda: load_image_folder(root, image_size=8)) < 16 * MIB


def test_a_zip_bomb_is_refused_cheaply(untouched: Path) -> None:
    mini_csv(untouched / "mini")
    path = untouched / "mini.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for file in sorted((untouched / "mini").rglob("*")):
            name = file.relative_to(untouched / "mini").as_posix()
            if file.is_file():
                archive.writestr(name, bytes(80 * MIB) if name.endswith("n0153282900000001.png") else file.read_bytes())
    assert path.stat().st_size < 2 * MIB
    assert peak_of(load_mini_imagenet, path) < 8 * MIB
    refuses(DataError, r"'images/n0153282900000001\.png' holds more than 67108864 bytes", load_mini_imagenet, path)


def test_a_zip_that_lies_about_a_size_is_refused_cheaply(untouched: Path) -> None:
    path = untouched / "mini.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("train.csv", bytes(100 * MIB))
    claimed = struct.pack("<I", 100 * MIB)
    path.write_bytes(path.read_bytes().replace(claimed, struct.pack("<I", 100)))
    assert peak_of(load_mini_imagenet, path) < 8 * MIB


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=200))
def test_any_text_is_a_table_or_an_error(text: str) -> None:
    try:
        rows = read_table(text, "a.csv", ("filename", "label"))
    except DataError:
        return
    assert all(len(row) == 2 for row in rows)


@pytest.mark.parametrize("inner", ["inner.zip", "a/inner.zip", "a/inner.tar.gz"])
def test_an_archive_inside_of_an_archive_is_not_opened(untouched: Path, inner: str) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (4, 4)).save(picture, "PNG")
    path, bomb = untouched / "outer.zip", bytes(10_000)  # It is no archive: opening it would fail.
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(inner, bomb)
    refuses(DataError, "holds no class folder|holds no image", load_image_folder, path)
    with zipfile.ZipFile(path, "a") as archive:
        for name in "abcdef":
            archive.writestr(f"{name}/0.png", picture.getvalue())
    assert load_image_folder(path, image_size=4).train.num_classes == 4
