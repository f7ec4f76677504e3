"""Grocery Store: 81 kinds of fruit, vegetables and cartons, photographed in shops; names -> classes -> split -> pixels.

Source: Klasson, Zhang, Kjellström 2019, A Hierarchical Grocery Store Image Dataset with Visual and Semantic Labels
(arXiv:1901.00711), MIT licence. Its own split is by image, with every class in every part. The split by class below is
metawrap's own, made before anything was trained on it.
"""

from __future__ import annotations

import re
from pathlib import Path

from metawrap.data.class_folders import ClassFiles, visible
from metawrap.data.class_split import GivenSplit, split_as_given
from metawrap.data.downloads import locate
from metawrap.data.image_files import files_at
from metawrap.data.image_sets import DataSplits, as_splits
from metawrap.data.pictures import IMAGE_SUFFIXES, MAX_IMAGE_BYTES
from metawrap.data.pixel_sources import file_classes
from metawrap.data.preprocessing import ImageSize, decoding_of
from metawrap.data.problems import listed
from metawrap.errors import DataError

# A line holds one kind, or kinds that look alike. No coarse class of the data set is in two parts, and no brand
# of cartons is: those of Arla, Garant, Valio and Yoggi train, those of Alpro and Oatly validate, juices test.
FAMILIES = {
    "train": """
        Golden-Delicious Granny-Smith Pink-Lady Red-Delicious Royal-Gala
        Anjou Conference Kaiser
        Lemon Lime Orange Red-Grapefruit Satsumas
        Nectarine Peach Plum
        Avocado Mango Passion-Fruit Pomegranate
        Green-Bell-Pepper Orange-Bell-Pepper Red-Bell-Pepper Yellow-Bell-Pepper
        Beef-Tomato Regular-Tomato Vine-Tomato
        Cucumber Zucchini
        Asparagus Brown-Cap-Mushroom Ginger Red-Beet
        Arla-Ecological-Medium-Fat-Milk Arla-Lactose-Medium-Fat-Milk Arla-Medium-Fat-Milk Arla-Standard-Milk
        Garant-Ecological-Medium-Fat-Milk Garant-Ecological-Standard-Milk
        Arla-Ecological-Sour-Cream Arla-Sour-Cream Arla-Sour-Milk
        Arla-Mild-Vanilla-Yoghurt Arla-Natural-Mild-Low-Fat-Yoghurt Arla-Natural-Yoghurt
        Valio-Vanilla-Yoghurt Yoggi-Strawberry-Yoghurt Yoggi-Vanilla-Yoghurt
    """,
    "validation": """
        Floury-Potato Solid-Potato Sweet-Potato
        Banana Cabbage Carrots Papaya
        Alpro-Blueberry-Soyghurt Alpro-Vanilla-Soyghurt Alpro-Fresh-Soy-Milk Alpro-Shelf-Soy-Milk
        Oatly-Natural-Oatghurt Oatly-Oat-Milk
    """,
    "test": """
        Cantaloupe Galia-Melon Honeydew-Melon Watermelon
        Garlic Leek Yellow-Onion
        Aubergine Kiwi Pineapple
        Bravo-Apple-Juice Bravo-Orange-Juice
        God-Morgon-Apple-Juice God-Morgon-Orange-Juice God-Morgon-Orange-Red-Grapefruit-Juice
        God-Morgon-Red-Grapefruit-Juice
        Tropicana-Apple-Juice Tropicana-Golden-Grapefruit Tropicana-Juice-Smooth Tropicana-Mandarin-Morning
    """,
}
_CLASSES = frozenset(" ".join(FAMILIES.values()).split())
# All classes side by side, or as published; each at most in a folder or two more.
_FILE = re.compile(
    r"(?:(?P<flat>[^/]+/)?|(?P<published>(?:[^/]+/){0,2})(?:train|val|test)/(?:Fruit|Packages|Vegetables)/(?:[^/]+/)?)"
    r"(?P<name>[^/]+)/[^/]+"
)
_PLACES = ("*", "*/*", "train/*/*", "*/train/*/*", "*/*/train/*/*")
_HOW_TO_GET = (
    "Get GroceryStoreDataset by Marcus Klasson (MIT licence; marcusklasson/GroceryStoreDataset on GitHub) and pass "
    "root=<its folder or a zip of it, grocery-store-128.zip, or a folder with the 81 class folders>."
)


def load_grocery(
    root: str | Path | None = None,
    *,
    split: GivenSplit = "families",
    image_size: ImageSize = 84,
    stream: bool | None = None,
) -> DataSplits:
    """Grocery Store: 48 classes to train on, 13 to validate, 20 to test, of 35 images and more, in colour.

        >>> train, validation, test = load_grocery("path/to/grocery-store-128.zip")  # doctest: +SKIP

    Args:
        root: a folder, zip, tar or tar.gz of the data set, or the folder that holds grocery-store/ or
            grocery-store-128.zip (default: a cache folder). Classes lie side by side; or as they were published, in
            {train,val,test}/{Fruit,Packages,Vegetables}/, and their images are then those of all three. Other files
            are left out.
        split: "families", which keeps each coarse class, each brand of cartons and kinds that look alike in one part;
            or the names of the classes, as for `load_image_folder`.
        image_size, stream: as for `load_image_folder`.
    Raises:
        ArgumentError, DataError: as `load_image_folder`; or a class is missing, or the data set is there twice.
    """
    decoding = decoding_of(image_size)
    complete = lambda folder: any(found.name in _CLASSES for place in _PLACES for found in folder.glob(place))  # noqa: E731
    place = locate(root, "Grocery Store", "grocery-store", "grocery-store-128.zip", complete, None, _HOW_TO_GET)
    files = files_at(place, MAX_IMAGE_BYTES)
    classes = _classes(visible(files.names()), place)
    families = split == "families"
    if families and (missing := sorted(_CLASSES - classes.keys())):
        raise DataError(f"'{place}' has no image of the classes {listed(missing)}. {_HOW_TO_GET}")
    parts = [part.split() for part in FAMILIES.values()] if families else split_as_given(list(classes), split)
    origin = f"Grocery Store, split by {'families' if families else 'name'}"
    chosen = ({name: classes[name] for name in part} for part in parts)
    return as_splits([file_classes(files, part, decoding, origin) for part in chosen], stream)


def _classes(names: list[str], where: Path) -> ClassFiles:
    found: ClassFiles = {}
    places = {}
    for name in sorted(names):
        match = _FILE.fullmatch(name)
        if match and match["name"] in _CLASSES and name.lower().endswith(IMAGE_SUFFIXES):
            places[match["flat"], match["published"]] = name
            found.setdefault(match["name"], []).append(name)
    if len(places) > 1:
        raise DataError(f"'{where}' holds the data set in several places: {listed(list(places.values()))}. Keep one.")
    return found
