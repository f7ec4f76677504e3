"""Data sets in their published formats, made by hand: what real downloads look like, small."""

from __future__ import annotations

import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

CIFAR_COARSE = {
    "aquatic_mammals": "beaver dolphin otter seal whale",
    "fish": "aquarium_fish flatfish ray shark trout",
    "flowers": "orchid poppy rose sunflower tulip",
    "food_containers": "bottle bowl can cup plate",
    "fruit_and_vegetables": "apple mushroom orange pear sweet_pepper",
    "household_electrical_devices": "clock keyboard lamp telephone television",
    "household_furniture": "bed chair couch table wardrobe",
    "insects": "bee beetle butterfly caterpillar cockroach",
    "large_carnivores": "bear leopard lion tiger wolf",
    "large_man-made_outdoor_things": "bridge castle house road skyscraper",
    "large_natural_outdoor_scenes": "cloud forest mountain plain sea",
    "large_omnivores_and_herbivores": "camel cattle chimpanzee elephant kangaroo",
    "medium_mammals": "fox porcupine possum raccoon skunk",
    "non-insect_invertebrates": "crab lobster snail spider worm",
    "people": "baby boy girl man woman",
    "reptiles": "crocodile dinosaur lizard snake turtle",
    "small_mammals": "hamster mouse rabbit shrew squirrel",
    "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "vehicles_1": "bicycle bus motorcycle pickup_truck train",
    "vehicles_2": "lawn_mower rocket streetcar tank tractor",
}
"""The superclasses of CIFAR-100 and their classes, from the data set's home page."""


def noise(count: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, (count, *shape), dtype=np.uint8)


def picture(image: np.ndarray, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind)
    return file.getvalue()


def cifar_folder(root: Path, protocol: int = 2) -> Path:
    """cifar-100-python with three images of each class: two in train, one in test."""
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    fine = sorted(name for names in CIFAR_COARSE.values() for name in names.split())
    coarse = sorted(CIFAR_COARSE)
    parent = {name: coarse.index(group) for group, names in CIFAR_COARSE.items() for name in names.split()}
    meta = {"fine_label_names": fine, "coarse_label_names": coarse}
    (folder / "meta").write_bytes(pickle.dumps(meta, protocol))
    for seed, (name, each) in enumerate({"train": 2, "test": 1}.items()):
        labels = np.random.RandomState(seed).permutation(np.repeat(np.arange(100), each)).tolist()
        batch = {
            "filenames": [f"{fine[label]}_s_{place:06d}.png" for place, label in enumerate(labels)],
            "batch_label": "training batch 1 of 1",
            "fine_labels": labels,
            "coarse_labels": [parent[fine[label]] for label in labels],
            "data": noise(len(labels), 3072, seed=seed),
        }
        (folder / name).write_bytes(pickle.dumps(batch, protocol))
    return folder


def cifar_archive(root: Path) -> Path:
    folder, path = cifar_folder(root / "unpacked"), root / "cifar-100-python.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.add(folder, "cifar-100-python")
    return path


MINI = {"train": ["n01532829", "n01558993", "n01704323"], "val": ["n01855672"], "test": ["n01930112", "n01981276"]}


def mini_csv(root: Path, nested: bool = False, images: int = 4) -> dict[str, np.ndarray]:
    """train.csv, val.csv, test.csv and images/, as Ravi & Larochelle; returns the pixels of each file name."""
    pixels = {}
    for part, classes in MINI.items():
        rows = ["filename,label"]
        for name in classes:
            for number in range(1, images + 1):
                file = f"{name}{number:08d}.png"
                pixels[file] = noise(84, 84, 3, seed=int(name[1:]) + number)
                place = root / "images" / (name if nested else "") / file
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(picture(pixels[file]))
                rows.append(f"{file},{name}")
        (root / f"{part}.csv").write_text("\n".join(rows) + "\n")
    return pixels


def mini_caches(root: Path, kind: str, protocol: int = 2, images: int = 4) -> dict[str, np.ndarray]:
    """Either pickle cache; returns the array of each part."""
    arrays = {}
    for seed, (part, classes) in enumerate(MINI.items()):
        array = noise(len(classes) * images, 84, 84, 3, seed=seed)
        arrays[part] = array
        if kind == "class_dict":
            rows = {name: list(range(i * images, (i + 1) * images)) for i, name in enumerate(classes)}
            content, file = {"image_data": array, "class_dict": rows}, f"mini-imagenet-cache-{part}.pkl"
        else:
            labels = [64 * (seed > 0) + i for i in range(len(classes)) for _ in range(images)]
            content = {"data": array, "labels": labels, "catname2label": {}}
            file = f"miniImageNet_category_split_{'train_phase_train' if part == 'train' else part}.pickle"
        pickled = pickle.dumps(content, protocol)
        if protocol < 4:  # As NumPy 1 wrote them.
            pickled = pickled.replace(b"numpy._core.", b"numpy.core.")
        (root / file).write_bytes(pickled)
    return arrays


