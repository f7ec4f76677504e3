from __future__ import annotations

import stat
import zipfile
from contextlib import closing
from pathlib import Path

import pytest
from data_helpers import omniglot_files, write_zip
from refusals import refuses

from metawrap.data import load_mini_imagenet, load_omniglot
from metawrap.data.image_files import files_at
from metawrap.errors import DataError


def everything_under(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


@pytest.mark.parametrize(
    "name",
    [
        *("../evil.png", "omniglot-py/../../evil.png", "omniglot-py/images_background/..", "/tmp/evil.png"),
        *("C:/evil.png", "c:evil.png", "omniglot-py\\..\\evil.png", "omniglot-py/evil.png\0.txt"),
    ],
)
def test_names_that_leave_the_folder_are_refused_and_nothing_is_written(tmp_path, name):
    path = tmp_path / "inside" / "o.zip"
    path.parent.mkdir()
    write_zip(path, omniglot_files())
    with zipfile.ZipFile(path, "a") as archive:
        member = zipfile.ZipInfo("x" * len(name))
        archive.writestr(member, b"x")
    # Patched in the finished file, because zipfile cleans some of these names while it writes.
    path.write_bytes(path.read_bytes().replace(b"x" * len(name), name.encode()))
    before = everything_under(tmp_path)
    refuses(DataError, r"unsafe name", load_omniglot, path, counts=(5, 2, 3))
    refuses(DataError, r"unsafe name", load_mini_imagenet, path)
    assert everything_under(tmp_path) == before


def test_links_are_refused(tmp_path):
    path = write_zip(tmp_path / "o.zip", omniglot_files())
    with zipfile.ZipFile(path, "a") as archive:
        link = zipfile.ZipInfo("omniglot-py/link.png")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
    refuses(DataError, r"holds a link, 'omniglot-py/link\.png'", load_omniglot, path, counts=(5, 2, 3))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_that_comes_twice_is_refused(tmp_path):
    path = tmp_path / "o.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.png", b"1")
        archive.writestr("a.png", b"2")
    with pytest.raises(DataError, match=r"'a\.png' twice"), closing(files_at(path, 100)):
        pass


def test_members_larger_than_the_limit_are_refused(tmp_path):
    path = tmp_path / "o.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.png", bytes(10**6))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "bomb.png").write_bytes(bytes(10**6))
    for root in (path, tmp_path / "folder"):
        with (
            closing(files_at(root, max_bytes=10**5)) as source,
            pytest.raises(DataError, match=r"'bomb\.png' holds more"),
        ):
            source.read("bomb.png")
        with closing(files_at(root, max_bytes=10**6)) as source:
            assert source.names() == ["bomb.png"]
            assert source.read("bomb.png") == bytes(10**6)


def test_a_damaged_archive_is_refused(tmp_path):
    path = tmp_path / "o.zip"
    path.write_bytes(b"PK not really")
    with pytest.raises(DataError, match=r"not a readable zip"), closing(files_at(path, 100)):
        pass
    with pytest.raises(DataError, match=r"no folder and no zip"), closing(files_at(tmp_path / "none", 100)):
        pass
    write_zip(path, {"a.png": b"some content"})
    path.write_bytes(path.read_bytes().replace(b"some content", b"same content"))
    with (
        closing(files_at(path, 100)) as source,
        pytest.raises(DataError, match=r"'a\.png' in the archive cannot be read.*CRC"),
    ):
        source.read("a.png")
