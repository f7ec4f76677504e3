"""Every classifier of torchvision with fewer than 30 million parameters, its segmentation networks, and small ViTs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
import torchvision
from entry import Entry
from models import class_tasks
from steady import steady
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.segmentation import FCN, DeepLabV3
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from torchvision.models.segmentation.fcn import FCNHead

LIMIT = 30_000_000
# These take more than 4 GB, two of them 18.
LARGE = ("convnext_tiny", "deeplabv3_resnet50", "densenet161", "fcn_resnet50", "inception_v3", "swin_t", "swin_v2_t")
WAYS = 3
nets = torchvision.models


def builders_below_limit() -> set[str]:
    """What torchvision offers, by its own parameter counts; a builder without one must be in the zoo as well."""
    names = nets.list_models(module=nets)
    counts = {name: [w.meta["num_params"] for w in nets.get_model_weights(name)] for name in names}
    return {name for name, count in counts.items() if min(count, default=0) < LIMIT}


def _with_auxiliaries(weight: float) -> Callable[[Any, Tensor], Tensor]:
    def loss(output: Any, y: Tensor) -> Tensor:
        logits, *auxiliary = output
        return F.cross_entropy(logits, y) + weight * sum(F.cross_entropy(other, y) for other in auxiliary)

    return loss


def _pixels(output: dict[str, Tensor], y: Tensor) -> Tensor:
    auxiliary = 0.5 * F.cross_entropy(output["aux"], y) if "aux" in output else 0.0
    return F.cross_entropy(output["out"], y) + auxiliary


def _made(build: Callable[..., nn.Module], eps: float = 0.1, **options: Any) -> nn.Module:
    return steady(build(**options), eps)


def _tasks(size: int, ways: int = WAYS, images: int = 2) -> list[tuple[Tensor, ...]]:
    return list(zip(*class_tasks((3, size, size), tasks=1, ways=ways, shots=images, targets=images), strict=True))


def _classifier(
    name: str,
    size: int = 32,
    *,
    build: Callable[..., nn.Module] | None = None,
    ways: int = WAYS,
    images: int = 2,
    loss_fn: Callable[[Any, Tensor], Tensor] = F.cross_entropy,
    quick: bool = False,
    note: str = "",
    **options: Any,
) -> Entry:
    return Entry(
        name,
        "torchvision classifiers",
        partial(_made, build or getattr(nets, name), num_classes=WAYS, **options),
        partial(_tasks, size, ways, images),
        loss_fn=loss_fn,
        inner_lr=0.01,
        quick=quick,
        note=note,
    )


def _live_squeezenet(build: Callable[..., nn.Module], **options: Any) -> nn.Module:
    model = build(**options)
    nn.init.ones_(model.classifier[1].bias)  # The ReLU that follows would shut out all images.
    return model


def _segmentation_tasks(size: int) -> list[tuple[Tensor, ...]]:
    ((support_x, _, target_x, _),) = _tasks(size)
    # The label of a pixel is that of its colour: something to learn.
    return [(support_x, support_x.argmax(1), target_x, target_x.argmax(1))]


def _segmenter(
    name: str, build: Callable[..., nn.Module], *, size: int = 32, quick: bool = False, **more: Any
) -> Entry:
    return Entry(
        name,
        "torchvision segmentation",
        partial(_made, build, **more),
        partial(_segmentation_tasks, size),
        loss_fn=_pixels,
        inner_lr=0.01,
        quick=quick,
    )


def _fcn_on_resnet18() -> nn.Module:
    backbone = IntermediateLayerGetter(nets.resnet18(), {"layer4": "out", "layer3": "aux"})
    return FCN(backbone, FCNHead(512, WAYS), FCNHead(256, WAYS))


def _deeplab_on_mobilenet_v2() -> nn.Module:
    backbone = IntermediateLayerGetter(nets.mobilenet_v2().features, {"13": "out"})
    return DeepLabV3(backbone, DeepLabHead(96, WAYS))


_TINY = {"num_layers": 2, "num_heads": 2, "hidden_dim": 8, "mlp_dim": 16}
_BARE = {"weights_backbone": None, "num_classes": WAYS}
_ROUGH = {"eps": 0.5}  # At 0.1 rounding still grows to 1e-9.
_segmentation = nets.segmentation

TORCHVISION = [
    _classifier("convnext_tiny"),
    *[_classifier(f"densenet{depth}") for depth in (121, 161, 169, 201)],
    *[_classifier(f"efficientnet_b{scale}", images=1) for scale in range(5)],
    _classifier("efficientnet_v2_s", images=1),
    _classifier("googlenet", loss_fn=_with_auxiliaries(0.3), init_weights=False, note="two auxiliary heads"),
    _classifier(
        "inception_v3",
        299,  # The auxiliary head takes nothing smaller.
        ways=2,
        images=1,
        loss_fn=_with_auxiliaries(0.4),
        init_weights=False,
        **_ROUGH,
        note="an auxiliary head; 299 x 299",
    ),
    *[_classifier(f"mnasnet{width}", **_ROUGH) for width in ("0_5", "0_75", "1_0", "1_3")],
    _classifier("mobilenet_v2"),
    _classifier("mobilenet_v3_large"),
    _classifier("mobilenet_v3_small", quick=True),
    *[_classifier(f"regnet_{kind}_{size}", **_ROUGH) for kind in "xy" for size in ("400mf", "800mf", "1_6gf", "3_2gf")],
    *[_classifier(f"resnet{depth}", **_ROUGH) for depth in (18, 34, 50)],
    _classifier("resnext50_32x4d", **_ROUGH),
    _classifier("shufflenet_v2_x0_5", quick=True),
    *[_classifier(f"shufflenet_v2_x{width}") for width in ("1_0", "1_5", "2_0")],
    _classifier("squeezenet1_0", build=partial(_live_squeezenet, nets.squeezenet1_0)),
    _classifier("squeezenet1_1", build=partial(_live_squeezenet, nets.squeezenet1_1), quick=True),
    _classifier("swin_t"),
    # 256: on anything smaller it pads its windows with zeros, whose norm has no second derivative in torch.
    _classifier("swin_v2_t", 256, ways=1, images=1, note="256 x 256: no second derivative where it pads windows"),
    _classifier("VisionTransformer, 2 layers", 16, build=nets.VisionTransformer, image_size=16, patch_size=8, **_TINY),
    _segmenter("lraspp_mobilenet_v3_large", _segmentation.lraspp_mobilenet_v3_large, **_BARE),
    _segmenter("deeplabv3_mobilenet_v3_large", _segmentation.deeplabv3_mobilenet_v3_large, **_BARE, aux_loss=True),
    _segmenter("fcn_resnet50", _segmentation.fcn_resnet50, **_BARE, **_ROUGH, aux_loss=True),
    _segmenter("deeplabv3_resnet50", _segmentation.deeplabv3_resnet50, **_BARE, **_ROUGH, aux_loss=True),
    _segmenter("FCN heads on resnet18", _fcn_on_resnet18),
    _segmenter("DeepLab head on mobilenet_v2", _deeplab_on_mobilenet_v2),
]