def tiered_pickles(root: Path, images: int = 3) -> dict[str, np.ndarray]:
    """{train,val,test}_images_png.pkl, as cv2.imencode's arrays, and their labels; returns the pixels of each part."""
    root.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for seed, (part, classes) in enumerate({"train": 4, "val": 2, "test": 3}.items()):
        arrays[part] = noise(classes * images, 84, 84, 3, seed=seed)
        pictures = [np.frombuffer(picture(image), np.uint8)[:, None] for image in arrays[part]]
        labels = np.repeat(np.arange(classes), images)
        general = {"label_general": labels // 2, "label_general_str": ["dog", "bird"]}
        specific = {"label_specific": labels, "label_specific_str": [f"{part} class {i}" for i in range(classes)]}
        (root / f"{part}_images_png.pkl").write_bytes(pickle.dumps(pictures, 2))
        (root / f"{part}_labels.pkl").write_bytes(pickle.dumps(specific | general, 2))
    return arrays


def cub_folder(root: Path, classes: int = 8, images: int = 3) -> Path:
    """CUB_200_2011 with its tables; class i is one colour."""
    folder = root / "CUB_200_2011"
    tables: dict[str, list[str]] = {"images": [], "image_class_labels": [], "classes": [], "bounding_boxes": []}
    number = 0
    for index in range(classes):
        name = f"{index + 1:03d}.Bird_{index}"
        tables["classes"].append(f"{index + 1} {name}")
        for place in range(images):
            number += 1
            file = folder / "images" / name / f"Bird_{index}_{place:04d}_{number}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(picture(np.full((30, 40, 3), 20 * index, np.uint8), "JPEG"))
            tables["images"].append(f"{number} {name}/{file.name}")
            tables["image_class_labels"].append(f"{number} {index + 1}")
            tables["bounding_boxes"].append(f"{number} 1.0 2.0 3.0 4.0")
    for name, rows in tables.items():
        (folder / f"{name}.txt").write_text("\n".join(rows) + "\n")
    return folder


GROCERY = {
    "Fruit": {
        "Apple": "Golden-Delicious Granny-Smith Pink-Lady Red-Delicious Royal-Gala",
        "Melon": "Cantaloupe Galia-Melon Honeydew-Melon Watermelon",
        "Pear": "Anjou Conference Kaiser",
        "": "Avocado Banana Kiwi Lemon Lime Mango Nectarine Orange Papaya Passion-Fruit Peach Pineapple Plum "
        "Pomegranate Red-Grapefruit Satsumas",
    },
    "Packages": {
        "Juice": "Bravo-Apple-Juice Bravo-Orange-Juice God-Morgon-Apple-Juice God-Morgon-Orange-Juice "
        "God-Morgon-Orange-Red-Grapefruit-Juice God-Morgon-Red-Grapefruit-Juice Tropicana-Apple-Juice "
        "Tropicana-Golden-Grapefruit Tropicana-Juice-Smooth Tropicana-Mandarin-Morning",
        "Milk": "Arla-Ecological-Medium-Fat-Milk Arla-Lactose-Medium-Fat-Milk Arla-Medium-Fat-Milk Arla-Standard-Milk "
        "Garant-Ecological-Medium-Fat-Milk Garant-Ecological-Standard-Milk",
        "Oatghurt": "Oatly-Natural-Oatghurt",
        "Oat-Milk": "Oatly-Oat-Milk",
        "Sour-Cream": "Arla-Ecological-Sour-Cream Arla-Sour-Cream",
        "Sour-Milk": "Arla-Sour-Milk",
        "Soyghurt": "Alpro-Blueberry-Soyghurt Alpro-Vanilla-Soyghurt",
        "Soy-Milk": "Alpro-Fresh-Soy-Milk Alpro-Shelf-Soy-Milk",
        "Yoghurt": "Arla-Mild-Vanilla-Yoghurt Arla-Natural-Mild-Low-Fat-Yoghurt Arla-Natural-Yoghurt "
        "Valio-Vanilla-Yoghurt Yoggi-Strawberry-Yoghurt Yoggi-Vanilla-Yoghurt",
    },
    "Vegetables": {
        "Mushroom": "Brown-Cap-Mushroom",
        "Onion": "Yellow-Onion",
        "Pepper": "Green-Bell-Pepper Orange-Bell-Pepper Red-Bell-Pepper Yellow-Bell-Pepper",
        "Potato": "Floury-Potato Solid-Potato Sweet-Potato",
        "Tomato": "Beef-Tomato Regular-Tomato Vine-Tomato",
        "": "Asparagus Aubergine Cabbage Carrots Cucumber Garlic Ginger Leek Red-Beet Zucchini",
    },
}
"""Kind -> coarse class -> classes of Grocery Store, from its table; under "", classes that are coarse classes too."""


def grocery_files(published: bool = False, images: int = 3) -> dict[str, bytes]:
    """All 81 classes side by side; or in the folders of its repository, with a drawing of each class beside them."""
    files: dict[str, bytes] = {}
    for kind, coarse in GROCERY.items():
        for group, names in coarse.items():
            for name in names.split():
                pictures = [picture(image, "JPEG") for image in noise(images, 8, 8, 3, seed=len(files))]
                inside = "/".join(filter(None, (kind, group, name)))
                for place, content in enumerate(pictures):
                    part = ("test", "train", "val")[place % 3]
                    home = (
                        f"GroceryStoreDataset-master/dataset/{part}/{inside}" if published else f"grocery-store/{name}"
                    )
                    files[f"{home}/{place:03d}.jpg"] = content
                if published:
                    drawings = "GroceryStoreDataset-master/dataset/iconic-images-and-descriptions"
                    files[f"{drawings}/{inside}/{name}_Iconic.jpg"] = pictures[0]
    return files
