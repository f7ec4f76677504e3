"""A name and its weights -> a network, and the preprocessing that the weights were trained with.

Names: "package.module:factory", "torchvision.models:resnet18", "timm:NAME", "hf:NAME or folder". `load_network` first.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import nn
from torchvision import models
from torchvision.transforms._presets import ImageClassification

from metawrap.data import Preprocessing
from metawrap.errors import ArgumentError
from metawrap.factory import call_factory, in_one_line
from metawrap.weight_files import head_of, load_file, mismatch, package, put, read_file, with_outputs

DEFAULT = "DEFAULT"
_TORCHVISION, _TIMM, _HF = PUBLISHED = "torchvision.models:", "timm:", "hf:"
_OWN = "Write a factory of your own that returns the network with an attribute `preprocessing` (docs/pretrained.md)."
# Switches of Hugging Face's image processors that `Preprocessing` has a place for, or that change no pixel.
_SWITCHES = {
    "do_resize", "do_rescale", "do_normalize", "do_center_crop", "do_flip_channel_order", "do_convert_rgb",
    "do_reduce_labels",
}  # fmt: skip


@dataclass(frozen=True)
class PretrainedNetwork:
    """A network. preprocessing: that of its weights; None if there is none on record. words: about the weights."""

    model: nn.Module
    preprocessing: Preprocessing | None
    words: str


def load_network(name: str, weights: str | Path | None = None, ways: int | None = None) -> PretrainedNetwork:
    """Builds a network and loads its weights, with the preprocessing that belongs to them.

        >>> load_network("torch.nn:Identity").model
        Identity()

    Args:
        name: "package.module:factory", a function or class that makes the network; "torchvision.models:resnet18";
            "timm:resnet18"; or "hf:" with the name or the folder of a Hugging Face model: an image classifier, else the
            bare model, such as a text encoder.
        weights: None for random weights, or those of a factory of your own; "DEFAULT" for the published ones, which are
            downloaded or lie in the folder; a name of torchvision's, such as "IMAGENET1K_V1"; or a file, .safetensors
            or what torch.save wrote.
        ways: the number of outputs that the last linear layer shall have. A factory of your own gets it if it takes it.
    Returns:
        The network in training mode. Its preprocessing is torchvision's, timm's or Hugging Face's for these weights; of
        a factory of your own, the attribute `preprocessing` of the network, a `Preprocessing` or its dict, which is
        taken off.
    Raises:
        ArgumentError: there is no such network or file, the weights are those of another network, or their
            preprocessing is of a kind that `Preprocessing` does not have.
    """
    weights = None if weights is None else str(weights)
    if name.startswith(_TORCHVISION) and name.removeprefix(_TORCHVISION) in _classifiers():
        made = _torchvision(name, weights)
    elif name.startswith(_TIMM):
        made = _timm(name, weights)
    elif name.startswith(_HF):
        made = _hugging_face(name, weights)
    else:
        return _own_factory(name, weights, ways)
    if ways is None:
        return made
    return PretrainedNetwork(made.model, made.preprocessing, made.words + _new_head(made.model, name, ways))


def _own_factory(name: str, weights: str | None, ways: int | None) -> PretrainedNetwork:
    model = call_factory(name, ways)
    given = getattr(model, "preprocessing", None)
    if isinstance(given, Mapping):
        given = Preprocessing.from_dict(given)
    if given is not None and not isinstance(given, Preprocessing):
        raise ArgumentError(
            f"model: '{name}' has an attribute preprocessing, a {type(given).__name__}; expected a "
            "metawrap.data.Preprocessing or its to_dict()."
        )
    vars(model).pop("preprocessing", None)  # An adapted copy of the network shall not need metawrap.
    if weights is None:
        return PretrainedNetwork(model, given, "" if given is None else f"{name} with a preprocessing of its own")
    if weights == DEFAULT:
        raise ArgumentError(f"weights: 'DEFAULT' is unknown for '{name}'. Name a file, or load them in the factory.")
    return PretrainedNetwork(model, given, f"{name} with the weights of '{weights}'{load_file(model, weights, name)}")


def _random(name: str) -> str:
    return f"{name} with random weights: --weights DEFAULT, or a file, loads trained ones"


def _classifiers() -> list[str]:
    return models.list_models(module=models)  # type: ignore[no-any-return]


def _torchvision(name: str, weights: str | None) -> PretrainedNetwork:
    short = name.removeprefix(_TORCHVISION)
    builder, known = getattr(models, short), models.get_model_weights(short)
    if weights is None:
        return PretrainedNetwork(_built(name, builder), None, _random(name))
    if weights == DEFAULT or weights in known.__members__:
        entry = known[weights] if weights in known.__members__ else known.DEFAULT
        model = _fetched(name, weights, lambda: builder(weights=entry))
        return PretrainedNetwork(model, _of_torchvision(name, entry), f"{name} with torchvision's weights {entry.name}")
    # Files keep the names under which torchvision publishes them; of another file, the newest entry is assumed.
    entry = next((each for each in known if Path(each.url).name == Path(weights).name), known.DEFAULT)
    # These two were published with weights that normalise by themselves, and with heads for their training alone.
    auxiliary = {"transform_input": True, "aux_logits": True, "init_weights": False}
    model = _built(name, builder, **(auxiliary if short in ("googlenet", "inception_v3") else {}))
    words = load_file(model, weights, name)
    for part in ("aux1", "aux2", "AuxLogits"):
        if hasattr(model, part):
            setattr(model, part, None)
            model.aux_logits = False  # type: ignore[assignment]
    words = f"{name} with the weights of '{weights}' and the preprocessing of torchvision's {entry.name}{words}"
    return PretrainedNetwork(model, _of_torchvision(name, entry), words)


def _of_torchvision(name: str, entry: Any) -> Preprocessing:
    way = entry.transforms()
    if not isinstance(way, ImageClassification) or len(way.crop_size) != 1:
        raise ArgumentError(f"model: '{name}' has the transforms {type(way).__name__} of no image classifier. {_OWN}")
    size, resized = way.crop_size[0], way.resize_size[0]
    return _cropped(name, (size, size), resized, way.interpolation.value, way.mean, way.std)


def _cropped(name: str, size: Any, resized: int, interpolation: str, mean: Any, deviation: Any) -> Preprocessing:
    """The preprocessing that resizes the short side to `resized` pixels and cuts out the centre."""
    if min(size) > resized or interpolation.upper() not in Image.Resampling.__members__:
        raise ArgumentError(f"model: '{name}' cuts {size} out of {resized} pixels by {interpolation}. {_OWN}")
    how: Any = {"interpolation": interpolation.lower(), "channels": len(mean), "resize": "crop"}
    return Preprocessing(
        size=tuple(size), crop_fraction=min(size) / resized, mean=tuple(mean), deviation=tuple(deviation), **how
    )


def _timm(name: str, weights: str | None) -> PretrainedNetwork:
    timm, short = package("timm", name), name.removeprefix(_TIMM)
    if not timm.is_model(short):
        raise ArgumentError(f"model: timm has no network '{short}'. timm.list_models() lists them.")
    if weights is None:
        return PretrainedNetwork(_built(name, timm.create_model, short), None, _random(name))
    if weights == DEFAULT:
        model = _fetched(name, weights, lambda: timm.create_model(short, pretrained=True))
        words = f"{name} with timm's weights"
    else:
        model = _built(name, timm.create_model, short)
        words = f"{name} with the weights of '{weights}'{load_file(model, weights, name)}"
    return PretrainedNetwork(model, _of_timm(name, importlib.import_module("timm.data"), model), words)


def _of_timm(name: str, data: Any, model: nn.Module) -> Preprocessing:
    found = data.resolve_model_data_config(model)
    size, mode = found["input_size"][1:], found["crop_mode"]
    resized = [math.floor(side / found["crop_pct"]) for side in size]
    fractions = [side / whole for side, whole in zip(size, resized, strict=True)]
    if mode not in ("center", "squash") or (mode == "center" and len(set(size)) > 1) or len(set(fractions)) > 1:
        raise ArgumentError(f"model: '{name}' wants timm's crop mode '{mode}' to {size}. {_OWN}")
    way = _cropped(name, size, resized[0], found["interpolation"], found["mean"], found["std"])
    return way if mode == "center" else Preprocessing.from_dict(way.to_dict() | {"resize": "squeeze"})


def _hugging_face(name: str, weights: str | None) -> PretrainedNetwork:
    transformers, place = package("transformers", name), name.removeprefix(_HF)
    config = _fetched(name, None, lambda: transformers.AutoConfig.from_pretrained(place, trust_remote_code=False))
    pictures = type(config) in transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    kind = transformers.AutoModelForImageClassification if pictures else transformers.AutoModel
    loading: dict[str, Any] = {"output_loading_info": True}
    if weights == DEFAULT:
        model, info = _fetched(name, weights, lambda: kind.from_pretrained(place, trust_remote_code=False, **loading))
        words = f"{name} with its weights{_of_loading(name, weights, model, info)}"
    else:
        model, words = _built(name, kind.from_config, config, trust_remote_code=False), _random(name)
    if weights not in (None, DEFAULT):
        # transformers knows the names that weights had in its earlier versions.
        loading |= {"config": config, "state_dict": read_file(Path(weights))}
        model, info = _fetched(name, weights, lambda: type(model).from_pretrained(None, **loading))
        words = f"{name} with the weights of '{weights}'{_of_loading(name, weights, model, info)}"
    way = None
    if pictures and weights is not None:
        try:
            processor = transformers.AutoImageProcessor.from_pretrained(place, trust_remote_code=False)
        except Exception:  # A folder of a model alone has none; each version raises another error.
            words += "; it has no preprocessor_config.json, so pictures are prepared as the data set's are"
        else:
            way = of_image_processor(name, processor.to_dict())
    return PretrainedNetwork(model.train(), way, words)


def _of_loading(name: str, weights: str, model: nn.Module, info: Mapping[str, Any]) -> str:
    """The parts that a folder has no weights for, in words; ArgumentError if they are more than head and pooler."""
    missing = sorted(info["missing_keys"])
    wrong = [key for key in missing if not any(part in key for part in ("classifier", "head", "pooler"))]
    if wrong or len(missing) == len(model.state_dict()):
        unexpected = sorted(info["unexpected_keys"])[:1]
        raise mismatch(weights, name, (wrong or missing)[:1], unexpected)
    return f"; '{missing[0]}'{f' and {len(missing) - 1} more' * (len(missing) > 1)} random" if missing else ""


def of_image_processor(name: str, found: Mapping[str, Any]) -> Preprocessing:
    """The preprocessing that the values of a Hugging Face image processor describe.

    Raises:
        ArgumentError: it does something that `Preprocessing` does not, such as padding.
    """
    size: dict[str, Any] = dict(found.get("size") or {})
    cut: dict[str, Any] = dict(found.get("crop_size") or {})
    size = {key: value for key, value in size.items() if value is not None}
    on = {key for key, value in found.items() if key.startswith("do_") and value}
    strange = sorted(on - _SWITCHES) + ["rescale_offset"] * bool(found.get("rescale_offset"))
    short, sides = size.get("shortest_edge"), (size.get("height"), size.get("width"))
    crops = "do_center_crop" in on
    target: tuple[Any, Any] = (cut.get("height"), cut.get("width")) if crops else sides
    resize, fraction = "squeeze", 1.0
    if found.get("crop_pct") and short:  # ConvNeXT: below 384 pixels a crop, from there on none.
        target, whole = (short, short), int(short / found["crop_pct"])
        resize, fraction = ("crop", short / whole) if short < 384 else ("squeeze", 1.0)
    elif short and target[0]:
        resize, fraction = "crop", target[0] / short
    elif crops and all(sides) and all(target):
        fraction = target[0] / sides[0]
        strange += ["crop_size"] * (fraction != target[1] / sides[1])
    if strange or "do_resize" not in on or not all(target) or fraction > 1 or (short and len(set(target)) > 1):
        what = strange or [f"size={size}", f"crop_size={cut}"]
        raise ArgumentError(f"model: '{name}' prepares pictures in a way that is not known ({what[0]}). {_OWN}")
    scale = 255 * found.get("rescale_factor", 1 / 255) if "do_rescale" in on else 255.0
    scale = 1.0 if math.isclose(scale, 1.0) else scale
    mean, deviation = (found["image_mean"], found["image_std"]) if "do_normalize" in on else ((0.0,) * 3, (1.0,) * 3)
    return Preprocessing.from_dict({
        "size": [int(side) for side in target if side],
        "resize": resize,
        "crop_fraction": fraction,
        "interpolation": Image.Resampling(found.get("resample", Image.Resampling.BILINEAR)).name.lower(),
        "mean": [float(each) / scale for each in mean],
        "deviation": [float(each) / scale for each in deviation],
        "channels": len(mean),
        "order": "BGR" if "do_flip_channel_order" in on else "RGB",
    })  # fmt: skip


def _new_head(model: nn.Module, name: str, ways: int) -> str:
    """Replaces the head of a network that has another number of classes; returns what there is to say."""
    if name.startswith(_HF) and not type(model).__name__.endswith("ForImageClassification"):
        raise ArgumentError(
            f"ways: '{name}' is a bare {type(model).__name__} without a head of classes. Use a method on embeddings, "
            "such as r2d2, or a factory of your own with a head."
        )
    path, head = head_of(model)
    before = head.out_features if isinstance(head, nn.Linear) else head.out_channels
    if before == ways:
        return ""
    put(model, path, with_outputs(head, ways))
    return f"; its head of {before} classes is replaced by a new one of {ways}"


def _built(name: str, function: Any, *given: Any, **options: Any) -> nn.Module:
    try:
        return function(*given, **options)  # type: ignore[no-any-return]
    except Exception as error:  # Builders raise errors of many kinds.
        raise ArgumentError(
            f"model: '{name}' cannot be built: {in_one_line(error)[:300]}. Correct the name."
        ) from error


def _fetched(name: str, weights: str | None, function: Any) -> Any:
    try:
        return function()
    except Exception as error:  # Of the network, the hub, the disk, or the file.
        what = f"weights: '{weights}' of '{name}'" if weights else f"model: '{name}'"
        fix = "Check the name and the connection, or pass a file or folder that is here."
        raise ArgumentError(f"{what} cannot be loaded: {in_one_line(error)[:300]}. {fix}") from error
