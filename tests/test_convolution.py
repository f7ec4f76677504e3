"""The convolution with its own second derivative: against torch's, and against finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from metawrap.engines import QuickConvolutions, quick
from metawrap.layers.convolution import convolution

NATIVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
# dimensions, in, out, kernel, stride, padding, dilation, groups
FORMS: list[Any] = [
    (2, 3, 4, 3, 1, 1, 1, 1),
    (2, 3, 4, (3, 2), (2, 1), (1, 0), (1, 2), 1),
    (2, 4, 6, 3, 2, 0, 1, 2),
    (2, 4, 4, 3, 1, 2, 2, 4),
    (2, 3, 5, 1, 3, 0, 1, 1),
    (1, 3, 4, 3, 2, 1, 1, 1),
    (3, 2, 3, 2, 1, 1, 1, 1),
]


def inputs(form: Any, bias: bool = True) -> list[Tensor]:
    dimensions, channels, out, kernel, *_, groups = form
    generator = torch.Generator().manual_seed(0)
    sides = (kernel,) * dimensions if isinstance(kernel, int) else kernel
    shapes = [(2, channels, *(7, 6, 5)[:dimensions]), (out, channels // groups, *sides), *([(out,)] if bias else [])]
    return [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


def derivatives(run: Any, tensors: list[Tensor], asked: list[int]) -> list[Tensor | None]:
    """The gradient with respect to the asked inputs, and its derivative along a direction with respect to all."""
    generator = torch.Generator().manual_seed(1)
    output = run(*tensors)
    upstream = torch.randn(output.shape, generator=generator, dtype=torch.float64).requires_grad_()
    first = torch.autograd.grad(output, [tensors[i] for i in asked], upstream, create_graph=True)
    along = sum((g * torch.randn(g.shape, generator=generator, dtype=torch.float64)).sum() for g in first)
    second = torch.autograd.grad(along, [*tensors, upstream], create_graph=True, allow_unused=True)
    return [output, *first, *second]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("asked", [[0], [1], [2], [0, 1], [1, 2], [0, 1, 2]], ids=str)
def test_both_derivatives_equal_torchs_own(form: Any, asked: list[int]) -> None:
    geometry = form[4:]
    native = derivatives(lambda x, w, b: NATIVE[form[0]](x, w, b, *geometry), inputs(form), asked)
    ours = derivatives(lambda x, w, b: convolution(x, w, b, *geometry), inputs(form), asked)
    for found, expected in zip(ours, native, strict=True):
        if found is None or expected is None:
            assert all(g is None or not g.any() for g in (found, expected))
        else:
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("form", FORMS[:2] + FORMS[5:], ids=str)
def test_both_derivatives_equal_finite_differences(form: Any) -> None:
    def run(*tensors: Tensor) -> Tensor:
        return convolution(*tensors, *form[4:])

    small = [tensor[..., :3].detach().requires_grad_() if i == 0 else tensor for i, tensor in enumerate(inputs(form))]
    assert gradcheck(run, small)
    assert gradgradcheck(run, small)


def test_the_third_derivative_equals_torchs_own() -> None:
    def third(run: Any) -> Tensor:
        x, w = inputs(FORMS[0], bias=False)
        first = torch.autograd.grad(run(x, w).pow(4).sum(), w, create_graph=True)[0]
        second = torch.autograd.grad(first.pow(2).sum(), w, create_graph=True)[0]
        return torch.autograd.grad(second.pow(2).sum(), x)[0]

    ours, native = (
        third(lambda x, w: convolution(x, w, None, 1, 1, 1, 1)),
        third(lambda x, w: F.conv2d(x, w, padding=1)),
    )
    torch.testing.assert_close(ours, native, rtol=1e-9, atol=0)


def test_the_mode_takes_every_way_of_calling() -> None:
    x, w, b = inputs(FORMS[0])
    with QuickConvolutions():
        taken = [
            F.conv2d(x, w, b, padding=1),
            F.conv2d(input=x, weight=w, bias=b, stride=1, padding=(1, 1)),
            torch.conv2d(x, w, b, 1, 1, 1, 1),
        ]
        layer = nn.Conv2d(3, 4, 3, padding=1).double()
        taken.append(layer(x))
    assert {out.grad_fn.name() for out in taken if out.grad_fn} == {"_ForwardBackward"}
    for out in taken[:3]:
        assert torch.equal(out, F.conv2d(x, w, b, padding=1))


@pytest.mark.parametrize(("side", "taken"), [(39, False), (41, True)])
def test_only_large_convolutions_are_taken(side: int, taken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # 2 * 5 images * side^2 places / 4 by the stride * 8 * 8 * 9 weights: 2.19e6 and 2.42e6.
    monkeypatch.setattr(quick, "LARGE", 2.3e6)
    x, w = torch.rand(5, 8, side, side), torch.rand(8, 8, 3, 3, requires_grad=True)
    with QuickConvolutions() as mode:
        out = F.conv2d(x, w, stride=2, padding=1)
    assert out.grad_fn is not None
    assert (out.grad_fn.name() == "_ForwardBackward") is mode.seen is taken


@pytest.mark.parametrize("case", ["same", "unbatched", "no grad", "autocast", "vmap", "frozen", "half"])
def test_the_mode_leaves_alone_what_it_does_not_know(case: str) -> None:
    x, w, b = inputs(FORMS[0])
    with QuickConvolutions():
        if case == "same":
            out = F.conv2d(x, w, b, padding="same")
        elif case == "unbatched":
            out = F.conv2d(x[0], w, b, padding=1)
        elif case == "no grad":
            with torch.no_grad():
                out = F.conv2d(x, w, b, padding=1)
        elif case == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                out = F.conv2d(x.float(), w.float(), b.float(), padding=1)
            assert out.dtype == torch.bfloat16
        elif case == "vmap":
            out = torch.func.vmap(lambda one: F.conv2d(one[None], w, b, padding=1)[0])(x)
        elif case == "half":
            out = F.conv2d(x.bfloat16(), w.bfloat16(), b.bfloat16(), padding=1)
        else:
            out = F.conv2d(x, w.detach(), b, padding=1)
    assert out.grad_fn is None or out.grad_fn.name() != "_ForwardBackward"
    torch.testing.assert_close(
        out.double().reshape(2, 4, 7, 6)[0] if out.ndim == 4 else out.double(),
        F.conv2d(x, w, b, padding=1)[0],
        rtol=5e-2,
        atol=5e-2,
    )
