"""Layers and functions of torch, one at a time; those without a second derivative are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from entry import Entry
from pieces import IMAGES, SEQUENCES, VECTORS, Around, AroundImage, AroundSequence, Calls, Whole, words
from torch import Tensor, nn
from torchvision import ops


def unpooled() -> nn.Module:
    parts = {"pool": nn.MaxPool2d(2, return_indices=True), "unpool": nn.MaxUnpool2d(2)}
    return Whole(lambda m, x: m.unpool(*m.pool(x)), **parts)


def bag(mode: str = "mean") -> nn.Module:
    parts = {"bag": nn.EmbeddingBag(9, 4, mode=mode), "last": nn.Linear(4, 3)}
    return Whole(lambda m, x: m.last(torch.tanh(m.bag(x))), **parts)


def _sampled(model: Any, x: Tensor) -> Tensor:
    turn = model.where(x.mean((2, 3))).view(-1, 2, 3) * 0.1 + torch.eye(2, 3, dtype=x.dtype)
    grid = F.affine_grid(turn, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode=model.mode, align_corners=False)


def transformed(mode: str = "bilinear") -> nn.Module:
    """A spatial transformer: where the image is sampled is learned."""
    return Whole(_sampled, where=nn.Linear(4, 6), mode=mode)


def adaptive() -> nn.Module:
    """Its loss is part of the layer, so the targets go in as an input."""
    parts = {"first": nn.Linear(4, 6), "loss": nn.AdaptiveLogSoftmaxWithLoss(6, 3, [1, 2], div_value=1.5)}
    return Whole(lambda m, x, y: m.loss(torch.tanh(m.first(x)), y), **parts)


def _with_labels() -> list[Any]:
    return [((sx, sy), sy, (tx, ty), ty) for sx, sy, tx, ty in VECTORS()]


def deformable() -> nn.Module:
    parts = {"offset": nn.Conv2d(4, 18, 3, padding=1), "conv": ops.DeformConv2d(4, 4, 3, padding=1)}
    return Whole(lambda m, x: m.conv(x, m.offset(x)), **parts)


def _regions(x: Tensor) -> Tensor:
    boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0]], dtype=x.dtype)
    return ops.roi_align(x, [boxes] * len(x), 3)


def _square(x: Tensor) -> Tensor:
    """A batch of well-conditioned symmetric 3x3 matrices."""
    a = torch.tanh(x).reshape(len(x), 2, 3)
    spread = torch.diag(torch.tensor([3.0, 5.0, 8.0], dtype=x.dtype))
    return a.mT @ a + spread


def _eigenvectors(x: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(_square(x))
    return torch.cat([values, vectors.square().flatten(1)[:, :3]], 1)


def _singular(x: Tensor) -> Tensor:
    u, s, _ = torch.linalg.svd(_square(x), full_matrices=False)
    return torch.cat([s, u.square().flatten(1)[:, :3]], 1)


def _solved(x: Tensor) -> Tensor:
    return torch.cat([torch.linalg.solve(_square(x), x.reshape(-1, 3, 2)).flatten(1)], 1)


def _cholesky(x: Tensor) -> Tensor:
    return torch.linalg.cholesky(_square(x)).flatten(1)[:, [0, 3, 4, 6, 7, 8]]


def _scaled(mode: str) -> Callable[[Tensor], Tensor]:
    options = {} if mode in ("nearest", "area") else {"align_corners": False}
    return partial(F.interpolate, scale_factor=1.5, mode=mode, **options)


# Functions of (examples, 6) to six features again.
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "cumsum, cumprod": lambda x: x.cumsum(1) + torch.sigmoid(x).cumprod(1),
    "logcumsumexp, cummax": lambda x: x.logcumsumexp(1) + x.cummax(1).values,
    "sort": lambda x: x.sort(1).values,
    "topk": lambda x: x.topk(6, 1).values * torch.arange(6),
    "kthvalue, median, mode": lambda x: x + x.kthvalue(2, 1, True).values * x.median(1, True).values,
    "max, min, amax, logsumexp": lambda x: x * x.max(1, True).values + x.amin(1, True) + x.logsumexp(1, True),
    "norms": lambda x: (
        x / x.norm(dim=1, keepdim=True) + x.norm(p=1, dim=1, keepdim=True) + torch.linalg.vector_norm(x, 3)
    ),
    "var, std, prod": lambda x: x * x.var(1, keepdim=True) + x.std(0) + x.prod(1, True),
    "cdist": lambda x: torch.cdist(x, x.roll(1, 0))[:, :3].repeat(1, 2) + 0.1 * x,
    "pairwise distance": lambda x: F.pairwise_distance(x, x.flip(1), keepdim=True) * x,
    "gather, scatter, index_add": lambda x: x.gather(1, x.argsort(1)).scatter_add(1, x.argsort(1).flip(1), x),
    "where, clamp, masked_fill": lambda x: torch.where(x > 0, x, x.exp()).clamp(max=1).masked_fill(x < -1, 0.3),
    "einsum": lambda x: torch.einsum("bi,bj->bij", x, torch.tanh(x)).mean(2),
    "fft": lambda x: torch.fft.fft(x).abs(),
    "stft": lambda x: (
        torch.stft(x.repeat(1, 4), 10, 4, window=torch.ones(10).double(), return_complex=True).abs().flatten(1)[:, :6]
    ),
    "eigh": _eigenvectors,
    "svd": _singular,
    "solve": _solved,
    "cholesky": _cholesky,
    "inverse, determinant": lambda x: (
        x * torch.linalg.slogdet(_square(x))[1][:, None] + torch.linalg.inv(_square(x)).flatten(1)[:, :6]
    ),
    "qr": lambda x: torch.linalg.qr(_square(x)).R.flatten(1)[:, [0, 1, 2, 4, 5, 8]],
    "matrix_exp": lambda x: torch.matrix_exp(_square(x) / 8).flatten(1)[:, :6],
    "least squares, pinv": lambda x: (torch.linalg.pinv(_square(x)) @ x.reshape(-1, 3, 2)).flatten(1),
    "erf, lgamma, digamma, i0": lambda x: (
        torch.erf(x) + torch.lgamma(x.abs() + 1) + torch.digamma(x.abs() + 1) + torch.special.i0(x)
    ),
    "sinc, atan2, logit, xlogy": lambda x: (
        torch.sinc(x) + torch.atan2(x, x.flip(1) + 2) + torch.special.xlogy(x, x.abs() + 1)
    ),
    "unfold, fold": lambda x: F.fold(F.unfold(x.view(-1, 1, 2, 3), 2, padding=1), (2, 3), 2, padding=1).flatten(1),
    "cosine similarity": lambda x: F.cosine_similarity(x, x.roll(1, 0), eps=1e-3)[:, None] * x,
    "normalize": lambda x: F.normalize(x, p=3),
    "complex numbers": lambda x: torch.view_as_real(torch.complex(x[:, :3], x[:, 3:]).exp().tanh()).flatten(1),
    "roll, flip, tril, diagonal": lambda x: (
        x.roll(2, 1) * x.flip(1) + torch.tril(x[:, None] * x[:, :, None]).diagonal(dim1=1, dim2=2)
    ),
    "trapezoid, diff, lerp": lambda x: (
        torch.lerp(x, x.flip(1), 0.3) + torch.trapezoid(x, dim=1)[:, None] + F.pad(x.diff(dim=1), (0, 1))
    ),
    "bucketize, searchsorted": lambda x: x * torch.bucketize(x.detach(), torch.tensor([-1.0, 0.0, 1.0]).double()),
    "grouped by segments": lambda x: torch.zeros_like(x).scatter_reduce(0, torch.zeros_like(x).long(), x, "amax") + x,
}

ACTIVATIONS = [
    nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU, nn.LogSigmoid,
    nn.Mish, nn.PReLU, nn.ReLU, nn.ReLU6, nn.RReLU, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softshrink,
    nn.Softsign, nn.Tanh, nn.Tanhshrink,
]  # fmt: skip

# Layers on (examples, 4, 6, 6).
IMAGE_LAYERS: dict[str, Callable[[], Callable[..., Any]]] = {
    "AdaptiveAvgPool2d": lambda: nn.AdaptiveAvgPool2d((2, 3)),
    "AdaptiveMaxPool2d": lambda: nn.AdaptiveMaxPool2d((2, 3)),
    "AvgPool2d": lambda: nn.AvgPool2d(2, count_include_pad=False),
    "MaxPool2d, dilated": lambda: nn.MaxPool2d(2, stride=1, dilation=2),
    "LPPool2d": lambda: nn.LPPool2d(2, 2),
    "FractionalMaxPool2d": lambda: nn.FractionalMaxPool2d(2, output_size=3),
    "MaxUnpool2d": unpooled,
    "PixelShuffle": lambda: nn.PixelShuffle(2),
    "PixelUnshuffle": lambda: nn.PixelUnshuffle(2),
    "ChannelShuffle": lambda: nn.ChannelShuffle(2),
    "Softmax2d": lambda: nn.Softmax2d(),
    "GLU": lambda: nn.GLU(1),
    "Dropout2d": lambda: nn.Dropout2d(0.4),
    "FeatureAlphaDropout": lambda: nn.FeatureAlphaDropout(0.4),
    "ConvTranspose2d": lambda: nn.ConvTranspose2d(4, 3, 3, stride=2, output_padding=1),
    "convolution, depthwise": lambda: nn.Conv2d(4, 8, 3, groups=4),
    "convolution, dilated, strided": lambda: nn.Conv2d(4, 3, 3, dilation=2, stride=2, padding=1),
    "convolution, circular padding": lambda: nn.Conv2d(4, 3, 3, padding=1, padding_mode="circular"),
    "convolution, reflected padding": lambda: nn.Conv2d(4, 3, 3, padding="same", padding_mode="reflect"),
    "convolution, channels last": lambda: nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last),
    "padding": lambda: nn.Sequential(nn.ReplicationPad2d(1), nn.ZeroPad2d(1), nn.ReflectionPad2d(2)),
    "Upsample, bilinear": lambda: nn.Upsample(scale_factor=2, mode="bilinear"),
    **{f"interpolate, {mode}": partial(_scaled, mode) for mode in ("nearest", "area", "bicubic", "bilinear")},
    "interpolate, antialiased": lambda: lambda x: F.interpolate(x, size=4, mode="bilinear", antialias=True),
    "grid_sample": transformed,
    "squeeze and excitation": lambda: ops.SqueezeExcitation(4, 2),
    "stochastic depth of torchvision": lambda: ops.StochasticDepth(0.4, "row"),
}

LOSSES: dict[str, Callable[[Any, Any], Tensor]] = {
    "huber": lambda p, y: F.huber_loss(p, F.one_hot(y, 3).double()),
    "smooth l1": lambda p, y: F.smooth_l1_loss(p, F.one_hot(y, 3).double()),
    "mse": lambda p, y: F.mse_loss(p, F.one_hot(y, 3).double()),
    "kl": lambda p, y: F.kl_div(p.log_softmax(1), F.one_hot(y, 3).double() * 0.7 + 0.1, reduction="batchmean"),
    "binary cross-entropy": lambda p, y: F.binary_cross_entropy(p.sigmoid(), F.one_hot(y, 3).double()),
    "binary cross-entropy of logits": lambda p, y: F.binary_cross_entropy_with_logits(p, F.one_hot(y, 3).double()),
    "nll of log_softmax": lambda p, y: F.nll_loss(p.log_softmax(1), y),
    "label smoothing and weights": lambda p, y: F.cross_entropy(
        p, y, torch.tensor([1.0, 2.0, 0.5]).double(), label_smoothing=0.1
    ),
    "gaussian nll": lambda p, y: F.gaussian_nll_loss(p[:, 0], y.double(), p[:, 1].exp()),
    "poisson nll": lambda p, y: F.poisson_nll_loss(p[:, 0], y.double()),
    "soft margin": lambda p, y: F.soft_margin_loss(p, 2.0 * F.one_hot(y, 3) - 1),
    "multi-label soft margin": lambda p, y: F.multilabel_soft_margin_loss(p, F.one_hot(y, 3).double()),
    "triplet": lambda p, y: F.triplet_margin_loss(p, p.roll(1, 0), p.roll(2, 0)),
    "cosine embedding": lambda p, y: F.cosine_embedding_loss(p, p.roll(1, 0), 2 * (y > 0).long() - 1),
    "of a distribution": lambda p, y: -torch.distributions.Categorical(logits=p).log_prob(y).mean(),
}


def _ctc(prediction: Tensor, y: Tensor) -> Tensor:
    steps, examples = prediction.shape[1], len(y)
    lengths = torch.full((examples,), steps), torch.ones(examples, dtype=torch.long)
    return F.ctc_loss(prediction.log_softmax(2).transpose(0, 1), (y[:, None] + 1).clamp(max=2), *lengths)


_entry = partial(Entry, family="layers", tasks=VECTORS, quick=True)
_once = r"(?s){}.* cannot be differentiated twice.*{}.*(FOMAML|first_order_epochs=math\.inf)"

_NO_BAG = _once.format(r"'bag' \(EmbeddingBag\)", "_embedding_bag_backward")


def _around(layer: Callable[..., Any]) -> Callable[[], nn.Module]:
    return lambda: Around(layer)


PATTERNS = [
    *(_entry(name, make=_around(function)) for name, function in FUNCTIONS.items()),
    *(_entry(kind.__name__, make=partial(lambda kind: Around(kind()), kind)) for kind in ACTIVATIONS),
    *(
        _entry(name, make=partial(lambda layer: AroundImage(layer()), layer), tasks=IMAGES)
        for name, layer in IMAGE_LAYERS.items()
    ),
    *(_entry(f"loss: {name}", make=lambda: Around(nn.Identity()), loss_fn=loss) for name, loss in LOSSES.items()),
    _entry(
        "Bilinear", make=lambda: Around(Whole(lambda m, x: m.layer(x, x.roll(1, -1) * 0.5), layer=nn.Bilinear(6, 6, 6)))
    ),
    _entry("PReLU, one slope per channel", make=lambda: Around(nn.PReLU(6))),
    _entry(
        "Conv1d and pooling",
        make=lambda: AroundSequence(nn.Sequential(nn.Conv1d(5, 5, 2), nn.MaxPool1d(2, 1), nn.ConstantPad1d(1, 0.5))),
        tasks=SEQUENCES,
    ),
    _entry("adaptive softmax", make=adaptive, tasks=_with_labels, loss_fn=lambda out, y: out.loss),
    _entry("EmbeddingBag", make=bag, tasks=words(), refused=_NO_BAG),
    _entry("EmbeddingBag, largest", make=partial(bag, "max"), tasks=words(), refused=_NO_BAG),
    _entry("EmbeddingBag below the head", make=bag, tasks=words(), options={"adapt": "last.*"}),
    _entry("grid_sample, bicubic", make=lambda: AroundImage(transformed("bicubic")), tasks=IMAGES),
    _entry(
        "DeformConv2d",
        make=lambda: AroundImage(deformable()),
        tasks=IMAGES,
        refused=_once.format(r"'layer.conv' \(DeformConv2d\)", "deform_conv2d"),
    ),
    _entry(
        "roi_align",
        make=lambda: AroundImage(Calls(_regions)),
        tasks=IMAGES,
        refused=_once.format(r"'layer' \(Calls\)", "roi_align"),
    ),
    _entry(
        "loss: ctc",
        make=lambda: Whole(lambda m, x: m.last(torch.tanh(m.first(x))), first=nn.Linear(3, 4), last=nn.Linear(4, 3)),
        tasks=SEQUENCES,
        loss_fn=_ctc,
        refused=_once.format("The loss function", "_ctc_loss_backward"),
    ),
    _entry(
        "loss: multi margin",
        make=lambda: Around(nn.Identity()),
        loss_fn=F.multi_margin_loss,
        refused=_once.format("The loss function", "multi_margin_loss_backward"),
    ),
    _entry(
        "segment_reduce",
        make=lambda: Around(
            Calls(lambda x: torch.segment_reduce(x.flatten(), "max", lengths=torch.full((len(x) * 6,), 1)).view(-1, 6))
        ),
        refused=_once.format(r"'layer' \(Calls\)", "_segment_reduce_backward"),
    ),
]
