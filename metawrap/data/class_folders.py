"""Names of files -> the parts of a data set -> classes -> image files.

A class is a folder that holds images, or a label file of a webdataset: `key.cls` beside `key.jpg`. Classes may lie in
groups, such as the alphabets of Omniglot. Where a folder can mean two things, it is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import PurePosixPath
from typing import TypeAlias

from metawrap.data.class_split import PARTS, part_of
from metawrap.data.image_files import ImageFiles
from metawrap.data.pictures import IMAGE_SUFFIXES
from metawrap.data.problems import listed
from metawrap.data.text_files import decoded
from metawrap.errors import DataError

# Class name -> the names of its image files.
ClassFiles: TypeAlias = dict[str, list[str]]

_DEEPEST = 8  # folders
_LABEL = ".cls"
_LONGEST_LABEL = 200  # characters


@dataclass
class Folder:
    """A folder of a data set: folders by name, full names of images, and of other files."""

    folders: dict[str, Folder] = field(default_factory=dict)
    images: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)

    def holds_images(self) -> bool:
        """Whether images lie here or deeper."""
        return bool(self.images) or any(folder.holds_images() for folder in self.folders.values())

    def all_others(self) -> list[str]:
        """The files that are no images, here and deeper."""
        return self.others + [name for folder in self.folders.values() for name in folder.all_others()]


def visible(names: Sequence[str]) -> list[str]:
    """The names without hidden files and folders, which file managers write."""
    return [name for name in names if not any(part[:1] == "." or part == "__MACOSX" for part in name.split("/"))]


def folder_tree(names: Sequence[str]) -> Folder:
    """The folders of these names. A single folder around all others is entered.

    Raises:
        DataError: folders are nested too deep.
    """
    root = Folder()
    for name in names:
        *parents, last = name.split("/")
        if len(parents) > _DEEPEST:
            raise DataError(f"'{name[:200]}' lies in more than {_DEEPEST} folders. Pass a folder further down.")
        folder = root
        for part in parents:
            folder = folder.folders.setdefault(part, Folder())
        if last:
            (folder.images if last.lower().endswith(IMAGE_SUFFIXES) else folder.others).append(name)
    while len(root.folders) == 1 and not root.images:
        [(name, only)] = root.folders.items()
        if only.images or part_of(name):
            break
        root = only
    return root


def part_classes(root: Folder, where: object) -> dict[str, ClassFiles] | None:
    """The classes of the folders train, validation and test; None if the root has no such folder.

    Names such as Train, val, meta-test are understood. The validation part may be missing.

    Raises:
        DataError: another part is missing, has two folders, or holds images in place of class folders; images lie
            in other folders; or a class is in two parts.
    """
    named = {name: part for name in root.folders if (part := part_of(name))}
    flat = [name for name in named if root.folders[name].images]
    if len(flat) > 1:
        raise DataError(
            f"'{where}': {', '.join(flat)} hold images and no class folders, so their classes are not known. Put the "
            "images of each class into a folder of its own."
        )
    found: dict[str, ClassFiles] = {}
    parts = {name: part for name, part in named.items() if root.folders[name].folders and name not in flat}
    for name, part in parts.items():
        if part in found:
            raise DataError(f"'{where}' has two folders for {part}; the second is '{name}'. Rename or remove one.")
        found[part] = class_files(root.folders[name], f"{where}/{name}")
    if not found:
        return None
    if missing := [part for part in ("train", "test") if part not in found]:
        raise DataError(
            f"'{where}' has some split folders, but {', '.join(missing)} with class folders inside is missing. "
            "Add it, or move all class folders directly into one folder."
        )
    if beside := [name for name, inner in root.folders.items() if name not in parts and inner.holds_images()]:
        raise DataError(
            f"'{where}' has the parts {', '.join(parts)}, and images in {listed(beside)}, which would not be read. "
            "Move them into class folders of a part, or away."
        )
    found = {part: found[part] for part in PARTS if part in found}
    for first, second in combinations(found, 2):
        if shared := sorted(found[first].keys() & found[second].keys()):
            raise DataError(
                f"The classes {listed(shared)} lie in both {first} and {second} of '{where}'; expected other classes "
                "in each. Few-shot splits are by class: move each to one of them."
            )
    return found


def class_files(folder: Folder, where: object) -> ClassFiles:
    """The classes of a folder; a class in a group is called "<group>/<class>".

    Raises:
        DataError: no class, a class without an image, or a folder that may be a class as well as a group.
    """
    found = _classes(folder, "", where)
    if not found:
        hint = " Images lie in it directly: put those of each class into a folder." if folder.images else ""
        raise DataError(f"'{where}' holds no class folder. Expected one folder of images per class.{hint}")
    return found


def _classes(folder: Folder, prefix: str, where: object) -> ClassFiles:
    found: ClassFiles = {}
    for name, inner in sorted(folder.folders.items()):
        place, groups = f"{where}/{prefix}{name}", [each for each, sub in inner.folders.items() if sub.holds_images()]
        if not inner.holds_images():
            kinds = Counter(PurePosixPath(other).suffix or "no suffix" for other in inner.all_others())
            there = f"; it has {', '.join(f'{n} of {kind}' for kind, n in kinds.most_common(3))}" if kinds else ""
            raise DataError(
                f"The class folder '{place}' holds no image ({', '.join(IMAGE_SUFFIXES)}){there}. Remove it, or "
                "convert its files."
            )
        if inner.images and groups:
            raise DataError(
                f"'{place}' holds images, and so does its folder '{groups[0]}': it may be one class or a group of "
                "classes. Move the images of each class into one folder."
            )
        if parts := [each for each in groups if part_of(each)]:
            raise DataError(
                f"'{place}' holds the folder '{parts[0]}'. If these are the parts of the data set, pass '{place}' "
                f"itself; if '{name}' is a class, move all its images into it, because few-shot splits are by class; "
                f"if '{parts[0]}' is one, rename it."
            )
        if inner.images:
            found[prefix + name] = sorted(inner.images)
        else:
            found |= _classes(inner, f"{prefix}{name}/", where)
    return found


def webdataset_classes(files: ImageFiles, names: Sequence[str]) -> ClassFiles | None:
    """The classes of a webdataset: image `key.jpg` has the label in `key.cls`; None if there is no such pair.

    Raises:
        DataError: an image without a label, a key with two images, or a label that is no short text.
    """
    labels = {_key(name): name for name in names if name.endswith(_LABEL)}
    images = [name for name in names if name.lower().endswith(IMAGE_SUFFIXES)]
    if not any(_key(name) in labels for name in images):
        return None
    found: dict[str, str] = {}
    for name in images:
        if _key(name) not in labels or _key(name) in found:
            problem = "two images" if _key(name) in found else f"no '{_key(name)}{_LABEL}' with its label"
            raise DataError(f"'{name}': there is {problem} of this key. Write one image and one label for each key.")
        found[_key(name)] = name
    classes: ClassFiles = {}
    for key in sorted(found, key=lambda key: files.position(labels[key])):
        label = decoded(files.read(labels[key]), labels[key]).strip()
        if not label or len(label) > _LONGEST_LABEL or not label.isprintable():
            raise DataError(f"'{labels[key]}': expected the name or number of a class, but got {label[:40]!r}.")
        classes.setdefault(label, []).append(found[key])
    return {label: sorted(own) for label, own in sorted(classes.items())}


def _key(name: str) -> str:
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.partition(".")[0]
